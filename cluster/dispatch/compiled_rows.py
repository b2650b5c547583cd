"""Packing and adding up of rows on a CPU, each one compiled call: see `cluster.dispatch.layout` for what and where.

Shapes: T tokens, N expert shards, K experts per token, H hidden size.
"""

import ctypes
import functools
from collections.abc import Sequence

import torch

from cluster.dispatch.layout import DispatchSegments
from model_shards.kernels.builder import LANES, Builder, Kind
from model_shards.kernels.machine_code import TeamFunction
from model_shards.kernels.program import Call, Program

# Rows worth a team of threads: of 1,024 bfloat16 for two shards, some 50 us of one.
_ROWS_OF_A_TEAM = 256
_KINDS = {torch.float32: Kind.FLOAT32, torch.bfloat16: Kind.BFLOAT16}

PACK_ARGUMENTS = (
    "rows",  # T
    "hidden",  # address of [T, H]
    "row_bytes",  # of hidden
    "ids",  # address of int64 [T, K]
    "weights",  # address of float32 [T, K]
    "table",  # address of int32 [N, num_logical]
    "logical",  # num_logical
    "shards",  # N
    "top_k",  # K
    "segment_bytes",  # from a shard's segment to the next one's
    "to_hidden",  # addresses in the first segment
    "to_ids",
    "to_weights",
    "to_header",
    "sent",  # address of int64 [N], which the rows are added to
)


@functools.cache
def _pack() -> TeamFunction:
    """Rows, local ids and weights of all segments. Pieces are rows."""
    build = Builder(PACK_ARGUMENTS)
    given = build.arguments
    pair_bytes = build.ir.mul(given["top_k"], build.const(4))
    with build.pieces(given["rows"]) as row:
        first = build.ir.mul(row, given["top_k"])
        with build.loop(given["shards"]) as shard:
            segment = build.ir.mul(shard, given["segment_bytes"])
            table = build.at(given["table"], (build.ir.mul(shard, given["logical"]), 4))
            source = build.at(given["hidden"], (row, given["row_bytes"]))
            build.copy(
                source, build.at(given["to_hidden"], (segment, 1), (row, given["row_bytes"])), given["row_bytes"]
            )
            build.copy(
                build.at(given["weights"], (first, 4)),
                build.at(given["to_weights"], (segment, 1), (first, 4)),
                pair_bytes,
            )
            with build.loop(given["top_k"]) as k:
                slot = build.ir.add(first, k)
                expert = build.int_at(build.at(given["ids"], (slot, 8)))
                local = build.short_int_at(build.at(table, (expert, 4)))
                build.put_short_int(build.at(given["to_ids"], (segment, 1), (slot, 4)), local)
    return TeamFunction(build.finish())


@functools.cache
def _count() -> TeamFunction:
    """The rows with an expert on each shard, of the local ids as they were packed."""
    build = Builder(PACK_ARGUMENTS)
    given = build.arguments
    zero, one = build.const(0), build.const(1)
    with build.only_first(), build.loop(given["shards"]) as shard:
        segment = build.ir.mul(shard, given["segment_bytes"])
        total = build.variable(zero)
        with build.loop(given["rows"]) as row:
            found = build.variable(zero)
            with build.loop(given["top_k"]) as k:
                slot = build.ir.add(build.ir.mul(row, given["top_k"]), k)
                local = build.short_int_at(build.at(given["to_ids"], (segment, 1), (slot, 4)))
                found.set(build.ir.select(build.ir.icmp_signed(">=", local, zero), one, found.get()))
            total.set(build.ir.add(total.get(), found.get()))
        build.put_int(build.at(given["to_header"], (segment, 1), (one, 8)), total.get())
        sent = build.at(given["sent"], (shard, 8))
        build.put_int(sent, build.ir.add(build.int_at(sent), total.get()))
    return TeamFunction(build.finish())


class CompiledPack:
    """`layout.pack_rows` with one table; adds the rows sent to `sent`, [N] int64."""

    def __init__(self, table: torch.Tensor, sent: torch.Tensor) -> None:
        self._table, self._sent = table, sent  # kept: the calls have their addresses only
        values = dict.fromkeys(PACK_ARGUMENTS, 0) | {
            "table": table.data_ptr(),
            "logical": table.shape[1],
            "shards": table.shape[0],
            "sent": sent.data_ptr(),
        }
        self.calls = [Call(function, PACK_ARGUMENTS, **values) for function in (_pack(), _count())]
        self._program = Program(self.calls)

    def pack(
        self, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, segments: DispatchSegments
    ) -> None:
        """See `pack_rows`."""
        hidden, ids, weights = hidden.contiguous(), topk_ids.contiguous(), topk_weights.contiguous()
        self.place(hidden, ids, weights, segments)
        self._program.run(torch.get_num_threads() if takes_a_team(hidden.shape[0]) else 1)

    def place(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, segments: DispatchSegments) -> None:
        """Says where rows are and where they go, for `calls` to pack them; contiguous tensors."""
        shards = segments.hidden.shape[0]
        assert hidden.is_contiguous(), "rows lie one after another"
        assert ids.is_contiguous(), "rows lie one after another"
        assert weights.is_contiguous(), "rows lie one after another"
        assert hidden.dtype is segments.hidden.dtype, "segments are for rows of another dtype"
        assert segments.hidden.shape == (shards, *hidden.shape), "segments are for as many rows"
        assert segments.local_ids.shape == (shards, *ids.shape), "segments are for as many slots"
        assert ids.shape == weights.shape, "a weight for each slot"
        assert ids.dtype is torch.int64, "as the gate gives them"
        assert weights.dtype is torch.float32, "as the gate gives them"
        values = {
            "rows": hidden.shape[0],
            "hidden": hidden.data_ptr(),
            "row_bytes": hidden.shape[1] * hidden.element_size(),
            "ids": ids.data_ptr(),
            "weights": weights.data_ptr(),
            "top_k": ids.shape[1],
            "segment_bytes": 8 * segments.header.stride(0),
            "to_hidden": segments.hidden.data_ptr(),
            "to_ids": segments.local_ids.data_ptr(),
            "to_weights": segments.weights.data_ptr(),
            "to_header": segments.header.data_ptr(),
        }
        for call in self.calls:
            call.set(**values)


def takes_a_team(num_rows: int) -> bool:
    """Whether packing and adding up are worth more than one thread."""
    return num_rows >= _ROWS_OF_A_TEAM


SUM_ARGUMENTS = (
    "rows",  # T
    "parts",  # address of the first of N times [T, H]
    "part_bytes",  # from one to the next
    "count",  # N
    "out",  # address of [T, H]
    "size",  # H
)


@functools.cache
def _sum(kind: Kind) -> TeamFunction:
    """In float32, in order. Pieces are rows."""
    build = Builder(SUM_ARGUMENTS)
    given = build.arguments
    row_bytes = build.ir.mul(given["size"], build.const(kind.bytes))
    with build.pieces(given["rows"]) as row, build.loop(given["size"], step=LANES) as i:
        place = build.at(build.ir.mul(row, row_bytes), (i, kind.bytes))
        total = build.variable(build.numbers(0.0))
        with build.loop(given["count"]) as part:
            value = build.load(build.at(given["parts"], (part, given["part_bytes"]), (place, 1)), kind)
            total.set(build.ir.fadd(total.get(), value))
        build.store(build.at(given["out"], (place, 1)), total.get(), kind)
    return TeamFunction(build.finish())


def can_sum(returned: torch.Tensor) -> bool:
    """Whether there is compiled code for it."""
    return returned.device.type == "cpu" and returned.dtype in _KINDS and returned.shape[2] % LANES == 0


def sum_call(returned: torch.Tensor, out: torch.Tensor) -> Call:
    """`layout.sum_rows` of parts that `can_sum`, [N, T, H], which may lie apart, to [T, H]."""
    count, rows, size = returned.shape
    assert returned[0].is_contiguous(), "rows of a part lie one after another"
    assert out.shape == (rows, size), "as many as of a part"
    assert out.is_contiguous(), "rows lie one after another"
    assert out.dtype is returned.dtype, "as the parts are"
    return Call(
        _sum(_KINDS[returned.dtype]),
        SUM_ARGUMENTS,
        rows=rows,
        parts=returned.data_ptr(),
        part_bytes=returned.stride(0) * returned.element_size(),
        count=count,
        out=out.data_ptr(),
        size=size,
    )


def compiled_sum(returned: torch.Tensor) -> torch.Tensor:
    """`layout.sum_rows` of parts that `can_sum`: [N, T, H], parts that may lie apart, to [T, H]."""
    out = torch.empty(returned.shape[1:], dtype=returned.dtype)
    call = sum_call(returned, out)
    call.run(torch.get_num_threads() if takes_a_team(out.shape[0]) else 1)
    return out


COPY_ARGUMENTS = (
    "count",
    "copies",  # address of int64 [count, 3]: source, target, bytes
)


@functools.cache
def _copy() -> TeamFunction:
    """Pieces are copies."""
    build = Builder(COPY_ARGUMENTS)
    given = build.arguments
    with build.pieces(given["count"]) as index:
        at = build.at(given["copies"], (index, 24))
        source, target, size = (build.int_at(build.at(at, (build.const(place), 8))) for place in range(3))
        build.copy(source, target, size)
    return TeamFunction(build.finish())


class Copies:
    """Contiguous tensors to others of their size, in one call of a program."""

    def __init__(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self._kept = tuple(pairs)  # the call has their addresses only
        numbers: list[int] = []
        for source, target in pairs:
            assert source.is_contiguous(), "rows lie one after another"
            assert target.is_contiguous(), "rows lie one after another"
            assert source.nbytes == target.nbytes, "all of it"
            numbers += [source.data_ptr(), target.data_ptr(), source.nbytes]
        self._numbers = (ctypes.c_int64 * len(numbers))(*numbers)
        self.call = Call(_copy(), COPY_ARGUMENTS, count=len(pairs), copies=ctypes.addressof(self._numbers))
