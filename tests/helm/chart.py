"""Runs helm on the project's chart."""

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
import yaml

from tools import get_helm

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "shoal"
HELM = ROOT / ".kube-tools" / "helm"
VALUES = ROOT / "tests" / "helm" / "values"
RENDERS = ROOT / "tests" / "helm" / "renders"
CASES = tuple(sorted(path.stem for path in VALUES.glob("*.yaml")))


def find_helm() -> str:
    """The pinned helm; where that cannot run, one on the PATH.

    Where neither is, the test is skipped if that is to be expected: there is no pinned one for this machine, or
    SHOAL_NO_HELM=1 says that there is none on purpose. Otherwise it fails.
    """
    if HELM.exists():
        return str(HELM)
    if os.environ.get("SHOAL_NO_HELM") == "1":
        pytest.skip("SHOAL_NO_HELM=1: the chart's tests need helm")
    if get_helm.runs_here():
        pytest.fail(f"{HELM} is missing: run `.venv/bin/python tools/get_helm.py .kube-tools` (make test does)")
    found = shutil.which("helm")
    if found is None:
        pytest.skip(
            f"the chart's tests need a helm on the PATH ({get_helm.HELM_VERSION}): none is pinned for this machine"
        )
    return found


def helm(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs helm; what `find_helm` says where there is none."""
    return subprocess.run([find_helm(), *arguments], capture_output=True, text=True, timeout=60, check=False)


def template(*arguments: str | Path, release: str = "demo") -> subprocess.CompletedProcess[str]:
    """`helm template` in the namespace `models`, for a Kubernetes version that the chart supports."""
    return helm("template", release, CHART, "--namespace", "models", "--kube-version", "1.33.0", *arguments)


@cache
def render(case: str) -> str:
    """The YAML text that the values file of this case renders to."""
    done = template("-f", VALUES / f"{case}.yaml")
    assert done.returncode == 0, done.stderr
    return done.stdout


def parse(text: str) -> dict[str, dict]:
    """{"Kind/name": document}; a duplicate fails."""
    documents: dict[str, dict] = {}
    for document in yaml.safe_load_all(text):
        if document is None:
            continue
        key = f"{document['kind']}/{document['metadata']['name']}"
        assert key not in documents, f"{key} is rendered twice"
        documents[key] = document
    return documents


def documents(case: str) -> dict[str, dict]:
    """The documents of a case."""
    return parse(render(case))


def ray_service(case: str) -> dict:
    """The one RayService of a case."""
    (found,) = [document for document in documents(case).values() if document["kind"] == "RayService"]
    return found


def pod_templates(case: str) -> dict[str, dict]:
    """{"head" | group name: pod template} of the RayService."""
    cluster = ray_service(case)["spec"]["rayClusterConfig"]
    workers = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    return {"head": cluster["headGroupSpec"]["template"], **workers}
