"""What the step loop sees of the exchange, whichever transport carries it."""

from dataclasses import dataclass
from typing import Protocol

import torch

from model_shards.kernels.program import Halt, Program
from model_shards.routed import RoutedExperts


@dataclass(frozen=True)
class StepPlan:
    """What all ranks agreed on before a step. Every size of the step's exchanges follows from it."""

    epoch: int
    tokens: tuple[tuple[int, ...], ...]  # [attention_rank][micro_batch]

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of the step, empty ones included; the same on every rank."""
        return len(self.tokens[0])

    def tokens_of(self, micro_batch: int) -> tuple[int, ...]:
        """T of each attention rank in one micro-batch."""
        return tuple(counts[micro_batch] for counts in self.tokens)

    @property
    def active_micro_batches(self) -> tuple[int, ...]:
        """Micro-batches that hold a token on any rank. The others have no exchange, on all ranks alike."""
        return tuple(index for index in range(self.num_micro_batches) if any(self.tokens_of(index)))


class AttentionDispatcher(Protocol):
    """The attention side of one epoch. Used by one thread."""

    def begin_step(self, plan: StepPlan) -> None:
        """Sizes the buffers of the step. Must come before `routed`; no exchange may be under way."""
        ...

    def routed(self, micro_batch: int) -> RoutedExperts | None:
        """What stands in for the routed experts of one micro-batch of the step begun last.

        None for one without a token on any rank: it has no exchange, and nothing of it is to be computed.
        """
        ...

    @property
    def rows_sent(self) -> tuple[int, ...]:
        """Rows with an expert on each shard that were sent in this epoch."""
        ...

    @property
    def waited_s(self) -> float | None:
        """Seconds that this rank has waited for its rows in this epoch; None where the host does not wait for them."""
        ...


class PreparedExperts(Protocol):
    """The experts of each MoE layer as programs, of rows in one place: `model_shards.compiled.experts.PreparedRows`."""

    programs: list[Program]  # by the index among the MoE layers

    @property
    def is_current(self) -> bool:
        """Whether they can be run still; if not, they are to be prepared anew."""
        ...


class ExpertCompute(Protocol):
    """A shard's routed experts: `model_shards.experts.ExpertShardModel`."""

    def forward(
        self,
        layer: int,
        hidden: torch.Tensor,  # [R, H]
        local_ids: torch.Tensor,  # [R, K] int32, -1: no expert of this shard
        weights: torch.Tensor,  # [R, K] float32
        /,
    ) -> torch.Tensor:
        """[R, H]: for each row the weighted sum of its experts' outputs; zeros for a row without experts."""
        ...

    def prepare(
        self,
        hidden: torch.Tensor,  # [R, H]
        local_ids: torch.Tensor,  # [R, K] int32
        weights: torch.Tensor,  # [R, K] float32
        out: torch.Tensor,  # [R, H]
        halt: Halt,
        /,
    ) -> PreparedExperts | None:
        """`forward` to `out` of what lies there in each layer; halts where `forward` raises. None: there is only
        `forward`."""
        ...


class ExpertDispatcher(Protocol):
    """The expert side of one epoch. Used by one thread."""

    def run_step(self, plan: StepPlan, shard: ExpertCompute) -> None:
        """Answers every exchange of the step; blocks until it is over. Raises EpochAbortedError."""
        ...

    @property
    def rows_received(self) -> int:
        """Rows with an expert here that came in this epoch; a step counts once it is over."""
        ...

    @property
    def computed_s(self) -> float | None:
        """Seconds of the last step in which this rank did not wait; None before the first, and where the host does not
        wait for rows."""
        ...
