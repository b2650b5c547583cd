"""`python -m tests.bare_ray`: as many Ray actors and Serve replicas as a cell of 1 + 2 has, that do nothing.

What they use while idle is Ray's own. Prints `ready`, and ends when its stdin does.
"""

import logging
import sys

import ray
from ray import serve
from ray.serve.config import HTTPOptions, gRPCOptions

from deploy.app.application import SERVICER_FUNCTIONS


class Idle:
    """Async, as the cell's actors are."""

    async def run(self):
        return None


def main():
    logging.getLogger("ray").setLevel(logging.ERROR)
    grpc_port, http_port = map(int, sys.argv[1:])
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    try:
        actors = [ray.remote(Idle).options(max_concurrency=16).remote() for _ in range(3)]
        ray.get([actor.run.remote() for actor in actors])
        serve.start(
            http_options=HTTPOptions(host="127.0.0.1", port=http_port),
            grpc_options=gRPCOptions(port=grpc_port, grpc_servicer_functions=list(SERVICER_FUNCTIONS)),
        )
        inner = serve.deployment(name="attention")(Idle).bind()
        serve.run(serve.deployment(name="gateway")(Gateway).bind(inner), name="bare")
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        sys.stdin.read()
        serve.shutdown()
    finally:
        ray.shutdown()


class Gateway:
    """Holds a handle, as the gateway does."""

    def __init__(self, inner):
        self._inner = inner

    async def __call__(self, _):
        return None


if __name__ == "__main__":
    main()
