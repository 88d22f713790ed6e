"""Accuracy and wall-clock on posteriors with reference draws.

    python benchmarks/posteriors.py --posteriors DIR [--names eight_schools_noncentered ...] [--seeds 5]

``DIR`` holds a collection of posteriors as two modules: ``models.py`` with ``POSTERIORS`` and
``load(name) -> (model, data, reference draws)``, and ``metrics.py`` with ``score(draws, reference, stats)`` and
``load_stats(name)``. Every (posterior, method, seed) is one row, failures too; a table of medians is printed
and all rows are written as JSON, with versions and the commit.

Errors are against the reference: ``sw1`` is the sliced Wasserstein-1 distance and ``floor`` what two halves of the
reference score against each other; ``mean_max`` and ``sd_max`` are the worst error of a mean in reference sds and of
a log2 sd ratio. Seconds count everything from the model to the fitted guide.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyro
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal
from record import versions

from pyro_sivism import SIVISM, FisherDivergence, PathGradientKL

NUM_DRAWS = 4000

Draws = dict[str, torch.Tensor]


def sivism(loss: Callable) -> Callable:
    def fit(model: Callable, data: dict) -> Callable[[], Draws]:
        inference = SIVISM(model, loss=loss())
        inference.run(None, data, progress_bar=False)
        return lambda: inference.sample(NUM_DRAWS)

    return fit


def auto_multivariate_normal(model: Callable, data: dict) -> Callable[[], Draws]:
    """``SVI`` with ``AutoMultivariateNormal``, 3,000 steps of Adam at 1e-2 decayed to 1e-3."""
    guide = AutoMultivariateNormal(model)
    optim = pyro.optim.ClippedAdam({"lr": 1e-2, "lrd": 0.1 ** (1 / 3000)})
    svi = SVI(model, guide, optim, Trace_ELBO())
    for _ in range(3000):
        svi.step(data)

    def draw() -> Draws:
        sites = guide.prototype_trace.stochastic_nodes
        draws = Predictive(guide, num_samples=NUM_DRAWS, return_sites=sites)(data)
        shapes = {name: guide.prototype_trace.nodes[name]["value"].shape for name in sites}
        return {name: draws[name].reshape(NUM_DRAWS, *shape) for name, shape in shapes.items()}

    return draw


METHODS = {
    "default": sivism(PathGradientKL),
    "FisherDivergence": sivism(FisherDivergence),
    "AutoMultivariateNormal": auto_multivariate_normal,
}


def run_one(name: str, method: str, seed: int, models, metrics) -> dict:
    """One row: the scores of one method's draws, or the error that it ended with."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    model, data, reference = models.load(name)
    row: dict = {"posterior": name, "method": method, "seed": seed}
    started = time.perf_counter()
    try:
        draw = METHODS[method](model, data)
        row["seconds"] = time.perf_counter() - started
        draws = {site: value.detach() for site, value in draw().items()}
        row |= metrics.score(draws, reference, metrics.load_stats(name))
    except Exception as error:  # a failure is a result: it stays in the table
        row["seconds"] = time.perf_counter() - started
        row["error"] = f"{type(error).__name__}: {error}"
    return row


def print_table(rows: list[dict]) -> None:
    print(f"\n{'posterior':28s} {'method':24s} seeds   sw1/floor (worst)   mean_max   sd_max   seconds")
    for name, method in dict.fromkeys((row["posterior"], row["method"]) for row in rows):
        group = [row for row in rows if (row["posterior"], row["method"]) == (name, method)]
        good = [row for row in group if "error" not in row]
        if not good:
            print(f"{name:28s} {method:24s} failed: {group[0]['error'][:80]}")
            continue
        ratios = [row["sw1"] / row["sw1_floor"] for row in good]
        mean_max, sd_max, seconds = (
            statistics.median(row[key] for row in good) for key in ("mean_max", "sd_max", "seconds")
        )
        print(
            f"{name:28s} {method:24s} {len(good)}/{len(group)}   {statistics.median(ratios):6.2f} ({max(ratios):5.2f})"
            f"      {mean_max:8.2f} {sd_max:8.2f} {seconds:9.1f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--posteriors", type=Path, required=True)
    parser.add_argument("--names", nargs="*")
    parser.add_argument("--methods", nargs="*", default=["default", "AutoMultivariateNormal"], choices=METHODS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/posteriors.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sys.path.insert(0, str(arguments.posteriors))
    models, metrics = importlib.import_module("models"), importlib.import_module("metrics")

    rows = []
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for name in arguments.names or models.POSTERIORS:
        for method in arguments.methods:
            for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
                rows.append(run_one(name, method, seed, models, metrics))
                arguments.out.write_text(json.dumps({"versions": versions(), "rows": rows}, indent=1))
        print_table([row for row in rows if row["posterior"] == name])
    print_table(rows)


if __name__ == "__main__":
    main()
