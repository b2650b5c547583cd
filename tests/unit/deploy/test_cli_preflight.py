"""What is refused before anything starts, with the numbers."""

import dataclasses
import shutil
import socket
import subprocess
import sys

import pytest
from click.testing import CliRunner

from deploy import preflight as module
from deploy.cli.main import shoal
from deploy.config import ServerSettings, ShoalConfig
from deploy.models import default_model_directory
from deploy.preflight import (
    CellNeeds,
    Machine,
    cell_needs,
    check_capacity,
    check_ray_directory,
    choose_ports,
    inspect_machine,
    preflight,
)
from model_shards.errors import CapacityError, CheckpointError, ConfigError
from model_shards.weights import memory

GIB = 2**30
NEEDS = CellNeeds(attention_replicas=2, attention_slice=3 * GIB, kv_cache=1 * GIB, expert_slices=(5 * GIB, 6 * GIB))
CPU = ShoalConfig.load(None, {"model.path": "/models/lite"})
CUDA = ShoalConfig.load(None, {"model.path": "/models/lite", "cell.device": "cuda"})


@pytest.fixture
def used_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_port_0_picks_two_different_ports_that_can_be_bound():
    chosen = choose_ports(ServerSettings(grpc_port=0, http_port=0))
    assert chosen.grpc_port != chosen.http_port
    for port in (chosen.grpc_port, chosen.http_port):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", port))


def test_given_ports_that_are_free_are_kept():
    free = choose_ports(ServerSettings(grpc_port=0, http_port=0))
    assert choose_ports(free) == free


@pytest.mark.parametrize("key", ["grpc_port", "http_port"])
def test_a_port_in_use_is_named_with_the_remedy(used_port, key):
    server = dataclasses.replace(ServerSettings(grpc_port=0, http_port=0), **{key: used_port})
    flag = "--" + key.replace("_", "-")
    with pytest.raises(ConfigError, match=rf"server\.{key} {used_port} on 127\.0\.0\.1 .*in use.*{flag}.*0 for any"):
        choose_ports(server)


def test_a_port_used_on_every_interface_is_in_use_on_loopback_too():
    with socket.socket() as listener:
        listener.bind(("0.0.0.0", 0))
        listener.listen()
        with pytest.raises(ConfigError, match="in use"):
            choose_ports(ServerSettings(grpc_port=listener.getsockname()[1], http_port=0))


@pytest.mark.parametrize("host", ["no-such-host.invalid", "203.0.113.7"])
def test_a_host_that_is_not_this_machine_is_refused(host):
    with pytest.raises(ConfigError, match=host):
        choose_ports(ServerSettings(host=host, grpc_port=9000, http_port=8000))


def test_a_cell_that_fits_the_memory_exactly_is_accepted():
    assert NEEDS.total == 19 * GIB
    check_capacity(CPU, NEEDS, Machine(memory=19 * GIB))


def test_a_cell_too_large_for_memory_is_refused_with_every_number():
    with pytest.raises(CapacityError) as caught:
        check_capacity(CPU, NEEDS, Machine(memory=19 * GIB - 1))
    assert str(caught.value) == (
        "the cell needs 19.00 GiB of memory and 19.00 GiB is free: 2 attention replicas of 3.00 GiB weights and "
        "1.00 GiB KV cache each, 2 expert shards of up to 6.00 GiB"
    )


def test_more_ranks_than_gpus_are_refused_with_both_numbers():
    with pytest.raises(CapacityError, match=r"4 ranks \(2 attention replicas, 2 expert shards\).*this machine has 3"):
        check_capacity(CUDA, NEEDS, Machine(memory=0, gpu_memory=(80 * GIB,) * 3))
    with pytest.raises(CapacityError, match="this machine has 0"):
        check_capacity(CUDA, NEEDS, Machine(memory=0))


def test_a_slice_larger_than_a_gpu_is_refused():
    machine = Machine(memory=0, gpu_memory=(80 * GIB, 5 * GIB, 80 * GIB, 80 * GIB))
    with pytest.raises(CapacityError, match=r"needs 6\.00 GiB of GPU memory and GPU 1 has 5\.00 GiB free"):
        check_capacity(CUDA, NEEDS, machine)
    check_capacity(CUDA, NEEDS, Machine(memory=0, gpu_memory=(6 * GIB,) * 4))


def test_a_containers_limit_counts_as_the_machines_memory(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text(f"{GIB}\n")
    (tmp_path / "memory.current").write_text(f"{GIB - 4096}\n")
    (tmp_path / "memory.stat").write_text("anon 900000000\nfile 0\ninactive_file 0\nactive_file 0\n")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert inspect_machine("cpu") == Machine(memory=4096)
    # A checkpoint that was read lies in the page cache, and the kernel gives that up.
    (tmp_path / "memory.stat").write_text("anon 900000000\ninactive_file 65536\nactive_file 8192\n")
    assert inspect_machine("cpu") == Machine(memory=4096 + 65536 + 8192)
    (tmp_path / "memory.stat").write_text(f"inactive_file {2 * GIB}\n")
    assert inspect_machine("cpu") == Machine(memory=GIB)
    (tmp_path / "memory.max").write_text("max\n")
    assert inspect_machine("cpu").memory > 4096
    monkeypatch.setattr(memory, "_CGROUP", tmp_path / "none")
    assert inspect_machine("cpu").memory > 4096


def test_gpus_are_asked_in_a_process_of_their_own(monkeypatch):
    monkeypatch.setattr(module, "_GPU_QUERY", "print(7); print(9)")
    assert inspect_machine("cuda").gpu_memory == (7, 9)
    monkeypatch.setattr(module, "_GPU_QUERY", "raise RuntimeError('driver too old')")
    with pytest.raises(CapacityError, match="driver too old"):
        inspect_machine("cuda")


@pytest.fixture
def checkpoint(tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(default_model_directory(), tmp_path / "tiny")


def settings(directory, **cell):
    return ShoalConfig.load(
        None, {"model.path": str(directory)} | {f"cell.{key}": value for key, value in cell.items()}
    )


def test_a_full_disk_under_rays_files_is_told_with_directory_numbers_and_remedy(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=3 * 2**20))
    with pytest.raises(CapacityError, match=rf"to {tmp_path}, which has 3\.0 MiB free and needs 64: .* RAY_TMPDIR"):
        check_ray_directory(tmp_path)
    monkeypatch.undo()
    check_ray_directory(tmp_path)
    check_ray_directory(tmp_path / "made" / "by Ray")


def test_the_package_checkpoint_passes_and_its_slices_are_measured(checkpoint):
    two = cell_needs(settings(checkpoint, expert_shards=2))
    four = cell_needs(settings(checkpoint, expert_shards=4, attention_replicas=3))
    assert two.attention_slice == four.attention_slice > 0
    assert sum(two.expert_slices) == sum(four.expert_slices)
    assert len(four.expert_slices) == 4
    # The cache fills the quarter GiB that it is given, up to one block.
    assert 0.24 * GIB < two.kv_cache <= 0.25 * GIB
    half = cell_needs(settings(checkpoint, dtype="bfloat16"))
    assert sum(half.expert_slices) * 2 == sum(two.expert_slices)


def test_a_checkpoint_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=rf"model\.path must be a directory.*{tmp_path}/none"):
        cell_needs(settings(tmp_path / "none"))


def test_a_missing_tokenizer_is_told_before_the_start(checkpoint):
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        cell_needs(settings(checkpoint))


def test_a_truncated_weights_file_is_told_before_the_start(checkpoint):
    file = next(checkpoint.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=file.name):
        cell_needs(settings(checkpoint))


def test_more_shards_than_experts_are_refused(checkpoint):
    with pytest.raises(ConfigError, match=r"expert shards must be 1 to .*got 1000"):
        cell_needs(settings(checkpoint, expert_shards=1000))


def test_ranks_elsewhere_are_not_measured_against_this_machine(checkpoint, monkeypatch, used_port):
    monkeypatch.setattr(module, "inspect_machine", lambda device: Machine(memory=0))
    here = dataclasses.replace(settings(checkpoint), server=ServerSettings(grpc_port=used_port, http_port=0))
    with pytest.raises(ConfigError, match="in use"):
        preflight(here)
    elsewhere = dataclasses.replace(here, ray=dataclasses.replace(here.ray, address="ray://head:10001"))
    assert preflight(elsewhere).server.grpc_port == used_port
    assert preflight(elsewhere).server.http_port != 0


def test_serve_tells_a_port_in_use_on_one_line_and_starts_nothing(used_port):
    result = CliRunner().invoke(shoal, ["serve", "--grpc-port", str(used_port), "--http-port", "0"])
    assert result.exit_code == 2
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("shoal: error:")]
    assert f"server.grpc_port {used_port}" in error
    assert "Traceback" not in result.output


def test_what_is_refused_is_told_before_ray_is_imported():
    """Importing Ray takes longer than all the checks."""
    code = (
        "import sys; from deploy.config import ShoalConfig; from deploy.preflight import preflight;"
        "preflight(ShoalConfig.load(None, {'server.grpc_port': 0, 'server.http_port': 0}));"
        "print('torch' in sys.modules, 'ray' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout == "True False\n"
