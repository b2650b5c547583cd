"""The tensors of a micro-batch, worked by hand."""

from array import array

import torch

from cluster.batch_builder import build_batch, lay_out
from cluster.request import GenerationRequest
from cluster.scheduler import ScheduledChunk
from cluster.sequence import Sequence

CPU = torch.device("cpu")


def sequence(token_ids: tuple[int, ...], blocks: list[int]) -> Sequence:
    made = Sequence(GenerationRequest("s", token_ids, 8))
    made.block_table.extend(blocks)
    return made


def test_a_decode_and_a_chunk_over_a_block_border_lie_end_to_end() -> None:
    decode = ScheduledChunk(sequence((10, 11, 12), [5, 9]), 2, 3, is_decode=True, wants_logits=True)
    prefill = ScheduledChunk(sequence((20, 21, 22, 23, 24, 25), [3, 0, 7]), 1, 5, is_decode=False, wants_logits=False)
    last = ScheduledChunk(sequence((30,), [4]), 0, 1, is_decode=False, wants_logits=True)
    batch = build_batch([decode, prefill, last], 2, CPU)
    assert batch.token_ids.tolist() == [12, 21, 22, 23, 24, 30]
    assert batch.positions.tolist() == [2, 1, 2, 3, 4, 0]
    assert batch.slot_mapping.tolist() == [18, 7, 0, 1, 14, 8]
    assert batch.cu_seqlens_q == (0, 1, 5, 6)
    assert batch.context_lens == (3, 5, 1)
    assert batch.block_tables.tolist() == [[5, 9, 0], [3, 0, 7], [4, 0, 0]]
    assert batch.num_decodes == 1
    assert batch.logits_indices.tolist() == [0, 5]
    assert {t.dtype for t in (batch.token_ids, batch.slot_mapping, batch.block_tables)} == {torch.int64}


def test_decodes_whose_tokens_are_not_known_yet_are_laid_out_before_they_are() -> None:
    first, second = sequence((10, 11, 12), [5, 9]), sequence((20, 21), [3])
    chunks = [ScheduledChunk(first, 3, 4, True, True), ScheduledChunk(second, 2, 3, True, True)]
    layout = lay_out(chunks, [first.block_table, array("q", [3, 8])], 2)
    for made, token in ((first, 13), (second, 22)):
        made.append(token)
    second.block_table.append(8)
    layout.fill_in([13, 22])
    batch, expected = layout.batch(CPU), build_batch(chunks, 2, CPU)
    assert batch.token_ids.tolist() == [13, 22]
    assert batch.slot_mapping.tolist() == [19, 16]
    for name, value in vars(expected).items():
        made = getattr(batch, name)
        assert torch.equal(made, value) if isinstance(value, torch.Tensor) else made == value


def test_no_chunk_gives_an_empty_batch_of_the_same_form() -> None:
    batch = build_batch([], 2, CPU)
    assert batch.num_tokens == 0
    assert batch.cu_seqlens_q == (0,)
    assert batch.block_tables.shape == (0, 0)
    assert batch.logits_indices.shape == (0,)
    assert batch.token_ids.dtype == torch.int64
