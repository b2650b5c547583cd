"""Weights from a Hugging Face directory: each role reads its own slice, and memory holds that and one tensor more."""

from model_shards.weights.check import check_checkpoint
from model_shards.weights.loader import Progress, load_attention_model, load_expert_shard
from model_shards.weights.memory import (
    attention_slice_bytes,
    available_bytes,
    check_memory,
    container_memory,
    expert_slice_bytes,
)

__all__ = [
    "Progress",
    "attention_slice_bytes",
    "available_bytes",
    "check_checkpoint",
    "check_memory",
    "container_memory",
    "expert_slice_bytes",
    "load_attention_model",
    "load_expert_shard",
]
