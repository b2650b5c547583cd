"""What keeps the rows of another epoch out of an expert shard, and counts the others.

Shapes: A attention ranks with tokens.
"""

import ctypes
import functools
from collections.abc import Sequence
from typing import Protocol

import torch

from model_shards.errors import EpochAbortedError
from model_shards.kernels.builder import Builder
from model_shards.kernels.machine_code import TeamFunction
from model_shards.kernels.program import Call, Halt


class Fence(Protocol):
    """Counts rows and refuses those of another epoch."""

    def admit(self, headers: tuple[torch.Tensor, ...]) -> None:
        """Tallies headers, each [2] int64. May raise EpochAbortedError."""
        ...

    def settle(self) -> int:
        """Rows admitted so far. Raises EpochAbortedError on a stranger."""
        ...


ADMIT_ARGUMENTS = (
    "count",  # A
    "headers",  # address of the addresses of their headers: epoch, rows
    "epoch",
    "rows",  # address of int64, which the rows are added to
    "halt",  # address, written when a segment is of another epoch
)


@functools.cache
def _admit() -> TeamFunction:
    build = Builder(ADMIT_ARGUMENTS)
    given = build.arguments
    with build.only_first():
        rows, strangers = build.variable(build.const(0)), build.variable(build.const(0))
        with build.loop(given["count"]) as index:
            header = build.int_at(build.at(given["headers"], (index, 8)))
            is_stranger = build.ir.icmp_signed("!=", build.int_at(header), given["epoch"])
            strangers.set(build.ir.select(is_stranger, build.const(1), strangers.get()))
            rows.set(build.ir.add(rows.get(), build.int_at(build.at(header, (build.const(1), 8)))))
        with build.ir.if_else(build.ir.icmp_signed("!=", strangers.get(), build.const(0))) as (refused, admitted):
            with refused:
                build.put_int(given["halt"], build.const(1))
            with admitted:
                build.put_int(given["rows"], build.ir.add(build.int_at(given["rows"]), rows.get()))
    return TeamFunction(build.finish())


class Admission:
    """A call of a program, and what it reads."""

    def __init__(self, headers: Sequence[torch.Tensor], epoch: int, rows: ctypes.c_int64, halt: Halt) -> None:
        """`headers`, each [2] int64; to `rows` their rows are added."""
        self._kept = (tuple(headers), rows)
        self._addresses = (ctypes.c_int64 * len(headers))(*(header.data_ptr() for header in headers))
        self.call = Call(
            _admit(),
            ADMIT_ARGUMENTS,
            count=len(headers),
            headers=ctypes.addressof(self._addresses),
            epoch=epoch,
            rows=ctypes.addressof(rows),
            halt=halt.address,
        )


class HostFence:
    """On CPU: a stranger is refused before it is computed."""

    def __init__(self, epoch: int, rank_name: str) -> None:
        self._epoch = epoch
        self._rank_name = rank_name
        self._rows = ctypes.c_int64(0)

    def admit(self, headers: tuple[torch.Tensor, ...]) -> None:
        """See `Fence`."""
        found: list[list[int]] = [header.tolist() for header in headers]
        _refuse(sum(epoch != self._epoch for epoch, _ in found), self._epoch, self._rank_name)
        self._rows.value += sum(count for _, count in found)

    def admission(self, headers: Sequence[torch.Tensor], halt: Halt) -> Admission:
        """`admit` as a call of a program, which halts where `admit` raises."""
        return Admission(headers, self._epoch, self._rows, halt)

    def settle(self) -> int:
        """See `Fence`."""
        return self._rows.value


class DeviceFence:
    """On CUDA: the tally stays on the device, so that no layer makes the host wait, and is read once at the end of the
    step; what a stranger got back by then is its own rows' sums."""

    def __init__(self, epoch: int, device: torch.device, rank_name: str) -> None:
        self._epoch = epoch
        self._rank_name = rank_name
        self._tally = torch.zeros(2, dtype=torch.int64, device=device)  # rows, segments of another epoch

    def admit(self, headers: tuple[torch.Tensor, ...]) -> None:
        """See `Fence`."""
        found = torch.stack(headers)  # [A, 2]
        self._tally += torch.stack([found[:, 1].sum(), (found[:, 0] != self._epoch).sum()])

    def settle(self) -> int:
        """See `Fence`; the host waits for the device."""
        rows, strangers = self._tally.tolist()
        _refuse(strangers, self._epoch, self._rank_name)
        return int(rows)


def make_fence(epoch: int, device: torch.device, rank_name: str) -> Fence:
    """The fence for segments on `device`."""
    return HostFence(epoch, rank_name) if device.type == "cpu" else DeviceFence(epoch, device, rank_name)


def _refuse(strangers: int, epoch: int, rank_name: str) -> None:
    if strangers:
        raise EpochAbortedError(f"rank {rank_name} received {strangers} segments of another epoch than {epoch}")
