"""An expert rank: holds its slice of the routed experts and answers every exchange of every step."""

import logging
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from cluster.device import local_device, pin_threads, torch_dtype, use_threads
from cluster.dispatch import make_expert_dispatcher
from cluster.epoch_session import LeaveFlag, open_session
from cluster.epoch_thread import EpochThread, OnEpochEnd
from cluster.logs import log_event
from cluster.membership import Membership
from cluster.spec import CellSpec
from cluster.step_header import StepHeader
from cluster.topology import Role
from model_shards.config import load_model_config
from model_shards.weights import Progress, load_expert_shard

logger = logging.getLogger(__name__)


class ExpertShard:
    """One shard, its weights loaded when constructed. Stateless between steps: it can be replaced at any boundary."""

    def __init__(
        self,
        spec: CellSpec,
        ep_rank: int,
        device_index: int,
        on_epoch_end: OnEpochEnd,
        progress: Progress | None = None,
    ) -> None:
        self._spec = spec
        self._device = local_device(spec, device_index)
        self._dtype = torch_dtype(spec)
        directory = Path(spec.model_directory)
        self._config = load_model_config(directory)
        experts = spec.placement(self._config).shards[ep_rank]
        self._shard = load_expert_shard(directory, self._config, experts, self._dtype, self._device, progress)
        self._shard.lay_out()
        self._ep_rank = ep_rank
        self._leave = LeaveFlag()
        self._rows_received = 0
        self._thread = EpochThread(f"E{ep_rank}", self._run_epoch, on_epoch_end)

    @property
    def rows_received(self) -> int:
        """Rows (token, shard) this shard has computed since it was loaded."""
        return self._rows_received

    def join(self, membership: Membership, global_rank: int) -> "Future[None]":
        """Joins an epoch; the future is done once the process groups stand."""
        return self._thread.join(membership, global_rank)

    def leave(self, epoch: int) -> None:
        """Ends this epoch at its next step boundary, or at once while it is joined."""
        self._leave.ask(epoch)

    def close(self, timeout_s: float = 5.0) -> bool:
        """Leaves and ends the thread; whether it ended in time."""
        self._leave.ask_for_good()
        return self._thread.close(timeout_s)

    def _run_epoch(self, membership: Membership, global_rank: int, on_joined: Callable[[], None]) -> None:
        use_threads(self._spec, Role.EXPERT)
        num_micro_batches = self._spec.limits.num_micro_batches
        num_moe_layers = len(self._config.moe_layers)
        with open_session(
            membership,
            global_rank,
            self._device,
            num_micro_batches,
            num_moe_layers,
            self._leave,
            self._spec.trace_directory,
        ) as session:
            dispatcher = make_expert_dispatcher(
                session.groups,
                membership,
                self._ep_rank,
                self._config,
                self._dtype,
                self._device,
                session.trace,
            )
            before = self._rows_received
            if session.groups.mesh is not None:  # all ranks are on this host
                pin_threads(self._spec, Role.EXPERT, self._ep_rank)
            on_joined()
            log_event(logger, "epoch joined", epoch=membership.epoch, experts=len(self._shard.experts))
            computed_s: float | None = None  # since the last header
            while True:
                header = StepHeader(
                    membership.epoch, (0,) * num_micro_batches, self._leave.asked(), computed_s=computed_s
                )
                agreed = session.headers.exchange(header)
                computed_s = None
                if not agreed.idle:
                    dispatcher.run_step(agreed.plan, self._shard)
                    computed_s = dispatcher.computed_s
                    self._rows_received = before + dispatcher.rows_received
                if agreed.ends:
                    return
                if agreed.idle:
                    session.bell.sleep(self._leave.asked)
