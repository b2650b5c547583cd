"""Writes one file of a cut: a block of rows at a time, whatever the size of a tensor, summed on the way."""

import hashlib
from collections.abc import Callable
from contextlib import ExitStack
from io import FileIO
from pathlib import Path

import torch
from blake3 import blake3

from model_shards.cut.disk import whole_file, write_all
from model_shards.cut.plan import Part, PlannedFile
from model_shards.errors import CheckpointError
from model_shards.quantization import SCALE_SUFFIX, Quantization, QuantizedRows, quantize_rows
from model_shards.weights.header import StoredTensor
from model_shards.weights.manifest import FileRecord
from model_shards.weights.reading import TensorReader, open_weights

# Of the source; with its float32 copy and what is computed of it, a few times as much is held.
_BLOCK_BYTES = 2**20


def write_planned(directory: Path, planned: PlannedFile, advance: Callable[[int], None]) -> FileRecord:
    """Writes the file; `advance` is told the bytes of the source as they are done.

    Raises CheckpointError for a source that cannot be read or quantized, CapacityError for a full disk; then there is
    no file.
    """
    with ExitStack() as sources:
        streams: dict[Path, FileIO] = {}
        for part in planned.parts:
            file = part.source.file
            if file not in streams:
                streams[file] = sources.enter_context(open_weights(file))
        with whole_file(directory / planned.name) as stream:
            output = _SummedOutput(stream)
            output.write_header(planned.header())
            for part in planned.parts:
                _write_part(part, streams[part.source.file], output, advance)
        return output.record()


def copy_beside(source: Path, directory: Path) -> FileRecord:
    """Copies a file as it is."""
    digest, total = hashlib.sha256(), 0
    with whole_file(directory / source.name) as target, open_weights(source) as stream:
        while block := stream.read(_BLOCK_BYTES):
            write_all(target, block)
            digest.update(block)
            total += len(block)
    return FileRecord(total, digest.hexdigest())


class _SummedOutput:
    """A safetensors file that is written from its first byte to its last."""

    def __init__(self, stream: FileIO) -> None:
        self._stream = stream
        self._whole = hashlib.sha256()
        self._num_bytes = 0
        self._header_sha256 = ""
        self._tensors: dict[str, str] = {}

    def write_header(self, header: bytes) -> None:
        self._header_sha256 = hashlib.sha256(header).hexdigest()
        self._write(header)

    def write(self, name: str, tensor_sum: blake3, data: memoryview) -> None:
        """The next bytes of a tensor, whose sum so far is `tensor_sum`."""
        tensor_sum.update(data)
        self._tensors[name] = tensor_sum.hexdigest()
        self._write(data)

    def record(self) -> FileRecord:
        return FileRecord(self._num_bytes, self._whole.hexdigest(), self._header_sha256, self._tensors)

    def _write(self, data: memoryview | bytes) -> None:
        self._whole.update(data)
        write_all(self._stream, data)
        self._num_bytes += len(data)


def _write_part(part: Part, stream: FileIO, output: _SummedOutput, advance: Callable[[int], None]) -> None:
    source = part.source
    reader = TensorReader(stream, source)
    tensor_sum = blake3()
    row_bytes = source.num_bytes // source.shape[0] if source.shape and source.shape[0] else source.num_bytes
    block_bytes = max(row_bytes, _BLOCK_BYTES // max(1, row_bytes) * row_bytes)
    # One tensor for all: scales that are kept between freed blocks would hold the heap open around each of them.
    scales = torch.empty(0 if part.quantization is None else source.shape[0])
    num_rows = 0
    buffer = memoryview(bytearray(min(block_bytes, source.num_bytes)))
    for start in range(0, source.num_bytes, max(1, block_bytes)):
        block = buffer[: source.num_bytes - start]
        reader.read_into(block)
        if part.quantization is None:
            output.write(source.name, tensor_sum, block)
        else:
            rows = torch.frombuffer(block, dtype=source.dtype).view(-1, source.shape[1])
            quantized = _quantize(source, rows, part.quantization)
            output.write(source.name, tensor_sum, _bytes_of(quantized.values))
            scales[num_rows : num_rows + len(rows)] = quantized.scale_inv
            num_rows += len(rows)
            del quantized  # before the next block is
        advance(len(block))
    if part.quantization is not None:
        output.write(source.name + SCALE_SUFFIX, blake3(), _bytes_of(scales))


def _quantize(source: StoredTensor, rows: torch.Tensor, quantization: Quantization) -> QuantizedRows:
    try:
        return quantize_rows(rows, quantization)
    except ValueError as error:
        raise CheckpointError(
            f"{source.file}: tensor {source.name} cannot be quantized: {error}; cut it without --quantize"
        ) from error


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.view(torch.uint8).numpy().data.cast("B")
