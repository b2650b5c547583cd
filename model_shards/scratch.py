"""Memory that is used again at every call: large buffers that come and go would be given back to the system, and
every page of them faulted in anew, each time."""

import math

import torch


class Scratch:
    """One buffer that grows to the largest shape ever taken. For one thread."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._buffer = torch.empty(0, dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._buffer.nbytes

    def take(self, *shape: int) -> torch.Tensor:
        """A contiguous tensor with undefined values, valid until the next `take`."""
        count = math.prod(shape)
        if count > self._buffer.numel():
            # Made under inference mode it could not be written outside of it.
            with torch.inference_mode(False):
                self._buffer = torch.empty(count, dtype=self._buffer.dtype, device=self._buffer.device)
        return self._buffer[:count].view(shape)


class Workspace:
    """What attention on a CPU computes in, beside a cache: float32, used by all layers in turn."""

    def __init__(self, device: torch.device) -> None:
        self.latents, self.scores, self.keys, self.values = (Scratch(torch.float32, device) for _ in range(4))

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(scratch.nbytes for scratch in (self.latents, self.scores, self.keys, self.values))
