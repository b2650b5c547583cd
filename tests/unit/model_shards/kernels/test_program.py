"""Programs of calls that leave marks: their order, on one thread and on a team, and what halts them."""

import ctypes

import pytest

from model_shards.kernels.builder import Builder
from model_shards.kernels.machine_code import TeamFunction
from model_shards.kernels.program import Call, Halt, Program

MARK_ARGUMENTS = ("count", "marks", "mark", "halt", "value")


class Marks:
    """Calls that append their number to a list, and then may halt."""

    def __init__(self) -> None:
        self._count = ctypes.c_int64(0)
        self._marks = (ctypes.c_int64 * 100)()
        self._ignored = ctypes.c_int64(0)
        build = Builder(MARK_ARGUMENTS)
        given = build.arguments
        with build.only_first():
            number = build.int_at(given["count"])
            build.put_int(build.at(given["marks"], (number, 8)), given["mark"])
            build.put_int(given["count"], build.ir.add(number, build.const(1)))
            build.put_int(given["halt"], given["value"])
        self._function = TeamFunction(build.finish())

    def call(self, mark: int, halt: Halt | None = None, value: int = 1) -> Call:
        address = ctypes.addressof(self._ignored) if halt is None else halt.address
        return Call(
            self._function,
            MARK_ARGUMENTS,
            count=ctypes.addressof(self._count),
            marks=ctypes.addressof(self._marks),
            mark=mark,
            halt=address,
            value=value,
        )

    def taken(self) -> list[int]:
        """All so far, which are forgotten."""
        found = list(self._marks[: self._count.value])
        self._count.value = 0
        return found


@pytest.mark.parametrize("threads", [1, 3])
def test_calls_run_in_order_and_a_program_is_one_of_another(threads) -> None:
    marks = Marks()
    inner = Program([marks.call(2), marks.call(3)])
    outer = Program([marks.call(1), inner, Program([]), marks.call(4), inner])
    outer.run(threads)
    assert marks.taken() == [1, 2, 3, 4, 2, 3]


def test_no_thread_leaves_a_team_for_what_a_later_call_does() -> None:
    """More threads than cores, so that some are late."""
    marks, halt = Marks(), Halt()
    program = Program([*(marks.call(index) for index in range(20)), marks.call(20, halt), marks.call(21)], halt)
    for _ in range(200):
        halt.clear()
        program.run(6)
        assert marks.taken() == list(range(21))


@pytest.mark.parametrize("threads", [1, 3])
def test_what_halts_leaves_out_the_calls_after_it_in_programs_that_know_it(threads) -> None:
    marks, halt = Marks(), Halt()
    stops = Program([marks.call(1), marks.call(2, halt), marks.call(3)], halt)
    stops.run(threads)
    assert halt.is_set
    assert marks.taken() == [1, 2]
    halt.clear()
    Program([stops, marks.call(4)], halt).run(threads)
    assert marks.taken() == [1, 2]
    halt.clear()
    Program([stops, marks.call(4)]).run(threads)  # around it nobody asks
    assert marks.taken() == [1, 2, 4]
    halt.clear()
    Program([marks.call(5, halt, value=0), marks.call(6)], halt).run(threads)
    assert not halt.is_set
    assert marks.taken() == [5, 6]


def test_a_call_tells_what_its_function_has_written_to_its_arguments() -> None:
    build = Builder(("seen",))
    build.put_int(build.argument_address("seen"), build.ir.add(build.arguments["seen"], build.const(1)))
    call = Call(TeamFunction(build.finish()), ("seen",), seen=41)
    call.run(1)
    assert call.get("seen") == 42


def test_text_may_call_what_it_is_told_the_address_of() -> None:
    heard: list[int] = []
    callback = ctypes.CFUNCTYPE(None, ctypes.c_int64)(heard.append)
    address = ctypes.cast(callback, ctypes.c_void_p).value
    assert address is not None
    text = """
    declare void @shoal_test_hear(i64)
    define void @share(ptr %arguments, i64 %first, i64 %step) {
      %value = load i64, ptr %arguments
      call void @shoal_test_hear(i64 %value)
      ret void
    }"""
    Call(TeamFunction(text, {"shoal_test_hear": address}), ("value",), value=7).run(1)
    assert heard == [7]
