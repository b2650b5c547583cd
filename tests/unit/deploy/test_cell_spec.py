"""What every rank is told follows from the settings."""

import dataclasses

import pytest

from cluster.device import attention_in_int8, kv_quantization, torch_dtype
from deploy.cell_spec import build_cell_spec
from deploy.config import ShoalConfig
from deploy.models import default_model_directory
from model_shards.config import load_model_config
from model_shards.errors import ConfigError
from model_shards.kv_cache import bytes_per_block


@pytest.mark.parametrize(
    ("device", "transport", "backend"),
    [("cpu", "auto", "auto"), ("cuda", "auto", "nccl"), ("cpu", "gloo", "gloo"), ("cuda", "gloo", "gloo")],
)
def test_the_data_travels_by_what_the_device_is_made_for_unless_gloo_is_asked_for(device, transport, backend):
    settings = ShoalConfig.load(None, {"cell.device": device, "cell.transport": transport})
    assert build_cell_spec(settings).backend == backend


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["auto", "int8", "fp8"])
def test_a_quantized_cache_of_the_same_memory_holds_more_tokens_counted_as_the_cache_takes_them(dtype, kind):
    given = {"cell.dtype": dtype, "engine.kv_cache_memory_gb": 0.01}
    told = build_cell_spec(ShoalConfig.load(None, {**given, "engine.kv_cache_dtype": kind}))
    assert told.kv_cache_dtype == kind
    config = load_model_config(default_model_directory())
    of_a_block = bytes_per_block(config, told.limits.block_size, torch_dtype(told), kv_quantization(told))
    budget = int(0.01 * 2**30)
    assert budget - of_a_block < told.limits.num_blocks * of_a_block <= budget
    plain = build_cell_spec(ShoalConfig.load(None, given)).limits.num_blocks
    assert (told.limits.num_blocks > plain) == (kind != "auto")


def test_an_unknown_kind_of_cache_is_refused():
    told = dataclasses.replace(build_cell_spec(ShoalConfig.load(None, {})), kv_cache_dtype="int4")
    with pytest.raises(ConfigError, match="kv_cache_dtype must be one of auto, int8, fp8, got 'int4'"):
        kv_quantization(told)


def test_the_weights_of_attention_are_in_8_bits_when_the_settings_say_so():
    assert not attention_in_int8(build_cell_spec(ShoalConfig.load(None, {})))
    told = build_cell_spec(ShoalConfig.load(None, {"engine.attention_weights": "int8"}))
    assert attention_in_int8(told)
    with pytest.raises(ConfigError, match="attention_weights must be one of auto, int8, got 'fp8'"):
        attention_in_int8(dataclasses.replace(told, attention_weights="fp8"))


@pytest.mark.parametrize(("given", "told"), [({}, True), ({"engine.prefix_cache": False}, False)])
def test_blocks_are_shared_unless_the_settings_forbid_it(given, told):
    assert build_cell_spec(ShoalConfig.load(None, given)).limits.prefix_cache is told
