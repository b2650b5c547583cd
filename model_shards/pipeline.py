"""Ping-pong: while one micro-batch's tokens are away at the experts, the next one computes.

With D(l, i) dispatch and C(l, i) combine of MoE layer l and micro-batch i, two micro-batches give on every rank

    D(l0,0) D(l0,1) C(l0,0) D(l1,0) C(l0,1) D(l1,1) C(l1,0) ... C(l1,1) ...
"""

from collections.abc import Callable, Generator, Sequence

import torch


def run_micro_batches(
    steps: Sequence[Generator[None, None, torch.Tensor]], meanwhile: Callable[[], None] | None = None
) -> list[torch.Tensor]:
    """Runs each generator to its next yield in turn until all returned; their results in order.

    All generators must yield equally often (one model, so the same MoE layers). Their exceptions pass through,
    after every other generator was closed. `meanwhile` is called once, when all have reached their first yield: the
    tokens of every micro-batch are away, and what comes next would wait for them.
    """
    results: dict[int, torch.Tensor] = {}
    try:
        while len(results) < len(steps):
            for index, step in enumerate(steps):
                try:
                    next(step)
                except StopIteration as finished:
                    results[index] = finished.value
            if meanwhile is not None:
                meanwhile()
                meanwhile = None
    finally:
        for step in steps:
            step.close()
    return [results[index] for index in range(len(steps))]
