"""Pictures of the curves: what was measured, the law fitted to it, and whether it holds. PNG."""

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image  # matplotlib stands on it

from benchmarks.scaling.curve import Curve

_DPI = 70
_COLUMNS = 3
_COLOURS = 24
_WIDTH, _HEIGHT = 4.2, 3.1  # inches, of one curve


def plot(curves: Sequence[Curve], title: str, path: Path) -> None:
    """One PNG with a panel for each curve."""
    rows = -(-len(curves) // _COLUMNS)
    figure = Figure(figsize=(_COLUMNS * _WIDTH, rows * _HEIGHT), layout="constrained")
    panels = figure.subplots(rows, _COLUMNS, squeeze=False).flat
    for curve in curves:
        _draw(next(panels), curve)
    for panel in panels:
        panel.set_axis_off()
    figure.suptitle(title)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=_DPI)
    # Few colours: a third of the bytes.
    Image.open(drawn).convert("RGB").quantize(_COLOURS).save(path, optimize=True)


def _draw(axes: Axes, curve: Curve) -> None:
    verdict = curve.verdict()
    blue, orange = mpl.color_sequences["tab10"][:2]
    xs = [point.x for point in curve.points]
    middle = [point.median for point in curve.points]
    below = [point.median - min(point.rounds) for point in curve.points]
    above = [max(point.rounds) - point.median for point in curve.points]
    axes.errorbar(xs, middle, (below, above), color=blue, fmt="o", markersize=4, capsize=2, label="measured")
    at = np.linspace(min(xs), max(xs), 60)
    law = f"a = {verdict.law.a:.3g}" + (f", b = {verdict.law.b:.3g}" if curve.exponent else "")
    axes.plot(at, [verdict.law.at(float(x)) for x in at], color=orange, label=f"law, {law}")
    axes.set_ylim(bottom=0, top=1.25 * max(max(middle), verdict.law.at(max(xs))))
    axes.set_xlabel(curve.x)
    axes.set_ylabel(curve.y, fontsize=7)
    mark = "EXCEEDS its law" if verdict.exceeds else "flat" if verdict.is_flat else f"exponent {verdict.free.p:g}"
    axes.set_title(f"{curve.name}: {mark}", fontsize=9, color="red" if verdict.exceeds else "black")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="upper left")
