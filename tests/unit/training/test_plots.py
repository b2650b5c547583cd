"""The pictures of the model card; they need the `train` extra."""

from pathlib import Path

import pytest

from training.checkpoint import HistoryRow

pytest.importorskip("matplotlib", reason="matplotlib comes with the extra `train`")

from training.plots import plot_expert_load, plot_losses

LARGEST = 150_000  # bytes; they are committed beside the weights


def rows() -> list[HistoryRow]:
    """A long run of two phases, the second without held-out losses."""
    return [
        HistoryRow(
            phase=phase,
            step=step + 1,
            tokens=2048 * (3000 * number + step + 1),
            lr=1e-3,
            loss=8 / (1 + step / 300) + 0.1 * (step * 7919 % 13),
            expert_balance=0.009,
            device_balance=0.15,
            communication_balance=0.06,
            grad_norm=1.0,
            seconds=float(step),
            held_out={"text": 4.0} if number == 0 and step % 200 == 0 else {},
        )
        for number, phase in enumerate(("pre-training", "fine-tuning"))
        for step in range(3000)
    ]


def assert_is_small_png(path: Path) -> None:
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) < LARGEST


def test_the_losses_of_a_long_run_fit_a_small_picture(tmp_path):
    plot_losses(rows(), tmp_path / "losses.png")
    assert_is_small_png(tmp_path / "losses.png")


def test_a_dead_expert_can_be_drawn(tmp_path):
    plot_expert_load([[0.0, 0.25, 0.25, 0.5], [0.25, 0.25, 0.25, 0.25]], [1, 2], tmp_path / "load.png")
    assert_is_small_png(tmp_path / "load.png")
