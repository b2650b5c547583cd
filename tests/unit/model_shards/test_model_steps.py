"""The generator contract of the model, its parameters, and the order in which micro-batches interleave."""

from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from model_shards.config import load_model_config
from model_shards.kv_cache import LatentKVCache
from model_shards.model import AttentionModel
from model_shards.pipeline import run_micro_batches
from model_shards.quantization import Quantization
from model_shards.routed import PendingCombine, RoutedExperts
from tests.reference import (
    CPU,
    DirectExperts,
    ShardExperts,
    attention_model_of,
    empty_batch,
    expert_shard_of,
    hf_greedy,
    make_hf_config,
    published_state_dict,
    random_hf_model,
    random_tokens,
    relative_error,
    run_steps,
    save_checkpoint,
    single_sequence_batch,
)

REFERENCE = random_hf_model(make_hf_config(num_hidden_layers=4, moe_layer_freq=2), seed=21)
MODEL = attention_model_of(REFERENCE)
MOE_LAYERS = (2,)


def new_cache(dtype: torch.dtype = torch.float32) -> LatentKVCache:
    return LatentKVCache(MODEL.config, 8, 4, dtype, CPU)


@dataclass
class _Recorder(RoutedExperts):
    """Writes down when tokens leave and come back."""

    name: int
    log: list[str]
    inner: RoutedExperts

    def dispatch(
        self, layer: int, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> PendingCombine:
        self.log.append(f"D(l{layer},{self.name})")
        return _RecordedCombine(
            f"C(l{layer},{self.name})", self.log, self.inner.dispatch(layer, hidden, topk_ids, topk_weights)
        )


@dataclass
class _RecordedCombine(PendingCombine):
    event: str
    log: list[str]
    inner: PendingCombine

    def wait(self) -> torch.Tensor:
        self.log.append(self.event)
        return self.inner.wait()


def test_an_empty_batch_still_dispatches_at_every_moe_layer() -> None:
    reference = random_hf_model(make_hf_config(first_k_dense_replace=0, q_lora_rank=24), seed=22)
    model = attention_model_of(reference)
    routed = DirectExperts(published_state_dict(reference))
    logits = run_steps(model, empty_batch(), new_cache(), routed)
    assert logits.shape == (0, 131)
    assert routed.calls == [(0, 0), (1, 0), (2, 0)]


@pytest.mark.parametrize("overrides", [{}, {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}])
def test_an_empty_batch_passes_every_kind_of_gate(overrides: dict[str, object]) -> None:
    reference = random_hf_model(make_hf_config(norm_topk_prob=True, **overrides), seed=23)
    logits = run_steps(
        attention_model_of(reference), empty_batch(), new_cache(), ShardExperts(expert_shard_of(reference))
    )
    assert logits.shape == (0, 131)


def test_it_yields_once_per_moe_layer_between_dispatch_and_combine() -> None:
    reference = random_hf_model(make_hf_config(), seed=24)
    log: list[str] = []
    routed = _Recorder(0, log, ShardExperts(expert_shard_of(reference)))
    steps = attention_model_of(reference).forward_steps(single_sequence_batch([5, 6], 4), new_cache(), routed)
    next(steps)
    assert log == ["D(l1,0)"]
    next(steps)
    assert log == ["D(l1,0)", "C(l1,0)", "D(l2,0)"]
    with pytest.raises(StopIteration):
        next(steps)
    assert log[-1] == "C(l2,0)"


def test_what_is_computed_meanwhile_has_its_own_number_of_threads(monkeypatch) -> None:
    reference = random_hf_model(make_hf_config(), seed=24)
    model = attention_model_of(reference)
    model.limit_meanwhile(2)
    seen: list[int] = []

    def shared(hidden: torch.Tensor) -> torch.Tensor:
        seen.append(torch.get_num_threads())
        if len(seen) > 2:
            raise RuntimeError("fails meanwhile")
        return torch.zeros_like(hidden)

    for layer in model.model.decoder_layers[1:]:
        monkeypatch.setattr(layer.mlp.shared_experts, "forward", shared)
    routed = ShardExperts(expert_shard_of(reference))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        run_steps(model, single_sequence_batch([5, 6], 4), new_cache(), routed)
        assert torch.get_num_threads() == 3
        with pytest.raises(RuntimeError, match="fails meanwhile"):
            run_steps(model, single_sequence_batch([5, 6], 4), new_cache(), routed)
        assert torch.get_num_threads() == 3
        torch.set_num_threads(1)
        seen.pop()
        seen.pop()
        with pytest.raises(RuntimeError, match="fails meanwhile"):
            run_steps(model, single_sequence_batch([5, 6], 4), new_cache(), routed)
    finally:
        torch.set_num_threads(before)
    assert seen == [2, 1, 1]  # at most, and never more than there are


def test_micro_batches_interleave_in_the_documented_order_and_keep_their_results() -> None:
    reference = random_hf_model(make_hf_config(), seed=25)
    model = attention_model_of(reference)
    experts = ShardExperts(expert_shard_of(reference))
    batches = [single_sequence_batch(random_tokens(131, length, length), 4) for length in (5, 3)] + [empty_batch()]
    expected = [run_steps(model, batch, new_cache(), experts) for batch in batches]
    log: list[str] = []
    steps = [model.forward_steps(b, new_cache(), _Recorder(i, log, experts)) for i, b in enumerate(batches)]
    results = run_micro_batches(steps, meanwhile=lambda: log.append("meanwhile"))
    assert " ".join(log) == (
        "D(l1,0) D(l1,1) D(l1,2) meanwhile C(l1,0) D(l2,0) C(l1,1) D(l2,1) C(l1,2) D(l2,2) C(l2,0) C(l2,1) C(l2,2)"
    )
    assert all(torch.equal(result, wanted) for result, wanted in zip(results, expected, strict=True))


def test_a_failing_micro_batch_closes_the_others_and_passes_its_error_on() -> None:
    closed: list[str] = []

    def failing() -> Generator[None, None, torch.Tensor]:
        yield
        raise ValueError("lost")

    def endless() -> Generator[None, None, torch.Tensor]:
        try:
            while True:
                yield
        finally:
            closed.append("endless")

    waiting = endless()  # held here, so that it is not closed by being forgotten
    with pytest.raises(ValueError, match="lost"):
        run_micro_batches([waiting, failing()])
    assert closed == ["endless"]


def test_no_micro_batches_give_no_results() -> None:
    assert run_micro_batches([]) == []


@pytest.mark.parametrize("quantization", [None, *Quantization])
def test_running_a_step_again_changes_neither_logits_nor_cache(quantization: Quantization | None) -> None:
    routed = ShardExperts(expert_shard_of(REFERENCE))
    cache = LatentKVCache(MODEL.config, 8, 4, torch.float32, CPU, quantization)
    batch = single_sequence_batch(random_tokens(131, 9, 1), 4)
    first = run_steps(MODEL, batch, cache, routed)
    before = cache.data.clone()
    assert torch.equal(run_steps(MODEL, batch, cache, routed), first)
    assert torch.equal(cache.data, before)


def test_logits_are_computed_for_the_wanted_tokens_alone() -> None:
    routed = ShardExperts(expert_shard_of(REFERENCE))
    tokens = random_tokens(131, 9, 1)
    whole = run_steps(MODEL, single_sequence_batch(tokens, 4), new_cache(), routed)
    last = run_steps(MODEL, single_sequence_batch(tokens, 4, all_logits=False), new_cache(), routed)
    assert last.shape == (1, 131)
    assert relative_error(last[0], whole[-1]) < 1e-6


def test_nothing_records_a_graph() -> None:
    logits = run_steps(MODEL, single_sequence_batch([1, 2], 4), new_cache(), ShardExperts(expert_shard_of(REFERENCE)))
    assert not logits.requires_grad
    assert not any(parameter.requires_grad for parameter in MODEL.parameters())


def test_it_runs_under_inference_mode_with_a_cache_made_outside() -> None:
    routed = ShardExperts(expert_shard_of(REFERENCE))
    batch = single_sequence_batch(random_tokens(131, 6, 2), 4)
    plain = run_steps(MODEL, batch, new_cache(), routed)
    cache = new_cache()
    with torch.inference_mode():
        assert torch.equal(run_steps(MODEL, batch, cache, routed), plain)


@pytest.mark.parametrize("overrides", [{}, {"q_lora_rank": 24, "attention_bias": True}, {"tie_word_embeddings": True}])
def test_slices_and_shards_together_are_exactly_the_tensors_of_a_saved_checkpoint(
    tmp_path: Path, overrides: dict[str, object]
) -> None:
    reference = random_hf_model(make_hf_config(**overrides), seed=26)
    save_checkpoint(reference, tmp_path)
    config = load_model_config(tmp_path)
    model = AttentionModel(config, torch.float32, CPU)
    slices = dict(model.hf_slices()) | dict(expert_shard_of(reference).hf_slices())
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        on_disk = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert {name: tuple(tensor.shape) for name, tensor in slices.items()} == on_disk
    assert ("lm_head.weight" in slices) == (not config.tie_word_embeddings)


def test_only_the_gate_stays_in_float32_in_a_bfloat16_model() -> None:
    model = AttentionModel(MODEL.config, torch.bfloat16, CPU)
    wide = {name for name, tensor in model.hf_slices() if tensor.dtype == torch.float32}
    assert wide == {f"model.layers.{layer}.mlp.gate.weight" for layer in MOE_LAYERS}


def test_greedy_decoding_equals_that_of_transformers() -> None:
    reference = random_hf_model(make_hf_config(q_lora_rank=24), seed=27)
    model = attention_model_of(reference)
    routed = ShardExperts(expert_shard_of(reference))
    prompt = random_tokens(131, 7, 3)
    cache = new_cache()
    logits = run_steps(model, single_sequence_batch(prompt, 4, all_logits=False), cache, routed)
    generated = [int(logits.argmax())]
    while len(generated) < 16:
        position = len(prompt) + len(generated) - 1
        step = single_sequence_batch(generated[-1:], 4, start=position, decode=True)
        generated.append(int(run_steps(model, step, cache, routed).argmax()))
    assert generated == hf_greedy(reference, prompt, 16)
