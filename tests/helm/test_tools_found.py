"""What the chart's tests need and is not in this repository: found, missed aloud, or skipped with the reason."""

import os

import pytest

from tests.helm import chart, crds
from tools import get_helm


@pytest.fixture
def empty(monkeypatch, tmp_path):
    """No pinned helm, none on the PATH, and nothing said about either."""
    monkeypatch.setattr(chart, "HELM", tmp_path / ".kube-tools" / "helm")
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("SHOAL_NO_HELM", "KUBERAY_CRDS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def on(monkeypatch, system, machine):
    monkeypatch.setattr("platform.system", lambda: system)
    monkeypatch.setattr("platform.machine", lambda: machine)


def test_on_x86_64_linux_a_missing_helm_fails_and_the_path_is_not_looked_at(empty, monkeypatch):
    on(monkeypatch, "Linux", "x86_64")
    other = empty / "helm"
    other.touch(0o755)
    with pytest.raises(pytest.fail.Exception, match=r"get_helm\.py"):
        chart.find_helm()


@pytest.mark.parametrize(("system", "machine"), [("Linux", "aarch64"), ("Darwin", "arm64"), ("Darwin", "x86_64")])
def test_elsewhere_helm_comes_from_the_path_or_the_test_says_that_it_skips(empty, monkeypatch, system, machine):
    on(monkeypatch, system, machine)
    with pytest.raises(pytest.skip.Exception, match="need a helm on the PATH"):
        chart.find_helm()
    (empty / "helm").touch(0o755)
    assert chart.find_helm() == os.path.join(empty, "helm")
    with pytest.raises(SystemExit, match="x86-64 Linux"):
        get_helm.install(empty)


def test_kuberays_definitions_are_missed_aloud_where_a_folder_is_named(empty, monkeypatch):
    monkeypatch.setattr(crds, "ROOT", empty / "checkout")
    look = crds.schema.__wrapped__  # without its cache
    with pytest.raises(pytest.skip.Exception, match="set KUBERAY_CRDS"):
        look("ray.io_rayservices.yaml", "v1")
    monkeypatch.setenv("KUBERAY_CRDS", str(empty))
    with pytest.raises(pytest.fail.Exception, match=r"ray\.io_rayservices\.yaml is not there"):
        look("ray.io_rayservices.yaml", "v1")
