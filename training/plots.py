"""Pictures for the model card: losses over the run, and the load of each expert."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from training.checkpoint import HistoryRow

_DPI = 110
_SMOOTHING = 0.97  # of the running mean that the bold line shows
_MAX_POINTS = 1500  # a line; more only make the file larger


def plot_losses(rows: Sequence[HistoryRow], path: Path) -> None:
    """PNG with training and held-out losses over tokens, phases apart, and the balance losses below."""
    figure = Figure(figsize=(9, 7), layout="constrained")
    losses, balance = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    _draw_losses(losses, rows)
    _draw_balance(balance, rows)
    figure.savefig(path, dpi=_DPI)


def plot_expert_load(shares: Sequence[Sequence[float]], layers: Sequence[int], path: Path) -> None:
    """PNG heat map of `shares[row][expert]`, the share of chosen experts in one MoE layer that fell on each expert.

    `layers` holds the layer's number for each row. Colours are relative to an even load, which is 1.
    """
    num_experts = len(shares[0])
    relative = [[share * num_experts for share in row] for row in shares]
    figure = Figure(figsize=(1.5 + 0.5 * num_experts, 1.8 + 0.55 * len(shares)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(relative, aspect="auto", cmap="viridis", vmin=0)
    top = image.get_clim()[1] or 0.0
    for row, values in enumerate(relative):
        for expert, value in enumerate(values):
            colour = "black" if value > 0.6 * top else "white"
            axes.text(expert, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(num_experts))
    axes.set_yticks(range(len(layers)), labels=[str(layer) for layer in layers])
    axes.set_xlabel("routed expert")
    axes.set_ylabel("layer")
    axes.set_title("Load of the routed experts over the evaluation set")
    figure.colorbar(image, ax=axes, label="load (1 = even)")
    figure.savefig(path, dpi=_DPI)


def _draw_losses(axes: Axes, rows: Sequence[HistoryRow]) -> None:
    colours = mpl.color_sequences["tab10"]
    for colour, phase in zip(colours, _phases(rows), strict=False):
        phase_rows = [row for row in rows if row.phase == phase]
        tokens = [row.tokens / 1e6 for row in phase_rows]
        losses = [row.loss for row in phase_rows]
        axes.plot(*_thinned(tokens, losses), color=colour, alpha=0.25, linewidth=0.6)
        axes.plot(*_thinned(tokens, _smooth(losses)), color=colour, label=f"{phase}, training")
    held_out = sorted({name for row in rows for name in row.held_out})
    for marker, name in zip("osD^v<>", held_out, strict=False):
        measured = [row for row in rows if name in row.held_out]
        axes.plot(
            [row.tokens / 1e6 for row in measured],
            [row.held_out[name] for row in measured],
            f"k{marker}--",
            markersize=3,
            linewidth=0.8,
            label=f"{name}, held out",
        )
    axes.set_ylabel("cross entropy (nats per token)")
    axes.set_title("Losses of the demonstration model")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_balance(axes: Axes, rows: Sequence[HistoryRow]) -> None:
    tokens = [row.tokens / 1e6 for row in rows]
    for label, values in (
        ("expert", [row.expert_balance for row in rows]),
        ("device", [row.device_balance for row in rows]),
        ("communication", [row.communication_balance for row in rows]),
    ):
        axes.plot(*_thinned(tokens, _smooth(values)), label=label)
    axes.set_xlabel("tokens seen (millions)")
    axes.set_ylabel("balance loss, weighted")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()


def _phases(rows: Sequence[HistoryRow]) -> list[str]:
    """Names in the order of the run."""
    return list(dict.fromkeys(row.phase for row in rows))


def _smooth(values: Sequence[float]) -> list[float]:
    """Running mean, with the weight of the missing past taken out."""
    means: list[float] = []
    total = weight = 0.0
    for value in values:
        total = _SMOOTHING * total + (1 - _SMOOTHING) * value
        weight = _SMOOTHING * weight + (1 - _SMOOTHING)
        means.append(total / weight)
    return means


def _thinned(x: Sequence[float], y: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    """Every n-th point, the last one included, so that at most `_MAX_POINTS` stay."""
    stride = -(-len(x) // _MAX_POINTS)
    return x[::-1][::stride], y[::-1][::stride]
