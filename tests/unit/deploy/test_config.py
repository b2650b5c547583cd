"""Settings: what is written is what is in effect, and nothing wrong is passed over."""

import dataclasses
import pickle

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from deploy.config import ShoalConfig, ShoalSettings, default_config_path
from deploy.models import default_model_directory
from model_shards.errors import ConfigError

SECTIONS = {
    section.name: [key.name for key in dataclasses.fields(section.default_factory())]
    for section in dataclasses.fields(ShoalSettings)
}
SECONDS = st.one_of(st.integers(1, 86400), st.floats(0.001, 86400))
VALUES = {
    "model.path": st.sampled_from(["/models/a", "/models/b c"]),
    "model.name": st.from_regex(r"[A-Za-z0-9._-]{1,20}", fullmatch=True),
    "cell.attention_replicas": st.integers(1, 100),
    "cell.expert_shards": st.integers(1, 100),
    "cell.device": st.sampled_from(["cpu", "cuda"]),
    "cell.dtype": st.sampled_from(["auto", "float32", "bfloat16"]),
    "cell.micro_batches": st.sampled_from(["auto", 1, 2, 3]),
    "cell.transport": st.sampled_from(["auto", "gloo"]),
    "cell.load_timeout_s": SECONDS,
    "cell.join_timeout_s": SECONDS,
    "cell.exchange_timeout_s": SECONDS,
    "engine.max_model_len": st.none() | st.integers(1, 10**6),
    "engine.max_num_seqs": st.integers(1, 64),
    "engine.max_num_batched_tokens": st.integers(64, 10**5),
    "engine.block_size": st.integers(1, 256),
    "engine.kv_cache_tokens": st.none() | st.integers(1, 10**7),
    "engine.kv_cache_dtype": st.sampled_from(["auto", "int8", "fp8"]),
    "engine.attention_weights": st.sampled_from(["auto", "int8"]),
    "engine.max_decode_slowdown": st.none() | st.floats(1.01, 100.0),
    "engine.prefix_cache": st.booleans(),
    "server.host": st.sampled_from(["127.0.0.1", "0.0.0.0", "::1", "no"]),
    "server.grpc_port": st.integers(0, 30000),
    "server.http_port": st.just(0) | st.integers(30001, 65535),
    "server.proxy": st.sampled_from(["auto", "python"]),
    "server.max_concurrent_requests": st.integers(1, 10**6),
    "server.drain_timeout_s": SECONDS,
    "server.request_timeout_s": SECONDS,
    "ray.address": st.none() | st.sampled_from(["auto", "ray://head:10001"]),
    "ray.attention_resource": st.none() | st.just("shoal_attention"),
    "log.level": st.sampled_from(["DEBUG", "INFO", "WARNING", "ERROR"]),
}
REQUIRED = {key: VALUES.pop(key) for key in ("model.path", "model.name")}
OVERRIDES = st.fixed_dictionaries(REQUIRED, optional=VALUES)


def written(tmp_path, text):
    path = tmp_path / "shoal.yaml"
    path.write_text(text)
    return path


def refused(tmp_path, text):
    with pytest.raises(ConfigError) as caught:
        ShoalConfig.load(written(tmp_path, text), {})
    message = str(caught.value)
    assert "shoal.yaml" in message
    return message


def at(settings, key):
    section, name = key.split(".")
    return getattr(getattr(settings, section), name)


@given(overrides=OVERRIDES)
def test_effective_settings_written_out_load_back_to_themselves(tmp_path_factory, overrides):
    settings = ShoalConfig.load(None, overrides)
    for key, value in overrides.items():
        if value not in (None, "auto"):
            assert at(settings, key) == value
    path = tmp_path_factory.mktemp("config") / "shoal.yaml"
    path.write_text(ShoalConfig.dump(settings))
    assert ShoalConfig.load(path, {}) == settings
    assert pickle.loads(pickle.dumps(settings)) == settings


@given(key=st.from_regex(r"[a-z_]{1,20}", fullmatch=True), section=st.sampled_from([None, *SECTIONS]))
def test_every_unknown_key_is_refused_by_its_path(tmp_path_factory, key, section):
    known = SECTIONS if section is None else SECTIONS[section]
    if key in known:
        return
    tree = {key: {}} if section is None else {section: {key: 1}}
    path = tmp_path_factory.mktemp("config") / "shoal.yaml"
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match="is not a setting") as caught:
        ShoalConfig.load(path, {})
    assert (key if section is None else f"{section}.{key}") in str(caught.value)


def test_without_a_file_the_checkpoint_of_the_package_is_served_on_loopback():
    settings = ShoalConfig.load(None, {})
    assert settings.model.path == str(default_model_directory().absolute())
    assert settings.model.name == default_model_directory().name
    assert (settings.server.host, settings.server.grpc_port, settings.server.http_port) == ("127.0.0.1", 9000, 8000)
    assert (settings.cell.attention_replicas, settings.cell.expert_shards) == (1, 2)


def test_an_empty_file_and_an_empty_section_are_the_defaults(tmp_path):
    assert ShoalConfig.load(written(tmp_path, "cell:\nmodel: {path: null, name: null}\n"), {}) == ShoalConfig.load(
        None, {}
    )
    assert ShoalConfig.load(written(tmp_path, ""), {}) == ShoalConfig.load(None, {})


@pytest.mark.parametrize(
    ("device", "given_dtype", "dtype", "cache"),
    [("cpu", "auto", "float32", 0.25), ("cuda", "auto", "bfloat16", 8.0), ("cpu", "bfloat16", "bfloat16", 0.25)],
)
def test_dtype_and_cache_follow_the_device_unless_given(device, given_dtype, dtype, cache):
    settings = ShoalConfig.load(None, {"cell.device": device, "cell.dtype": given_dtype})
    assert settings.cell.dtype == dtype
    assert settings.engine.kv_cache_memory_gb == cache


def test_a_flag_wins_over_the_file_and_is_blamed_when_it_is_wrong(tmp_path):
    path = written(tmp_path, "cell: {device: cuda, expert_shards: 8}")
    settings = ShoalConfig.load(path, {"cell.expert_shards": 4})
    assert (settings.cell.device, settings.cell.expert_shards) == ("cuda", 4)
    with pytest.raises(ConfigError, match=r"the command line: cell\.expert_shards should be .* 1, got 0"):
        ShoalConfig.load(path, {"cell.expert_shards": 0})


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("cell: {expert_shard: 2}", "cell.expert_shard is not a setting; did you mean expert_shards?"),
        ("engin: {}", "engin is not a setting; did you mean engine?"),
        ("device: cpu", "device is not a setting; did you mean cell.device?"),
        ("log: {xyzzy: 1}", "log.xyzzy is not a setting; known keys: level"),
    ],
)
def test_a_misspelt_key_brings_the_right_one_to_mind(tmp_path, text, told):
    assert told in refused(tmp_path, text.replace("device: cpu", "device: {a: 1}"))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("cell: {attention_replicas: 0}", ("cell.attention_replicas", "1", "got 0")),
        ("cell: {attention_replicas: true}", ("cell.attention_replicas", "got True")),
        ("cell: {attention_replicas: 2.5}", ("cell.attention_replicas", "got 2.5")),
        ("cell: {attention_replicas: null}", ("cell.attention_replicas", "got None")),
        ("cell: {micro_batches: 4}", ("cell.micro_batches", "3", "got 4")),
        ("cell: {device: tpu}", ("cell.device", "'cpu' or 'cuda'", "'tpu'")),
        ("cell: {join_timeout_s: .nan}", ("cell.join_timeout_s", "nan")),
        ("cell: {join_timeout_s: '5'}", ("cell.join_timeout_s", "'5'")),
        ("server: {grpc_port: 65536}", ("server.grpc_port", "65535", "got 65536")),
        ("server: {grpc_port: 7000, http_port: 7000}", ("server.grpc_port", "server.http_port", "7000")),
        ("engine: {kv_cache_tokens: 10, kv_cache_memory_gb: 1}", ("kv_cache_tokens (10)", "kv_cache_memory_gb (1.0)")),
        ("engine: {max_num_seqs: 9, max_num_batched_tokens: 8}", ("max_num_seqs (9)", "max_num_batched_tokens (8)")),
        ("model: {name: 'a b'}", ("model.name", "'a b'")),
        ("model: {path: '/models/a b'}", ("model.name", "'a b'", "set model.name")),
        ("model: {path: [1]}", ("model.path", "[1]")),
        ("cell: 3", ("cell must hold keys", "3")),
        ("[1]", ("must hold sections", "list")),
        ("cell: {a: 1", ("line 1", "not valid YAML")),
        ("cell: {device: cpu}\nlog: {level: INFO}\ncell: {dtype: auto}", ("line 3", "cell stands twice")),
        ("cell: {device: !!python/object:os.system x}", ("not valid YAML",)),
        ("? [a, b]\n: {c: 1}", ("not valid YAML",)),
        ("cell: {1: 2}", ("cell.1 is not a setting",)),
    ],
)
def test_a_broken_rule_is_told_with_key_rule_and_value(tmp_path, text, parts):
    message = refused(tmp_path, text)
    for part in parts:
        assert part in message
    assert "pydantic" not in message


def test_all_problems_are_told_at_once(tmp_path):
    message = refused(tmp_path, "cell: {expert_shards: 0, devise: cpu}\nlog: {level: LOUD}")
    assert len(message.splitlines()) == 3


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"missing\.yaml: cannot be read: No such file"):
        ShoalConfig.load(tmp_path / "missing.yaml", {})
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"cell: \xff")
    with pytest.raises(ConfigError, match=r"binary\.yaml: is not UTF-8: byte 6 is 0xff"):
        ShoalConfig.load(binary, {})


def test_the_environment_names_a_file(monkeypatch, tmp_path):
    monkeypatch.delenv("SHOAL_CONFIG", raising=False)
    assert default_config_path() is None
    monkeypatch.setenv("SHOAL_CONFIG", str(tmp_path / "shoal.yaml"))
    assert default_config_path() == tmp_path / "shoal.yaml"
