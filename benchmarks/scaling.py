"""How time and memory grow: a default step against D, N, B and the number of processes.

    python benchmarks/scaling.py                      # all axes, some minutes
    python benchmarks/scaling.py --axes dim ranks     # only these

Bayesian logistic regression on synthetic data. From D = 22, N = 1,000 (all of them in every step) and the default
B = 128, one axis at a time:

- ``dim``: D up to 7,850;
- ``rows``: N, all rows in every step;
- ``minibatch``: N with 1,000 rows in a step, by a subsampling plate;
- ``particles``: B;
- ``ranks``: processes that share the particles, on ``torch.distributed``.

Every point is a fit with everything by default, in a fresh process: its peak memory is that of set-up and steps
together (``peak_mib``), and less what the process held after its imports (``own_mib``). Milliseconds are CPU time of
one thread, of a step and, for the part of it that the model is to blame for, of one batch of scores; for ``ranks``
they are wall-clock, as waiting for one another counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pyro
import record
import torch
from fresh import peak_mib, run_fresh
from problems import logistic_regression
from timing import interleave

from pyro_sivism import SIVISM

BASE = {"dim": 22, "num_rows": 1000, "subsample_size": None, "num_particles": 128, "ranks": 1, "rounds": 9}
AXES: dict[str, list[dict[str, Any]]] = {
    "dim": [{"dim": dim} for dim in (5, 22, 64, 200, 650, 2000, 7850)],
    "rows": [{"num_rows": rows} for rows in (100, 1_000, 10_000, 100_000)],
    "minibatch": [{"num_rows": rows, "subsample_size": 1000} for rows in (10_000, 100_000, 1_000_000)],
    "particles": [{"num_particles": particles} for particles in (16, 64, 256, 1024, 4096)],
    "ranks": [{"num_particles": 4096, "ranks": ranks} for ranks in (1, 2)],
}
VARIES = {
    "dim": "dim",
    "rows": "num_rows",
    "minibatch": "num_rows",
    "particles": "num_particles",
    "ranks": "ranks",
}
LABELS = {
    "dim": "D, latent dimensions",
    "rows": "N, rows, all in every step",
    "minibatch": "N, rows, 1,000 in a step",
    "particles": "B, particles",
    "ranks": "processes",
}


def measure(point: dict[str, Any]) -> dict[str, Any]:
    """The figures of one point, in this process."""
    before = peak_mib()
    pyro.set_rng_seed(0)
    problem = logistic_regression(point["num_rows"], point["dim"], subsample_size=point["subsample_size"])
    started = time.process_time()
    sivism = SIVISM(problem.model, num_particles=point["num_particles"])
    sivism.setup(*problem.args)
    setup_seconds = time.process_time() - started
    points = sivism.sample_unconstrained(point["num_particles"])
    if point["ranks"] > 1:  # every rank must take the same number of steps, so none may time its own turns
        seconds = {"step": _wall_clock(sivism, problem.args, 20 * point["rounds"])}
    else:
        actions = {"step": lambda: sivism.step(*problem.args), "score": lambda: sivism.target.score(points)}
        seconds = interleave(actions, rounds=point["rounds"])
    row: dict[str, Any] = {"path": sivism.target.path.name, "setup_seconds": setup_seconds}
    for name, values in seconds.items():
        row |= {f"{name}_ms_median": 1e3 * statistics.median(values), f"{name}_ms_min": 1e3 * min(values)}
    peak = peak_mib()
    return row | {"peak_mib": peak, "own_mib": peak - before}


def _wall_clock(sivism: SIVISM, data: tuple, num_steps: int) -> list[float]:
    seconds = []
    for _ in range(num_steps):
        started = time.perf_counter()
        sivism.step(*data)
        seconds.append(time.perf_counter() - started)
    return seconds


def print_row(axis: str, row: dict[str, Any]) -> None:
    size = f"{row[VARIES[axis]]:9d}"
    if "error" in row:
        print(f"{axis:10s} {size}  failed: {row['error'][:90]}", flush=True)
        return
    score = f"{row['score_ms_median']:9.2f}" if "score_ms_median" in row else f"{'-':>9s}"
    print(
        f"{axis:10s} {size} {row['step_ms_median']:9.2f} {score} {row['own_mib']:9.0f} {row['setup_seconds']:9.1f}  "
        f"{row['path']}",
        flush=True,
    )


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Time above memory, one column for each axis, on logarithmic scales."""
    good = [row for row in rows if "error" not in row]
    axes = [axis for axis in AXES if any(row["axis"] == axis for row in good)]
    figure, panels = plt.subplots(2, len(axes), figsize=(3.4 * len(axes), 5.5), squeeze=False, sharex="col")
    for (top, bottom), axis in zip(panels.T, axes):
        mine = [row for row in good if row["axis"] == axis]
        sizes = [row[VARIES[axis]] for row in mine]
        top.plot(sizes, [row["step_ms_median"] for row in mine], "o-", label="step")
        if all("score_ms_median" in row for row in mine):
            top.plot(sizes, [row["score_ms_median"] for row in mine], "s--", color="tab:gray", label="score")
        bottom.plot(sizes, [max(1.0, row["own_mib"]) for row in mine], "o-", color="tab:red")
        top.set(yscale="log", ylabel="ms")
        bottom.set(yscale="log", ylabel="peak less imports, MiB", xlabel=LABELS[axis])
        if axis == "ranks":
            bottom.set_xticks(sizes)
        else:
            bottom.set_xscale("log")
        top.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="only the two smallest points of each axis")
    parser.add_argument("--out", type=Path, default=Path("results/scaling.json"), help="JSON; the plot goes beside")
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)  # one point, in this process
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.point is not None:
        print(json.dumps(measure(args.point)))
        return

    rows = []
    print(f"{'axis':10s} {'size':>9s} {'ms step':>9s} {'ms score':>9s} {'own MiB':>9s} {'set-up s':>9s}  path")
    for axis in args.axes:
        for change in AXES[axis][: 2 if args.quick else None]:
            point = BASE | {"rounds": 2 if args.quick else args.rounds} | change
            rows.append({"axis": axis, **run_fresh(__file__, point, ranks=point["ranks"])})
            print_row(axis, rows[-1])
    record.write(args, rows)
    plot(rows, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
