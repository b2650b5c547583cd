"""A shard's experts as compiled programs against float64, and against the modules that they were compiled from."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from model_shards.config import ModelConfig
from model_shards.experts import ExpertShardModel
from model_shards.kernels.program import Halt
from model_shards.packing import program_instructions
from model_shards.quantization import SCALE_SUFFIX, Quantization
from tests.reference import CPU, make_hf_config, model_config_of, relative_error

EXPERTS = (0, 3, 4, 7, 9)
KINDS = [
    kind
    for kind, dtype in ((None, torch.bfloat16), (Quantization.INT8, torch.int8))
    if program_instructions(dtype, CPU) is not None
]
pytestmark = pytest.mark.skipif(not KINDS, reason="this CPU has no programs")


def config(hidden: int = 96, width: int = 48) -> ModelConfig:
    return model_config_of(
        make_hf_config(hidden_size=hidden, moe_intermediate_size=width, n_routed_experts=10, num_experts_per_tok=3)
    )


def shard(kind: Quantization | None, shape: ModelConfig) -> ExpertShardModel:
    generator = torch.Generator().manual_seed(1)
    model = ExpertShardModel(shape, EXPERTS, torch.bfloat16, CPU, kind)
    for name, view in model.hf_slices():
        if name.endswith("scale_inv"):
            view.copy_(torch.rand(view.shape, generator=generator) / 127)
        elif kind is Quantization.INT8:
            view.copy_(torch.randint(-127, 128, view.shape, generator=generator))
        else:
            view.copy_(torch.randn(view.shape, generator=generator) * view.shape[-1] ** -0.5)
    return model


SHARDS = {kind: (shard(kind, config()), shard(kind, config())) for kind in KINDS}
for _, compiled in SHARDS.values():
    compiled.lay_out()


def exact(
    kind: Quantization | None, layer: int, hidden: torch.Tensor, local_ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """In float64, expert for expert."""
    stored = dict(SHARDS[kind][0].hf_slices())

    def matrix(expert: int, part: str) -> torch.Tensor:
        name = f"model.layers.{layer}.mlp.experts.{EXPERTS[expert]}.{part}_proj.weight"
        scale = 1.0 if kind is None else stored[name + SCALE_SUFFIX].double()[:, None]
        return stored[name].double() * scale

    sums = torch.zeros(hidden.shape, dtype=torch.float64)
    for row, slot in (local_ids >= 0).nonzero().tolist():
        gate, up, down = (matrix(int(local_ids[row, slot]), part) for part in ("gate", "up", "down"))
        x = hidden[row].double()
        sums[row] += weights[row, slot].double() * (down @ (F.silu(gate @ x) * (up @ x)))
    return sums


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(
    ids=st.lists(st.lists(st.integers(-1, len(EXPERTS) - 1), min_size=3, max_size=3), max_size=20),
    layer=st.sampled_from(config().moe_layers),
    wide=st.booleans(),
)
def test_any_routing_gives_the_sums_up_to_rounding(kind, ids, layer, wide) -> None:
    compiled = SHARDS[kind][1]
    assert compiled._compiled is not None
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(len(ids), 96, generator=generator).bfloat16()
    local_ids = torch.tensor(ids, dtype=torch.int64 if wide else torch.int32).view(len(ids), 3)
    weights = torch.rand(len(ids), 3, generator=generator)
    sums = compiled(layer, hidden, local_ids, weights)
    expected = exact(kind, layer, hidden, local_ids, weights)
    assert sums.dtype is torch.bfloat16
    assert sums.shape == expected.shape
    nowhere = (local_ids < 0).all(-1)
    assert bool((sums[nowhere] == 0).all())
    if not nowhere.all():
        assert relative_error(sums, expected) < (0.006 if kind is None else 0.03)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_the_others_nor_on_the_number_of_threads(kind) -> None:
    compiled = SHARDS[kind][1]
    layer = config().moe_layers[-1]
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(40, 96, generator=generator).bfloat16()
    local_ids = torch.randint(-1, 5, (40, 3), generator=generator)
    weights = torch.rand(40, 3, generator=generator)
    sums = compiled(layer, hidden, local_ids, weights)
    assert torch.equal(compiled(layer, hidden[7:9], local_ids[7:9], weights[7:9]), sums[7:9])
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(compiled(layer, hidden, local_ids, weights), sums)
    finally:
        torch.set_num_threads(before)
    assert bool((local_ids[5] >= 0).any())
    hidden[5, 3] = float("nan")
    spoiled = compiled(layer, hidden, local_ids, weights)
    assert bool(spoiled[5].isnan().all())
    others = torch.arange(40) != 5
    assert torch.equal(spoiled[others], sums[others])


@pytest.mark.parametrize("kind", KINDS)
def test_other_shapes_keep_their_modules(kind) -> None:
    odd = config(width=40)
    plain, laid_out = shard(kind, odd), shard(kind, odd)
    laid_out.lay_out()
    assert laid_out._compiled is None
    hidden = torch.randn(6, 96, generator=torch.Generator().manual_seed(2)).bfloat16()
    local_ids = torch.tensor([[0, 1, 2]] * 6)
    arguments = (odd.moe_layers[0], hidden, local_ids, torch.ones(6, 3))
    assert relative_error(laid_out(*arguments), plain(*arguments)) < 0.03


@pytest.mark.parametrize("kind", KINDS)
def test_an_expert_that_is_not_here_is_an_error_and_nothing_is_written(kind) -> None:
    compiled = SHARDS[kind][1]
    layer = config().moe_layers[0]
    hidden, weights = torch.ones(4, 96).bfloat16(), torch.ones(4, 3)
    good = torch.tensor([[0, 1, 2]] * 4)
    expected = compiled(layer, hidden, good, weights)
    bad = good.clone()
    bad[2, 1] = len(EXPERTS)
    with pytest.raises(IndexError, match="beyond the 5 of this shard"):
        compiled(layer, hidden, bad, weights)
    assert torch.equal(compiled(layer, hidden, good, weights), expected)


def test_a_model_without_routed_layers_has_nothing_to_compile() -> None:
    dense = model_config_of(make_hf_config(hidden_size=96, first_k_dense_replace=3, num_hidden_layers=3))
    shard = ExpertShardModel(dense, (0, 1), torch.bfloat16, CPU)
    shard.lay_out()
    assert shard._compiled is None


@pytest.mark.parametrize("kind", KINDS)
def test_prepared_rows_are_the_same_to_the_bit_in_every_layer_and_whatever_is_written_over_them(kind) -> None:
    compiled = SHARDS[kind][1]
    generator = torch.Generator().manual_seed(3)
    hidden, out = torch.empty(7, 96, dtype=torch.bfloat16), torch.empty(7, 96, dtype=torch.bfloat16)
    local_ids, weights = torch.zeros(7, 3, dtype=torch.int32), torch.empty(7, 3)
    halt = Halt()
    prepared = compiled.prepare(hidden, local_ids, weights, out, halt)
    assert prepared is not None
    for _ in range(3):
        for index, layer in enumerate(config().moe_layers):
            hidden.copy_(torch.randn(7, 96, generator=generator))
            local_ids.copy_(torch.randint(-1, len(EXPERTS), (7, 3), generator=generator))
            weights.copy_(torch.rand(7, 3, generator=generator))
            prepared.programs[index].run(1 + index % 2)
            assert torch.equal(out, compiled(layer, hidden, local_ids, weights))
    assert prepared.is_current
    assert not halt.is_set


@pytest.mark.parametrize("kind", KINDS)
def test_prepared_rows_are_of_no_use_once_memory_has_moved_and_many_rows_are_not_prepared(kind) -> None:
    compiled = shard(kind, config())
    compiled.lay_out()

    def rows(count: int) -> tuple[torch.Tensor, ...]:
        hidden = torch.ones(count, 96).bfloat16()
        return hidden, torch.zeros(count, 3, dtype=torch.int32), torch.ones(count, 3), torch.empty_like(hidden)

    few = rows(2)
    prepared = compiled.prepare(*few, Halt())
    assert prepared is not None
    assert prepared.is_current
    compiled(config().moe_layers[0], *rows(100)[:3])
    assert not prepared.is_current
    again = compiled.prepare(*few, Halt())
    assert again is not None
    again.programs[0].run(1)
    assert torch.equal(few[3], compiled(config().moe_layers[0], *few[:3]))
    assert compiled.prepare(*rows(512), Halt()) is not None
    assert compiled.prepare(*rows(513), Halt()) is None
    assert shard(kind, config()).prepare(*few, Halt()) is None


@pytest.mark.parametrize("kind", KINDS)
def test_an_expert_that_is_not_here_halts_prepared_rows(kind) -> None:
    compiled = SHARDS[kind][1]
    hidden, out = torch.ones(4, 96).bfloat16(), torch.full((4, 96), 3.0, dtype=torch.bfloat16)
    local_ids, weights = torch.tensor([[0, 1, 2]] * 4, dtype=torch.int32), torch.ones(4, 3)
    halt = Halt()
    prepared = compiled.prepare(hidden, local_ids, weights, out, halt)
    assert prepared is not None
    local_ids[2, 1] = len(EXPERTS)
    prepared.programs[0].run(1)
    assert halt.is_set
    assert bool((out == 3.0).all())
    local_ids[2, 1] = 1
    halt.clear()
    prepared.programs[0].run(1)
    assert not halt.is_set
    assert torch.equal(out, compiled(config().moe_layers[0], hidden, local_ids, weights))
