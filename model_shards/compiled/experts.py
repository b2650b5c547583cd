"""The routed experts of one shard as compiled programs: one call sorts the pairs, one does all the rest of a layer.

    sort    counts, places                                          how many pairs there are decides how much room
    rest    gather -> gate and up -> SwiGLU -> down -> weighted sum

Of few rows, which lie in the same place in every layer, both are one program (`PreparedRows`).

Shapes: R rows received, K expert slots per row, H hidden size, I moe_intermediate_size, E experts held here, P pairs.
What is computed, and in which order it is summed, is `model_shards.experts`'.
"""

from collections.abc import Sequence

import torch

from model_shards.compiled.expert_memory import ExpertMemory, LayerMatrices, RowCalls
from model_shards.kernels.builder import LANES
from model_shards.kernels.program import Halt, Program

# Pairs that are given room whichever experts they are of, without being counted first.
_PREPARED_PAIRS = 1536


class CompiledExperts:
    """All layers of a shard. For one thread."""

    def __init__(self, experts: int, hidden: int, width: int, layers: Sequence[LayerMatrices]) -> None:
        """E, H and I: the last two are served when `serves` says so."""
        self._memory = ExpertMemory(experts, hidden, width, layers)
        self._num_layers = len(layers)
        self._halt = Halt()

    def forward(self, index: int, hidden: torch.Tensor, local_ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """See `model_shards.experts.ExpertShardModel.forward`; `index` is the layer's among those given."""
        memory = self._memory
        hidden, weights = hidden.contiguous(), weights.contiguous()
        local_ids = local_ids.to(torch.int32).contiguous()
        out = torch.empty_like(hidden)
        memory.make_room(local_ids.numel(), 1)
        calls, moves = RowCalls(memory, hidden, local_ids, weights, out, self._halt), memory.moves
        calls.sort.run(1)
        if memory.pairs.value < 0:
            raise IndexError(f"a row names an expert beyond the {memory.experts} of this shard")
        memory.make_room(local_ids.numel(), memory.pairs.value)
        if memory.moves != moves:
            calls = RowCalls(memory, hidden, local_ids, weights, out, self._halt)
        Program([calls.gather, *memory.products(index), calls.sum]).run(torch.get_num_threads())
        return out

    def prepare(
        self, hidden: torch.Tensor, local_ids: torch.Tensor, weights: torch.Tensor, out: torch.Tensor, halt: Halt
    ) -> "PreparedRows | None":
        """`forward` of rows that lie there in every layer, local ids as int32, with its result to `out`; None where
        they are too many. A row with an id beyond this shard's halts its program by `halt`."""
        if not 0 < local_ids.numel() <= _PREPARED_PAIRS:
            return None
        return PreparedRows(self._memory, self._num_layers, hidden, local_ids, weights, out, halt)


class PreparedRows:
    """A program for each layer; of use until `is_current` says otherwise."""

    def __init__(
        self,
        memory: ExpertMemory,
        num_layers: int,
        hidden: torch.Tensor,
        local_ids: torch.Tensor,
        weights: torch.Tensor,
        out: torch.Tensor,
        halt: Halt,
    ) -> None:
        memory.make_room(local_ids.numel(), local_ids.numel())
        self._memory, self._moves = memory, memory.moves
        self._calls = calls = RowCalls(memory, hidden, local_ids, weights, out, halt)  # the programs have addresses
        # By the layer's index among those of the shard.
        self.programs = [
            Program([calls.sort, calls.gather, *memory.products(index), calls.sum], halt) for index in range(num_layers)
        ]

    @property
    def is_current(self) -> bool:
        """Whether nothing has moved since."""
        return self._memory.moves == self._moves


def serves(hidden: int, width: int) -> bool:
    """Whether there is compiled code for such sizes."""
    return hidden % LANES == 0 and width % LANES == 0
