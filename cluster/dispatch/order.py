"""The order of the exchanges of a step: the same on every rank, or the ranks deadlock.

An attention rank runs its micro-batches round robin, each up to its next dispatch (model_shards/pipeline.py). With
layers l0, l1 and two micro-batches:

    attention   D(l0,0) D(l0,1) | C(l0,0) D(l1,0) | C(l0,1) D(l1,1) | C(l1,0) | C(l1,1)
                                  `-- micro-batch 0 resumes: waits its combine, runs on, dispatches the next layer

The expert side starts them in exactly this order; between D(l,i) and C(l,i) it computes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise


class Direction(Enum):
    """Which way the rows go."""

    DISPATCH = "dispatch"  # attention -> expert
    COMBINE = "combine"  # expert -> attention


@dataclass(frozen=True)
class Exchange:
    """One all-to-all of a step."""

    direction: Direction
    layer: int  # the model's layer index
    micro_batch: int


def exchange_order(layers: Sequence[int], micro_batches: Sequence[int]) -> tuple[Exchange, ...]:
    """All exchanges of a step: `layers` are the MoE layers, `micro_batches` those that hold tokens."""
    if not layers:
        return ()
    order = [Exchange(Direction.DISPATCH, layers[0], index) for index in micro_batches]
    for layer, following in pairwise(layers):
        for index in micro_batches:
            order.append(Exchange(Direction.COMBINE, layer, index))
            order.append(Exchange(Direction.DISPATCH, following, index))
    order.extend(Exchange(Direction.COMBINE, layers[-1], index) for index in micro_batches)
    return tuple(order)
