# syntax=docker/dockerfile:1
# The image of every pod: gateway, coordinator, attention replicas and expert shards.
#
#   docker build -t shoal:0.1.0 .
#
# torch's Linux wheels bring the CUDA libraries, so a plain Python base serves GPUs too. The base must have Python 3.11
# or later as `python`, and apt. An image without CUDA: --build-arg PIP_EXTRA_INDEX_URL=<index of CPU wheels>.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS build
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
WORKDIR /src
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/shoal
# Dependencies first, from the metadata alone: a change of the code does not install torch again.
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN mkdir deploy cluster model_shards \
    && touch deploy/__init__.py cluster/__init__.py model_shards/__init__.py \
    && /opt/shoal/bin/pip install -c constraints.txt '.[kubernetes]' \
    && /opt/shoal/bin/pip uninstall -y shoal
COPY deploy deploy
COPY cluster cluster
COPY model_shards model_shards
RUN /opt/shoal/bin/pip install --no-deps .

FROM ${BASE_IMAGE}
# KubeRay's probes run bash and wget inside the container.
RUN apt-get update \
    && apt-get install -y --no-install-recommends bash wget \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 1000 shoal \
    && useradd --uid 1000 --gid 1000 --create-home shoal
COPY --from=build /opt/shoal /opt/shoal
ENV PATH=/opt/shoal/bin:$PATH PYTHONUNBUFFERED=1
# Numeric, so that Kubernetes can see that it is not root.
USER 1000:1000
WORKDIR /home/shoal
EXPOSE 8000 9000
CMD ["shoal", "serve"]
