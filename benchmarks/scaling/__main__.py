"""What a step and the control plane cost against all that grows, and whether any of it grows faster than it must.

python -m benchmarks.scaling --out DIR            about 2 minutes on 2 cores
python -m benchmarks.scaling --out DIR --quick    under a minute: fewer and smaller points, so a coarser judgement
python -m benchmarks.scaling --part scheduler     one part: data-plane, ranks, coordinator or scheduler

Each curve has a law, a constant or a straight line in x (`law.py` says how it is judged). Prints a line for each,
writes `curves.jsonl`, `points.csv` and one PNG for each part, and ends with status 1 if a curve exceeds its law. Needs
the `test` extra and Linux; leave the machine alone meanwhile.
"""

import csv
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click

from benchmarks.scaling.coordinator import coordinator_curves
from benchmarks.scaling.curve import Curve
from benchmarks.scaling.data_plane import Sizes, data_plane_curves
from benchmarks.scaling.plots import plot
from benchmarks.scaling.ranks import rank_curves
from benchmarks.scaling.scheduler import scheduler_curves

_FULL = Sizes((1, 2, 4, 8, 16, 32, 64), (64, 256, 1024, 2048, 4096), (8, 16, 32, 64, 160), (1, 2, 4), (1, 2, 4, 8), 24)
_QUICK = Sizes((1, 4, 16, 64), (64, 512, 2048), (8, 32, 160), (1, 2, 4), (1, 2, 4), 12)
_TITLES = {
    "data-plane": "A decode step in a cell of processes",
    "ranks": "Joining, step headers and exchanges of light ranks",
    "coordinator": "The coordinator with simulated ranks",
    "scheduler": "Scheduler, batch builder and block manager",
}


def _parts(quick: bool) -> dict[str, Callable[[], list[Curve]]]:
    sizes = (2, 4, 8, 16, 32) if quick else (2, 4, 8, 16, 32, 64)
    return {
        "scheduler": lambda: scheduler_curves(3, 512 if quick else 1024, 4096 if quick else 16384),
        "coordinator": lambda: coordinator_curves(3 if quick else 7, sizes),
        "ranks": lambda: rank_curves(3 if quick else 5, sizes, (1, 2, 4, 8) if quick else (1, 2, 4, 8, 16)),
        "data-plane": lambda: data_plane_curves(_QUICK if quick else _FULL, 3 if quick else 5),
    }


def _write(curves: dict[str, list[Curve]], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with (out / "curves.jsonl").open("w") as lines:
        lines.writelines(f"{curve.line()}\n" for of_part in curves.values() for curve in of_part)
    with (out / "points.csv").open("w", newline="") as table:
        rows = csv.writer(table)
        rows.writerow(["part", "curve", "x", "x value", "y", "round", "y value"])
        for part, of_part in curves.items():
            for curve in of_part:
                for point in curve.points:
                    for number, value in enumerate(point.rounds):
                        rows.writerow([part, curve.name, curve.x, f"{point.x:g}", curve.y, number, f"{value:.6g}"])
    for part, of_part in curves.items():
        plot(of_part, _TITLES[part], out / f"{part}.png")


@click.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Where curves, points and plots go.")
@click.option("--quick", is_flag=True, help="Fewer and smaller points.")
@click.option("--part", "names", multiple=True, type=click.Choice(sorted(_TITLES)), help="All of them if not given.")
def main(out: Path | None, quick: bool, names: tuple[str, ...]) -> None:
    """Measures how cost grows; see the top of the file."""
    # Processes as many as cores or more: a second thread in one of them takes the core of another.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    curves: dict[str, list[Curve]] = {}
    for name, measure in _parts(quick).items():
        if names and name not in names:
            continue
        begun = time.perf_counter()
        curves[name] = measure()
        click.echo(f"{name}, {time.perf_counter() - begun:.0f} s")
        for curve in curves[name]:
            click.echo(f"  {curve.summary()}")
    if out is not None:
        _write(curves, out)
    exceeding = [curve.name for of_part in curves.values() for curve in of_part if curve.verdict().exceeds]
    click.echo(f"growing faster than they must: {', '.join(exceeding) or 'none'}")
    sys.exit(1 if exceeding else 0)


if __name__ == "__main__":
    main()
