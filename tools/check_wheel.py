"""Installs a built wheel into a fresh environment and checks that it works from there.

Usage: .venv/bin/python tools/check_wheel.py dist/shoal-*.whl

The fresh environment borrows the dependencies of the one that runs this script (a .pth line), so that torch is not
downloaded twice; the wheel's own packages come first on its path, and editable installs are not borrowed.
"""

import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

MAX_BYTES = 25 * 2**20
NEEDED = ("deploy/gateway/inference_pb2.py", "deploy/gateway/inference_pb2_grpc.py", "deploy/gateway/inference.proto")
# The embedded checkpoint, wherever in the package it lies.
NEEDED_SUFFIXES = ("/config.json", "/tokenizer.json", ".safetensors")


def check_contents(wheel: Path) -> None:
    """Raises SystemExit naming what is missing, or the size."""
    size = wheel.stat().st_size
    if size >= MAX_BYTES:
        raise SystemExit(f"{wheel.name} has {size} bytes, the limit is {MAX_BYTES}")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    missing = [name for name in NEEDED if name not in names]
    missing += [f"*{suffix}" for suffix in NEEDED_SUFFIXES if not any(name.endswith(suffix) for name in names)]
    if missing:
        raise SystemExit(f"{wheel.name} lacks {', '.join(missing)}")
    packages = {name.split("/")[0] for name in names if not name.split("/")[0].endswith(".dist-info")}
    if packages != {"deploy", "cluster", "model_shards"}:
        raise SystemExit(f"{wheel.name} holds the packages {sorted(packages)}")


def check_install(wheel: Path) -> str:
    """Runs `shoal version` from the installed wheel, outside the checkout; returns what it says."""
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary) / "venv"
        venv.create(home, with_pip=True)
        python = home / "bin" / "python"
        subprocess.run(
            [python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel.resolve()], check=True, timeout=300
        )
        site = next((home / "lib").glob("python3*/site-packages"))
        (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
        where = subprocess.run(
            [python, "-c", "import deploy; print(deploy.__file__)"],
            cwd=temporary,
            check=True,
            timeout=120,
            capture_output=True,
            text=True,
        ).stdout.strip()
        if not Path(where).is_relative_to(home):
            raise SystemExit(f"the wheel's environment imports deploy from {where}")
        # A whole service out of the wheel alone: Ray's workers, the generated code, the checkpoint and its tokenizer.
        subprocess.run([python, "-m", "deploy.cli.demo"], cwd=temporary, check=True, timeout=300)
        return subprocess.run(
            [home / "bin" / "shoal", "version"], cwd=temporary, check=True, timeout=120, capture_output=True, text=True
        ).stdout.strip()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    path = Path(sys.argv[1])
    check_contents(path)
    sys.stdout.write(f"{path.name}: {path.stat().st_size} bytes, `shoal version` says {check_install(path)}\n")
