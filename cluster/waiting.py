"""How long a rank has waited in exchanges with its peers: what is left of a step is its own work."""

import ctypes


class WaitTally:
    """Of one rank in one epoch; for one thread. Compiled code adds to it, too."""

    def __init__(self) -> None:
        self._nanoseconds = ctypes.c_int64(0)

    @property
    def address(self) -> int:
        """Of the int64 to which compiled code adds nanoseconds."""
        return ctypes.addressof(self._nanoseconds)

    @property
    def seconds(self) -> float:
        """So far."""
        return self._nanoseconds.value / 1e9

    def add(self, nanoseconds: int) -> None:
        """One wait."""
        self._nanoseconds.value += nanoseconds
