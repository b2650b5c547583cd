"""A cut that is killed, anywhere, and begun again gives the bytes of one that never was."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from model_shards.cut import cut_checkpoint
from model_shards.quantization import Quantization
from tests.checkpoints import branchy_model, save_model

ROOT = Path(__file__).resolve().parents[4]
# Runs the cut in forked children, each of which is killed with SIGKILL at a step of its own: in the middle of a write,
# before or after an fsync, before or after a rename. The last one is left alone. Prints how each child ended.
CHILD = """
import json, os, random, signal, sys, traceback
from pathlib import Path
import model_shards.cut.cut as cut, model_shards.cut.disk as disk, model_shards.cut.journal as journal, \\
    model_shards.cut.write as write
from model_shards.quantization import Quantization

source, out, quantization, seed = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
draw = random.Random(seed)

def run(fatal_step):
    steps = 0

    def step():
        nonlocal steps
        steps += 1
        if steps == fatal_step:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(operation):
        def stepped(*arguments, **options):
            step()
            result = operation(*arguments, **options)
            step()
            return result
        return stepped

    def halting_write(stream, data, plain=disk.write_all):
        half = len(data) // 2
        plain(stream, data[:half])
        step()
        plain(stream, data[half:])

    for module in (cut, journal, write):
        module.write_all = halting_write
    os.fsync, Path.replace, Path.unlink = around(os.fsync), around(Path.replace), around(Path.unlink)
    cut.cut_checkpoint(source, out, Quantization(quantization) if quantization else None)
    return steps

def child(fatal_step):
    pid = os.fork()
    if pid == 0:
        try:
            run(fatal_step)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)

ends = []
while not ends or ends[-1] != 0:
    ends.append(child(draw.randint(1, 60) if len(ends) < 12 else 0))
    assert ends[-1] in (0, -signal.SIGKILL), ends
print(json.dumps({"killed": ends.count(-signal.SIGKILL), "finished_early": len(ends) < 13}))
"""


def cut(source: Path, out: Path, quantization: str, seed: int) -> dict[str, int]:
    command = [sys.executable, "-c", CHILD, str(source), str(out), quantization, str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(directory.iterdir())}


@pytest.mark.parametrize(("quantization", "seed"), [("", 1), ("int8", 2), ("int8", 3), ("fp8", 4)])
def test_killed_at_random_moments_the_same_command_ends_with_the_same_bytes(
    tmp_path: Path, quantization: str, seed: int
) -> None:
    source = tmp_path / "source"
    save_model(branchy_model(), source)
    cut_checkpoint(source, tmp_path / "whole", Quantization(quantization) if quantization else None)
    counted = cut(source, tmp_path / "cut", quantization, seed)
    assert counted["killed"] >= 3
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
