"""The settings of one `shoal serve`: one YAML file, checked by pydantic at the edge, frozen dataclasses inside.

    flags (--attention-replicas 2)  >  the file (--config shoal.yaml)  >  the defaults below

Helm renders the same file. An unknown key is refused, with the nearest known one named; so is a key that stands twice.
"""

import dataclasses
import difflib
import os
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal, TypeAlias

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from deploy.models import default_model_directory
from model_shards.errors import ConfigError

Scalar: TypeAlias = str | int | float | bool | None
_Tree: TypeAlias = dict[str, dict[str, Scalar]]

_EDGE: ConfigDict = ConfigDict(extra="forbid", allow_inf_nan=False)
# Strict numbers: pydantic would take "8" and true for them.
Positive = Annotated[int, Field(strict=True, ge=1)]
Seconds = Annotated[float, Field(strict=True, gt=0, le=86400)]
Port = Annotated[int, Field(strict=True, ge=0, le=65535)]
Text = Annotated[str, BeforeValidator(lambda value: "" if value is None else value)]  # null is empty
Resource = Annotated[str, Field(pattern=r"^[A-Za-z0-9_./-]{1,63}$")]


@dataclass(frozen=True)
class ModelSettings:
    """Which checkpoint."""

    __pydantic_config__: ClassVar[ConfigDict] = _EDGE
    path: Text = ""  # directory in Hugging Face layout; empty: the small checkpoint inside the package
    name: Text = ""  # what clients call it, without spaces; empty: the directory's name


@dataclass(frozen=True)
class CellSettings:
    """How the model is cut, and on what it runs."""

    __pydantic_config__: ClassVar[ConfigDict] = _EDGE
    attention_replicas: Positive = 1
    expert_shards: Positive = 2
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: float32 on cpu, bfloat16 on cuda
    # auto: what is measured to be fastest, for each kind of step
    micro_batches: Literal["auto"] | Annotated[int, Field(strict=True, ge=1, le=3)] = "auto"
    # auto: nccl on cuda; on cpu shared memory where all ranks are on one host, gloo where they are not
    transport: Literal["auto", "gloo"] = "auto"
    load_timeout_s: Seconds = 1800.0  # every rank must have its weights in memory by then
    join_timeout_s: Seconds = 60.0  # all ranks must have joined an epoch by then
    exchange_timeout_s: Seconds = 60.0  # one exchange of a running step


@dataclass(frozen=True)
class EngineSettings:
    """Bounds of each attention replica."""

    __pydantic_config__: ClassVar[ConfigDict] = _EDGE
    max_model_len: Positive | None = None  # tokens of prompt and output; null: what model and cache allow
    max_num_seqs: Positive = 64
    max_num_batched_tokens: Positive = 512
    # A step with prefills takes at most so many times as long as its decodes alone; null: no bound. The bound keeps
    # streams going while a long prompt comes in, which takes longer for it.
    max_decode_slowdown: Annotated[float, Field(strict=True, gt=1, allow_inf_nan=False)] | None = 2.0
    block_size: Positive = 16
    kv_cache_tokens: Positive | None = None  # either this
    kv_cache_memory_gb: Annotated[float, Field(strict=True, gt=0)] | None = (
        None  # or this (GiB); null: 0.25 cpu, 8 cuda
    )
    kv_cache_dtype: Literal["auto", "int8", "fp8"] = "auto"  # auto: cell.dtype; else kv_c in 1 byte an element
    # auto: cell.dtype; int8: matrices of attention, dense layers and shared experts in 1 byte an element, and that of
    # the logits in bfloat16 on a CPU with 8-bit dot products
    attention_weights: Literal["auto", "int8"] = "auto"
    prefix_cache: Annotated[bool, Field(strict=True)] = True  # a prompt's begin that was computed before is not again


@dataclass(frozen=True)
class ServerSettings:
    """Where it listens, and how much it takes."""

    __pydantic_config__: ClassVar[ConfigDict] = _EDGE
    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    grpc_port: Port = 9000  # 0 picks a free port
    http_port: Port = 8000
    # Before the gateway: HAProxy, or Serve's proxy in Python. auto: HAProxy where `shoal serve` starts Ray itself, on
    # platforms that ray[serve] has one for.
    proxy: Literal["auto", "haproxy", "python"] = "auto"
    max_concurrent_requests: Positive = 256  # per gateway replica; more are refused with RESOURCE_EXHAUSTED
    drain_timeout_s: Seconds = 30.0
    request_timeout_s: Seconds = 3600.0  # the longest a request may take; a client's own deadline may be shorter


@dataclass(frozen=True)
class RaySettings:
    """The Ray cluster; the resources keep each role on its own group of nodes."""

    __pydantic_config__: ClassVar[ConfigDict] = _EDGE
    address: str | None = None  # null: start Ray on this machine and stop it at the end
    replace: Annotated[bool, Field(strict=True)] = False  # take down a cell, and Serve, that run at that address
    attention_resource: Resource | None = None  # a custom Ray resource that attention replicas ask 1 of
    expert_resource: Resource | None = None  # likewise for expert shards


@dataclass(frozen=True)
class LogSettings:
    """What is logged."""

    __pydantic_config__: ClassVar[ConfigDict] = _EDGE
    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"


@dataclass(frozen=True)
class ShoalSettings:
    """All settings. Build it with `ShoalConfig.load`: then nothing is left open and every rule holds."""

    __pydantic_config__: ClassVar[ConfigDict] = _EDGE
    model: ModelSettings = field(default_factory=ModelSettings)
    cell: CellSettings = field(default_factory=CellSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    server: ServerSettings = field(default_factory=ServerSettings)
    ray: RaySettings = field(default_factory=RaySettings)
    log: LogSettings = field(default_factory=LogSettings)


_ADAPTER = TypeAdapter(ShoalSettings)
_DEFAULT_CACHE_GB = {"cpu": 0.25, "cuda": 8.0}


class ShoalConfig:
    """Reads and writes settings."""

    @staticmethod
    def load(path: Path | None, overrides: Mapping[str, Scalar]) -> ShoalSettings:
        """The file, or the defaults, with `overrides` (dotted keys, "cell.device") on top.

        Raises ConfigError naming file, key, rule and value.
        """
        tree = {} if path is None else _read(path)
        for key, value in overrides.items():
            section, _, name = key.partition(".")
            tree.setdefault(section, {})[name] = value
        origin = _Origin("the command line" if path is None else str(path), frozenset(overrides))
        try:
            settings = _ADAPTER.validate_python(tree)
        except ValidationError as error:
            raise ConfigError("\n".join(_explain(origin, error))) from None
        return _resolve(settings, origin)

    @staticmethod
    def dump(settings: ShoalSettings) -> str:
        """The same settings as a YAML file that loads back to them."""
        return yaml.safe_dump(dataclasses.asdict(settings), sort_keys=False)


def default_config_path() -> Path | None:
    """The file named by SHOAL_CONFIG, the one variable that Shoal's settings read."""
    named = os.environ.get("SHOAL_CONFIG")
    return Path(named) if named else None


@dataclass(frozen=True)
class _Origin:
    """Where a value came from: the overrides, or else the file."""

    file: str
    overrides: frozenset[str]

    def of(self, key: str) -> str:
        return "the command line" if key in self.overrides else self.file


class _UniqueKeyLoader(yaml.SafeLoader):
    """A SafeLoader that refuses a key that stands twice, of which YAML would silently drop the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} stands twice", problem_mark=key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _read(path: Path) -> _Tree:
    try:
        # The loader is a SafeLoader: it makes plain values only.
        tree = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeyLoader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = "" if mark is None else f", line {mark.line + 1} column {mark.column + 1}"
        raise ConfigError(f"{path}{where}: is not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # not a date, too deep, too many digits
        raise ConfigError(f"{path}: is not valid YAML: {' '.join(str(error).split())}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must hold sections such as `model:` and `cell:`, got {type(tree).__name__}")
    for section, values in tree.items():
        if values is not None and not isinstance(values, dict):
            raise ConfigError(f"{path}: {section} must hold keys, got {values!r}")
    return {
        str(section): {str(key): value for key, value in (values or {}).items()} for section, values in tree.items()
    }


def _explain(origin: _Origin, error: ValidationError) -> list[str]:
    lines = []
    for problem in error.errors():
        # Past section and key, pydantic names the branch of a union; that is no part of the file.
        keys = [str(key) for key in problem["loc"]][:2]
        where = ".".join(keys)
        if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            known = _known_keys(keys[:-1])
            near = difflib.get_close_matches(keys[-1], known, n=1)
            if len(keys) == 1:
                near += [f"{section}.{keys[0]}" for section in known if keys[0] in _known_keys([section])]
            hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
            lines.append(f"{origin.of(where)}: {where} is not a setting; {hint}")
        else:
            rule = problem["msg"].removeprefix("Input ")
            lines.append(f"{origin.of(where)}: {where} {rule}, got {problem['input']!r}")
    return list(dict.fromkeys(lines))


def _known_keys(sections: list[str]) -> list[str]:
    sections_by_name = {entry.name: entry.default_factory for entry in dataclasses.fields(ShoalSettings)}
    if not sections:
        return list(sections_by_name)
    factory = sections_by_name.get(sections[0])
    if factory is None or factory is dataclasses.MISSING:
        return []
    return [entry.name for entry in dataclasses.fields(factory())]


def _resolve(settings: ShoalSettings, origin: _Origin) -> ShoalSettings:
    """Checks the rules between keys and fills what was left open."""
    cell, engine, server = settings.cell, settings.engine, settings.server
    if engine.kv_cache_tokens is not None and engine.kv_cache_memory_gb is not None:
        raise ConfigError(
            f"{origin.of('engine.kv_cache_tokens')}: engine.kv_cache_tokens ({engine.kv_cache_tokens}) and "
            f"engine.kv_cache_memory_gb ({engine.kv_cache_memory_gb}) say the same thing twice; keep one"
        )
    if engine.max_num_seqs > engine.max_num_batched_tokens:
        raise ConfigError(
            f"{origin.of('engine.max_num_seqs')}: engine.max_num_seqs ({engine.max_num_seqs}) must not exceed "
            f"engine.max_num_batched_tokens ({engine.max_num_batched_tokens}): every running sequence decodes in a step"
        )
    if server.grpc_port == server.http_port != 0:
        raise ConfigError(
            f"{origin.of('server.grpc_port')}: server.grpc_port and server.http_port must differ, "
            f"both are {server.grpc_port}"
        )
    if server.proxy == "haproxy" and settings.ray.address is not None:
        raise ConfigError(
            f"{origin.of('server.proxy')}: server.proxy must be auto or python with ray.address, got haproxy: what "
            "stands before the gateway there, the environment of that cluster says (RAY_SERVE_ENABLE_HA_PROXY)"
        )
    if engine.kv_cache_tokens is None and engine.kv_cache_memory_gb is None:
        engine = dataclasses.replace(engine, kv_cache_memory_gb=_DEFAULT_CACHE_GB[cell.device])
    if cell.dtype == "auto":
        cell = dataclasses.replace(cell, dtype="float32" if cell.device == "cpu" else "bfloat16")
    model = _resolve_model(settings.model, origin)
    return dataclasses.replace(settings, model=model, cell=cell, engine=engine)


def _resolve_model(model: ModelSettings, origin: _Origin) -> ModelSettings:
    directory = (Path(model.path) if model.path else default_model_directory()).absolute()
    name = model.name or directory.resolve().name
    if not name or any(character.isspace() or not character.isprintable() for character in name):
        # The name stands in the `ready` line and in log lines, between spaces.
        raise ConfigError(
            f"{origin.of('model.name')}: model.name must have no spaces or control characters, got {name!r}"
            + ("" if model.name else " (the directory's name): set model.name")
        )
    return ModelSettings(str(directory), name)
