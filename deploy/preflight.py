"""Everything that can be known to fail is refused before anything is started, with the numbers.

ports -> room for Ray's files -> checkpoint -> tokenizer -> how the model is cut -> devices and memory
"""

import errno
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Set
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from deploy.config import ServerSettings, ShoalSettings
from model_shards.errors import CapacityError, ConfigError

_GIB = 2**30
# Free ports are drawn from here: below Linux's ephemeral ports, which any connection of the starting processes may
# take between this check and the bind, and above the ports that Ray gives to its workers (10002 to 19999).
DRAWN_PORTS = range(20000, 32768)
_DRAWS = 64
_GPU_QUERY = "import torch\nfor i in range(torch.cuda.device_count()): print(torch.cuda.mem_get_info(i)[0])"
_GPU_QUERY_S = 120.0
# Ray's logs of a day; on a full disk its daemons end without a word that helps.
_RAY_FILES_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Machine:
    """What this machine has to give now."""

    memory: int  # bytes
    gpu_memory: tuple[int, ...] = ()  # free bytes of each GPU


@dataclass(frozen=True)
class CellNeeds:
    """Bytes that the ranks of a cell take, working memory left aside."""

    attention_replicas: int
    attention_slice: int  # weights of one attention replica
    kv_cache: int  # of one attention replica
    expert_slices: tuple[int, ...]  # weights of each expert shard

    @property
    def attention_rank(self) -> int:
        """One attention replica, weights and cache."""
        return self.attention_slice + self.kv_cache

    @property
    def total(self) -> int:
        """All ranks."""
        return self.attention_replicas * self.attention_rank + sum(self.expert_slices)


def preflight(settings: ShoalSettings) -> ShoalSettings:
    """Checks all that is above; returns the settings with port 0 replaced by free ports.

    Ranks on a Ray cluster (`ray.address`) run on machines that are not this one: their ports, devices and memory are
    not checked. Raises ConfigError, CheckpointError or CapacityError.
    """
    local = settings.ray.address is None
    server = choose_ports(settings.server, check_given=local)
    if local:
        check_ray_directory(Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()))
    needs = cell_needs(settings)
    if local:
        check_capacity(settings, needs, inspect_machine(settings.cell.device))
    return replace(settings, server=server)


def check_ray_directory(directory: Path) -> None:
    """Raises CapacityError unless Ray, started on this machine, has room for its logs and sockets there."""
    there = next((parent for parent in (directory, *directory.parents) if parent.exists()), directory)  # Ray makes it
    try:
        free = shutil.disk_usage(there).free
    except OSError as error:
        raise CapacityError(f"Ray writes its files to {directory}, which cannot be used: {error.strerror}") from error
    if free < _RAY_FILES_BYTES:
        raise CapacityError(
            f"Ray writes its logs and sockets to {directory}, which has {free / 2**20:.1f} MiB free and needs "
            f"{_RAY_FILES_BYTES / 2**20:.0f}: free some, or name another directory in RAY_TMPDIR"
        )


def choose_ports(server: ServerSettings, check_given: bool = True) -> ServerSettings:
    """The same settings with free ports in place of 0. Raises ConfigError for a port in use or an unusable host."""
    with ExitStack() as held:
        ports: dict[str, int] = {}
        for key, port in (("grpc_port", server.grpc_port), ("http_port", server.http_port)):
            try:
                if port == 0:
                    ports[key] = _free_port(server.host, held)
                    continue
                ports[key] = port
                if check_given:
                    _bind(server.host, port, held)
            except OSError as error:
                if error.errno == errno.EADDRNOTAVAIL:
                    raise ConfigError(
                        f"server.host must be an address of this machine, got {server.host!r}: {error.strerror}"
                    ) from error
                raise ConfigError(
                    f"server.{key} {port} on {server.host} cannot be taken ({error.strerror}): stop what uses it, "
                    f"choose another with --{key.replace('_', '-')}, or 0 for any free one"
                ) from error
    return replace(server, grpc_port=ports["grpc_port"], http_port=ports["http_port"])


def free_ports(host: str, count: int, taken: Set[int] = frozenset()) -> list[int]:
    """Different ports that nobody uses now, and that are not among those that are taken."""
    ports: list[int] = []
    with ExitStack() as held:
        while len(ports) < count:
            port = _free_port(host, held)
            if port not in taken:
                ports.append(port)
    return ports


def _free_port(host: str, held: ExitStack) -> int:
    for port in random.sample(DRAWN_PORTS, _DRAWS):
        try:
            _bind(host, port, held)
        except OSError:
            continue
        return port
    return _bind(host, 0, held)


def _bind(host: str, port: int, held: ExitStack) -> int:
    """Holds the port until `held` closes; returns it. Raises OSError, or ConfigError for an unknown host."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise ConfigError(f"server.host must be an address of this machine, got {host!r}: {error.strerror}") from error
    listener = held.enter_context(socket.socket(family, kind, protocol))
    # As servers do: connections of a former server that linger in TIME_WAIT do not hold the port.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(address)
    # Two sockets with SO_REUSEADDR may bind one port; only one may listen.
    listener.listen(1)
    return int(listener.getsockname()[1])


def cell_needs(settings: ShoalSettings) -> CellNeeds:
    """Checks checkpoint, tokenizer and cut, and measures them. Raises CheckpointError or ConfigError."""
    # Imported here: torch takes seconds, and a port in use should be told before that.
    from cluster.device import torch_dtype
    from deploy.cell_spec import build_cell_spec, kv_bytes_per_token
    from deploy.text import ChatTokenizer
    from model_shards.config import load_model_config
    from model_shards.weights import attention_slice_bytes, check_checkpoint, expert_slice_bytes

    directory = Path(settings.model.path)
    if not directory.is_dir():
        raise ConfigError(f"model.path must be a directory in Hugging Face layout, got {directory}")
    config = load_model_config(directory)
    spec = build_cell_spec(settings)
    placement = spec.placement(config)
    quantization = check_checkpoint(directory, config)
    ChatTokenizer.load(directory)
    dtype = torch_dtype(spec)
    tokens = spec.limits.num_blocks * spec.limits.block_size
    return CellNeeds(
        attention_replicas=spec.topology.num_attention,
        attention_slice=attention_slice_bytes(config, dtype, spec.device),
        kv_cache=tokens * kv_bytes_per_token(config, spec.dtype, spec.kv_cache_dtype),
        expert_slices=tuple(
            expert_slice_bytes(config, len(experts), dtype, quantization) for experts in placement.shards
        ),
    )


def inspect_machine(device: str) -> Machine:
    """Free memory now, within the container's limit; of GPUs too when `device` is cuda."""
    from model_shards.weights import container_memory

    memory = psutil.virtual_memory().available
    limit = container_memory()
    if limit is not None:
        memory = min(memory, limit)
    return Machine(memory, _free_gpu_memory() if device == "cuda" else ())


def _free_gpu_memory() -> tuple[int, ...]:
    """Asks in a process of its own: a CUDA context here would hold memory on every GPU for as long as this one runs."""
    query = [sys.executable, "-c", _GPU_QUERY]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=_GPU_QUERY_S, check=True)
    except subprocess.TimeoutExpired as error:
        raise CapacityError(
            f"the CUDA driver did not say within {_GPU_QUERY_S:.0f} s what is free on the GPUs"
        ) from error
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise CapacityError(f"the CUDA driver does not answer: {reason}") from error
    return tuple(int(line) for line in answer.stdout.split())


def check_capacity(settings: ShoalSettings, needs: CellNeeds, machine: Machine) -> None:
    """Raises CapacityError when the ranks cannot fit, naming what each takes and what there is."""
    if settings.cell.device == "cpu":
        if needs.total > machine.memory:
            raise CapacityError(
                f"the cell needs {_size(needs.total)} of memory and {_size(machine.memory)} is free: {_itemized(needs)}"
            )
        return
    ranks = needs.attention_replicas + len(needs.expert_slices)
    gpus = len(machine.gpu_memory)
    if ranks > gpus:
        raise CapacityError(
            f"the cell has {ranks} ranks ({needs.attention_replicas} attention replicas, {len(needs.expert_slices)} "
            f"expert shards) and each needs a GPU of its own; this machine has {gpus}"
        )
    # Ray chooses which rank gets which GPU, so the largest must fit on the smallest.
    largest, smallest = max(needs.attention_rank, *needs.expert_slices), min(machine.gpu_memory)
    if largest > smallest:
        raise CapacityError(
            f"the largest rank needs {_size(largest)} of GPU memory and GPU {machine.gpu_memory.index(smallest)} has "
            f"{_size(smallest)} free: {_itemized(needs)}"
        )


def _itemized(needs: CellNeeds) -> str:
    return (
        f"{needs.attention_replicas} attention replicas of {_size(needs.attention_slice)} weights and "
        f"{_size(needs.kv_cache)} KV cache each, {len(needs.expert_slices)} expert shards of up to "
        f"{_size(max(needs.expert_slices))}"
    )


def _size(count: int) -> str:
    return f"{count / _GIB:.2f} GiB" if count >= _GIB else f"{count / 2**20:.1f} MiB"
