"""What stands where the routed experts stood: the attention side sends rows away and gets sums back.

Shapes: T tokens of one micro-batch, K experts per token, H hidden size.
"""

from typing import Protocol

import torch


class PendingCombine(Protocol):
    """Tokens that are away at the expert shards."""

    def wait(self) -> torch.Tensor:
        """Blocks until every shard answered; [T, H] in the dtype that was sent, until the micro-batch's next `wait`.

        Raises EpochAbortedError when a rank was lost or the exchange's deadline passed.
        """
        ...


class RoutedExperts(Protocol):
    """One direction pair (dispatch, combine) per MoE layer and micro-batch.

    Every attention rank must call `dispatch` for every MoE layer and every micro-batch of the step in the
    order that `model_shards.pipeline` fixes, with T = 0 when it has no tokens.
    """

    def dispatch(
        self,
        layer: int,
        hidden: torch.Tensor,  # [T, H]
        topk_ids: torch.Tensor,  # [T, K] int64, logical experts
        topk_weights: torch.Tensor,  # [T, K] float32
    ) -> PendingCombine:
        """Sends each token to the shards of its experts; returns at once."""
        ...
