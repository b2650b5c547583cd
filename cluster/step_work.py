"""How much there is to do in a step, so that steps with contexts of different depth are compared fairly. Policy: no
torch.

A token costs what its weights cost, and what it takes to attend to its context, which grows with it:

    work of a token = 1 + context / C         C: the context that takes as long to attend to as all the rest
"""

from collections.abc import Sequence as SequenceOf

from cluster.scheduler import ScheduledChunk
from model_shards.config import ModelConfig


def context_worth_a_token(config: ModelConfig) -> float:
    """C, by the multiplications of either part. Where one is faster than the other, C is off by as much."""
    heads, hidden = config.num_attention_heads, config.hidden_size
    query_width = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
    queries = hidden * query_width
    if config.q_lora_rank is not None:
        queries = config.q_lora_rank * (hidden + query_width)
    latents = hidden * (config.kv_lora_rank + config.qk_rope_head_dim)
    output = heads * config.v_head_dim * hidden
    experts = config.num_experts_per_tok + (config.n_shared_experts or 0)
    num_moe = len(config.moe_layers)
    num_dense = config.num_hidden_layers - num_moe
    mlps = 3 * hidden * (num_dense * config.intermediate_size + num_moe * experts * config.moe_intermediate_size)
    weights = config.num_hidden_layers * (queries + latents + output) + mlps
    attending = config.num_hidden_layers * (query_width + heads * config.v_head_dim)
    return weights / attending


def mean_context(chunks: SequenceOf[ScheduledChunk]) -> int:
    """Tokens that a token of the prefills among them attends to, on average; 0 where there are none."""
    prefills = [chunk for chunk in chunks if not chunk.is_decode]
    num_tokens = sum(chunk.num_tokens for chunk in prefills)
    return _attended(prefills) // max(num_tokens, 1)


def work_of(chunks: SequenceOf[ScheduledChunk], context_worth: float) -> float:
    """In tokens without a context. Decodes count as such: their contexts grow by a token a step, and what is measured
    of them is as new as the steps."""
    prefills = [chunk for chunk in chunks if not chunk.is_decode]
    return sum(chunk.num_tokens for chunk in chunks) + _attended(prefills) / context_worth


def _attended(chunks: SequenceOf[ScheduledChunk]) -> int:
    """Pairs of a token and one that it attends to: token i of a sequence attends to i + 1."""
    return sum(chunk.num_tokens * (chunk.start + chunk.stop + 1) // 2 for chunk in chunks)
