"""What the chart renders: valid to Kubernetes and KubeRay, as a reviewer last read it, and what Shoal expects."""

import json
import os

import jsonschema
import kubernetes_validate
import pytest
import yaml

from cluster.device import RANK_ENVIRONMENT
from deploy.launch.ray_runtime import SERVE_ENVIRONMENT
from tests.helm import crds
from tests.helm.chart import CASES, CHART, RENDERS, VALUES, documents, helm, parse, pod_templates, ray_service, render

KUBERNETES_VERSIONS = ("1.28", "1.33", kubernetes_validate.latest_version())


@pytest.mark.parametrize("case", CASES)
def test_helm_lint_finds_nothing(case):
    done = helm("lint", "--strict", CHART, "-f", VALUES / f"{case}.yaml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_schema_is_a_valid_json_schema():
    jsonschema.Draft7Validator.check_schema(json.loads((CHART / "values.schema.json").read_text()))


def test_every_default_value_is_described_by_the_schema():
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    described = json.loads((CHART / "values.schema.json").read_text())["properties"]
    assert set(values) == set(described) - {"global"}


@pytest.mark.parametrize("case", CASES)
def test_the_render_equals_the_committed_one(case):
    path = RENDERS / f"{case}.yaml"
    if os.environ.get("SHOAL_UPDATE_RENDERS") == "1":
        path.write_text(render(case))
    assert documents(case) == parse(path.read_text()), "review it, then run with SHOAL_UPDATE_RENDERS=1"


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
@pytest.mark.parametrize("case", CASES)
def test_every_object_is_valid_to_kubernetes(case, version):
    for document in documents(case).values():
        # A kind that Kubernetes does not know raises; the RayService has its own test.
        if document["kind"] != "RayService":
            kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
@pytest.mark.parametrize("case", CASES)
def test_every_pod_template_is_a_valid_pod(case, version):
    for role, template in pod_templates(case).items():
        metadata = {"name": role, **template["metadata"]}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}
        kubernetes_validate.validate(pod, version, strict=True)


@pytest.mark.parametrize("case", CASES)
def test_kuberay_accepts_the_ray_service(case):
    assert crds.errors(ray_service(case), crds.schema("ray.io_rayservices.yaml", "v1")) == []


def test_the_kuberay_check_refuses_an_unknown_field_and_a_wrong_type():
    schema = crds.schema("ray.io_rayservices.yaml", "v1")
    service = json.loads(json.dumps(ray_service("default")))
    service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["minReplica"] = 1
    service["spec"]["rayClusterConfig"]["workerGroupSpecs"][1]["replicas"] = "2"
    found = crds.errors(service, schema)
    assert len(found) == 2
    assert "minReplica" in found[0] + found[1]
    assert "'2' is not of type" in found[0] + found[1]


@pytest.mark.parametrize("case", CASES)
def test_shoal_accepts_the_rendered_config(case, tmp_path):
    (config,) = [item for item in documents(case).values() if item["kind"] == "ConfigMap"]
    from deploy.config import ShoalConfig

    path = tmp_path / "shoal.yaml"
    path.write_text(config["data"]["shoal.yaml"])
    settings = ShoalConfig.load(path, {})
    cell = yaml.safe_load(config["data"]["shoal.yaml"])["cell"]
    assert settings.cell.attention_replicas == cell["attention_replicas"]
    assert settings.cell.expert_shards == cell["expert_shards"]
    assert settings.cell.device == cell["device"]


@pytest.mark.parametrize("case", CASES)
def test_a_worker_group_offers_as_many_places_as_the_config_has_ranks(case):
    (config,) = [item for item in documents(case).values() if item["kind"] == "ConfigMap"]
    cell = yaml.safe_load(config["data"]["shoal.yaml"])["cell"]
    ranks = {"attention": cell["attention_replicas"], "expert": cell["expert_shards"]}
    for group in ray_service(case)["spec"]["rayClusterConfig"]["workerGroupSpecs"]:
        # KubeRay pastes the value into a shell command, so it is JSON inside double quotes.
        offered = json.loads(json.loads(group["rayStartParams"]["resources"]))
        role = group["groupName"]
        assert offered == {f"shoal_{role}": ranks[role] // group["replicas"]}
        assert group["minReplicas"] == group["replicas"] == group["maxReplicas"]
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        gpus = [count for name, count in limits.items() if name.endswith("gpu")]
        assert gpus == ([offered[f"shoal_{role}"]] if cell["device"] == "cuda" else [])


@pytest.mark.parametrize("case", CASES)
def test_the_serve_config_is_one_that_ray_serve_accepts(case):
    from ray.serve.schema import ServeDeploySchema

    config = ServeDeploySchema.model_validate(yaml.safe_load(ray_service(case)["spec"]["serveConfigV2"]))
    assert config.applications[0].import_path == "deploy.app:build"
    assert config.grpc_options.port == 9000


@pytest.mark.parametrize("case", CASES)
def test_no_pod_runs_as_root_or_holds_a_token(case):
    for template in pod_templates(case).values():
        assert template["spec"]["automountServiceAccountToken"] is False
        assert template["spec"]["securityContext"]["runAsNonRoot"] is True
        for container in template["spec"]["containers"]:
            assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]
            assert container["securityContext"]["allowPrivilegeEscalation"] is False


def test_a_changed_config_changes_every_pod_template():
    checksums = {
        pod_templates(case)[role]["metadata"]["annotations"]["shoal.dev/config-checksum"]
        for case in ("default", "cpu")
        for role in ("head", "attention", "expert")
    }
    assert len(checksums) == 2


@pytest.mark.parametrize("case", CASES)
def test_every_ray_container_has_the_environment_that_shoal_serve_gives_its_own(case):
    for template in pod_templates(case).values():
        [container] = [entry for entry in template["spec"]["containers"] if "env" in entry]
        found = {entry["name"]: entry["value"] for entry in container["env"]}
        assert {**SERVE_ENVIRONMENT, **RANK_ENVIRONMENT}.items() <= found.items()
