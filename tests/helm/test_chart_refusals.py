"""What the chart refuses before anything reaches a cluster, and what it says."""

import pytest

from tests.helm.chart import template


def refusal(*arguments: str, release: str = "demo") -> str:
    """stderr of a template that must fail."""
    done = template(*arguments, release=release)
    assert done.returncode != 0, "helm accepted it"
    return done.stderr


def test_a_release_name_of_48_characters_is_refused_with_its_length():
    assert "has 48 characters, KubeRay allows a RayService 47" in refusal(release="a" * 48)


def test_a_name_of_47_characters_is_accepted():
    assert template(release="a" * 47).returncode == 0


def test_a_release_name_that_starts_with_a_digit_is_refused_by_name():
    assert '"7b" is not DNS-1035' in refusal(release="7b")


def test_a_bad_fullname_override_is_refused_by_the_schema():
    assert "fullnameOverride" in refusal("--set", "fullnameOverride=Shoal_1")


def test_incremental_upgrade_is_refused_because_it_routes_http_only():
    said = refusal("--set", "upgradeStrategy=NewClusterWithIncrementalUpgrade")
    assert "routes HTTP only" in said
    assert "use NewCluster or None" in said


def test_another_upgrade_strategy_is_refused_with_its_value():
    assert 'upgradeStrategy is "Rolling"; it must be NewCluster or None' in refusal("--set", "upgradeStrategy=Rolling")


def test_a_volume_without_a_model_path_is_refused():
    said = refusal("--set", "model.volume.persistentVolumeClaim.claimName=v2")
    assert "model.volume is set but model.path is empty" in said


def test_a_foreign_service_account_needs_a_name():
    assert "serviceAccount.name must name an existing account" in refusal("--set", "serviceAccount.create=false")


@pytest.mark.parametrize(
    "setting",
    [
        "atention.replicas=2",
        "attention.replica=2",
        "config.cell.attention_replicas=2",
        "config.engine.max_batch=2",
        "model.url=x",
    ],
)
def test_an_unknown_value_is_refused_by_name(setting):
    said = refusal("--set", setting)
    assert setting.split("=")[0].split(".")[-1] in said or setting.split(".")[0] in said
    assert "additional properties" in said.lower()


@pytest.mark.parametrize(
    ("setting", "where"),
    [
        ("attention.replicas=two", "/attention/replicas"),
        ("attention.replicas=0", "/attention/replicas"),
        ("expert.ranksPerPod=-1", "/expert/ranksPerPod"),
        ("rdma.enabled=please", "/rdma/enabled"),
        ("config.cell.device=tpu", "/config/cell/device"),
        ("config.cell.micro_batches=4", "/config/cell/micro_batches"),
        ("image.digest=sha256:12", "/image/digest"),
        ("podSecurityContext.runAsUser=0", "/podSecurityContext/runAsUser"),
        ("head.sharedMemory=lots", "/head/sharedMemory"),
    ],
)
def test_a_value_of_the_wrong_type_or_range_is_refused_by_its_path(setting, where):
    assert where in refusal("--set", setting)
