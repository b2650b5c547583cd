"""The chart's `config` against the program's own: same keys, same bounds, same rules, said in the same words."""

import json

import pytest
import yaml
from pydantic import TypeAdapter

from deploy.config import EngineSettings, ServerSettings, ShoalConfig, ShoalSettings
from model_shards.errors import ConfigError
from tests.helm.chart import CHART, template

# What the chart works out itself, or has under `model`.
NOT_IN_CONFIG = {
    "model": {"path", "name"},
    "cell": {"attention_replicas", "expert_shards"},
    "server": {"host", "grpc_port", "http_port", "proxy"},
    "ray": {"address", "replace", "attention_resource", "expert_resource"},
}
BOUNDS = ("type", "enum", "const", "pattern", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")


def bounds(node):
    """The constraints of one key in each form it may have; what may be null in a file is left out of the values."""
    found = []
    for branch in node.get("anyOf", [node]):
        if branch.get("type") != "null":
            found.append({name: branch[name] for name in BOUNDS if name in branch})
            if {"enum", "const"} & found[-1].keys():
                found[-1].pop("type", None)
    return found


def keys_of_the_program():
    schema = TypeAdapter(ShoalSettings).json_schema()
    sections = {name: schema["$defs"][node["$ref"].split("/")[-1]] for name, node in schema["properties"].items()}
    return {
        f"{name}.{key}": bounds(node)
        for name, section in sections.items()
        for key, node in section["properties"].items()
        if key not in NOT_IN_CONFIG.get(name, ())
    }


def keys_of_the_chart():
    schema = json.loads((CHART / "values.schema.json").read_text())["properties"]["config"]
    return {
        f"{name}.{key}": bounds(node)
        for name, section in schema["properties"].items()
        for key, node in section["properties"].items()
    }


def test_the_schema_of_the_values_has_the_programs_keys_and_bounds():
    assert keys_of_the_chart() == keys_of_the_program()


def said_by_helm(tmp_path, values):
    """stderr of a template that must fail, or empty."""
    path = tmp_path / "values.yaml"
    path.write_text(yaml.safe_dump(values))
    done = template("-f", path)
    assert (done.returncode != 0) == bool(done.stderr)
    return done.stderr


def said_by_the_program(settings):
    with pytest.raises(ConfigError) as caught:
        ShoalConfig.load(None, settings)
    return str(caught.value).removeprefix("the command line: ")


TWICE = {"kv_cache_tokens": 10, "kv_cache_memory_gb": 1.5}
TOO_FEW_TOKENS = EngineSettings().max_num_seqs - 1
TOO_MANY_SEQS = EngineSettings().max_num_batched_tokens + 1


@pytest.mark.parametrize(
    "engine", [TWICE, {"max_num_batched_tokens": TOO_FEW_TOKENS}, {"max_num_seqs": TOO_MANY_SEQS}], ids=str
)
def test_a_rule_between_keys_is_told_in_the_programs_words(tmp_path, engine):
    told = said_by_the_program({f"engine.{key}": value for key, value in engine.items()})
    assert told in said_by_helm(tmp_path, {"config": {"engine": engine}})


@pytest.mark.parametrize("key", ["name", "path"])
@pytest.mark.parametrize("name", ["a b", "a\tb", "a\x7f", "a\u2028b", "a\u3000b", "\u200bb"], ids=ascii)
def test_a_model_name_with_spaces_or_control_characters_is_told_in_the_programs_words(tmp_path, key, name):
    value = name if key == "name" else f"/models/{name}"
    told = said_by_the_program({f"model.{key}": value})
    assert told in said_by_helm(tmp_path, {"model": {key: value}})


def test_values_at_the_edge_of_each_rule_are_accepted(tmp_path):
    engine = {"max_num_batched_tokens": TOO_FEW_TOKENS + 1, "kv_cache_tokens": 10}
    assert said_by_helm(tmp_path, {"model": {"name": "模型-v2.5"}, "config": {"engine": engine}}) == ""


def test_a_pod_must_have_time_to_drain_before_it_is_killed(tmp_path):
    def said(grace, sleep, **server):
        termination = {"gracePeriodSeconds": grace, "preStopSleepSeconds": sleep}
        return said_by_helm(tmp_path, {"termination": termination, "config": {"server": server}})

    drain = int(ServerSettings().drain_timeout_s)
    assert "termination.gracePeriodSeconds (120) must exceed termination.preStopSleepSeconds (500) and " in said(
        120, 500
    )
    assert f"config.server.drain_timeout_s ({drain}) together" in said(10 + drain, 10)
    assert said(11 + drain, 10) == ""
    assert "config.server.drain_timeout_s (0.5) together" in said(10, 10, drain_timeout_s=0.5)
    assert said(11, 10, drain_timeout_s=0.5) == ""
