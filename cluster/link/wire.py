"""Addresses, frames and messages of the link; the format is in link.proto."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from cluster.link import link_pb2 as pb
from cluster.request import FinishReason, StepOutput, TokenLogprob

_LENGTH_BYTES = 4
_TO_WIRE: dict[FinishReason | None, pb.FinishReason] = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: pb.FINISH_REASON_CANCELLED,
    FinishReason.ERROR: pb.FINISH_REASON_ERROR,
}
_FROM_WIRE = {wire: reason for reason, wire in _TO_WIRE.items()}


@dataclass(frozen=True)
class LinkAddress:
    """Where a gateway takes outputs, and the secret that shows it the way here was told by itself."""

    host: str
    port: int
    token: str = field(repr=False)


@dataclass(frozen=True)
class StreamAddress:
    """Where the outputs of one request go; the gateway gives each request a number of its own, never the same twice."""

    link: LinkAddress
    stream: int


class ProtocolError(Exception):
    """The other side does not speak this protocol."""


class FrameReader:
    """Cuts a stream of bytes into frames."""

    def __init__(self, max_frame_bytes: int) -> None:
        self.max_frame_bytes = max_frame_bytes
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The payloads that are whole now. Raises ProtocolError at one that is longer than `max_frame_bytes`.

        The bound is read for each frame, so it may change between two.
        """
        self._buffer += data
        while len(self._buffer) >= _LENGTH_BYTES:
            length = int.from_bytes(self._buffer[:_LENGTH_BYTES], "big")
            if length > self.max_frame_bytes:
                raise ProtocolError(f"a frame may have {self.max_frame_bytes} bytes, one has {length}")
            end = _LENGTH_BYTES + length
            if len(self._buffer) < end:
                return
            payload = bytes(self._buffer[_LENGTH_BYTES:end])
            del self._buffer[:end]
            yield payload


def hello_frame(token: str) -> bytes:
    """The first frame of a connection."""
    return _frame(pb.Hello(token=token))


def batch_frame(outputs: Iterable[tuple[int, StepOutput]]) -> bytes:
    """The frame of one step: outputs with the numbers of their streams."""
    return _frame(pb.OutputBatch(outputs=[_to_wire(stream, output) for stream, output in outputs]))


def output_of(wire: pb.StreamOutput, request_id: str) -> StepOutput:
    """The output as the replica made it. Raises ProtocolError at a finish reason that is none."""
    if wire.finish_reason not in _FROM_WIRE:
        raise ProtocolError(f"finish_reason must be one of link.proto, got {wire.finish_reason}")
    logprobs = tuple(
        TokenLogprob(entry.logprob, tuple(zip(entry.top_token_ids, entry.top_logprobs, strict=True)))
        for entry in wire.logprobs
    )
    reason = _FROM_WIRE[wire.finish_reason]
    error = wire.error if reason is FinishReason.ERROR else None
    return StepOutput(request_id, tuple(wire.token_ids), reason, logprobs, error, wire.num_cached_tokens)


def _to_wire(stream: int, output: StepOutput) -> pb.StreamOutput:
    return pb.StreamOutput(
        stream=stream,
        token_ids=output.token_ids,
        finish_reason=_TO_WIRE[output.finish_reason],
        error=output.error or "",
        logprobs=[
            pb.TokenLogprob(
                logprob=entry.logprob,
                top_token_ids=[token for token, _ in entry.top],
                top_logprobs=[value for _, value in entry.top],
            )
            for entry in output.logprobs
        ],
        num_cached_tokens=output.num_cached_tokens,
    )


def _frame(message: pb.Hello | pb.OutputBatch) -> bytes:
    payload = message.SerializeToString()
    return len(payload).to_bytes(_LENGTH_BYTES, "big") + payload
