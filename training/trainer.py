"""Trains a transformers DeepSeek-V2 one phase at a time, and goes on where a killed run left off.

Nothing in a step draws random numbers: parameters, batches and the order of all sums depend on the seed alone, so a
resumed run gives the same parameters, bit for bit, as one that was never interrupted (same machine, same threads).
"""

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn
from transformers import DeepseekV2ForCausalLM

from training.balance import BalanceFactors, BalanceLosses, DeviceLayout, RouterProbe, sum_over_layers
from training.batch import IGNORED, Batch, TrainPhase
from training.checkpoint import History, HistoryRow, RunState, Tensors, load_checkpoint, save_checkpoint
from training.errors import DivergedError, TrainingStopped, WorkDirError
from training.progress import PhaseReport
from training.schedule import learning_rate
from training.signals import StopFlag

# Losses of held-out sets by name, in nats; called between steps, under no_grad.
HeldOutLosses = Callable[[DeepseekV2ForCausalLM], dict[str, float]]


@dataclass(frozen=True)
class TrainerOptions:
    """Settings that hold for all phases. AdamW's are those of the report, section 3.1.2."""

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # of matrices; not of norms
    max_grad_norm: float = 1.0
    balance: BalanceFactors = field(default_factory=BalanceFactors)
    checkpoint_every: int = 200  # steps
    held_out_every: int = 200  # steps


class Trainer:
    """Runs phases on one model, in order; `work_dir` holds the checkpoint and the history."""

    def __init__(
        self,
        model: DeepseekV2ForCausalLM,
        work_dir: Path,
        data_fingerprint: str,
        options: TrainerOptions | None = None,
        held_out: HeldOutLosses | None = None,
        console: Console | None = None,
    ) -> None:
        """Loads the checkpoint of `work_dir` into the model if there is one.

        Raises WorkDirError when it was made with another shape, other options or another `data_fingerprint`.
        """
        self._model = model
        self._work_dir = work_dir
        self._options = options or TrainerOptions()
        self._held_out = held_out
        self._console = console or Console()
        self._device = next(model.parameters()).device
        self._layout = DeviceLayout(model.config.n_group, model.config.topk_group)
        work_dir.mkdir(parents=True, exist_ok=True)
        fingerprint = _fingerprint(model.config.to_dict(), _numerical(self._options), data_fingerprint)
        self._state = RunState(fingerprint)
        self._saved_optimizer: dict[str, object] | None = None
        self._resume(fingerprint)

    @property
    def state(self) -> RunState:
        """A copy of how far the run has come."""
        return replace(self._state, completed=list(self._state.completed))

    def run(self, phase: TrainPhase) -> None:
        """Trains one phase to its end, from where the work directory stands; nothing when it is over already.

        Call it from the main thread. Raises TrainingStopped after SIGTERM or SIGINT, when the step under way is
        finished and saved; DivergedError when the loss is no number; WorkDirError when the phase has been begun with
        other settings.
        """
        if phase.name in self._state.completed:
            return
        optimizer = self._start(phase)
        self._model.train()
        history = History(self._work_dir, self._state.history_bytes)
        try:
            with (
                StopFlag() as stop,
                RouterProbe(self._model) as probe,
                PhaseReport(self._console, phase.name, phase.num_steps, self._state.step) as report,
            ):
                while self._state.step < phase.num_steps:
                    tokens, seconds = self._state.tokens, self._state.seconds
                    row = self._step(phase, optimizer, probe)
                    history.append(row)
                    report.step(row, row.tokens - tokens, row.seconds - seconds)
                    if stop.signal is not None or self._state.step % self._options.checkpoint_every == 0:
                        self._save(optimizer, history)
                    if stop.signal is not None:
                        raise TrainingStopped(
                            f"{stop.signal.name} after step {row.step} of {phase.name}; start again to go on"
                        )
            self._state.completed.append(phase.name)
            self._save(optimizer, history)
        finally:
            history.close()

    def _resume(self, fingerprint: str) -> None:
        loaded = load_checkpoint(self._work_dir)
        if loaded is None:
            return
        state, tensors = loaded
        if state.fingerprint != fingerprint:
            raise WorkDirError(f"{self._work_dir} holds a run with another model, other data or other options")
        self._state = state
        self._model.load_state_dict(tensors.model)
        self._saved_optimizer = tensors.optimizer

    def _start(self, phase: TrainPhase) -> torch.optim.AdamW:
        """Each phase has an optimizer of its own, fresh unless the phase is resumed."""
        optimizer = _adamw(self._model, self._options)
        settings = _fingerprint([phase.name, phase.num_steps, phase.max_lr, phase.warmup_steps])
        if self._state.phase == phase.name and self._saved_optimizer is not None:
            if self._state.phase_fingerprint != settings:
                raise WorkDirError(f"{self._work_dir} holds phase {phase.name} begun with other steps or rates")
            optimizer.load_state_dict(self._saved_optimizer)
        else:
            self._state = replace(self._state, phase=phase.name, phase_fingerprint=settings, step=0)
        self._saved_optimizer = None
        return optimizer

    def _step(self, phase: TrainPhase, optimizer: torch.optim.AdamW, probe: RouterProbe) -> HistoryRow:
        """One update. Changes the model and the state; raises DivergedError before it spoils the model."""
        began = time.perf_counter()
        batch = phase.batches(self._state.step)
        lr = learning_rate(self._state.step, phase.num_steps, phase.max_lr, phase.warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss, balance = self._losses(batch, probe)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss + balance.total)
        norm = float(nn.utils.clip_grad_norm_(self._model.parameters(), self._options.max_grad_norm))
        if not math.isfinite(norm):
            raise DivergedError(
                f"step {self._state.step + 1} of {phase.name}: loss {loss.item()}, gradient norm {norm}"
            )
        optimizer.step()
        self._state.step += 1
        self._state.tokens += batch.num_tokens
        self._state.seconds += time.perf_counter() - began
        return HistoryRow(
            phase=phase.name,
            step=self._state.step,
            tokens=self._state.tokens,
            lr=lr,
            loss=loss.item(),
            expert_balance=balance.expert.item(),
            device_balance=balance.device.item(),
            communication_balance=balance.communication.item(),
            grad_norm=norm,
            seconds=self._state.seconds,
            held_out=self._held_out_losses(phase, probe),
        )

    def _losses(self, batch: Batch, probe: RouterProbe) -> tuple[torch.Tensor, BalanceLosses]:
        """Cross entropy per supervised token, and the balance losses."""
        input_ids, labels, mask = (part.to(self._device) for part in (batch.input_ids, batch.labels, batch.mask))
        loss = next_token_loss(self._model, input_ids, labels)
        return loss, sum_over_layers(probe.take(), mask, self._layout, self._options.balance)

    def _held_out_losses(self, phase: TrainPhase, probe: RouterProbe) -> dict[str, float]:
        step, every = self._state.step, self._options.held_out_every
        if self._held_out is None or (step % every and step != phase.num_steps):
            return {}
        self._model.eval()
        with torch.no_grad():
            losses = self._held_out(self._model)
        self._model.train()
        probe.take()  # what the evaluation routed is no part of the next step
        return losses

    def _save(self, optimizer: torch.optim.AdamW, history: History) -> None:
        self._state.history_bytes = history.sync()
        save_checkpoint(self._work_dir, self._state, Tensors(self._model.state_dict(), optimizer.state_dict()))


def next_token_loss(model: DeepseekV2ForCausalLM, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy in nats over the labels [B, S] that are not IGNORED; padding may only end a sequence.

    The head runs on supervised positions alone: with this vocabulary it is a third of a step.
    """
    with torch.autocast(input_ids.device.type, dtype=torch.bfloat16, enabled=input_ids.device.type == "cuda"):
        hidden = model.model(input_ids=input_ids, use_cache=False).last_hidden_state  # [B, S, H]
        supervised = labels != IGNORED
        logits = model.lm_head(hidden[supervised])
    return F.cross_entropy(logits.float(), labels[supervised])


def _adamw(model: nn.Module, options: TrainerOptions) -> torch.optim.AdamW:
    parameters = list(model.parameters())
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": options.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=0.0,  # set before each step
        betas=(options.beta1, options.beta2),
        eps=options.eps,
        fused=True,
    )


def _numerical(options: TrainerOptions) -> dict[str, object]:
    """The options that change the parameters: how often a run is saved or measured does not."""
    return {key: value for key, value in asdict(options).items() if not key.endswith("_every")}


def _fingerprint(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
