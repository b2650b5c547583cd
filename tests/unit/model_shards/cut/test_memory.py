"""How much memory cutting takes: measured as the peak of a process of its own, against the size of a tensor."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from model_shards.weights.check import expected_shapes
from tests.checkpoints import write_zeros
from tests.reference import make_hf_config, model_config_of

ROOT = Path(__file__).resolve().parents[4]
MIB = 2**20
# Every tensor but the norms takes tens of MiB: 62 for the embedding, 32 for a matrix of an expert.
WIDE = make_hf_config(
    hidden_size=2048, moe_intermediate_size=4096, num_hidden_layers=2, n_routed_experts=1, num_experts_per_tok=1,
    n_shared_experts=None, vocab_size=8000, intermediate_size=64
)  # fmt: skip
# Peak memory of a cut above what the process held before it; then of reading the largest tensor at once.
CHILD = """
import json, re, sys
from pathlib import Path
from model_shards.cut import cut_checkpoint
from model_shards.quantization import Quantization

def memory(key):
    return int(re.search(rf"^{key}:\\s+(\\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1]) * 1024

def fresh_peak():
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is held now
    return memory("VmRSS")

small, wide, out, quantization = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
kind = Quantization(quantization) if quantization else None
cut_checkpoint(small, out / "small", kind)  # what a first cut brings in besides weights
before = fresh_peak()
cut_checkpoint(wide, out / "wide", kind)
peak = memory("VmHWM") - before
before = fresh_peak()
held = b"x" * int(sys.argv[5])
print(json.dumps({"cut": peak, "tensor": memory("VmHWM") - before}))
"""


@pytest.mark.parametrize("quantization", ["", "int8", "fp8"])
def test_the_peak_while_cutting_is_less_than_one_tensor(tmp_path: Path, quantization: str) -> None:
    for name, config in (("small", make_hf_config()), ("wide", WIDE)):
        (tmp_path / name).mkdir()
        write_zeros(tmp_path / name, config)
    largest = max(4 * math.prod(shape) for shape in expected_shapes(model_config_of(WIDE)).values())
    arguments = [str(tmp_path / "small"), str(tmp_path / "wide"), str(tmp_path / "out"), quantization, str(largest)]
    command = [sys.executable, "-c", CHILD, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    peak = json.loads(done.stdout)
    assert largest > 60 * MIB
    assert peak["tensor"] > 0.9 * largest  # the measure sees a tensor that is read whole
    assert peak["cut"] < 16 * MIB
