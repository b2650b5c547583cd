"""Whether a checkpoint holds exactly the tensors that its config.json asks for; reads headers only."""

from pathlib import Path

import torch

from model_shards.config import ModelConfig
from model_shards.errors import CheckpointError
from model_shards.experts import ExpertShardModel
from model_shards.json_keys import JsonKeys
from model_shards.model import AttentionModel
from model_shards.weights.header import StoredTensor, read_header

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# A checkpoint of another shape breaks thousands of rules at once; the first few tell which.
_MAX_PROBLEMS = 5


def check_checkpoint(directory: Path, config: ModelConfig) -> None:
    """Raises CheckpointError, naming tensor, file, expected and found shape, unless all is there and nothing else."""
    checked_tensors(directory, config)


def checked_tensors(directory: Path, config: ModelConfig) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint by name, after the same check. Raises CheckpointError as `check_checkpoint`."""
    stored = _read_tensors(directory)
    expected = expected_shapes(config)
    problems = [
        f"tensor {name} of shape {list(shape)} is missing" for name, shape in expected.items() if name not in stored
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
    if problems:
        more = f"; and {len(problems) - _MAX_PROBLEMS} more" if len(problems) > _MAX_PROBLEMS else ""
        place = directory / _source(directory)
        raise CheckpointError(f"{place} does not fit config.json: {'; '.join(problems[:_MAX_PROBLEMS])}{more}")
    return stored


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the whole model by Hugging Face name; allocates nothing."""
    meta = torch.device("meta")
    shapes = {name: tuple(view.shape) for name, view in AttentionModel(config, torch.float32, meta).hf_slices()}
    shard = ExpertShardModel(config, tuple(range(config.n_routed_experts or 0)), torch.float32, meta)
    shapes.update((name, tuple(view.shape)) for name, view in shard.hf_slices())
    return shapes


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
        # A bare name: an index must not lead out of its directory.
        if not isinstance(file, str) or file in ("", ".", "..") or Path(file).name != file or not file.isprintable():
            raise weight_map.error(name, "must be the name of a file beside the index")
        file_of[name] = file
    return file_of
