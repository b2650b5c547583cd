"""From the settings to the CellSpec that every rank is told: resolves what the settings leave open."""

from pathlib import Path

from cluster.limits import MAX_MICRO_BATCHES, EngineLimits
from cluster.spec import CellSpec
from cluster.topology import Topology
from deploy.config import ShoalSettings
from model_shards.config import ModelConfig, load_model_config
from model_shards.errors import ConfigError
from model_shards.latent_row import row_bytes

_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}


def build_cell_spec(settings: ShoalSettings) -> CellSpec:
    """Raises CheckpointError for an unreadable config.json and ConfigError for settings that do not fit it."""
    directory = settings.model.path
    config = load_model_config(Path(directory))
    cell, engine = settings.cell, settings.engine
    num_blocks = _num_blocks(settings, config)
    capacity = num_blocks * engine.block_size
    asked = engine.max_model_len
    if asked is not None and asked > config.max_position_embeddings:
        raise ConfigError(
            f"engine.max_model_len is {asked}, the model's max_position_embeddings is {config.max_position_embeddings}"
        )
    if asked is not None and asked > capacity:
        raise ConfigError(f"engine.max_model_len is {asked}, the KV cache holds {capacity} tokens: give it more memory")
    limits = EngineLimits(
        max_model_len=asked if asked is not None else min(config.max_position_embeddings, capacity),
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        block_size=engine.block_size,
        num_blocks=num_blocks,
        num_micro_batches=MAX_MICRO_BATCHES if cell.micro_batches == "auto" else cell.micro_batches,
        choose_micro_batches=cell.micro_batches == "auto",
        max_decode_slowdown=engine.max_decode_slowdown,
        prefix_cache=engine.prefix_cache,
    )
    return CellSpec(
        model_directory=str(directory),
        topology=Topology(cell.attention_replicas, cell.expert_shards),
        device=cell.device,
        dtype=cell.dtype,
        limits=limits,
        load_timeout_s=cell.load_timeout_s,
        join_timeout_s=cell.join_timeout_s,
        exchange_timeout_s=cell.exchange_timeout_s,
        log_level=settings.log.level,
        expert_resource=settings.ray.expert_resource,
        kv_cache_dtype=engine.kv_cache_dtype,
        attention_weights=engine.attention_weights,
        data_backend=None if cell.transport == "auto" else cell.transport,
    )


def kv_bytes_per_token(config: ModelConfig, dtype: str, kv_cache_dtype: str) -> int:
    """Latent cache of one token in all layers, in bytes."""
    return config.num_hidden_layers * row_bytes(config, _ELEMENT_BYTES[dtype], kv_cache_dtype != "auto")


def _num_blocks(settings: ShoalSettings, config: ModelConfig) -> int:
    engine = settings.engine
    if engine.kv_cache_tokens is not None:
        tokens = engine.kv_cache_tokens
    else:
        assert engine.kv_cache_memory_gb is not None, "ShoalConfig.load fills one of the two"
        budget = int(engine.kv_cache_memory_gb * 2**30)
        tokens = budget // kv_bytes_per_token(config, settings.cell.dtype, engine.kv_cache_dtype)
    blocks = tokens // engine.block_size
    if blocks < 1:
        raise ConfigError(
            f"the KV cache would hold {tokens} tokens, less than one block of engine.block_size {engine.block_size}"
        )
    return blocks
