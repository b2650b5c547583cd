"""The process groups of one epoch.

Both groups are built straight from the epoch's store, not through torch's default group, so one process may open
and close epochs as often as it likes, and hold several at once:

    control   gloo on CPU   step headers
    data      gloo or nccl  dispatch and combine

Ranks on CPUs of one host need neither: they exchange headers and rows through shared memory (cluster/shm). A gloo group
that nobody uses is not free: it connects all pairs of ranks, and to hang up takes gloo 10 ms for each.

How ranks join (keys in the store, under `epoch<n>/`):

    set joined/A0 -> wait for joined/* of all ranks -> open each other's memory
                  -> set sharing/A0 -> wait for sharing/* -> build the groups -> set built/A0 -> wait for built/*

The value of `joined` is where a rank's memory is, that of `sharing` why it cannot open another's; both may be empty.

Every wait ends at the one join deadline, and what is missing then is named. A rank that is told to leave while it
joins sets `abort` and every key that anyone may wait for, so all ranks wake, see why, and give the epoch up.
"""

import contextlib
import time
from collections.abc import Iterator
from datetime import timedelta
from types import TracebackType

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store  # torch.distributed has them, unexported in its stubs

from cluster.membership import Membership
from cluster.rendezvous import first_line, local_address_towards
from cluster.shm.mesh import Address, Mesh, address_of, supported
from cluster.shm.outbox import Outbox
from model_shards.errors import ConfigError, EpochAbortedError

# auto: shm where all ranks are on one host, else gloo.
BACKENDS = ("auto", "gloo", "nccl", "shm")
_STAGES = ("joined", "sharing", "built")
_HANG_UP_TAG = 0x5EED  # of messages that are never sent; collectives count their tags elsewhere


class EpochGroups:
    """The groups of one epoch on one rank; a context manager. Build it with `open_epoch`."""

    def __init__(
        self, control: dist.ProcessGroup | None, data: dist.ProcessGroup | None, backend: str, mesh: Mesh | None
    ) -> None:
        """There are both groups, or there is `mesh`; `backend` is that of `data`: gloo or nccl."""
        self.control = control
        self.data = data
        self.backend = backend
        self.mesh = mesh
        self._closed = False

    def close(self) -> None:
        """Drops the connections of both groups, so that neither this rank nor a peer waits on. Idempotent.

        Waits for no peer: exchanges under way fail at once, here and there.
        """
        if self._closed:
            return
        self._closed = True
        if self.mesh is not None:
            self.mesh.close()
        if self.data is not None:
            _hang_up(self.data, self.backend)
        if self.control is not None:
            _hang_up(self.control, "gloo")

    def __enter__(self) -> "EpochGroups":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_epoch(
    membership: Membership, global_rank: int, device: torch.device, store: Store, deadline: float | None = None
) -> EpochGroups:
    """Joins an epoch; blocks until every rank has joined and built its groups.

    `deadline` is on time.monotonic()'s clock; without one it is `membership.join_timeout_s` from now. Raises
    EpochAbortedError that names the ranks missing when it passed, or who gave up (`abort_join`), and ConfigError when
    backend and device do not go together. What was half built by then is closed.
    """
    check_backend(membership.backend, device)
    if deadline is None:
        deadline = time.monotonic() + membership.join_timeout_s
    joining = _Joining(membership, global_rank, store, deadline)
    with contextlib.ExitStack() as built:
        with joining.guarded("join"):
            outbox = _make_outbox(membership)
            if outbox is not None:
                built.callback(outbox.close)
            words = joining.meet("joined", "" if outbox is None else address_of(outbox).encode())
        with joining.guarded("build the process groups of"):
            mesh = _open_mesh(membership, global_rank, joining, outbox, words)
            backend = "nccl" if membership.backend == "nccl" else "gloo"
            control: dist.ProcessGroup | None = None
            data: dist.ProcessGroup | None = None
            if mesh is not None:
                built.callback(mesh.close)
            else:
                control = _open_gloo(membership, global_rank, joining.substore("control"), joining.left_s())
                built.callback(_hang_up, control, "gloo")
                data = _open_data(membership, backend, global_rank, device, joining.substore("data"), joining.left_s())
                built.callback(_hang_up, data, backend)
            joining.meet("built")
        built.pop_all()
    if mesh is None and outbox is not None:
        outbox.close()
    return EpochGroups(control, data, backend, mesh)


def _make_outbox(membership: Membership) -> Outbox | None:
    """None where shared memory is not asked for, or this system has none."""
    if membership.backend not in ("auto", "shm") or not supported():
        return None
    return Outbox(membership.topology.world_size)


def _open_mesh(
    membership: Membership, global_rank: int, joining: "_Joining", outbox: Outbox | None, words: list[str]
) -> Mesh | None:
    """None where shared memory was not asked for, or not all ranks can have it: all conclude the same.

    `words` are the ranks' addresses. Raises ConfigError where it was asked for by name and cannot be had.
    """
    mesh, why = None, _why_not_shared(words)
    with contextlib.ExitStack() as made:
        if not why:
            assert outbox is not None, "a rank that has an address has an outbox"
            try:
                addresses = [Address.decode(word) for word in words]
                mesh = made.enter_context(contextlib.closing(Mesh(outbox, addresses, global_rank, joining.names)))
            except (OSError, ValueError) as error:
                why = f"a rank cannot open another's memory: {error}"
        # Whoever cannot open one peer's memory tells all: either every rank shares or none does.
        refused = [word for word in joining.meet("sharing", why) if word]
        if not refused:
            made.pop_all()
            return mesh
    if membership.backend == "shm":
        raise ConfigError(f"the backend shm cannot be had, {refused[0]}; gloo carries the data everywhere")
    return None


def _why_not_shared(words: list[str]) -> str:
    """Empty when all ranks have an address, on one host."""
    hosts = {Address.decode(word).host for word in words if word}
    if all(words) and len(hosts) == 1:
        return ""
    able = sum(map(bool, words))
    return (
        f"it needs all ranks on one Linux host under one user: {able} of {len(words)} can share, on {len(hosts)} hosts"
    )


def abort_join(membership: Membership, global_rank: int, store: Store) -> None:
    """Ends the joining of an epoch on all ranks; nothing to those that have joined. `store` is not the one that joins.

    A store that is gone is not an error here: whoever joins meets the same fault and reports it.
    """
    keys = PrefixStore(f"epoch{membership.epoch}", store)
    topology = membership.topology
    with contextlib.suppress(RuntimeError, OSError):
        keys.set("abort", topology.name(global_rank))
        for stage in _STAGES:
            for rank in range(topology.world_size):
                keys.set(f"{stage}/{topology.name(rank)}", "1")


def check_backend(backend: str, device: torch.device) -> None:
    """Raises ConfigError unless `backend` can carry tensors of `device` (gloo carries CUDA through host memory)."""
    if backend not in BACKENDS:
        raise ConfigError(f"the backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend in ("auto", "shm") and device.type != "cpu":
        raise ConfigError(f"the backend {backend} needs a cpu device, got {device}")
    if backend == "shm" and not supported():
        raise ConfigError("the backend shm needs memfd, pidfd and /proc of Linux 5.3, and glibc 2.30; ask for gloo")
    if backend == "nccl" and device.type != "cuda":
        raise ConfigError(f"the backend nccl needs a cuda device, got {device}")
    if backend == "nccl" and not dist.is_nccl_available():
        raise ConfigError("the backend nccl is not part of this build of torch")


class _Joining:
    """The clock and the roll call of one join."""

    def __init__(self, membership: Membership, global_rank: int, store: Store, deadline: float) -> None:
        self._membership = membership
        self._store = PrefixStore(f"epoch{membership.epoch}", store)
        topology = membership.topology
        self.names = tuple(topology.name(rank) for rank in range(topology.world_size))
        self._me = self.names[global_rank]
        self._deadline = deadline
        self._stage = _STAGES[0]

    def left_s(self) -> float:
        """Seconds left to join; never 0, which torch reads as no wait at all."""
        return max(self._deadline - time.monotonic(), 0.05)

    def substore(self, name: str) -> Store:
        """A store whose keys no other group can touch."""
        return PrefixStore(name, self._store)

    def meet(self, stage: str, word: str = "") -> list[str]:
        """Says that this rank reached `stage` and waits until all have; their words, by global rank.

        Raises EpochAbortedError when one gave up.
        """
        self._stage = stage
        keys = [f"{stage}/{name}" for name in self.names]
        self._store.set(f"{stage}/{self._me}", word)
        self._store.wait(keys, timedelta(seconds=self.left_s()))
        # One question for all: with one for each, the store answers as often as there are pairs of ranks.
        words = [word.decode() for word in self._store.multi_get(keys)]
        # After reading: who gives up writes its own words over others'.
        self._check_abort()
        return words

    @contextlib.contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        """Turns any failure of the store or of a group into an EpochAbortedError that names who is missing."""
        try:
            yield
        except (RuntimeError, OSError, ValueError) as error:
            self._check_abort()
            missing = self._missing()
            lost = f"missing: {', '.join(missing)}" if missing else "no rank missing"
            raise EpochAbortedError(
                f"rank {self._me} could not {what} epoch {self._membership.epoch} within "
                f"{self._membership.join_timeout_s:g} s; {lost} ({first_line(error)})"
            ) from error

    def _check_abort(self) -> None:
        try:
            if not self._store.check(["abort"]):
                return
            who = self._store.get("abort").decode()
        except (RuntimeError, OSError):
            return  # the store is gone: `_missing` says so
        raise EpochAbortedError(f"rank {who} was told to leave epoch {self._membership.epoch} while it was joined")

    def _missing(self) -> tuple[str, ...]:
        # Ranks that never joined explain all later trouble, so they are named first and alone.
        for stage in _STAGES[: _STAGES.index(self._stage) + 1]:
            try:
                missing = tuple(name for name in self.names if not self._store.check([f"{stage}/{name}"]))
            except (RuntimeError, OSError):
                return (f"{self.names[0]} (the rendezvous)",)
            if missing:
                return missing
        return ()


def _hang_up(group: dist.ProcessGroup, backend: str) -> None:
    if backend == "nccl":
        group.abort()
        return
    # gloo's abort does nothing (torch 2.13), and its destructor waits for exchanges under way until they time out.
    # But a receive that times out closes every connection of its group: ask for a message that nobody sends.
    never = torch.empty(1, dtype=torch.uint8)
    peer = (group.rank() + 1) % group.size()
    with contextlib.suppress(RuntimeError):  # the time-out asked for, or a connection that is lost already
        group.recv([never], peer, _HANG_UP_TAG).wait(timedelta(milliseconds=1))


def _open_gloo(membership: Membership, global_rank: int, store: Store, timeout_s: float) -> dist.ProcessGroup:
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # absent from torch's stubs
    options._timeout = timedelta(seconds=timeout_s)
    # Without a device of our own gloo would listen wherever the host name resolves to.
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=local_address_towards(membership.rendezvous))]
    world_size = membership.topology.world_size
    backend = dist.ProcessGroupGloo(store, global_rank, world_size, options)
    # The join deadline bounded the connecting; from now on the deadline of one exchange holds.
    backend._set_default_timeout(timedelta(seconds=membership.exchange_timeout_s))
    group = dist.ProcessGroup(store, global_rank, world_size)
    group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, backend)
    return group


def _open_data(
    membership: Membership, backend: str, global_rank: int, device: torch.device, store: Store, timeout_s: float
) -> dist.ProcessGroup:
    if backend == "gloo":
        return _open_gloo(membership, global_rank, store, timeout_s)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=membership.exchange_timeout_s)
    world_size = membership.topology.world_size
    nccl = dist.ProcessGroupNCCL(store, global_rank, world_size, options)
    group = dist.ProcessGroup(store, global_rank, world_size)
    group._register_backend(torch.device("cuda"), dist.ProcessGroup.BackendType.NCCL, nccl)
    # NCCL connects lazily; do it now, so that a rank that cannot is met by the join deadline.
    nccl.eager_connect_single_device(device)
    return group
