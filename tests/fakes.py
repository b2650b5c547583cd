"""Fakes that fail loudly: a model whose next token depends on every token it reads back through the cache."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

import torch

from model_shards.batch import AttentionBatch
from model_shards.config import ModelConfig, RopeConfig
from model_shards.errors import EpochAbortedError
from model_shards.kv_cache import LatentKVCache
from model_shards.routed import PendingCombine, RoutedExperts

FAKE_VOCAB_SIZE = 31
FAKE_NUM_LAYERS = 2


def fake_config() -> ModelConfig:
    """Two layers with experts; a cached row is (token id, position)."""
    return ModelConfig(
        vocab_size=FAKE_VOCAB_SIZE,
        hidden_size=1,
        intermediate_size=1,
        moe_intermediate_size=1,
        num_hidden_layers=FAKE_NUM_LAYERS,
        num_attention_heads=1,
        q_lora_rank=None,
        kv_lora_rank=1,
        qk_nope_head_dim=1,
        qk_rope_head_dim=1,
        v_head_dim=1,
        n_routed_experts=2,
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
        max_position_embeddings=1 << 20,
        rope=RopeConfig(theta=10_000.0, yarn=None),
        attention_bias=False,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_ids=(),
    )


def fake_cache(num_blocks: int, block_size: int) -> LatentKVCache:
    """A real cache, small, in a dtype that holds token ids exactly."""
    return LatentKVCache(fake_config(), num_blocks, block_size, torch.float64, torch.device("cpu"))


def fake_logits(token_ids: Sequence[int]) -> torch.Tensor:
    """[V] float32: a hash of every token and its place, so a wrong token anywhere gives another row."""
    state = 17
    for token_id in token_ids:
        state = (state * 1_000_003 + token_id + 1) % (1 << 31)
    return torch.tensor([((state >> 3) * (2 * v + 1) + state * v) % 97 / 12 for v in range(FAKE_VOCAB_SIZE)])


class FakeModel:
    """Keeps `forward_steps`' contract: yields once per layer after dispatch, writes a layer's cache before reading."""

    def forward_steps(
        self, batch: AttentionBatch, kv_cache: LatentKVCache, routed: RoutedExperts
    ) -> Generator[None, None, torch.Tensor]:
        """Logits [R, V] of the wanted tokens; asserts the batch's layout and what it reads from the cache."""
        check_batch(batch, kv_cache.block_size)
        contexts: list[list[list[int]]] = []  # [layer][sequence]
        tokens = batch.token_ids[:, None].double()
        for layer in range(FAKE_NUM_LAYERS):
            kv_cache.write(layer, batch.slot_mapping, tokens, batch.positions[:, None].double())
            contexts.append([self._read(batch, kv_cache, layer, s) for s in range(len(batch.context_lens))])
            ids = torch.zeros(batch.num_tokens, 1, dtype=torch.int64)
            away = routed.dispatch(layer, tokens, ids, torch.ones(batch.num_tokens, 1))
            yield
            assert torch.equal(away.wait(), tokens)
        assert all(context == contexts[0] for context in contexts)
        ends = {stop - 1: s for s, stop in enumerate(batch.cu_seqlens_q[1:])}
        rows = [fake_logits(contexts[0][ends[int(index)]]) for index in batch.logits_indices]
        return torch.stack(rows) if rows else torch.empty(0, FAKE_VOCAB_SIZE)

    def _read(self, batch: AttentionBatch, kv_cache: LatentKVCache, layer: int, sequence: int) -> list[int]:
        positions = torch.arange(batch.context_lens[sequence])
        size = kv_cache.block_size
        slots = batch.block_tables[sequence][positions // size] * size + positions % size
        rows = kv_cache.gather(layer, slots)
        assert torch.equal(rows[:, 1], positions.double()), "a slot holds another position than it should"
        return [int(token) for token in rows[:, 0]]


def check_batch(batch: AttentionBatch, block_size: int) -> None:
    """Asserts what every AttentionBatch promises."""
    num_sequences = len(batch.context_lens)
    assert batch.positions.shape == batch.slot_mapping.shape == batch.token_ids.shape
    assert len(batch.cu_seqlens_q) == num_sequences + 1
    assert batch.cu_seqlens_q[0] == 0
    assert batch.cu_seqlens_q[-1] == batch.num_tokens
    assert batch.block_tables.shape[0] == num_sequences
    assert len(set(batch.slot_mapping.tolist())) == batch.num_tokens, "two tokens share a slot"
    lengths = [b - a for a, b in zip(batch.cu_seqlens_q, batch.cu_seqlens_q[1:], strict=False)]
    assert all(length >= 1 for length in lengths)
    assert all(length == 1 for length in lengths[: batch.num_decodes])
    for s in range(num_sequences):
        start, stop = batch.cu_seqlens_q[s], batch.cu_seqlens_q[s + 1]
        context = batch.context_lens[s]
        positions = list(range(context - (stop - start), context))
        assert batch.positions[start:stop].tolist() == positions
        table = batch.block_tables[s].tolist()
        slots = [table[p // block_size] * block_size + p % block_size for p in positions]
        assert batch.slot_mapping[start:stop].tolist() == slots


@dataclass(frozen=True)
class _Echo:
    hidden: torch.Tensor
    fails: bool

    def wait(self) -> torch.Tensor:
        if self.fails:
            raise EpochAbortedError("the fake exchange was told to fail")
        return self.hidden


@dataclass
class FakeRouted:
    """Gives every token back as it came; fails in the combine of call number `fails_at`, counting from 0."""

    fails_at: int | None = None
    dispatched: list[int] = field(default_factory=list)  # tokens of each dispatch

    def dispatch(
        self, layer: int, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> PendingCombine:
        """One exchange."""
        assert topk_ids.shape == topk_weights.shape
        assert topk_ids.shape[0] == hidden.shape[0]
        assert layer == len(self.dispatched)
        self.dispatched.append(hidden.shape[0])
        return _Echo(hidden, len(self.dispatched) - 1 == self.fails_at)
