"""How many threads torch computes with, for a while."""

from collections.abc import Generator
from contextlib import contextmanager

import torch


@contextmanager
def at_most(num_threads: int | None) -> Generator[None, None, None]:
    """No more than `num_threads` for what the calling thread computes within; None: as many as it has.

    A thread that first computes meanwhile takes this number over, so one thread alone should be computing.
    """
    before = torch.get_num_threads()
    if num_threads is None or num_threads >= before:
        yield
        return
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
