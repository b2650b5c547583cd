"""Milliseconds of one layer's attention of many decodes on one thread, with random weights and scattered cache blocks.
They are of the thread's CPU time, in which waiting for others on the machine is not.

python -m benchmarks.attention [--dtype bfloat16] [--kv-cache-dtype int8] [--case DECODES,CONTEXT ...]

`layer` is attention as a module; `linear` is the time of the four projections alone (q_a, q_b, kv_a, o), which is part
of it. `program` is what a rank runs where there are compiled programs: attention and the norms beside it in one call.
"""

import functools
import itertools
import statistics
import time
from collections.abc import Callable

import click
import torch
from torch import nn

from model_shards.attention_plan import plan_attention
from model_shards.batch import AttentionBatch
from model_shards.compiled.lane import Lane
from model_shards.compiled.layer import pack_layer
from model_shards.config import ModelConfig, RopeConfig
from model_shards.kv_cache import LatentKVCache
from model_shards.mla import MultiHeadLatentAttention
from model_shards.model import DecoderLayer
from model_shards.norm import RMSNorm
from model_shards.packing import program_instructions
from model_shards.quantization import Quantization
from model_shards.rope import RotaryEmbedding

CPU = torch.device("cpu")
_BLOCK_SIZE = 16
_LAYERS = 2  # read in turn, so that none is left in the caches
CONFIG = ModelConfig(
    vocab_size=32000,
    hidden_size=1024,
    intermediate_size=4096,
    moe_intermediate_size=512,
    num_hidden_layers=_LAYERS,
    num_attention_heads=16,
    q_lora_rank=512,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    n_routed_experts=None,
    n_shared_experts=None,
    num_experts_per_tok=1,
    n_group=1,
    topk_group=1,
    topk_method="greedy",
    routed_scaling_factor=1.0,
    norm_topk_prob=False,
    first_k_dense_replace=0,
    moe_layer_freq=1,
    rms_norm_eps=1e-6,
    max_position_embeddings=8192,
    rope=RopeConfig(10000.0, None),
    attention_bias=False,
    tie_word_embeddings=False,
    bos_token_id=0,
    eos_token_ids=(1,),
)


def random_layer(config: ModelConfig, dtype: torch.dtype) -> MultiHeadLatentAttention:
    """Weights at the scale of a trained layer, laid out as the loader does."""
    layer = MultiHeadLatentAttention(config, dtype, CPU)
    fill(layer)
    layer.lay_out_up_projections()
    for projection in (layer.q_a_proj, layer.q_b_proj, layer.kv_a_proj_with_mqa, layer.o_proj):
        projection.lay_out()
    return layer


def fill(module: nn.Module) -> None:
    """Weights at the scale of a trained layer."""
    for parameter in module.parameters():
        if parameter.dim() == 1:
            parameter.data.fill_(1)  # of a norm
        else:
            parameter.data.normal_(0, parameter.shape[-1] ** -0.5)


def random_lane(config: ModelConfig, dtype: torch.dtype) -> Lane | None:
    """The programs of such layers, each with a dense MLP that is not run; None: there are none on this machine."""
    instructions = program_instructions(dtype, CPU)
    if instructions is None:
        return None
    decoders = [DecoderLayer(config, index, dtype, CPU) for index in range(_LAYERS)]
    last_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, CPU)
    for module in (*decoders, last_norm):
        fill(module)
    layers = [
        pack_layer(
            config, layer.input_layernorm, layer.self_attn, layer.post_attention_layernorm, layer.mlp, instructions
        )
        for layer in decoders
    ]
    return Lane(config, layers, last_norm)


def decode_batch(decodes: int, context: int) -> AttentionBatch:
    """One token each of `decodes` sequences whose blocks lie anywhere."""
    width = -(-context // _BLOCK_SIZE)
    tables = torch.randperm(decodes * width).view(decodes, width)
    last = context - 1
    return AttentionBatch(
        token_ids=torch.zeros(decodes, dtype=torch.int64),
        positions=torch.full((decodes,), last),
        slot_mapping=tables[:, last // _BLOCK_SIZE] * _BLOCK_SIZE + last % _BLOCK_SIZE,
        cu_seqlens_q=tuple(range(decodes + 1)),
        context_lens=(context,) * decodes,
        block_tables=tables,
        num_decodes=decodes,
        logits_indices=torch.arange(decodes),
    )


def median_ms(work: Callable[[int], object], repeats: int) -> float:
    """Of `repeats` calls with the layer's index, after one that warms up each."""
    for index in range(_LAYERS):
        work(index)
    times = []
    for number in range(repeats):
        begun = time.thread_time()
        work(number % _LAYERS)
        times.append((time.thread_time() - begun) * 1e3)
    return statistics.median(times)


def measure(decodes: int, context: int, dtype: torch.dtype, quantization: Quantization | None) -> str:
    """One line."""
    torch.manual_seed(0)
    layers = [random_layer(CONFIG, dtype) for _ in range(_LAYERS)]
    batch = decode_batch(decodes, context)
    cache = LatentKVCache(CONFIG, batch.block_tables.numel(), _BLOCK_SIZE, dtype, CPU, quantization)
    slots = torch.arange(cache.num_blocks * _BLOCK_SIZE)
    for index in range(_LAYERS):
        kv_c, k_pe = torch.randn(len(slots), CONFIG.kv_lora_rank), torch.randn(len(slots), CONFIG.qk_rope_head_dim)
        cache.write(index, slots, kv_c, k_pe)
    hidden = torch.randn(decodes, CONFIG.hidden_size).to(dtype)
    mixed = torch.randn(decodes, CONFIG.num_attention_heads * CONFIG.v_head_dim).to(dtype)
    rotary = RotaryEmbedding(CONFIG.rope, CONFIG.qk_rope_head_dim, CPU)(batch.positions)
    plan = plan_attention(batch, _BLOCK_SIZE)

    def attention(index: int) -> None:
        layers[index](index, hidden, rotary, batch.slot_mapping, plan, cache)

    def linear(index: int) -> None:
        layer = layers[index]
        layer.q_b_proj(layer.q_a_proj(hidden))
        layer.kv_a_proj_with_mqa(hidden)
        layer.o_proj(mixed)

    repeats = max(5, 20_000 // (decodes * context) * 10)
    as_program = ""
    lane = random_lane(CONFIG, dtype)
    if lane is not None:
        lane.begin(batch, hidden, rotary, plan, cache)
        whole = functools.partial(lane.whole, threads=1, with_mlp=False)
        as_program = f"program {median_ms(whole, repeats):8.3f} ms; "
    planning = median_ms(lambda _: plan_attention(batch, _BLOCK_SIZE), 20)
    return (
        f"{decodes:3d} decodes at {context:5d}, {dtype}, cache {quantization or 'plain'}: "
        f"layer {median_ms(attention, repeats):8.3f} ms, of it linear {median_ms(linear, repeats):7.3f} ms; "
        f"{as_program}plan, once a step, {planning:6.3f} ms"
    )


@click.command()
@click.option("--dtype", "dtypes", multiple=True, default=("bfloat16", "float32"), show_default=True)
@click.option("--kv-cache-dtype", "kinds", multiple=True, default=("auto",), show_default=True)
@click.option("--case", "cases", multiple=True, default=("32,160", "8,160", "1,64", "32,4096"), show_default=True)
def main(dtypes: tuple[str, ...], kinds: tuple[str, ...], cases: tuple[str, ...]) -> None:
    """Measures; see the top of the file."""
    torch.set_num_threads(1)
    for dtype in dtypes:
        for kind, case in itertools.product(kinds, cases):
            decodes, context = (int(part) for part in case.split(","))
            quantization = None if kind == "auto" else Quantization(kind)
            click.echo(measure(decodes, context, getattr(torch, dtype), quantization))


if __name__ == "__main__":
    main()
