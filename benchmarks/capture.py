"""What one batch of scores costs along each path, on a dozen kinds of model.

    python benchmarks/capture.py                            # B = 100, one CPU thread, every model
    python benchmarks/capture.py --problems logistic radon --particles 1000
    python benchmarks/capture.py --posteriors DIR           # whole fits, capture on against capture off

For each model, ``Target.score`` at B points is measured along each path that the package knows: ``captured`` (a graph
replayed, no Pyro in it, of one particle or where that fails of a plate), ``vmap`` and ``plate`` (the model run once,
eagerly, for the batch) and ``loop`` (the model run B times). Beside them stands ``pyro``: the model under an outermost
plate of B particles, traced and differentiated by Pyro's own ELBOs, which is what ``SVI`` with
``vectorize_particles=True`` pays for its model.

Reported are milliseconds of a score, the ratio of the captured path to the eager plates, and ``capture s``: CPU seconds
from the model to the fifth batch of scores along the captured path, when all graphs are made, its checks
against single particles included.
Every path's scores are compared with Pyro's; ``error`` is the largest difference, in units of the largest score. A path
that cannot run a model has a dash, and its reason is in the JSON. Medians hide the self-checks that a path makes at
intervals; the means, which do not, are in the JSON too.

With ``--posteriors`` what is measured is a fit, ``run(--steps)`` on each of the posteriors in ``DIR`` (whose form
``posteriors.py`` states), in the default float32 and in CPU seconds with everything from the model to the verdict in
them, capture included; and the largest difference between the draws of two shorter fits, of ``--compared-steps`` steps
from one seed in float64, where roundings do not grow into differences, in posterior sds. Each fit has a process of its
own. The last line is the geometric mean of the ratios.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import record
import torch
from fresh import run_fresh
from problems import PROBLEMS, Problem
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from timing import interleave, ratio
from torch import Tensor

from pyro_sivism import SIVISM
from pyro_sivism.guide import SemiImplicitGuide
from pyro_sivism.target import Target

PATHS = {"captured": ("captured", "captured_plate"), "vmap": ("vmap",), "plate": ("plate",), "loop": ()}
EAGER_PLATES = ("plate", "pyro")
_BATCHES_UNTIL_REPLAYED = 5  # a graph is only made of a batch size that comes up again

Score = Callable[[Tensor], Tensor]


def target_along(path: str, problem: Problem, points: Tensor) -> tuple[Target, float]:
    """A target that computes its scores along one path, and the seconds until that path is at its full speed.

    Raises:
        RuntimeError: the path does not run the model; the message says why.
    """
    guide = SemiImplicitGuide(problem.model)
    guide.setup(*problem.args)
    trace = guide.trace_model(*problem.args)
    started = time.process_time()
    target = Target(problem.model, guide.layout, trace, problem.args, paths=PATHS[path])
    if target.path.name not in (*PATHS[path], path):
        raise RuntimeError(target.path.reason)
    with torch.no_grad():
        for _ in range(1 if path == "loop" else _BATCHES_UNTIL_REPLAYED):
            target.score(points)
    return target, time.process_time() - started


def score_by_pyro(problem: Problem, target: Target) -> Score:
    """The score by Pyro alone: the conditioned model in a plate of particles, its ELBO differentiated."""
    trace = poutine.trace(problem.model).get_trace(*problem.args)
    plates = [frame.dim for node in trace.stochastic_nodes for frame in trace.nodes[node]["cond_indep_stack"]]
    plates += [frame.dim for node in trace.observation_nodes for frame in trace.nodes[node]["cond_indep_stack"]]
    nesting = -min((dim for dim in plates if dim is not None), default=0)
    enumerates = any(msg["infer"].get("enumerate") for msg in trace.nodes.values() if msg["type"] == "sample")

    def in_plate(num_particles: int) -> None:
        with pyro.plate("particles", num_particles, dim=-1 - nesting):
            problem.model(*problem.args)

    def log_density(x: Tensor) -> Tensor:
        aligned = x.reshape((len(x),) + (1,) * nesting + (-1,))
        values = {site.name: site.transform(u) for site, u in target.layout.split_aligned(aligned)}
        model = poutine.condition(in_plate, data=values | target.minibatch)
        log_det = target.layout.log_abs_det_jacobian(x).sum()
        if not enumerates:
            return poutine.trace(model).get_trace(len(x)).log_prob_sum() + log_det
        elbo = TraceEnum_ELBO(max_plate_nesting=nesting + 1)
        return log_det - elbo.differentiable_loss(config_enumerate(model), _no_guide, len(x))

    def score(x: Tensor) -> Tensor:
        with pyro.validation_enabled(False), torch.enable_grad():
            point = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(log_density(point), point)
        return gradient

    return score


def _no_guide(*args: Any) -> None:
    """Everything is given: the model has no latents left."""


def measure(problem: Problem, args: argparse.Namespace) -> dict[str, Any]:
    """One row: every path on one model."""
    pyro.clear_param_store()
    pyro.set_rng_seed(args.seed)
    guide = SemiImplicitGuide(problem.model)
    guide.setup(*problem.args)
    reference = Target(problem.model, guide.layout, guide.trace_model(*problem.args), problem.args, paths=())
    points = 0.3 * torch.randn(args.particles, reference.dim)
    scores: dict[str, Score] = {}
    reasons, setup_seconds = {}, {}
    for path in args.paths:
        try:
            target, setup_seconds[path] = target_along(path, problem, points)
            reasons[path] = str(target.path)
        except RuntimeError as error:
            reasons[path] = str(error)
        else:
            target.minibatch = reference.minibatch
            scores[path] = target.score
    scores["pyro"] = score_by_pyro(problem, reference)
    want = scores["pyro"](points)
    errors = {name: ((score(points) - want).abs().max() / want.abs().max()).item() for name, score in scores.items()}

    loop = {name: score for name, score in scores.items() if name == "loop"}
    batched = {name: score for name, score in scores.items() if name != "loop"}
    with torch.no_grad():
        seconds = interleave(_calls(batched, points), rounds=args.rounds, turn=args.turn)
        # A loop takes as long as a hundred turns of the others and would spread their rounds apart.
        seconds |= interleave(_calls(loop, points), rounds=3, turn=0.0, warm_up=1)
    row: dict[str, Any] = {"problem": problem.name, "dim": reference.dim, "num_particles": args.particles}
    for name, values in seconds.items():
        row[f"{name}_ms_median"] = 1e3 * statistics.median(values)
        row[f"{name}_ms_mean"] = 1e3 * statistics.mean(values)
    for name in EAGER_PLATES:
        if "captured" in seconds and name in seconds:
            row[f"captured_over_{name}"] = ratio(seconds["captured"], seconds[name])
    return row | {"setup_seconds": setup_seconds, "errors": errors, "reasons": reasons}


def _calls(scores: dict[str, Score], points: Tensor) -> dict[str, Callable[[], Tensor]]:
    return {name: lambda score=score: score(points) for name, score in scores.items()}


# --- whole fits ---------------------------------------------------------------------------------------


def fit(point: dict[str, Any]) -> dict[str, Any]:
    """Fit one posterior in this process: the CPU seconds, and draws as nested lists where ``point`` asks for them."""
    torch.set_default_dtype(getattr(torch, point["dtype"]))
    sys.path.insert(0, point["posteriors"])
    model, data, _ = importlib.import_module("models").load(point["posterior"])
    pyro.set_rng_seed(point["seed"])
    inference = SIVISM(model, capture=point["capture"])
    started = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a short fit is no good one
        inference.run(point["steps"], data, progress_bar=False)
    row: dict[str, Any] = {"seconds": time.process_time() - started, "path": inference.target.path.name}
    if "num_draws" in point:
        pyro.set_rng_seed(point["seed"])
        draws = inference.sample(point["num_draws"])
        row["draws"] = {name: values.tolist() for name, values in draws.items()}
    return row


def compare_fits(posterior: str, args: argparse.Namespace) -> dict[str, Any]:
    """One row: the seconds of both fits and their ratio, and how far apart two shorter ones are."""
    point = {"posteriors": str(args.posteriors), "posterior": posterior, "seed": args.seed}
    row: dict[str, Any] = {"posterior": posterior, "steps": args.steps, "compared_steps": args.compared_steps}
    draws = {}
    for name, capture in (("captured", True), ("uncaptured", False)):
        timed = run_fresh(__file__, point | {"capture": capture, "steps": args.steps, "dtype": "float32"})
        compared = run_fresh(
            __file__,
            point | {"capture": capture, "steps": args.compared_steps, "dtype": "float64", "num_draws": 500},
        )
        for part in (timed, compared):
            if "error" in part:
                return row | {"error": f"{name}: {part['error']}"}
        row |= {f"{name}_seconds": timed["seconds"], f"{name}_path": timed["path"]}
        draws[name] = {site: torch.tensor(values, dtype=torch.double) for site, values in compared["draws"].items()}
    row["draws_difference"] = max(
        ((values - draws["uncaptured"][site]).abs() / values.std(0)).max().item()
        for site, values in draws["captured"].items()
    )
    return row | {"speedup": row["uncaptured_seconds"] / row["captured_seconds"]}


def print_fits(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if "error" in row:
            print(f"{row['posterior']:28s} {row['error']}", flush=True)
            continue
        print(
            f"{row['posterior']:28s} {row['captured_path']:>14s} {row['captured_seconds']:8.2f}"
            f" {row['uncaptured_path']:>10s} {row['uncaptured_seconds']:8.2f} {row['speedup']:8.2f}"
            f" {row['draws_difference']:12.1e}",
            flush=True,
        )


def compare_all_fits(args: argparse.Namespace) -> list[dict[str, Any]]:
    sys.path.insert(0, str(args.posteriors))
    names = args.names or list(importlib.import_module("models").POSTERIORS)
    print(
        f"{'posterior':28s} {'path':>14s} {'CPU s':>8s} {'without':>10s} {'CPU s':>8s} {'speedup':>8s}"
        f" {'draws apart':>12s}"
    )
    rows = []
    for name in names:
        rows.append(compare_fits(name, args))
        print_fits(rows[-1:])
    speedups = [row["speedup"] for row in rows if "error" not in row]
    if speedups:
        print(f"geometric mean of {len(speedups)} speedups: {statistics.geometric_mean(speedups):.2f}")
    return rows


def print_header() -> None:
    columns = "".join(f"{name + ' ms':>12s}" for name in (*PATHS, "pyro"))
    ratios = "".join(f"{'/ ' + name:>9s}" for name in EAGER_PLATES)
    print(f"{'model':22s} {'D':>5s}{columns}{ratios} {'capture s':>10s} {'error':>8s}")


def print_row(row: dict[str, Any]) -> None:
    def cell(key: str, width: int, digits: int) -> str:
        return f"{row[key]:{width}.{digits}f}" if key in row else f"{'-':>{width}s}"

    columns = "".join(cell(f"{name}_ms_median", 12, 3) for name in (*PATHS, "pyro"))
    ratios = "".join(cell(f"captured_over_{name}", 9, 2) for name in EAGER_PLATES)
    capture = f"{row['setup_seconds']['captured']:10.2f}" if "captured" in row["setup_seconds"] else f"{'-':>10s}"
    print(
        f"{row['problem']:22s} {row['dim']:5d}{columns}{ratios} {capture} {max(row['errors'].values()):8.1e}",
        flush=True,
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=list(PATHS))
    parser.add_argument("--particles", type=int, default=100, help="B, points in a batch")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--turn", type=float, default=0.05, help="seconds each path works in a round, at least")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few rounds of small batches")
    parser.add_argument("--out", type=Path, default=Path("results/capture.json"))
    parser.add_argument("--posteriors", type=Path, help="compare whole fits on the posteriors in this folder")
    parser.add_argument("--names", nargs="+", help="of them, these")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--compared-steps", type=int, default=50)
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)  # one fit, in a process of its own
    args = parser.parse_args(argv)
    if args.point is not None:
        torch.set_num_threads(1)
        print(json.dumps(fit(args.point)))
        return
    if args.quick:
        args.steps, args.compared_steps = 5, 2
        args.particles, args.rounds, args.turn = 5, 3, 0.0
    torch.set_num_threads(args.threads)

    if args.posteriors is not None:
        record.write(args, compare_all_fits(args))
        return
    rows = []
    print_header()
    for name in args.problems:
        rows.append(measure(PROBLEMS[name](), args))
        print_row(rows[-1])
    record.write(args, rows)


if __name__ == "__main__":
    main()
