"""On a Ray cluster that is there already: by `shoal serve --address`, and by the chart's serve config."""

import contextlib
import os
import socket
import subprocess
import sys
import time

import grpc
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deploy.gateway import inference_pb2 as pb
from deploy.gateway.inference_pb2_grpc import InferenceStub
from tests.helm.chart import RENDERS, parse
from tests.serving import running_service, serve_command

pytestmark = [pytest.mark.service, pytest.mark.timeout(300)]

ROLES = ("--set", "ray.attention_resource=shoal_attention", "--set", "ray.expert_resource=shoal_expert")


@pytest.fixture(scope="module")
def ray_address():
    command = [sys.executable, "-m", "tests.ray_cluster"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as cluster:
        try:
            word, address = cluster.stdout.readline().split()
            assert word == "address"
            yield address
        finally:
            cluster.stdin.close()
            cluster.wait(60.0)


def complete(address):
    request = pb.CompletionRequest(text="hello", max_tokens=8, temperature=0.0, ignore_eos=True)
    with grpc.insecure_channel(address) as channel:
        return [
            token for chunk in InferenceStub(channel).Completion(request, timeout=60.0) for token in chunk.token_ids
        ]


def test_shoal_serve_joins_a_cluster_and_leaves_it_as_it_was(ray_address):
    for _ in range(2):  # the second time finds nothing of the first
        with running_service("--address", ray_address, *ROLES) as service:
            assert len(complete(service.grpc)) == 8
            refused = subprocess.run(
                serve_command("--address", ray_address), capture_output=True, text=True, timeout=60.0, check=False
            )
            assert refused.returncode == 2
            assert "already runs a Shoal cell" in refused.stderr
            assert service.stop() == 0


def test_an_address_where_no_ray_is_is_named():
    ended = subprocess.run(
        serve_command("--address", "127.0.0.1:1"), capture_output=True, text=True, timeout=120.0, check=False
    )
    assert ended.returncode == 1
    assert "127.0.0.1:1" in ended.stderr
    assert "Traceback" not in ended.stderr


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def test_the_serve_config_of_the_chart_runs(ray_address, tmp_path):
    documents = parse((RENDERS / "cpu.yaml").read_text())
    settings = tmp_path / "shoal.yaml"
    settings.write_text(documents["ConfigMap/demo-config"]["data"]["shoal.yaml"])
    config = yaml.safe_load(documents["RayService/demo"]["spec"]["serveConfigV2"])
    # What one machine cannot have: the pods' file system, and a network of its own for each node.
    [application] = config["applications"]
    application["args"]["config"] = str(settings)
    config["proxy_location"] = "HeadOnly"
    config["http_options"] = {"host": "127.0.0.1", "port": free_port()}
    config["grpc_options"]["port"] = free_port()
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(config))
    serve = os.path.join(os.path.dirname(sys.executable), "serve")
    with subprocess.Popen([serve, "run", "--address", ray_address, str(file)], stdout=subprocess.DEVNULL) as runner:
        try:
            address = f"127.0.0.1:{config['grpc_options']['port']}"
            wait_until_serving(address, runner, 120.0)
            assert len(complete(address)) == 8
        finally:
            with contextlib.suppress(ProcessLookupError):
                runner.terminate()
            runner.wait(60.0)


def wait_until_serving(address, runner, timeout_s):
    deadline = time.monotonic() + timeout_s
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        while True:
            assert runner.poll() is None, "serve run ended"
            assert time.monotonic() < deadline, "not serving in time"
            with contextlib.suppress(grpc.RpcError):
                if stub.Check(health_pb2.HealthCheckRequest(), timeout=5.0).status == 1:
                    return
            time.sleep(0.5)
