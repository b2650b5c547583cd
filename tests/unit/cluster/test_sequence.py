"""A sequence's counts and its end."""

from cluster.request import FinishReason, GenerationRequest
from cluster.sequence import Sequence
from model_shards.sampling import SamplingParams


def test_replayed_output_counts_as_output_and_not_as_prompt() -> None:
    sequence = Sequence(GenerationRequest("a", (1, 2, 3), 4, output_token_ids=(4, 5)))
    assert (sequence.num_tokens, sequence.num_output_tokens, sequence.num_uncomputed_tokens) == (5, 2, 5)
    assert sequence.append(6) is None
    assert sequence.append(7) is FinishReason.LENGTH


def test_eos_wins_over_length_and_ignore_eos_over_eos() -> None:
    assert Sequence(GenerationRequest("a", (1,), 1, eos_token_ids=(9,))).append(9) is FinishReason.STOP
    ignoring = Sequence(GenerationRequest("a", (1,), 2, eos_token_ids=(9,), ignore_eos=True))
    assert [ignoring.append(9), ignoring.append(9)] == [None, FinishReason.LENGTH]


def test_a_sequence_decodes_when_only_its_last_token_is_not_computed() -> None:
    sequence = Sequence(GenerationRequest("a", (1,), 4))
    assert not sequence.is_decoding
    sequence.num_computed_tokens = 1
    sequence.append(2)
    assert sequence.is_decoding


def test_without_a_seed_the_request_id_decides() -> None:
    seeds = [Sequence(GenerationRequest(name, (1,), 1)).seed for name in ("a", "a", "b")]
    assert seeds[0] == seeds[1] != seeds[2]
    assert Sequence(GenerationRequest("a", (1,), 1, SamplingParams(seed=0))).seed == 0
