"""What one step costs: SIVISM beside ``SVI`` with the autoguides a user would take instead.

    python benchmarks/step_cost.py                                       # B = 100, D = 22, one CPU thread
    python benchmarks/step_cost.py --dims 22 7850 --particles 1000 --device cuda

The model is Bayesian logistic regression on synthetic data, written with plates so that ``SVI`` can vectorize its
particles. A step of SIVISM is one update of the critic and one of the guide (``critic_steps=1``) with B draws each,
everything else as it is by default; a step of ``SVI`` is one of ``Trace_ELBO(num_particles=B,
vectorize_particles=True)`` with ``pyro.optim.Adam``. Both are called as users do, ``step(X, y)``. Where SIVISM can
compile its step it is measured both ways; the seconds until the steps are at their full speed, set-up, capture and
compilation included, are recorded beside their cost.

The Gaussian that SIVISM's family starts from is fitted in a few updates only: it changes where the draws are, not
what a step does.
"""

from __future__ import annotations

import argparse
import inspect
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pyro
import record
import torch
from problems import logistic_regression
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal, AutoMultivariateNormal, AutoNormal
from timing import interleave, ratio, seconds_of

from pyro_sivism import SIVISM, BatchAndMatch

AUTOGUIDES = {guide.__name__: guide for guide in (AutoNormal, AutoMultivariateNormal, AutoIAFNormal)}
BASELINE = "AutoNormal"
CAN_COMPILE = "compile" in inspect.signature(SIVISM).parameters

# The score's graph is made of a batch that comes up again, and the step is compiled once it has.
STEPS_BEFORE_MEASURED = {"off": 30, "on": 60}

Step = Callable[[], float]


def sivism_step(model: Callable, data: tuple, num_particles: int, compile_mode: str) -> Step:
    preconditioner = BatchAndMatch(num_steps=2, max_path_steps=10)
    options: dict[str, Any] = {"compile": compile_mode == "on"} if CAN_COMPILE else {}
    sivism = SIVISM(model, num_particles=num_particles, critic_steps=1, preconditioner=preconditioner, **options)
    for _ in range(STEPS_BEFORE_MEASURED[compile_mode]):
        sivism.step(*data)
    return lambda: sivism.step(*data)


def svi_step(model: Callable, data: tuple, num_particles: int, autoguide: type) -> Step:
    elbo = Trace_ELBO(num_particles=num_particles, vectorize_particles=True)
    svi = SVI(model, autoguide(model), pyro.optim.Adam({"lr": 1e-3}), elbo)
    return lambda: svi.step(*data)


def methods(compile_modes: list[str]) -> dict[str, Callable[..., Step]]:
    table: dict[str, Callable[..., Step]] = {
        "SIVISM" if mode == "off" else "SIVISM compiled": partial(sivism_step, compile_mode=mode)
        for mode in compile_modes
    }
    return table | {name: partial(svi_step, autoguide=autoguide) for name, autoguide in AUTOGUIDES.items()}


def measure(args: argparse.Namespace, dim: int, num_particles: int) -> list[dict[str, Any]]:
    """One row for each method at one size."""
    pyro.clear_param_store()
    pyro.set_rng_seed(args.seed)
    problem = logistic_regression(args.rows, dim, device=args.device)
    steps, setup_seconds = {}, {}
    for name, make in methods(args.compile).items():
        if args.methods and name not in (*args.methods, BASELINE):
            continue

        def set_up(name: str = name, make: Callable[..., Step] = make) -> None:
            steps[name] = make(problem.model, problem.args, num_particles)

        setup_seconds[name] = seconds_of(set_up, args.device)
    seconds = interleave(steps, rounds=args.rounds, turn=args.turn, device=args.device)
    return [
        {
            "method": name,
            "dim": dim,
            "num_rows": args.rows,
            "num_particles": num_particles,
            "device": args.device,
            "ms_median": 1e3 * statistics.median(values),
            "ms_min": 1e3 * min(values),
            "ms_max": 1e3 * max(values),
            "ratio": ratio(values, seconds[BASELINE]),
            "setup_seconds": setup_seconds[name],
        }
        for name, values in seconds.items()
    ]


def print_rows(rows: list[dict[str, Any]]) -> None:
    first = rows[0]
    print(f"\nD = {first['dim']}, N = {first['num_rows']}, B = {first['num_particles']}, {first['device']}")
    print(f"{'method':24s} {'ms a step':>10s} {'(min':>8s} {'max)':>8s} {'x ' + BASELINE:>13s} {'set-up s':>9s}")
    for row in rows:
        print(
            f"{row['method']:24s} {row['ms_median']:10.3f} {row['ms_min']:8.3f} {row['ms_max']:8.3f} "
            f"{row['ratio']:13.2f} {row['setup_seconds']:9.2f}"
        )


def plot(groups: list[list[dict[str, Any]]], path: Path) -> None:
    """Horizontal bars of milliseconds a step, one panel for each size, labelled with the ratios."""
    figure, axes = plt.subplots(1, len(groups), figsize=(5.5 * len(groups), 3.0), squeeze=False)
    for axis, rows in zip(axes[0], groups):
        names = [row["method"] for row in rows]
        medians = [row["ms_median"] for row in rows]
        spread = [
            [row["ms_median"] - row["ms_min"] for row in rows],
            [row["ms_max"] - row["ms_median"] for row in rows],
        ]
        ours = ["tab:blue" if name.startswith("SIVISM") else "tab:gray" for name in names]
        bars = axis.barh(names, medians, xerr=spread, color=ours, error_kw={"elinewidth": 0.8})
        axis.bar_label(bars, [f" {row['ratio']:.2f}x" for row in rows], padding=6)
        axis.margins(x=0.2)
        axis.invert_yaxis()
        axis.set_xlabel(f"ms a step, and x {BASELINE}")
        axis.set_title(f"D = {rows[0]['dim']}, B = {rows[0]['num_particles']}, {rows[0]['device']}", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="+", default=[22], help="D, coefficients")
    parser.add_argument("--particles", type=int, nargs="+", default=[100], help="B, draws per step")
    parser.add_argument("--rows", type=int, default=400, help="N, observations")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--methods", nargs="*", help=f"only these, and {BASELINE}")
    parser.add_argument(
        "--compile",
        nargs="+",
        choices=["off", "on"],
        default=["off", "on"] if CAN_COMPILE else ["off"],
        help="SIVISM's steps as they are, compiled, or both",
    )
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--turn", type=float, default=0.1, help="seconds each method works in a round, at least")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few rounds of a small problem")
    parser.add_argument("--out", type=Path, default=Path("results/step_cost.json"), help="JSON; the plot goes beside")
    args = parser.parse_args(argv)
    if "on" in args.compile and not CAN_COMPILE:
        parser.error("this version of SIVISM has no compiled step")
    if args.quick:
        args.dims, args.particles, args.rows, args.rounds, args.turn = [3], [10], 20, 3, 0.0
    torch.set_num_threads(args.threads)

    groups = []
    for dim in args.dims:
        for num_particles in args.particles:
            groups.append(measure(args, dim, num_particles))
            print_rows(groups[-1])
    record.write(args, [row for rows in groups for row in rows])
    plot(groups, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
