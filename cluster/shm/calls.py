"""Sending and receiving as compiled calls: what a rank does twice in every layer, each time after weights have gone
through all caches, so that every line of Python would come from memory anew.

Both only do what goes well. A message that is not there, or not as it is due, is left to `cluster.shm.mesh`, which
knows what to say.
"""

import functools

from llvmlite import ir

from cluster.shm.semaphore import CLOCK_MONOTONIC, functions
from model_shards.kernels.builder import I32, I64, Builder, Value
from model_shards.kernels.machine_code import TeamFunction

RING = 4  # messages a queue holds, a power of two; more than the micro-batches of a step
DESCRIPTOR = 4  # int64 of a message's entry in the ring: number, offset, size, and one that is not used

# Of a message that is sent; addresses but for the size.
OUTGOING = (
    "source",
    "size",
    "number",  # of the message sent last
    "ring",  # of descriptors
    "regions",  # int64 [RING]: the offset of each slot's room
    "data",  # of the address of the data, and of its size
    "semaphore",
)
# Of a message that is due.
INCOMING = (
    "target",
    "size",
    "number",  # of the message read last
    "ring",
    "data",  # of the address of the data, and of its size
    "semaphore",
)

SEND_ARGUMENTS = (
    "count",
    "messages",
    "waited",  # address of nanoseconds, to which those of waking are added
)
RECEIVE_ARGUMENTS = (
    "count",
    "messages",
    "first",  # of those that are received
    "seconds",  # of the deadline on the monotonic clock; with the next one a timespec
    "nanoseconds",
    "taken",  # written: 1 when the semaphore of the message that ended the call was taken
    "waited",  # address of nanoseconds, to which the waits are added
    "halt",  # address, written when a message is not as it is due
)


@functools.cache
def send_code() -> TeamFunction:
    """Writes all messages, in order; then wakes their readers, in order. Where the outbox is closed nothing is sent.

    A reader that is woken on this rank's core takes it, as a rule, so that waking lasts until it sleeps again: that is
    no work of this rank but a wait.
    """
    build = Builder(SEND_ARGUMENTS)
    given = build.arguments
    with build.only_first():
        with build.loop(given["count"]) as index:
            message = _Message(build, given["messages"], index, OUTGOING)
            number = build.ir.add(build.int_at(message.get("number")), build.const(1))
            slot = build.ir.and_(number, build.const(RING - 1))
            offset = build.int_at(build.at(message.get("regions"), (slot, 8)))
            with build.ir.if_then(_is_open(build, message)):
                target = build.ir.add(build.int_at(message.get("data")), offset)
                build.copy(message.get("source"), target, message.get("size"))
                descriptor = build.at(message.get("ring"), (slot, 8 * DESCRIPTOR))
                build.put_int(build.at(descriptor, (build.const(1), 8)), offset)
                build.put_int(build.at(descriptor, (build.const(2), 8)), message.get("size"))
                build.ir.fence("release")
                build.put_int(descriptor, number)
                build.put_int(message.get("number"), number)
        clock = ir.Constant(I32, CLOCK_MONOTONIC)
        begun = _now(build, clock)
        with build.loop(given["count"]) as index:
            message = _Message(build, given["messages"], index, OUTGOING)
            with build.ir.if_then(_is_open(build, message)):
                build.call("sem_post", I32, (build.pointer(message.get("semaphore")),))
        took = build.ir.sub(_now(build, clock), begun)
        build.put_int(given["waited"], build.ir.add(build.int_at(given["waited"]), took))
    return TeamFunction(build.finish(), functions())


@functools.cache
def receive_code() -> TeamFunction:
    """Waits for each message from `first`, in order, and copies it. Ends at one that is not as it is due, whose index
    is `first` then; `count`: there was none."""
    build = Builder(RECEIVE_ARGUMENTS)
    given = build.arguments
    here, deadline, taken = (build.argument_address(name) for name in ("first", "seconds", "taken"))
    clock = ir.Constant(I32, CLOCK_MONOTONIC)
    with build.only_first():
        build.put_int(taken, build.const(0))
        goes_well = build.variable(build.const(1))
        with build.loop(given["count"], start=given["first"]) as index:
            message = _Message(build, given["messages"], index, INCOMING)
            with build.ir.if_then(build.ir.icmp_signed("!=", goes_well.get(), build.const(0))):
                build.put_int(here, index)
                semaphore = build.pointer(message.get("semaphore"))
                begun = _now(build, clock)
                failed = build.call("sem_clockwait", I32, (semaphore, clock, build.pointer(deadline)))
                took = build.ir.sub(_now(build, clock), begun)
                build.put_int(given["waited"], build.ir.add(build.int_at(given["waited"]), took))
                waited = build.ir.zext(build.ir.icmp_signed("==", failed, ir.Constant(I32, 0)), I64)
                build.put_int(taken, waited)
                goes_well.set(_take(build, message, waited))
        all_are_here = build.ir.icmp_signed("!=", goes_well.get(), build.const(0))
        with build.ir.if_else(all_are_here) as (all_here, some_are_not):
            with all_here:
                build.put_int(here, given["count"])
            with some_are_not:
                build.put_int(given["halt"], build.const(1))
    return TeamFunction(build.finish(), functions())


def _now(build: Builder, clock: Value) -> Value:
    """Nanoseconds. The C library asks no kernel for them, as a rule: some 30 ns."""
    time = build.array(4)  # a timespec
    build.call("clock_gettime", I32, (clock, build.pointer(time)))
    seconds, nanoseconds = build.int_at(time), build.int_at(build.at(time, (build.const(1), 8)))
    return build.ir.add(build.ir.mul(seconds, build.const(10**9)), nanoseconds)


def _is_open(build: Builder, message: "_Message") -> Value:
    """Whether there is data to write to."""
    return build.ir.icmp_signed("!=", build.int_at(message.get("data")), build.const(0))


def _take(build: Builder, message: "_Message", waited: Value) -> Value:
    """Copies it if it is there, of its size and within what this process has mapped; whether it did, 1 or 0."""
    number = build.ir.add(build.int_at(message.get("number")), build.const(1))
    slot = build.ir.and_(number, build.const(RING - 1))
    descriptor = build.at(message.get("ring"), (slot, 8 * DESCRIPTOR))
    written = build.int_at(descriptor)
    build.ir.fence("acquire")
    offset, size = (build.int_at(build.at(descriptor, (build.const(place), 8))) for place in (1, 2))
    mapped = build.int_at(build.at(message.get("data"), (build.const(1), 8)))
    as_due = build.ir.icmp_signed("!=", waited, build.const(0))
    for condition in (
        build.ir.icmp_signed("==", written, number),
        build.ir.icmp_signed("==", size, message.get("size")),
        build.ir.icmp_signed("<=", build.ir.add(offset, size), mapped),
    ):
        as_due = build.ir.and_(as_due, condition)
    with build.ir.if_then(as_due):
        source = build.ir.add(build.int_at(message.get("data")), offset)
        build.copy(source, message.get("target"), size)
        build.put_int(message.get("number"), number)
    return build.ir.zext(as_due, I64)


class _Message:
    """One of a list of messages, whose parts are int64 that lie one after another."""

    def __init__(self, build: Builder, messages: Value, index: Value, parts: tuple[str, ...]) -> None:
        self._build = build
        self._at = build.at(messages, (index, 8 * len(parts)))
        self._parts = parts

    def get(self, part: str) -> Value:
        """As of here."""
        return self._build.int_at(self._build.at(self._at, (self._build.const(self._parts.index(part)), 8)))
