"""How a service starts, refuses to start, survives a killed rank, and ends; nothing is left behind."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import psutil
import pytest
from safetensors.torch import load_file, save_file

from deploy.gateway import inference_pb2 as pb
from deploy.gateway.inference_pb2_grpc import InferenceStub
from deploy.launch.ray_runtime import SERVE_ENVIRONMENT
from deploy.models import default_model_directory
from model_shards.cut import cut_checkpoint
from tests.serving import running_service, serve_command

pytestmark = [pytest.mark.service, pytest.mark.timeout(300)]

START_REFUSED_S = 60.0
RAY_AGENTS = ("ray::DashboardA", "ray::RuntimeEnv")  # the kernel cuts names to 15 bytes


def complete(address, count=8, timeout=60.0, on_chunk=lambda: None):
    request = pb.CompletionRequest(
        token_ids=pb.TokenIds(ids=[5, 6, 7]), max_tokens=count, temperature=0.0, ignore_eos=True
    )
    tokens = []
    with grpc.insecure_channel(address) as channel:
        for chunk in InferenceStub(channel).Completion(request, timeout=timeout):
            tokens.extend(chunk.token_ids)
            on_chunk()
    return tokens


def wait_gone(processes, timeout=20.0):
    _, alive = psutil.wait_procs(processes, timeout)
    return [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def ranks_of(service, name):
    return [process for process in service.descendants() if name in " ".join(process.cmdline())]


# --- refused ------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of the package's checkpoint to spoil."""
    directory = tmp_path / "model"
    shutil.copytree(default_model_directory(), directory)
    return directory


def refused(*arguments):
    """What `shoal serve` says when it ends before it is ready; its exit status must be the user's."""
    ended = subprocess.run(
        serve_command(*arguments), capture_output=True, text=True, timeout=START_REFUSED_S, check=False
    )
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stdout == ""
    return ended.stderr


def test_a_truncated_file_is_named(checkpoint):
    weights = checkpoint / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1000)
    said = refused("--model", str(checkpoint))
    assert str(weights) in said
    assert "truncated" in said


def test_a_missing_file_is_named(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    assert "model.safetensors" in refused("--model", str(checkpoint))


def test_a_wrong_shape_is_named_with_both_shapes(checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    weights["model.layers.2.mlp.experts.3.up_proj.weight"] = weights["model.layers.2.mlp.experts.3.up_proj.weight"][:60]
    save_file(weights, checkpoint / "model.safetensors")
    said = refused("--model", str(checkpoint))
    for word in ("model.layers.2.mlp.experts.3.up_proj.weight", "[128, 256]", "[60, 256]", "model.safetensors"):
        assert word in said


def test_an_unknown_architecture_is_named(checkpoint):
    config = checkpoint / "config.json"
    config.write_text(config.read_text().replace("DeepseekV2ForCausalLM", "LlamaForCausalLM"))
    said = refused("--model", str(checkpoint))
    assert "LlamaForCausalLM" in said
    assert "DeepseekV2ForCausalLM" in said


@pytest.mark.parametrize("name", ["expert-00011.safetensors", "attention-00000.safetensors"])
def test_a_flipped_bit_in_a_cut_checkpoint_ends_the_start_with_its_file(tmp_path, name):
    cut_checkpoint(default_model_directory(), tmp_path / "cut")
    file = tmp_path / "cut" / name
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    said = refused("--model", str(tmp_path / "cut"))
    assert f"{file} is damaged: tensor " in said
    assert "run the same `shoal shard` again" in said


def test_a_port_in_use_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refused("--http-port", str(port))
    assert f"server.http_port {port}" in said
    assert "--http-port" in said


def test_more_ranks_than_gpus_are_refused_with_the_numbers():
    said = refused("--device", "cuda", "--attention-replicas", "300", "--expert-shards", "16")
    assert "316 ranks" in said
    assert "this machine has" in said


def test_too_little_memory_is_refused_with_the_numbers():
    said = refused("--set", "engine.kv_cache_memory_gb=1000000.0")
    assert "GiB" in said
    assert "free" in said


# --- started and stopped ------------------------------------------------------------------------------------------


# The first of a pool, and the second: HAProxy on another address than the one where it reaches the gateway, and Serve's
# proxy in Python.
KINDS = (("--host", "127.0.0.2"), ("--set", "server.proxy=python"))


class Pool:
    """Running services: a test takes one that an earlier one left running, and starts one only where there is none."""

    def __init__(self, stack):
        self._stack = stack
        self._running = []

    def take(self, count):
        """The first `count`; those that are missing start at the same time."""
        self._running = [service for service in self._running if service.process.poll() is None]
        missing = KINDS[len(self._running) : count]
        if missing:
            made = [running_service(*arguments) for arguments in missing]
            with ThreadPoolExecutor(len(missing)) as threads:
                self._running += threads.map(self._stack.enter_context, made)
        return self._running[:count]


@pytest.fixture(scope="module")
def pool():
    """Started as in the chart's pods, whose environment has what `shoal serve` sets for Serve already."""
    with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        for name, value in SERVE_ENVIRONMENT.items():
            patch.setenv(name, value)
        yield Pool(stack)


@contextlib.contextmanager
def answering(service, count):
    """Inside the block a request for `count` tokens is under way; it must get them all by the end of the block."""
    under_way = threading.Event()
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(complete, service.grpc, count, 150.0, under_way.set)
        assert under_way.wait(30.0)
        yield answer
        assert len(answer.result(150.0)) == count


def test_two_services_side_by_side_and_nothing_left_of_one_that_is_stopped(pool):
    first, second = pool.take(2)
    assert {first.grpc, first.http}.isdisjoint({second.grpc, second.http})
    assert listening_on(first, "127.0.0.2") == ["haproxy", "haproxy"]
    assert "haproxy" not in {process.name() for process in second.descendants()}
    assert complete(first.grpc) == complete(second.grpc)
    processes = second.descendants()
    with answering(second, 150):
        # As Ctrl-C on a terminal does: to every process of the group. The answer under way must still come.
        os.killpg(second.process.pid, signal.SIGINT)
        assert second.process.wait(60.0) == 0
    assert wait_gone(processes) == []
    assert len(complete(first.grpc)) == 8


def listening_on(service, address):
    return [
        process.name()
        for process in service.descendants()
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.ip == address
    ]


def test_haproxy_or_its_starter_killed_is_unavailable_until_it_is_back_and_nothing_stays(pool):
    [service] = pool.take(1)
    expected = complete(service.grpc)
    for name in ("bin/haproxy", "ray::HAProxyManager"):
        [haproxy] = ranks_of(service, "bin/haproxy")
        ranks_of(service, name)[0].kill()
        assert wait_gone([haproxy]) == []  # with its starter, too
        deadline = time.monotonic() + 30.0
        while True:
            try:
                assert complete(service.grpc) == expected
                break
            except grpc.RpcError as error:
                if error.code() != grpc.StatusCode.UNAVAILABLE or time.monotonic() > deadline:
                    raise
            time.sleep(0.2)
        assert listening_on(service, "127.0.0.2") == ["haproxy", "haproxy"]


def test_killed_ranks_are_a_pause_not_a_loss(pool):
    """kill -9 of an expert shard, then of the coordinator, each in the middle of a request."""
    [service] = pool.take(1)
    expected = complete(service.grpc, 100)
    for name in ("ray::ExpertRank", "ray::CoordinatorRank", "ray::ExpertRank"):
        with answering(service, 100) as answer:
            ranks_of(service, name)[0].kill()
            assert answer.result(150.0) == expected


def test_a_stop_lets_running_requests_end(pool):
    [service] = pool.take(1)
    processes = service.descendants()
    with answering(service, 100):
        # To every process of the group, as supervisors and `timeout` do it.
        os.killpg(service.process.pid, signal.SIGTERM)
        assert service.process.wait(60.0) == 0
    assert wait_gone(processes) == []


def test_a_second_signal_ends_it_at_once(pool):
    [service] = pool.take(1)
    processes = service.descendants()
    under_way = threading.Event()

    def call():
        with pytest.raises(grpc.RpcError):
            complete(service.grpc, 8000, on_chunk=under_way.set)

    caller = threading.Thread(target=call)
    caller.start()
    assert under_way.wait(30.0)
    service.process.send_signal(signal.SIGTERM)
    time.sleep(1.0)
    assert service.process.poll() is None, "it must wait for the running request"
    begun = time.monotonic()
    assert service.stop() == 1
    assert time.monotonic() - begun < 5.0
    caller.join(30.0)
    assert wait_gone(processes) == []


def test_no_process_outlives_a_killed_shoal_serve(pool):
    [service] = pool.take(1)
    # Ray's own two agents look for their raylet once a minute, and end then.
    processes = [process for process in service.descendants() if not process.name().startswith(RAY_AGENTS)]
    assert len(processes) > 4
    service.process.kill()
    service.process.wait(10.0)
    assert wait_gone(processes, 30.0) == []


@pytest.mark.parametrize(
    ("stage", "delay_s", "number"),
    [
        ("checking checkpoint", 0.0, signal.SIGTERM),
        ("checking checkpoint", 0.5, signal.SIGINT),
        ("importing Ray", 0.5, signal.SIGINT),
        ("starting Ray", 1.5, signal.SIGTERM),
        ("starting the cell", 3.0, signal.SIGTERM),
    ],
)
def test_a_signal_during_the_start_stops_what_stands(stage, delay_s, number):
    process = subprocess.Popen(
        serve_command(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        for line in process.stderr:
            if stage in line:
                break
        time.sleep(delay_s)
        processes = psutil.Process(process.pid).children(recursive=True)
        assert processes or not stage.startswith("starting"), "Ray must have been started"
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60.0)
        assert process.returncode == 0, stderr
        assert stdout == "", "it must never have said that it is ready"
        assert "Traceback" not in stderr
        assert stderr.endswith("shoal: stopped before it was ready\n")
        assert wait_gone(processes) == []
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
