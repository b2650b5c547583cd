"""Several compiled functions one after another, in one call: what a team of threads does between two exchanges.

A *call* is a function with what it is told, at an address that stays. The team goes through the calls of a program
together: nobody begins one before all have ended the one before.

    program   [ number of calls | halt | stopped | function, arguments | function, arguments | ... ]   eight bytes each

A program may be one of the calls of another. A call that finds, on the first thread of the team, that it cannot do its
part *halts* the program: the calls after it are left out. The first thread then writes behind which call that was, so
that one which is late does not leave the team when the next call halts.
"""

import ctypes
import functools
import struct
from collections.abc import Sequence

from model_shards.kernels.machine_code import TeamFunction, find_openmp


class Call:
    """A function and its arguments, which may be changed between runs."""

    def __init__(self, function: TeamFunction, names: Sequence[str], **values: int) -> None:
        """`names` are the function's arguments in order, `values` the addresses and numbers that they get."""
        assert set(names) == set(values), f"arguments {sorted(set(names) ^ set(values))} are missing or unknown"
        self.function = function
        self._places = {name: place for place, name in enumerate(names)}
        self._values = (ctypes.c_int64 * len(names))(*(values[name] for name in names))

    @property
    def share(self) -> int:
        """Address of the function."""
        return self.function.share

    @property
    def address(self) -> int:
        """Of the arguments."""
        return ctypes.addressof(self._values)

    def run(self, num_threads: int) -> None:
        """Runs it alone."""
        self.function.run(self._values, num_threads)

    def get(self, name: str) -> int:
        """An argument, which the function may have changed."""
        return self._values[self._places[name]]

    def set(self, **values: int) -> None:
        """Changes some arguments."""
        for name, value in values.items():
            self._values[self._places[name]] = value


def float_bits(value: float) -> int:
    """A float32 as an argument carries it: in the lower four bytes."""
    return int(struct.unpack("I", struct.pack("f", value))[0])


class Halt:
    """What calls halt a program by: they write another number than 0 there."""

    def __init__(self) -> None:
        self._value = ctypes.c_int64(0)

    @property
    def address(self) -> int:
        """Where calls write."""
        return ctypes.addressof(self._value)

    @property
    def is_set(self) -> bool:
        """Whether one did."""
        return bool(self._value.value)

    def clear(self) -> None:
        """Before the program runs again."""
        self._value.value = 0


class Program:
    """Calls in order. What their arguments point at must live as long as it runs."""

    def __init__(self, calls: "Sequence[Call | Program]", halt: Halt | None = None) -> None:
        """Without `halt` no call halts it. Programs within that are to halt it have the same `halt`."""
        self._calls, self._halt = tuple(calls), halt  # kept: the program has their addresses only
        self._runner = _runner()
        numbers = [len(self._calls), 0 if halt is None else halt.address, 0]
        for call in self._calls:
            numbers += [call.share, call.address]
        self._text = (ctypes.c_int64 * len(numbers))(*numbers)

    @property
    def share(self) -> int:
        """Address of what runs it as a call of another program."""
        return self._runner.share

    @property
    def address(self) -> int:
        """Of its text."""
        return ctypes.addressof(self._text)

    def run(self, num_threads: int) -> None:
        """Runs all of them on a team of so many threads."""
        self._runner.run(self._text, num_threads)


_BARRIER = "declare void @GOMP_barrier()"
_NO_TEAM = "define void @GOMP_barrier() { ret void }"
_RUN = """
define void @share(ptr %program, i64 %first, i64 %step) nounwind {
entry:
  %count = load i64, ptr %program
  %halt_at = getelementptr i8, ptr %program, i64 8
  %halt = load ptr, ptr %halt_at
  %never = icmp eq ptr %halt, null
  %stopped_at = getelementptr i8, ptr %program, i64 16
  %is_first = icmp eq i64 %first, 0
  %alone = icmp eq i64 %step, 1
  %any = icmp sgt i64 %count, 0
  br i1 %is_first, label %begin, label %begun
begin:
  store i64 0, ptr %stopped_at
  br label %begun
begun:
  br i1 %any, label %call, label %done
call:
  %i = phi i64 [0, %begun], [%i_next, %next]
  %place = mul i64 %i, 16
  %function_off = add i64 %place, 24
  %arguments_off = add i64 %place, 32
  %function_at = getelementptr i8, ptr %program, i64 %function_off
  %arguments_at = getelementptr i8, ptr %program, i64 %arguments_off
  %function = load ptr, ptr %function_at
  %arguments = load ptr, ptr %arguments_at
  call void %function(ptr %arguments, i64 %first, i64 %step)
  %i_next = add i64 %i, 1
  %asks = xor i1 %never, true
  %tells = and i1 %asks, %is_first
  br i1 %tells, label %tell, label %told
tell:
  %halted = load i64, ptr %halt
  %halts = icmp ne i64 %halted, 0
  %behind = select i1 %halts, i64 %i_next, i64 0
  store i64 %behind, ptr %stopped_at
  br label %told
told:
  br i1 %alone, label %joined, label %wait
wait:
  call void @GOMP_barrier()
  br label %joined
joined:
  br i1 %never, label %next, label %ask
ask:
  %stopped = load volatile i64, ptr %stopped_at
  %stops = icmp eq i64 %stopped, %i_next
  br i1 %stops, label %done, label %next
next:
  %more = icmp slt i64 %i_next, %count
  br i1 %more, label %call, label %done
done:
  ret void
}"""


@functools.cache
def _runner() -> TeamFunction:
    return TeamFunction((_NO_TEAM if find_openmp() is None else _BARRIER) + _RUN)
