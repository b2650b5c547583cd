"""Slow, obvious references: transformers with random weights, plain loops, and batches built by hand.

transformers departs from DeepSeek's published code in four places; a random model here is mended to follow the
published code: `norm_topk_prob`, `moe_layer_freq`, no shared experts, no routed experts.
"""

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2MLP, DeepseekV2Moe

from model_shards.batch import AttentionBatch
from model_shards.config import ModelConfig, load_model_config
from model_shards.experts import ExpertShardModel
from model_shards.gate import Routing
from model_shards.kv_cache import LatentKVCache
from model_shards.model import AttentionModel
from model_shards.routed import PendingCombine, RoutedExperts

CPU = torch.device("cpu")
PLAIN_ROPE: dict[str, object] = {"rope_type": "default", "rope_theta": 10000.0}
YARN_ROPE: dict[str, object] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}
SMALL: dict[str, object] = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": False,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "rope_parameters": PLAIN_ROPE,
}


# --- transformers -----------------------------------------------------------------------------------------------


def make_hf_config(**overrides: object) -> DeepseekV2Config:
    """A small transformers config; None is allowed for n_shared_experts and n_routed_experts."""
    values = {**SMALL, **overrides}
    published: dict[str, object] = {}
    for key in ("n_shared_experts", "n_routed_experts"):
        if values[key] is None:  # transformers wants a number; `mend` takes the modules out again
            published[key] = None
            values[key] = SMALL[key]
    if "n_routed_experts" in published:
        published["first_k_dense_replace"] = values["first_k_dense_replace"]
        values["first_k_dense_replace"] = values["num_hidden_layers"]
    config = DeepseekV2Config(**values, architectures=["DeepseekV2ForCausalLM"])
    config.published_overrides = published
    return config


def published_config(config: DeepseekV2Config) -> dict[str, object]:
    """What config.json of this model says."""
    values: dict[str, object] = config.to_dict()
    values.pop("published_overrides")
    return {**values, **config.published_overrides}


def model_config_of(config: DeepseekV2Config) -> ModelConfig:
    """The same shape as this package reads it, by way of a config.json."""
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(published_config(config)))
        return load_model_config(Path(directory))


@torch.no_grad()
def random_hf_model(config: DeepseekV2Config, seed: int) -> DeepseekV2ForCausalLM:
    """float32 weights at the scale of a trained model, with a router whose choices stand well apart."""
    generator = torch.Generator().manual_seed(seed)
    model = DeepseekV2ForCausalLM(config).eval()
    _mend(model, config)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("gate.weight"):
            parameter.copy_(noise * 4 / config.hidden_size**0.5)
        elif "norm" in name:
            parameter.copy_(1 + 0.1 * noise)
        elif "embed_tokens" in name:
            parameter.copy_(noise)
        elif name.endswith("bias"):
            parameter.copy_(0.5 * noise)
        else:
            parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    if config.tie_word_embeddings:
        model.tie_weights()
    return model.requires_grad_(False)


def save_checkpoint(model: DeepseekV2ForCausalLM, directory: Path) -> None:
    """Writes a Hugging Face directory (published tensor names) with a config.json that is true to the model."""
    model.save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(published_config(model.config), indent=2))


def published_state_dict(model: DeepseekV2ForCausalLM) -> dict[str, torch.Tensor]:
    """The tensors under their names on disk: one per expert and projection, where memory holds them fused."""
    state: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            prefix = name.removesuffix(".gate_up_proj")
            for expert, fused in enumerate(tensor):
                gate, up = fused.chunk(2)
                state[f"{prefix}.{expert}.gate_proj.weight"] = gate
                state[f"{prefix}.{expert}.up_proj.weight"] = up
        elif name.endswith("experts.down_proj"):
            prefix = name.removesuffix(".down_proj")
            for expert, down in enumerate(tensor):
                state[f"{prefix}.{expert}.down_proj.weight"] = down
        else:
            state[name] = tensor
    return state


@torch.no_grad()
def hf_logits(model: DeepseekV2ForCausalLM, token_ids: Sequence[int]) -> torch.Tensor:
    """Logits [T, V] of one whole sequence."""
    return model(input_ids=torch.tensor([list(token_ids)]), use_cache=False).logits[0]


def hf_greedy(model: DeepseekV2ForCausalLM, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """The next `num_tokens` greedy tokens by a whole forward each; does not stop at an end token."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(int(hf_logits(model, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


class _PublishedGate(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts or 0, config.hidden_size))

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        routing = reference_gate(self.config, hidden.flatten(0, -2), self.weight)
        return hidden, routing.topk_weights, routing.topk_ids


class _NoSharedExperts(nn.Module):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(hidden)


def _mend(model: DeepseekV2ForCausalLM, config: DeepseekV2Config) -> None:
    published = model_config_of(config)
    for index, layer in enumerate(model.model.layers):
        if not published.is_moe_layer(index):
            layer.mlp = DeepseekV2MLP(config)
        elif isinstance(layer.mlp, DeepseekV2Moe):
            if published.n_shared_experts is None:
                layer.mlp.shared_experts = _NoSharedExperts()
            if published.norm_topk_prob:
                layer.mlp.gate = _PublishedGate(published)


# --- plain references -------------------------------------------------------------------------------------------


def reference_gate(config: ModelConfig, hidden: torch.Tensor, weight: torch.Tensor) -> Routing:
    """MoEGate of DeepSeek's published modelling code, one token at a time; experts best first."""
    ids: list[list[int]] = []
    weights: list[list[float]] = []
    for token in hidden.float():
        scores = torch.softmax(weight.float() @ token, dim=0).tolist()
        allowed = list(range(len(scores)))
        if config.topk_method == "group_limited_greedy":
            size = len(scores) // config.n_group
            best_of_group = [max(scores[group * size : (group + 1) * size]) for group in range(config.n_group)]
            groups = sorted(range(config.n_group), key=lambda group: -best_of_group[group])[: config.topk_group]
            allowed = [expert for expert in allowed if expert // size in groups]
        chosen = sorted(allowed, key=lambda expert: -scores[expert])[: config.num_experts_per_tok]
        values = [scores[expert] for expert in chosen]
        if config.num_experts_per_tok > 1 and config.norm_topk_prob:
            total = sum(values) + 1e-20
            values = [value / total for value in values]
        else:
            values = [value * config.routed_scaling_factor for value in values]
        ids.append(chosen)
        weights.append(values)
    shape = (hidden.shape[0], config.num_experts_per_tok)
    return Routing(
        torch.tensor(ids, dtype=torch.int64).view(shape), torch.tensor(weights, dtype=torch.float32).view(shape)
    )


def reference_expert(weights: Mapping[str, torch.Tensor], layer: int, expert: int, row: torch.Tensor) -> torch.Tensor:
    """One logical expert on one row [H], from published tensor names."""
    prefix = f"model.layers.{layer}.mlp.experts.{expert}"
    row = row.to(weights[f"{prefix}.gate_proj.weight"].dtype)
    gate = weights[f"{prefix}.gate_proj.weight"] @ row
    up = weights[f"{prefix}.up_proj.weight"] @ row
    return weights[f"{prefix}.down_proj.weight"] @ (F.silu(gate) * up)


@dataclass(frozen=True)
class _Arrived(PendingCombine):
    result: torch.Tensor

    def wait(self) -> torch.Tensor:
        return self.result


@dataclass
class DirectExperts(RoutedExperts):
    """All routed experts in this process, by a plain loop over tokens and experts."""

    weights: Mapping[str, torch.Tensor]  # published names
    calls: list[tuple[int, int]] = field(default_factory=list)  # (layer, T) of every dispatch

    def dispatch(
        self, layer: int, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> PendingCombine:
        self.calls.append((layer, hidden.shape[0]))
        total = torch.zeros(hidden.shape, dtype=torch.float32)
        for token in range(hidden.shape[0]):
            for expert, weight in zip(topk_ids[token].tolist(), topk_weights[token].tolist(), strict=True):
                total[token] += weight * reference_expert(self.weights, layer, expert, hidden[token]).float()
        return _Arrived(total.to(hidden.dtype))


@dataclass
class ShardExperts(RoutedExperts):
    """All routed experts as one `ExpertShardModel` holding them in order; for prompts too long for a loop."""

    shard: ExpertShardModel

    def dispatch(
        self, layer: int, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> PendingCombine:
        return _Arrived(self.shard(layer, hidden, topk_ids, topk_weights))


def fill(slices: Iterable[tuple[str, torch.Tensor]], weights: Mapping[str, torch.Tensor]) -> None:
    """Copies published tensors into `hf_slices()` of a model."""
    for name, target in slices:
        assert target.shape == weights[name].shape, name
        target.copy_(weights[name])


def attention_model_of(model: DeepseekV2ForCausalLM, dtype: torch.dtype = torch.float32) -> AttentionModel:
    """The same weights in this package's model."""
    attention = AttentionModel(model_config_of(model.config), dtype, CPU)
    fill(attention.hf_slices(), published_state_dict(model))
    return attention


def expert_shard_of(
    model: DeepseekV2ForCausalLM, experts: tuple[int, ...] | None = None, dtype: torch.dtype = torch.float32
) -> ExpertShardModel:
    """The same weights in one shard; all experts by default."""
    config = model_config_of(model.config)
    held = tuple(range(config.n_routed_experts or 0)) if experts is None else experts
    shard = ExpertShardModel(config, held, dtype, CPU)
    fill(shard.hf_slices(), published_state_dict(model))
    return shard


# --- batches ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chunk:
    """Tokens of one sequence in one micro-batch."""

    token_ids: Sequence[int]
    start: int  # position of the first token: how many are in the cache already
    block_table: Sequence[int]
    decode: bool = False
    all_logits: bool = True  # otherwise the last token's only


def build_batch(chunks: Sequence[Chunk], block_size: int) -> AttentionBatch:
    """Lays chunks end to end; decodes must come first."""
    assert sorted(chunks, key=lambda chunk: not chunk.decode) == list(chunks), "decodes come first"
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    starts = [0]
    wanted: list[int] = []
    for chunk in chunks:
        for offset, token in enumerate(chunk.token_ids):
            position = chunk.start + offset
            if chunk.all_logits or offset == len(chunk.token_ids) - 1:
                wanted.append(len(tokens))
            tokens.append(token)
            positions.append(position)
            slots.append(chunk.block_table[position // block_size] * block_size + position % block_size)
        starts.append(len(tokens))
    width = max((len(chunk.block_table) for chunk in chunks), default=0)
    tables = [[*chunk.block_table, *[0] * (width - len(chunk.block_table))] for chunk in chunks]
    return AttentionBatch(
        token_ids=torch.tensor(tokens, dtype=torch.int64),
        positions=torch.tensor(positions, dtype=torch.int64),
        slot_mapping=torch.tensor(slots, dtype=torch.int64),
        cu_seqlens_q=tuple(starts),
        context_lens=tuple(chunk.start + len(chunk.token_ids) for chunk in chunks),
        block_tables=torch.tensor(tables, dtype=torch.int64).view(len(chunks), width),
        num_decodes=sum(chunk.decode for chunk in chunks),
        logits_indices=torch.tensor(wanted, dtype=torch.int64),
    )


def single_sequence_batch(
    token_ids: Sequence[int], block_size: int, start: int = 0, decode: bool = False, all_logits: bool = True
) -> AttentionBatch:
    """One chunk of one sequence whose blocks are 0, 1, 2, ..."""
    blocks = -(-(start + len(token_ids)) // block_size)
    return build_batch([Chunk(token_ids, start, range(blocks), decode, all_logits)], block_size)


def empty_batch() -> AttentionBatch:
    """A micro-batch without tokens."""
    return build_batch([], block_size=1)


def run_steps(
    model: AttentionModel, batch: AttentionBatch, kv_cache: LatentKVCache, routed: RoutedExperts
) -> torch.Tensor:
    """Drives one micro-batch to its logits."""
    steps = model.forward_steps(batch, kv_cache, routed)
    while True:
        try:
            next(steps)
        except StopIteration as finished:
            return finished.value


def chunks_of(token_ids: Sequence[int], size: int) -> Iterator[tuple[int, Sequence[int]]]:
    """(start, tokens) of consecutive chunks."""
    for start in range(0, len(token_ids), size):
        yield start, token_ids[start : start + size]


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over norm."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def random_tokens(vocab_size: int, length: int, seed: int) -> list[int]:
    """Token ids from a seed."""
    return torch.randint(vocab_size, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
