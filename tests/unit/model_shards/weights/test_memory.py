"""How much memory loading takes, and the refusal when there is less."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model_shards.errors import CapacityError
from model_shards.weights import (
    attention_slice_bytes,
    available_bytes,
    check_memory,
    expert_slice_bytes,
    load_attention_model,
    load_expert_shard,
    loader,
    memory,
)
from model_shards.weights.check import expected_shapes
from tests.checkpoints import (
    branchy_model,
    header_extents,
    merged,
    stored_state,
    watched_reads,
    write_single,
    write_zeros,
)
from tests.reference import CPU, make_hf_config, model_config_of

MIB = 2**20
# A checkpoint of about 200 MB, of which 32 experts in each of 4 layers take most.
WIDE = make_hf_config(
    hidden_size=256, moe_intermediate_size=512, num_hidden_layers=5, n_routed_experts=32, vocab_size=1000
)
# Peak memory of a load above what the process held before it, then above that again after reading the whole file.
CHILD = """
import json, re, sys
from pathlib import Path
import torch
from model_shards.config import load_model_config
from model_shards.weights import load_attention_model, load_expert_shard

def memory(key):
    return int(re.search(rf"^{key}:\\s+(\\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1]) * 1024

def fresh_peak():
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is held now
    return memory("VmRSS")

small, wide, role = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]

def load(directory):
    config = load_model_config(directory)
    if role == "attention":
        return load_attention_model(directory, config, torch.float32, torch.device("cpu"))
    return load_expert_shard(directory, config, (3, 1), torch.float32, torch.device("cpu"))

load(small)  # what a first load brings in besides weights
before = fresh_peak()
model = load(wide)
peak = memory("VmHWM") - before
before = fresh_peak()
content = (wide / "model.safetensors").read_bytes()
print(json.dumps({"load": peak, "whole": memory("VmHWM") - before, "size": len(content)}))
"""


@pytest.mark.parametrize("role", ["attention", "expert"])
def test_the_peak_while_loading_is_the_slice_and_one_tensor(tmp_path: Path, role: str) -> None:
    small, wide = tmp_path / "small", tmp_path / "wide"
    for directory, config in ((small, make_hf_config()), (wide, WIDE)):
        directory.mkdir()
        sizes = write_zeros(directory, config)
    config = model_config_of(WIDE)
    if role == "attention":
        held = attention_slice_bytes(config, torch.float32, "cpu")
    else:
        held = expert_slice_bytes(config, 2, torch.float32)
    command = [sys.executable, "-c", CHILD, str(small), str(wide), role]
    root = Path(__file__).parents[4]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, cwd=root)
    peak = json.loads(done.stdout)
    assert peak["size"] > 200e6
    assert peak["whole"] > 0.9 * peak["size"]  # the measure sees a file that is read whole
    assert held * 0.9 < peak["load"] < held + max(sizes.values()) + 12 * MIB


@pytest.mark.parametrize("role", ["attention", "expert"])
def test_too_little_memory_is_refused_with_the_numbers_before_a_tensor_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    model = branchy_model()
    config = model_config_of(model.config)
    write_single(tmp_path, stored_state(model))
    if role == "attention":
        needed, what = attention_slice_bytes(config, torch.float32, "cpu"), "the attention slice on cpu"
    else:
        needed, what = expert_slice_bytes(config, 3, torch.float32), "a slice of 3 of 8 experts on cpu"

    def load() -> object:
        if role == "attention":
            return load_attention_model(tmp_path, config, torch.float32, CPU)
        return load_expert_shard(tmp_path, config, (0, 5, 6), torch.float32, CPU)

    monkeypatch.setattr(loader, "available_bytes", lambda device: needed)
    load()
    monkeypatch.setattr(loader, "available_bytes", lambda device: needed - 1)
    with watched_reads() as log, pytest.raises(CapacityError) as refused:
        load()
    assert str(refused.value) == (
        f"{what} needs {needed / MIB:.1f} MiB of memory and {(needed - 1) / MIB:.1f} MiB is available"
    )
    assert merged(log) == header_extents(tmp_path)
    monkeypatch.setattr(loader, "available_bytes", lambda device: None)  # a system that does not tell
    load()


def test_the_kv_cache_must_fit_beside_the_attention_slice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = branchy_model()
    config = model_config_of(model.config)
    write_single(tmp_path, stored_state(model))
    needed = attention_slice_bytes(config, torch.float32, "cpu")
    monkeypatch.setattr(loader, "available_bytes", lambda device: needed + 100)
    load_attention_model(tmp_path, config, torch.float32, CPU, reserved_bytes=100)
    with pytest.raises(CapacityError, match="the attention slice with its KV cache on cpu needs"):
        load_attention_model(tmp_path, config, torch.float32, CPU, reserved_bytes=101)


def test_a_refusal_of_much_memory_counts_in_gib() -> None:
    check_memory(3 * 2**30, 3 * 2**30, "a slice")
    with pytest.raises(CapacityError, match=r"^a slice needs 3\.00 GiB of memory and 1\.50 GiB is available$"):
        check_memory(3 * 2**30, 3 * 2**29, "a slice")


def test_available_memory_is_what_the_system_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meminfo = tmp_path / "meminfo"
    monkeypatch.setattr(memory, "_MEMINFO", meminfo)
    assert available_bytes(CPU) is None
    meminfo.write_text("MemTotal:       9 kB\nMemAvailable:   1234 kB\nBuffers: 7 kB\n")
    assert available_bytes(CPU) == 1234 * 1024
    meminfo.write_text("MemTotal:       9 kB\n")
    assert available_bytes(CPU) is None


def test_slices_add_up_to_the_checkpoint() -> None:
    config = model_config_of(WIDE)
    total = sum(4 * math.prod(shape) for shape in expected_shapes(config).values())
    attention = attention_slice_bytes(config, torch.float32, "cpu")
    assert attention + sum(expert_slice_bytes(config, n, torch.float32) for n in (10, 22)) == total
