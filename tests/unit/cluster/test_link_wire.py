"""Frames and messages of the link, byte for byte."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.link import link_pb2 as pb
from cluster.link.wire import FrameReader, ProtocolError, batch_frame, hello_frame, output_of
from cluster.request import FinishReason, StepOutput, TokenLogprob

tokens = st.integers(0, 2**32 - 1)
numbers = st.floats(allow_nan=False)
logprobs = st.builds(TokenLogprob, numbers, st.lists(st.tuples(tokens, numbers), max_size=3).map(tuple))
outputs = st.builds(
    StepOutput,
    st.just("r"),
    st.lists(tokens, max_size=5).map(tuple),
    st.none() | st.sampled_from([reason for reason in FinishReason if reason is not FinishReason.ERROR]),
    st.lists(logprobs, max_size=3).map(tuple),
    num_cached_tokens=tokens,
)


def payloads(frames, data):
    return list(frames.feed(data))


@given(st.lists(st.tuples(st.integers(1, 2**64 - 1), outputs), max_size=4))
def test_outputs_come_out_of_a_frame_as_they_went_in(batch):
    [payload] = payloads(FrameReader(1 << 20), batch_frame(batch))
    read = pb.OutputBatch.FromString(payload).outputs
    assert [(wire.stream, output_of(wire, "r")) for wire in read] == batch


@given(st.lists(st.binary(max_size=20), max_size=6), st.integers(1, 9))
def test_frames_are_whole_however_the_bytes_are_cut(messages, size):
    data = b"".join(len(message).to_bytes(4, "big") + message for message in messages)
    frames = FrameReader(20)
    cut = [data[begin : begin + size] for begin in range(0, len(data), size)]
    assert [payload for part in cut for payload in frames.feed(part)] == messages


def test_a_frame_longer_than_the_bound_is_refused_before_it_is_read():
    frames = FrameReader(8)
    with pytest.raises(ProtocolError, match="may have 8 bytes, one has 9"):
        payloads(frames, (9).to_bytes(4, "big"))


def test_the_bound_may_grow_between_two_frames_that_came_together():
    frames = FrameReader(100)
    taken = frames.feed(hello_frame("t") + (200).to_bytes(4, "big") + bytes(200))
    assert pb.Hello.FromString(next(taken)).token == "t"
    frames.max_frame_bytes = 200
    assert [len(payload) for payload in taken] == [200]


def test_a_finish_reason_that_is_none_is_refused():
    with pytest.raises(ProtocolError, match="got 99"):
        output_of(pb.StreamOutput(stream=1, finish_reason=99), "r")


def test_an_error_and_minus_infinity_cross():
    failed = StepOutput("r", (), FinishReason.ERROR, error="")
    unlikely = StepOutput("r", (1,), None, (TokenLogprob(-math.inf),))
    [payload] = payloads(FrameReader(1000), batch_frame([(1, failed), (2, unlikely)]))
    assert [output_of(wire, "r") for wire in pb.OutputBatch.FromString(payload).outputs] == [failed, unlikely]
