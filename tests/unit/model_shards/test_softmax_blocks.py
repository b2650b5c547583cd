"""A softmax over blocks of keys equals the one over all of them, whatever the order and size of the scores."""

import pytest
import torch

from model_shards.softmax_blocks import RunningSoftmax

SCORES = torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
VALUES = torch.randn(2, 20, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def attend(scores: torch.Tensor, size: int) -> torch.Tensor:
    state = RunningSoftmax.empty(2, 3, 5)
    for start in range(0, 20, size):
        keys = slice(start, start + size)
        state.add(scores[..., keys].float(), VALUES[:, keys].float())
    out = torch.empty(2, 3, 5)
    state.finish(out)
    return out


@pytest.mark.parametrize("size", [1, 7, 20])
@pytest.mark.parametrize("scores", [SCORES, 300 * SCORES, SCORES + 1000, SCORES.sort(dim=-1).values * 50])
def test_blocks_equal_the_whole(size: int, scores: torch.Tensor) -> None:
    expected = scores.float().double().softmax(-1) @ VALUES
    torch.testing.assert_close(attend(scores, size).double(), expected, rtol=1e-4, atol=1e-5)


def test_keys_that_a_row_does_not_see_leave_it_as_it_was() -> None:
    scores = SCORES.clone()
    scores[:, 1, 4:] = float("-inf")
    expected = scores[:, 1, :4].softmax(-1)[:, None] @ VALUES[:, :4]
    torch.testing.assert_close(attend(scores, 4)[:, 1:2].double(), expected, rtol=1e-4, atol=1e-5)


def test_a_part_is_a_view_of_the_same_state() -> None:
    state, whole = RunningSoftmax.empty(2, 3, 5), RunningSoftmax.empty(2, 3, 5)
    whole.add(SCORES.float(), VALUES.float())
    for batch in range(2):
        for row in range(3):
            part = state.part(slice(batch, batch + 1), slice(row, row + 1))
            part.add(SCORES[batch : batch + 1, row : row + 1].float(), VALUES[batch : batch + 1].float())
    torch.testing.assert_close(state.weighted / state.total, whole.weighted / whole.total)
