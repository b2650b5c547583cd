"""Sampling against plain formulas, and the promise that a row depends on itself alone."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_shards.sampler import NO_TOKEN, SampledToken, SamplingRow, TokenStatistics, has_penalty, sample, uniform
from model_shards.sampling import SamplingParams

CPU = torch.device("cpu")


def row(position: int = 0, seed: int = 0, statistics: TokenStatistics | None = None, **settings: float) -> SamplingRow:
    return SamplingRow(SamplingParams(**settings), seed, position, statistics)


def drawn_ids(logits: torch.Tensor, count: int, **settings: float) -> Counter[int]:
    rows = [row(position=index, seed=3, **settings) for index in range(count)]
    return Counter(token.token_id for token in sample(logits.expand(count, -1), rows))


def test_temperature_zero_and_top_k_one_take_the_best_token() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 0.0, 1.0]])
    tokens = sample(logits, [row(temperature=0.0), row(temperature=2.0, top_k=1)])
    assert [token.token_id for token in tokens] == [1, 0]


def test_no_rows_give_no_tokens() -> None:
    assert sample(torch.empty(0, 5), []) == ()


def test_frequencies_follow_the_softmax_at_the_temperature() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    count = 20_000
    ids = drawn_ids(logits, count, temperature=0.7)
    for token_id, probability in enumerate((logits / 0.7).softmax(-1).tolist()):
        sigma = math.sqrt(probability * (1 - probability) / count)
        assert abs(ids[token_id] / count - probability) < 4 * sigma


@pytest.mark.parametrize("vocab_size", [6, 3000])
def test_top_p_keeps_the_smallest_set_that_holds_the_mass(vocab_size: int) -> None:
    probabilities = torch.full((vocab_size,), 1e-9)
    probabilities[[1, 2, 4, 5]] = torch.tensor([0.5, 0.25, 0.15, 0.1])
    ids = drawn_ids(probabilities.log(), 3000, temperature=1.0, top_p=0.7)
    assert ids.keys() == {1, 2}
    assert ids[1] / 3000 == pytest.approx(0.5 / 0.75, abs=0.04)


def test_top_p_of_a_flat_row_sorts_the_whole_vocabulary() -> None:
    logits = torch.arange(5000).flip(0) * -1e-5  # hardly any slope: 0.9 of the mass is some 4,500 tokens
    kept = drawn_ids(logits, 4000, temperature=1.0, top_p=0.9)
    probabilities = logits.double().softmax(-1).flip(0)  # best first
    size = int((probabilities.cumsum(0) < 0.9).sum()) + 1
    assert min(kept) >= 5000 - size
    assert min(kept) < 5000 - size + 50


def test_top_p_of_almost_nothing_keeps_one_token() -> None:
    assert drawn_ids(torch.tensor([0.0, 0.1, 0.05]), 50, temperature=1.0, top_p=1e-6).keys() == {1}


def test_top_k_keeps_k_tokens_and_top_p_counts_within_them() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert drawn_ids(logits, 500, temperature=1.0, top_k=2).keys() == {0, 1}
    # Among the three best, token 0 has 0.44 and tokens 0 and 1 have 0.78.
    assert drawn_ids(logits, 500, temperature=1.0, top_k=3, top_p=0.7).keys() == {0, 1}
    assert drawn_ids(logits, 500, temperature=1.0, top_k=99).keys() == {0, 1, 2, 3}


def test_a_tiny_temperature_is_the_argmax_and_not_nan() -> None:
    logits = torch.tensor([1e4, -1e4, 9.9e3])
    for temperature in (1e-6, 1e-30, 1e-300):
        assert drawn_ids(logits, 5, temperature=temperature).keys() == {0}


def test_tokens_of_no_probability_are_never_drawn() -> None:
    logits = torch.full((50,), -math.inf)
    logits[[7, 8]] = 1.0
    assert drawn_ids(logits, 400, temperature=1.0).keys() == {7, 8}


def test_penalties_follow_their_formulas() -> None:
    statistics = TokenStatistics(6, prompt=[0, 1], output=[2, 2], device=CPU)
    statistics.record(3)
    logits = torch.tensor([2.0, -2.0, 2.0, -2.0, 2.0, -2.0])
    params = SamplingParams(repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25)
    expected = [1.0, -4.0, 1.0 - 0.5 - 0.5, -4.0 - 0.5 - 0.25, 2.0, -2.0]
    assert statistics.penalise(logits, params).tolist() == expected
    assert logits.tolist() == [2.0, -2.0, 2.0, -2.0, 2.0, -2.0]


def test_presence_and_frequency_do_not_count_the_prompt() -> None:
    statistics = TokenStatistics(3, prompt=[1, 1], output=[], device=CPU)
    penalised = statistics.penalise(torch.ones(3), SamplingParams(presence_penalty=1.0, frequency_penalty=1.0))
    assert penalised.tolist() == [1.0, 1.0, 1.0]


def test_only_a_penalty_asks_for_statistics() -> None:
    assert not has_penalty(SamplingParams(temperature=0.3, top_p=0.5, top_k=4))
    for name, value in (("repetition_penalty", 1.1), ("presence_penalty", -0.1), ("frequency_penalty", 0.1)):
        assert has_penalty(SamplingParams(**{name: value}))


def test_logprobs_are_the_models_own_before_penalty_and_temperature() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0]])
    statistics = TokenStatistics(3, prompt=[2], output=[2], device=CPU)
    (token,) = sample(logits, [row(temperature=0.0, frequency_penalty=9.0, logprobs=2, statistics=statistics)])
    expected = logits[0].log_softmax(-1)
    assert token.token_id == 1
    assert token.logprob == pytest.approx(float(expected[1]))
    assert [token_id for token_id, _ in token.top] == [2, 1]
    assert token.top[0][1] == pytest.approx(float(expected[2]))


def test_logprobs_zero_gives_the_chosen_one_only_and_none_gives_none() -> None:
    logits = torch.tensor([[1.0, 2.0]]).expand(2, -1)
    with_zero, without = sample(logits, [row(temperature=0.0, logprobs=0), row(temperature=0.0)])
    assert with_zero.logprob is not None
    assert with_zero.top == ()
    assert without.logprob is None


params_of_a_row = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.5, 1.0]),
    top_p=st.sampled_from([1.0, 0.9, 0.3]),
    top_k=st.sampled_from([0, 1, 3, 1500]),
    logprobs=st.sampled_from([None, 2]),
)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(params_of_a_row, st.integers(0, 2**64 - 1), st.integers(0, 5000)), min_size=1, max_size=6))
def test_a_row_gives_the_same_token_alone_and_in_any_company(
    settings_: list[tuple[SamplingParams, int, int]],
) -> None:
    logits = torch.randn(len(settings_), 2000, generator=torch.Generator().manual_seed(1)) * 0.3
    rows = [SamplingRow(params, seed, position, None) for params, seed, position in settings_]
    together = sample(logits, rows)
    for index, alone in enumerate(rows):
        assert sample(logits[index : index + 1], [alone])[0].token_id == together[index].token_id


def test_uniform_never_repeats_and_fills_the_unit_interval_evenly() -> None:
    values = [uniform(seed, position) for seed in range(40) for position in range(250)]
    assert all(0.0 <= value < 1.0 for value in values)
    assert len(set(values)) == len(values)
    counts = Counter(int(value * 10) for value in values)
    assert sum((counts[decile] - 1000) ** 2 / 1000 for decile in range(10)) < 27.9  # chi square, 9 degrees, 0.1 %


def test_neighbouring_seeds_and_positions_are_not_correlated() -> None:
    grid = torch.tensor([[uniform(seed, position) for position in range(200)] for seed in range(50)]).double() - 0.5
    across_seeds = float((grid[1:] * grid[:-1]).mean() * 12)
    across_positions = float((grid[:, 1:] * grid[:, :-1]).mean() * 12)
    assert abs(across_seeds) < 0.04
    assert abs(across_positions) < 0.04


@pytest.mark.parametrize("logprobs", [None, 2])
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("temperatures", [(0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.0, 1.0, 1.0), (1.0, 0.0, 0.0)])
def test_a_row_that_is_not_finite_gives_no_token_and_leaves_its_neighbours_alone(temperatures, broken, logprobs):
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(2))
    rows = [
        SamplingRow(SamplingParams(temperature=t, logprobs=logprobs), seed=i, position=5, statistics=None)
        for i, t in enumerate(temperatures)
    ]
    sound = sample(logits, rows)
    # One NaN or infinity spoils a row; -inf is a token that cannot be, so only a row of nothing else is spoilt.
    logits[1, slice(None) if broken == -float("inf") else 7] = broken
    spoilt = sample(logits, rows)
    assert spoilt[1] == SampledToken(NO_TOKEN)
    assert (spoilt[0], spoilt[2]) == (sound[0], sound[2])
