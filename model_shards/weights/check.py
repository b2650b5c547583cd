"""Whether a checkpoint holds exactly the tensors that its config.json asks for; reads headers only.

A directory with a `shoal.json` was cut by `shoal shard`: that manifest says where each tensor is and what sum it has,
and a rank needs only the files that hold its own tensors. Elsewhere one file goes before an index, as in transformers.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from model_shards.config import ModelConfig
from model_shards.errors import CheckpointError
from model_shards.experts import ExpertShardModel
from model_shards.json_keys import JsonKeys
from model_shards.model import AttentionModel
from model_shards.quantization import SCALE_SUFFIX, Quantization
from model_shards.weights.header import DTYPE_NAMES, FLOAT_DTYPES, StoredTensor, read_header
from model_shards.weights.manifest import MANIFEST_FILE, FileRecord, Manifest, is_bare_name, read_manifest
from model_shards.weights.reading import REMEDY, check_file

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# What every role reads beside weights.
_CONFIG_FILES = ("config.json", "generation_config.json")
# A checkpoint of another shape breaks thousands of rules at once; the first few tell which.
_MAX_PROBLEMS = 5


@dataclass(frozen=True)
class Checkpoint:
    """A directory of weights, its headers not yet read. Make it with `open`."""

    directory: Path
    manifest: Manifest | None  # None: as Hugging Face lays it out

    @classmethod
    def open(cls, directory: Path) -> "Checkpoint":
        """Raises CheckpointError for a manifest that cannot be used."""
        return cls(directory, read_manifest(directory))

    @property
    def quantization(self) -> Quantization | None:
        """How the routed experts are stored; None: in a float dtype, as everything else."""
        return None if self.manifest is None else self.manifest.identity.quantization

    def tensors(self, config: ModelConfig, names: Collection[str] | None = None) -> dict[str, StoredTensor]:
        """The tensors by name, once the checkpoint was found to hold what `config` asks for and nothing else.

        Of a cut checkpoint only the files that hold `names` are looked at; None looks at all, those beside the weights
        too. Raises CheckpointError naming tensor, file, expected and found shape.
        """
        expected = expected_shapes(config, self.quantization)
        if self.manifest is None:
            stored = _read_tensors(self.directory)
            file_of = {name: tensor.file.name for name, tensor in stored.items()}
            source = _source(self.directory)
        else:
            check_beside(self.directory, self.manifest, names is None)
            records = self.manifest.files
            file_of = {name: file for file, record in records.items() for name in record.tensors}
            wanted = records if names is None else {file_of[name] for name in names if name in file_of}
            stored = _read_cut(self.directory, {name: records[name] for name in sorted(wanted)}, self.quantization)
            source = MANIFEST_FILE
        problems = _problems(expected, stored, file_of, config, self.quantization)
        if problems:
            more = f"; and {len(problems) - _MAX_PROBLEMS} more" if len(problems) > _MAX_PROBLEMS else ""
            place = self.directory / source
            raise CheckpointError(f"{place} does not fit config.json: {'; '.join(problems[:_MAX_PROBLEMS])}{more}")
        return stored


def check_checkpoint(directory: Path, config: ModelConfig) -> Quantization | None:
    """How its experts are quantized. Raises CheckpointError, naming tensor, file, expected and found shape, unless all
    is there and nothing else; of a cut checkpoint all but the tensors' bytes, which are checked when they are read."""
    checkpoint = Checkpoint.open(directory)
    checkpoint.tensors(config)
    return checkpoint.quantization


def check_beside(directory: Path, manifest: Manifest, all_files: bool) -> None:
    """The files beside the weights of a cut checkpoint, or only those that every role reads.

    Raises CheckpointError for one that is not as it was cut. Each is small.
    """
    for name, record in manifest.files.items():
        if record.header_sha256 is None and (all_files or name in _CONFIG_FILES):
            check_file(directory / name, record.num_bytes, record.sha256)


def expected_shapes(config: ModelConfig, quantization: Quantization | None = None) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the whole model by Hugging Face name; allocates nothing."""
    meta = torch.device("meta")
    shapes = {name: tuple(view.shape) for name, view in AttentionModel(config, torch.float32, meta).hf_slices()}
    experts = tuple(range(config.n_routed_experts or 0))
    shard = ExpertShardModel(config, experts, torch.float32, meta, quantization)
    shapes.update(shard.hf_shapes())
    return shapes


def _problems(
    expected: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, StoredTensor],
    file_of: Mapping[str, str],
    config: ModelConfig,
    quantization: Quantization | None,
) -> list[str]:
    """Each way in which what is stored is not what is expected; names are known of all files, shapes of `stored`."""
    problems = [
        f"tensor {name} of shape {list(shape)} is missing" for name, shape in expected.items() if name not in file_of
    ]
    problems += [
        f"{file} holds tensor {name}, which no layer has"
        for name, file in file_of.items()
        if name not in expected and name not in stored and not _ignored(name, config)
    ]
    for name, tensor in stored.items():
        if name not in expected:
            if not _ignored(name, config):
                problems.append(
                    f"{tensor.file.name} holds tensor {name} of shape {list(tensor.shape)}, which no layer has"
                )
        elif tensor.shape != expected[name]:
            problems.append(
                f"{tensor.file.name}: tensor {name} must have shape {list(expected[name])}, got {list(tensor.shape)}"
            )
        else:
            quantized = quantization is not None and name + SCALE_SUFFIX in expected
            if quantization is not None and quantized != (tensor.dtype == quantization.dtype):
                wanted = DTYPE_NAMES[quantization.dtype] if quantized else "a float dtype"
                problems.append(f"{tensor.file.name}: tensor {name} must be {wanted}, got {DTYPE_NAMES[tensor.dtype]}")
    return problems


def _ignored(name: str, config: ModelConfig) -> bool:
    """Tensors that some exporters add and that carry no information of their own."""
    return name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings)


def _source(directory: Path) -> str:
    """The file that says which tensors there are; as transformers does, one file goes before an index."""
    if not _exists(directory) or not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory; name one in Hugging Face layout")
    for name in (SINGLE_FILE, INDEX_FILE):
        if _exists(directory / name):
            return name
    raise CheckpointError(
        f"{directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}; download the checkpoint's *.safetensors files, "
        "or convert it to safetensors"
    )


def _exists(file: Path) -> bool:
    try:
        return file.exists()
    except OSError as error:  # a directory that may not be entered, a name too long
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error


def _read_cut(
    directory: Path, records: Mapping[str, FileRecord], quantization: Quantization | None
) -> dict[str, StoredTensor]:
    """The tensors of these files by name, each with the sum that its bytes must have."""
    dtypes = dict(FLOAT_DTYPES)
    if quantization is not None:
        dtypes[DTYPE_NAMES[quantization.dtype]] = quantization.dtype
    stored: dict[str, StoredTensor] = {}
    for name, record in records.items():
        if record.header_sha256 is None:
            continue
        file = directory / name
        if not _exists(file):
            raise CheckpointError(f"{file} is missing, and {directory / MANIFEST_FILE} names it; {REMEDY}")
        size = file.stat().st_size
        if size != record.num_bytes:
            raise CheckpointError(
                f"{file} is truncated or changed: it must have {record.num_bytes} bytes, found {size}; {REMEDY}"
            )
        tensors = read_header(file, dtypes, record.header_sha256)
        if {tensor.name for tensor in tensors} != record.tensors.keys():
            raise CheckpointError(
                f"{directory / MANIFEST_FILE} names other tensors of {name} than {file} holds; {REMEDY}"
            )
        stored |= {tensor.name: replace(tensor, blake3=record.tensors[tensor.name]) for tensor in tensors}
    return stored


def _read_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor by name, from the headers of the single file or of all files of the index."""
    if _source(directory) == SINGLE_FILE:
        return {tensor.name: tensor for tensor in read_header(directory / SINGLE_FILE)}
    index = directory / INDEX_FILE
    file_of = _weight_map(index)
    stored: dict[str, StoredTensor] = {}
    for file in sorted(set(file_of.values())):
        if not _exists(directory / file):
            raise CheckpointError(f"{directory / file} is missing, and {index} names it; copy or download it again")
        for tensor in read_header(directory / file):
            if tensor.name in stored:
                raise CheckpointError(f"tensor {tensor.name} is in {stored[tensor.name].file} and in {tensor.file}")
            stored[tensor.name] = tensor
    for name, file in file_of.items():
        if name not in stored or stored[name].file.name != file:
            raise CheckpointError(f"{index} says that tensor {name} is in {file}, but that file does not hold it")
    return stored


def _weight_map(index: Path) -> dict[str, str]:
    """File name of each tensor name."""
    weight_map = JsonKeys.read(index).section("weight_map")
    if weight_map is None:
        raise CheckpointError(f"{index}: weight_map is missing; it must map each tensor to its file")
    file_of: dict[str, str] = {}
    for name, file in weight_map.values.items():
        if not isinstance(file, str) or not is_bare_name(file):
            raise weight_map.error(name, "must be the name of a file beside the index")
        file_of[name] = file
    return file_of
