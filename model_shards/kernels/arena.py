"""Memory of a program: tensors for as many rows as there ever were, at addresses that stay until there are more."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Array:
    """One element type, and the elements of a row."""

    dtype: torch.dtype
    width: int


class Arena:
    """Tensors by name, each [capacity, width]. For one thread."""

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        self._arrays = arrays
        self.capacity = 0
        self._tensors: dict[str, torch.Tensor] = {}

    def make_room(self, rows: int) -> bool:
        """Room for so many rows; whether everything has moved, and what was in it is lost.

        Raises what torch raises without memory for it; then there is room for none, and whatever had an address here
        must not use it.
        """
        if self.capacity and rows <= self.capacity:
            return False
        # Let go of first: there must never be room for both.
        self.capacity = 0
        self._tensors.clear()
        capacity = 1 << max(rows - 1, 0).bit_length()
        # Made under inference mode they could not be written outside of it.
        with torch.inference_mode(False):
            for name, array in self._arrays.items():
                self._tensors[name] = torch.empty(capacity, array.width, dtype=array.dtype)
        self.capacity = capacity
        return True

    def __getitem__(self, name: str) -> torch.Tensor:
        """[capacity, width]."""
        return self._tensors[name]

    def address(self, name: str) -> int:
        """Of the first row."""
        return self._tensors[name].data_ptr()
