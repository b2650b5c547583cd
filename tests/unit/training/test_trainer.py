"""The training loop: what a kill, a signal or a changed setting does to it, and what it learns."""

import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

from training.balance import BalanceFactors
from training.batch import IGNORED, Batch, TrainPhase
from training.checkpoint import (
    CHECKPOINT_FILE,
    HISTORY_FILE,
    RunState,
    Tensors,
    load_checkpoint,
    read_history,
    save_checkpoint,
)
from training.errors import DivergedError, TrainingStopped, WorkDirError
from training.model import build_model, demo_config
from training.signals import SIGNALS, StopFlag
from training.trainer import HeldOutLosses, Trainer, TrainerOptions, next_token_loss

VOCAB = 64


def tiny_config() -> DeepseekV2Config:
    config = demo_config(VOCAB, bos_token_id=0, eos_token_id=1)
    config.update(
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "moe_intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "head_dim": 4,
            "v_head_dim": 8,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
        }
    )
    return config


def tiny_model() -> DeepseekV2ForCausalLM:
    return build_model(tiny_config(), seed=0)


def counting_batch(step: int) -> Batch:
    """Runs of consecutive tokens, starting where the step says; the second one is shorter."""
    starts = torch.randint(VOCAB, (2, 1), generator=torch.Generator().manual_seed(step))
    tokens = (starts + torch.arange(9)) % VOCAB
    labels = tokens[:, 1:].clone()
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[1, 5:] = False
    labels[1, 5:] = IGNORED
    return Batch(tokens[:, :-1], labels, mask)


def phase(num_steps: int = 6, batches: Callable[[int], Batch] = counting_batch, name: str = "first") -> TrainPhase:
    return TrainPhase(name, num_steps, max_lr=1e-2, warmup_steps=2, batches=batches)


def trainer(
    model: DeepseekV2ForCausalLM,
    work_dir: Path,
    options: TrainerOptions | None = None,
    held_out: HeldOutLosses | None = None,
    output: io.StringIO | None = None,
) -> Trainer:
    console = Console(file=output or io.StringIO(), width=200)
    return Trainer(model, work_dir, "counting", options, held_out, console)


def signalling(at: int, number: signal.Signals) -> Callable[[int], Batch]:
    """`counting_batch`, but the process gets a signal while it makes the batch of step `at`."""

    def batches(step: int) -> Batch:
        if step == at:
            os.kill(os.getpid(), number)
        return counting_batch(step)

    return batches


def assert_same_parameters(left: DeepseekV2ForCausalLM, right: DeepseekV2ForCausalLM) -> None:
    for (name, one), other in zip(left.named_parameters(), right.parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_stopped_by_a_signal_and_resumed_ends_with_the_same_bits_and_the_same_history(tmp_path, number):
    straight, resumed = tiny_model(), tiny_model()
    trainer(straight, tmp_path / "straight").run(phase())
    with pytest.raises(TrainingStopped, match=f"{number.name} after step 3 of first"):
        trainer(resumed, tmp_path / "resumed").run(phase(batches=signalling(2, number)))
    again = build_model(tiny_config(), seed=1)  # all of it must come from the checkpoint
    trainer(again, tmp_path / "resumed").run(phase())
    assert_same_parameters(straight, again)
    rows, expected = read_history(tmp_path / "resumed"), read_history(tmp_path / "straight")
    assert [(row.step, row.tokens, row.loss) for row in rows] == [(row.step, row.tokens, row.loss) for row in expected]


def test_only_the_first_signal_waits_for_the_step():
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopFlag() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal is signal.SIGTERM
        assert [signal.getsignal(number) for number in SIGNALS] == before
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_resumed_run_depends_on_the_optimizer_it_saved(tmp_path):
    straight, resumed = tiny_model(), tiny_model()
    trainer(straight, tmp_path / "straight").run(phase())
    with pytest.raises(TrainingStopped):
        trainer(resumed, tmp_path / "resumed").run(phase(batches=signalling(2, signal.SIGTERM)))
    state, tensors = load_checkpoint(tmp_path / "resumed")
    for moments in tensors.optimizer["state"].values():
        moments["exp_avg"].zero_()
    save_checkpoint(tmp_path / "resumed", state, tensors)
    again = tiny_model()
    trainer(again, tmp_path / "resumed").run(phase())
    with pytest.raises(AssertionError):
        assert_same_parameters(straight, again)


def test_rows_after_the_last_checkpoint_are_cut_when_a_killed_run_resumes(tmp_path):
    def killed(step: int) -> Batch:
        if step == 5:
            raise RuntimeError("killed")
        return counting_batch(step)

    with pytest.raises(RuntimeError, match="killed"):
        trainer(tiny_model(), tmp_path, TrainerOptions(checkpoint_every=2)).run(phase(batches=killed))
    assert len(read_history(tmp_path)) == 5
    with (tmp_path / HISTORY_FILE).open("a") as file:
        file.write('{"phase": "fir')  # a line that a kill tore
    assert len(read_history(tmp_path)) == 5
    trainer(tiny_model(), tmp_path).run(phase())
    assert [row.step for row in read_history(tmp_path)] == [1, 2, 3, 4, 5, 6]


KILLED_IN_A_WRITE = """
import io, os, signal, sys
from pathlib import Path
import torch
from training.checkpoint import RunState, Tensors, save_checkpoint

save = torch.save

def half(values, file):
    whole = io.BytesIO()
    save(values, whole)
    file.write(whole.getvalue()[: whole.tell() // 2])
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

torch.save = half
save_checkpoint(Path(sys.argv[1]), RunState("new"), Tensors({"w": torch.ones(1000)}, {}))
"""


def test_a_kill_in_the_middle_of_writing_a_checkpoint_leaves_the_old_one(tmp_path):
    save_checkpoint(tmp_path, RunState("old", step=3), Tensors({"w": torch.arange(1000)}, {}))
    killed = subprocess.run([sys.executable, "-c", KILLED_IN_A_WRITE, tmp_path], timeout=100, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2, "the write that was killed must have begun"
    state, tensors = load_checkpoint(tmp_path)
    assert (state.fingerprint, state.step) == ("old", 3)
    assert torch.equal(tensors.model["w"], torch.arange(1000))
    save_checkpoint(tmp_path, RunState("newer"), tensors)
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT_FILE]


def test_a_phase_that_is_over_is_not_run_again_and_the_next_one_goes_on_from_its_parameters(tmp_path):
    straight = tiny_model()
    both = trainer(straight, tmp_path / "straight")
    both.run(phase(3))
    both.run(phase(3, name="second"))
    trainer(tiny_model(), tmp_path / "apart").run(phase(3))
    apart = tiny_model()
    later = trainer(apart, tmp_path / "apart")
    later.run(phase(3))
    assert later.state.completed == ["first"]
    later.run(phase(3, name="second"))
    assert_same_parameters(straight, apart)
    assert [(row.phase, row.step) for row in read_history(tmp_path / "apart")] == [
        (name, step) for name in ("first", "second") for step in (1, 2, 3)
    ]


def test_another_run_s_work_directory_is_refused(tmp_path):
    with pytest.raises(TrainingStopped):
        trainer(tiny_model(), tmp_path).run(phase(batches=signalling(0, signal.SIGTERM)))
    with pytest.raises(WorkDirError, match="other data"):
        Trainer(tiny_model(), tmp_path, "letters")
    with pytest.raises(WorkDirError, match="other options"):
        trainer(tiny_model(), tmp_path, TrainerOptions(weight_decay=0.0))
    with pytest.raises(WorkDirError, match="begun with other steps"):
        trainer(tiny_model(), tmp_path, TrainerOptions(checkpoint_every=1)).run(phase(7))


def test_a_history_shorter_than_the_checkpoint_says_is_refused(tmp_path):
    trainer(tiny_model(), tmp_path).run(phase(2))
    (tmp_path / HISTORY_FILE).write_text("")
    with pytest.raises(WorkDirError, match="bytes or more"):
        trainer(tiny_model(), tmp_path).run(phase(2, name="second"))


def test_a_gradient_that_is_no_number_ends_the_run_before_it_reaches_the_parameters(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    before = model.lm_head.weight.clone()
    with pytest.raises(DivergedError, match="step 1 of first"):
        trainer(model, tmp_path).run(phase())
    assert torch.equal(model.lm_head.weight, before)


def test_it_learns_to_count_and_tells_so_in_lines_where_there_is_no_terminal(tmp_path):
    output = io.StringIO()
    model = tiny_model()
    trainer(model, tmp_path, output=output).run(phase(120))
    rows = read_history(tmp_path)
    assert rows[0].loss > 4
    assert sum(row.loss for row in rows[-10:]) / 10 < 1
    assert rows[-1].tokens == 120 * (8 + 5)
    assert rows[-1].balance > 0
    lines = output.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == [f"first: step {step}/120" for step in (50, 100, 120)]


def test_held_out_losses_are_taken_every_so_many_steps_and_at_the_end_without_changing_the_training(tmp_path):
    def losses(model: DeepseekV2ForCausalLM) -> dict[str, float]:
        assert not model.training
        assert not torch.is_grad_enabled()
        batch = counting_batch(99)
        return {"counting": next_token_loss(model, batch.input_ids, batch.labels).item()}

    measured, plain = tiny_model(), tiny_model()
    trainer(measured, tmp_path / "measured", TrainerOptions(held_out_every=2), losses).run(phase(5))
    trainer(plain, tmp_path / "plain").run(phase(5))
    rows = read_history(tmp_path / "measured")
    assert [row.step for row in rows if "counting" in row.held_out] == [2, 4, 5]
    assert [row.balance for row in rows] == [row.balance for row in read_history(tmp_path / "plain")]
    assert_same_parameters(measured, plain)


def test_padding_changes_no_loss():
    model = tiny_model()
    batch = counting_batch(0)
    before = next_token_loss(model, batch.input_ids, batch.labels).item()
    batch.input_ids[~batch.mask] = 7
    assert next_token_loss(model, batch.input_ids, batch.labels).item() == before


def test_a_balance_loss_reaches_the_gates(tmp_path):
    gates = []
    for device in (0.0, 5.0):
        model = tiny_model()
        options = TrainerOptions(balance=BalanceFactors(expert=0, device=device, communication=0))
        trainer(model, tmp_path / str(device), options).run(phase(1))
        gates.append(model.model.layers[1].mlp.gate.weight)
    assert not torch.equal(*gates)
