"""The head of a safetensors file: where each tensor lies. No tensor is read.

    0        8                   8 + L                        file size
    | u64 L  | JSON, L bytes     | tensor data, end to end     |

The JSON maps a name to its dtype, shape and [begin, end) within the data. A file whose size is not exactly the end of
its last tensor was cut short or damaged, and is told so here, before a byte of it is loaded.
Format: https://github.com/huggingface/safetensors, README, "Format".
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from model_shards.errors import CheckpointError

# The format's own bound.
_MAX_HEADER_BYTES = 100_000_000
_MAX_COUNT = 2**63 - 1
_MEND = "copy or download the file again"
FLOAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
QUANTIZED_DTYPES = {"I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn}
DTYPE_NAMES = {dtype: name for name, dtype in (FLOAT_DTYPES | QUANTIZED_DTYPES).items()}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # bytes from the start of the file
    num_bytes: int
    blake3: str | None = None  # what its bytes must have, where a manifest says so


def read_header(
    file: Path, dtypes: Mapping[str, torch.dtype] = FLOAT_DTYPES, sha256: str | None = None
) -> tuple[StoredTensor, ...]:
    """The tensors of a safetensors file, in the order of their data.

    `sha256` is what the header must have: its first 8 bytes and its JSON. Raises CheckpointError, naming the file, when
    it is missing, truncated, no safetensors file, has another header, or holds a dtype that is not in `dtypes`, by
    default the floats of 16 to 64 bits.
    """
    try:
        with file.open("rb") as stream:
            size = file.stat().st_size
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{file} is truncated or no safetensors file: its first 8 bytes announce a header of {length} "
                    f"bytes and the file has {size}; {_MEND}"
                )
            text = stream.read(length)
            found = hashlib.sha256(length.to_bytes(8, "little") + text).hexdigest()
            if sha256 not in (None, found):
                raise CheckpointError(
                    f"{file} is damaged: its header must have SHA-256 {sha256}, found {found}; {_MEND}"
                )
            header: object = json.loads(text.decode("utf-8"), object_pairs_hook=_distinct)
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing; {_MEND}") from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # invalid UTF-8 or JSON, or JSON nested without end
        raise CheckpointError(
            f"{file} is damaged: its safetensors header is not valid JSON ({error}); {_MEND}"
        ) from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file} is damaged: its header is not a JSON object; {_MEND}")
    tensors = [
        _entry(file, name, entry, 8 + length, dtypes) for name, entry in header.items() if name != "__metadata__"
    ]
    # A tensor without elements takes no room and may begin where another does.
    tensors.sort(key=lambda tensor: (tensor.start, tensor.num_bytes))
    _check_layout(file, tensors, 8 + length, size)
    return tuple(tensors)


def _entry(file: Path, name: str, entry: object, data_start: int, dtypes: Mapping[str, torch.dtype]) -> StoredTensor:
    values = entry if isinstance(entry, dict) else {}
    dtype_name, shape, offsets = values.get("dtype"), _counts(values.get("shape")), _counts(values.get("data_offsets"))
    if not isinstance(dtype_name, str) or shape is None or offsets is None or len(offsets) != 2:
        raise CheckpointError(f"{file} is damaged: its header entry of tensor {name} is not valid; {_MEND}")
    dtype = dtypes.get(dtype_name)
    if dtype is None:
        raise CheckpointError(f"{file}: tensor {name} must be one of {', '.join(dtypes)}, got {dtype_name!r}")
    begin, end = offsets
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(
            f"{file} is damaged: tensor {name} of shape {list(shape)} and dtype {dtype_name} does not take the "
            f"{end - begin} bytes that its header entry says; {_MEND}"
        )
    return StoredTensor(name, file, dtype, shape, data_start + begin, end - begin)


def _distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object of the header. Raises ValueError for a key that stands twice, or that is no text (a lone surrogate)."""
    for key, count in Counter(key for key, _ in pairs).items():
        key.encode()
        if count > 1:
            raise ValueError(f"{key} stands {count} times in one object")
    return dict(pairs)


def _counts(value: object) -> tuple[int, ...] | None:
    """A list of integers of 0 or more that a file can mean, or None."""
    if not isinstance(value, list):
        return None
    counts = tuple(item for item in value if type(item) is int and 0 <= item <= _MAX_COUNT)  # JSON's true is no int
    return counts if len(counts) == len(value) else None


def _check_layout(file: Path, tensors: list[StoredTensor], data_start: int, size: int) -> None:
    """Tensors, sorted by start, must fill the data without hole or overlap, up to the end of the file."""
    end = data_start
    for tensor in tensors:
        if tensor.start != end:
            raise CheckpointError(
                f"{file} is damaged: tensor {tensor.name} begins at byte {tensor.start}, not {end}; {_MEND}"
            )
        end += tensor.num_bytes
    if size < end:
        raise CheckpointError(f"{file} is truncated: its header asks for {end} bytes, the file has {size}; {_MEND}")
    if size > end:
        raise CheckpointError(f"{file} is damaged: its header ends at {end} bytes, the file has {size}; {_MEND}")
