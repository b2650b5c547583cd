"""What each role loads: the published tensors, bit for bit, and not a byte of another slice."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_shards.config import ModelConfig, load_model_config
from model_shards.errors import CheckpointError
from model_shards.kernels.instructions import choose_instructions
from model_shards.kv_cache import LatentKVCache
from model_shards.weights import attention_slice_bytes, background, check_checkpoint, expert_slice_bytes, runs
from model_shards.weights import load_attention_model as load_attention
from model_shards.weights import load_expert_shard as load_experts
from tests.checkpoints import (
    branchy_model,
    cut_state,
    header_extents,
    merged,
    save_model,
    stored_extents,
    stored_state,
    watched_reads,
    write_indexed,
    write_single,
)
from tests.reference import (
    CPU,
    DirectExperts,
    hf_logits,
    model_config_of,
    random_tokens,
    relative_error,
    run_steps,
    single_sequence_batch,
)

MODEL = branchy_model()
CONFIG = model_config_of(MODEL.config)
STATE = stored_state(MODEL)
ALL_EXPERTS = tuple(range(8))
VARIANTS: dict[str, dict[str, object]] = {
    "every kind of tensor": {},
    "plain queries": {"q_lora_rank": None, "attention_bias": False},
    "tied embeddings": {"tie_word_embeddings": True},
    "no dense layer": {"first_k_dense_replace": 0},
    "experts in every second layer": {"moe_layer_freq": 2, "num_hidden_layers": 4},
}


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model over three files."""
    directory = tmp_path_factory.mktemp("indexed")
    write_indexed(directory, cut_state(STATE, 3))
    return directory


def assert_equal(loaded: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor.to(loaded[name].dtype)), name


def is_routed(name: str) -> bool:
    return ".mlp.experts." in name


def expert_of(name: str) -> int:
    return int(name.split(".mlp.experts.")[1].split(".")[0])


@pytest.mark.parametrize("max_file_size", [None, "60KB"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_roles_together_load_what_transformers_saved(
    tmp_path: Path, variant: str, max_file_size: str | None
) -> None:
    model = branchy_model(**VARIANTS[variant])
    save_model(model, tmp_path, max_file_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) == 1) == (max_file_size is None)
    config = load_model_config(tmp_path)
    check_checkpoint(tmp_path, config)

    attention = dict(load_attention(tmp_path, config, torch.float32, CPU).hf_slices())
    first = dict(load_experts(tmp_path, config, (0, 1, 2), torch.float32, CPU).hf_slices())
    second = dict(load_experts(tmp_path, config, (3, 4, 5, 6, 7), torch.float32, CPU).hf_slices())

    assert not attention.keys() & first.keys() & second.keys()
    assert_equal({**attention, **first, **second}, stored_state(model))


def test_a_loaded_model_gives_the_logits_of_transformers(indexed: Path) -> None:
    tokens = random_tokens(CONFIG.vocab_size, 20, seed=1)
    model = load_attention(indexed, CONFIG, torch.float32, CPU)
    shard = dict(load_experts(indexed, CONFIG, ALL_EXPERTS, torch.float32, CPU).hf_slices())
    cache = LatentKVCache(CONFIG, 5, 4, torch.float32, CPU)
    logits = run_steps(model, single_sequence_batch(tokens, 4), cache, DirectExperts(shard))
    assert relative_error(logits, hf_logits(MODEL, tokens)) < 1e-4


def test_an_attention_rank_reads_no_routed_expert(indexed: Path) -> None:
    with watched_reads() as log:
        load_attention(indexed, CONFIG, torch.float32, CPU)
    mine = [extent for name, extent in stored_extents(indexed).items() if not is_routed(name)]
    assert merged(log) == merged([*header_extents(indexed), *mine])


@settings(max_examples=15, deadline=None)
@given(experts=st.lists(st.sampled_from(ALL_EXPERTS), max_size=8).map(tuple))
def test_an_expert_rank_reads_its_own_experts_and_nothing_else(indexed: Path, experts: tuple[int, ...]) -> None:
    with watched_reads() as log:
        shard = load_experts(indexed, CONFIG, experts, torch.float32, CPU)
    mine = {name: at for name, at in stored_extents(indexed).items() if is_routed(name) and expert_of(name) in experts}
    assert merged(log) == merged([*header_extents(indexed), *mine.values()])
    assert_equal(dict(shard.hf_slices()), {name: STATE[name] for name in mine})
    assert shard.experts == experts


def test_an_expert_held_twice_has_its_weights_in_both_places(indexed: Path) -> None:
    shard = load_experts(indexed, CONFIG, (5, 2, 5), torch.float32, CPU)
    for layer in shard.layers:
        assert torch.equal(layer.gate_up_proj.weight[0], layer.gate_up_proj.weight[2])
        assert torch.equal(layer.down_proj.weight[0], layer.down_proj.weight[2])
        assert not torch.equal(layer.down_proj.weight[0], layer.down_proj.weight[1])


def test_tensors_are_read_in_the_order_of_their_files(indexed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "_THREADS", 1)
    with watched_reads() as log:
        load_attention(indexed, CONFIG, torch.float32, CPU)
    tensors = log[2 * len(header_extents(indexed)) :]  # a header is two reads: its length, its text
    assert tensors == sorted(tensors, key=lambda extent: (extent.file, extent.start))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float32])
def test_any_stored_dtype_becomes_the_wanted_one(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    state = {name: tensor.to(stored) for name, tensor in STATE.items()}
    write_single(tmp_path, state)
    attention = dict(load_attention(tmp_path, CONFIG, wanted, CPU).hf_slices())
    experts = dict(load_experts(tmp_path, CONFIG, ALL_EXPERTS, wanted, CPU).hf_slices())
    assert_equal({**attention, **experts}, state)
    gates = {name for name in state if name.endswith("mlp.gate.weight")}
    assert {attention[name].dtype for name in gates} == {torch.float32}
    assert {tensor.dtype for name, tensor in {**attention, **experts}.items() if name not in gates} == {wanted}


def test_files_may_hold_different_dtypes(tmp_path: Path) -> None:
    dtypes = (torch.bfloat16, torch.float32)
    state = {name: tensor.to(dtypes[position % 2]) for position, (name, tensor) in enumerate(STATE.items())}
    write_indexed(tmp_path, cut_state(state, 3))
    assert_equal(
        dict(load_experts(tmp_path, CONFIG, ALL_EXPERTS, torch.float32, CPU).hf_slices()),
        {name: tensor for name, tensor in state.items() if is_routed(name)},
    )


def test_progress_counts_the_bytes_of_the_slice(indexed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "RUN_BYTES", 1)  # so that no tensors are joined
    calls: list[tuple[int, int]] = []
    load_experts(indexed, CONFIG, (1, 6), torch.float32, CPU, lambda done, total: calls.append((done, total)))
    extents = stored_extents(indexed)
    sizes = [at.end - at.start for name, at in extents.items() if is_routed(name) and expert_of(name) in (1, 6)]
    assert {total for _, total in calls} == {sum(sizes)}
    assert (calls[0][0], calls[-1][0], len(calls)) == (0, sum(sizes), len(sizes) + 1)
    steps = [after - before for (before, _), (after, _) in pairwise(calls)]
    assert sorted(steps) == sorted(sizes)


def test_an_expert_rank_without_experts_reads_headers_only(indexed: Path) -> None:
    calls: list[tuple[int, int]] = []
    with watched_reads() as log:
        shard = load_experts(indexed, CONFIG, (), torch.float32, CPU, lambda done, total: calls.append((done, total)))
    assert merged(log) == merged(header_extents(indexed))
    assert calls == [(0, 0)]
    assert dict(shard.hf_slices()) == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_slice_bytes_are_those_of_the_loaded_tensors(indexed: Path, dtype: torch.dtype) -> None:
    attention = dict(load_attention(indexed, CONFIG, dtype, CPU).hf_slices())
    experts = dict(load_experts(indexed, CONFIG, (0, 4, 7), dtype, CPU).hf_slices())
    assert attention_slice_bytes(CONFIG, dtype, "cuda") == sum(tensor.nbytes for tensor in attention.values())
    # Laid out on a CPU, W_UK and W_UV are float32, or bfloat16 with W_UK twice.
    halves = [tensor for name, tensor in attention.items() if name.endswith("kv_b_proj.weight")]
    keys = (
        sum(tensor.numel() for tensor in halves)
        * CONFIG.qk_nope_head_dim
        // (CONFIG.qk_nope_head_dim + CONFIG.v_head_dim)
    )
    wider = attention_slice_bytes(CONFIG, dtype, "cpu") - attention_slice_bytes(CONFIG, dtype, "cuda")
    packed = choose_instructions(dtype) is not None
    assert wider == (2 * keys if packed else sum(tensor.numel() for tensor in halves) * (4 - dtype.itemsize))
    assert expert_slice_bytes(CONFIG, 3, dtype) == sum(tensor.nbytes for tensor in experts.values())


@pytest.mark.parametrize("damage", ["shorter", "gone"])
def test_a_file_that_changes_while_it_is_read_is_named(tmp_path: Path, damage: str) -> None:
    write_indexed(tmp_path, cut_state(STATE, 2))
    last = tmp_path / "part-1.safetensors"

    def spoil(done: int, total: int) -> None:
        if done == 0:
            last.unlink()
            if damage == "shorter":
                last.write_bytes(b"\0" * 100)

    rule = rf"{last} became shorter while tensor \S+ was read" if damage == "shorter" else rf"{last} cannot be"
    with pytest.raises(CheckpointError, match=rule):
        load_attention(tmp_path, CONFIG, torch.float32, CPU, spoil)


def test_a_checkpoint_that_does_not_fit_is_refused_by_every_role_before_a_tensor_is_read(tmp_path: Path) -> None:
    write_single(tmp_path, {name: tensor for name, tensor in STATE.items() if name != "model.norm.weight"})
    with watched_reads() as log:
        for load in (lambda config: load_attention(tmp_path, config, torch.float32, CPU), _load_first_expert(tmp_path)):
            with pytest.raises(CheckpointError, match=r"tensor model\.norm\.weight of shape \[64\] is missing"):
                load(CONFIG)
    assert merged(log) == header_extents(tmp_path)


def _load_first_expert(directory: Path):
    def load(config: ModelConfig) -> object:
        return load_experts(directory, config, (0,), torch.float32, CPU)

    return load
