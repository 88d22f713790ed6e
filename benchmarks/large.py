"""Large models and large data: what a default step costs there, and whether the answer is right.

    python benchmarks/large.py                        # both cases, each in a fresh process

**multinomial**: multinomial logistic regression with D = 7,850 (K = 10 classes x P = 785 columns), N = 60,000
synthetic rows, n = 2,000 of them in a step by ``pyro.plate(..., subsample_size=2000)``. A score at B particles cannot
do without two matrix products,

    logits = X W,   (n, P) @ (P, K B),        gradient = X' R,   (P, n) @ (n, K B),

which are timed as single products in the model's precision, the fastest way there is. ``ratio`` is the cost of a step
with everything by default (B = 128) over that of *two* such scores, four products. Peak memory is the process's own,
data and set-up included.

**rows**: linear regression with known noise, D = 10, n = 1,000 rows in a step of N = 1,000,000. The posterior is
Gaussian and in closed form. ``ratio`` is the cost of a step over that with N = 10,000, in turns in one process;
``mean_error`` is the largest error of a posterior mean after a default run, in posterior sds, and ``sd_ratio`` the
posterior sd of the worst coordinate over the exact one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import record
import torch
from fresh import peak_mib, run_fresh
from problems import multinomial_regression
from timing import interleave, ratio
from torch import Tensor

from pyro_sivism import SIVISM

CASES: dict[str, dict[str, Any]] = {
    "multinomial": {
        "num_rows": 60_000,
        "num_classes": 10,
        "num_columns": 785,
        "subsample_size": 2000,
        "num_particles": 128,
        "rounds": 7,
    },
    "rows": {"num_rows": 1_000_000, "few_rows": 10_000, "dim": 10, "subsample_size": 1000, "rounds": 21, "steps": None},
}
QUICK: dict[str, dict[str, Any]] = {
    "multinomial": {
        "num_rows": 50,
        "num_classes": 3,
        "num_columns": 4,
        "subsample_size": 20,
        "num_particles": 8,
        "rounds": 2,
    },
    "rows": {"num_rows": 400, "few_rows": 100, "dim": 2, "subsample_size": 50, "rounds": 2, "steps": 20},
}


def multinomial(point: dict[str, Any]) -> dict[str, Any]:
    num_classes, num_columns, num_particles = point["num_classes"], point["num_columns"], point["num_particles"]
    batch = point["subsample_size"]
    problem = multinomial_regression(point["num_rows"], num_classes, num_columns, subsample_size=batch)
    sivism = SIVISM(problem.model, num_particles=num_particles)
    started = time.process_time()
    seconds_of_setup = sivism.run(0, *problem.args, progress_bar=False).seconds
    setup_cpu_seconds = time.process_time() - started
    sivism.step(*problem.args)

    covariates = problem.args[0][:batch]
    weights = torch.randn(num_columns, num_classes * num_particles)
    residuals = torch.randn(batch, num_classes * num_particles)

    def products_of_two_scores() -> None:
        for _ in range(2):
            covariates @ weights
            covariates.mT @ residuals

    draws = sivism.sample_unconstrained(num_particles)
    actions: dict[str, Callable[[], object]] = {
        "step": lambda: sivism.step(*problem.args),
        "products": products_of_two_scores,
        "score": lambda: sivism.target.score(draws),
    }
    seconds = interleave(actions, rounds=point["rounds"], warm_up=1)
    return {
        "dim": sivism.target.dim,
        **{f"{name}_ms": 1e3 * statistics.median(values) for name, values in seconds.items()},
        "ratio": ratio(seconds["step"], seconds["products"]),
        "setup_cpu_seconds": setup_cpu_seconds,
        "setup_seconds": seconds_of_setup,
        "path": str(sivism.target.path),
        "peak_mib": peak_mib(),
    }


def linear_regression(num_rows: int, dim: int, subsample_size: int) -> tuple[Callable, Tensor, Tensor]:
    """A model with unit noise and N(0, 10^2) coefficients, its covariates and its outcomes."""
    generator = torch.Generator().manual_seed(num_rows)
    covariates = torch.randn(num_rows, dim, generator=generator)
    covariates[:, 0] = 1.0
    outcomes = covariates @ torch.linspace(-1.0, 1.0, dim) + torch.randn(num_rows, generator=generator)

    def model(covariates: Tensor, outcomes: Tensor) -> None:
        with pyro.plate("coefficients", dim, dim=-1):
            weights = pyro.sample("weights", dist.Normal(0.0, 10.0))
        with pyro.plate("rows", num_rows, subsample_size=subsample_size, dim=-1) as rows:
            mean = weights @ covariates[rows].mT
            pyro.sample("outcomes", dist.Normal(mean, 1.0), obs=outcomes[rows])

    return model, covariates, outcomes


def exact_posterior(covariates: Tensor, outcomes: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D), in float64."""
    covariates, outcomes = covariates.double(), outcomes.double()
    precision = covariates.mT @ covariates + 1e-2 * torch.eye(covariates.shape[1], dtype=torch.double)
    covariance = torch.linalg.inv(precision)
    return covariance @ (covariates.mT @ outcomes), covariance


def rows(point: dict[str, Any]) -> dict[str, Any]:
    dim, batch = point["dim"], point["subsample_size"]
    few_model, *few_data = linear_regression(point["few_rows"], dim, batch)
    model, *data = linear_regression(point["num_rows"], dim, batch)
    few, many = SIVISM(few_model), SIVISM(model)
    few.setup(*few_data)
    started = time.process_time()
    fit = many.run(point["steps"], *data, progress_bar=False)
    fit_cpu_seconds = time.process_time() - started

    draws = many.sample(20_000)["weights"].double()
    mean, covariance = exact_posterior(*data)
    sd = covariance.diagonal().sqrt()
    sd_ratios = draws.std(0) / sd
    actions: dict[str, Callable[[], object]] = {"step": lambda: many.step(*data), "few": lambda: few.step(*few_data)}
    seconds = interleave(actions, rounds=point["rounds"])
    return {
        "step_ms": 1e3 * statistics.median(seconds["step"]),
        "few_rows_step_ms": 1e3 * statistics.median(seconds["few"]),
        "ratio": ratio(seconds["step"], seconds["few"]),
        "mean_error": ((draws.mean(0) - mean) / sd).abs().max().item(),
        "sd_ratio": sd_ratios[sd_ratios.log().abs().argmax()].item(),
        "fit_cpu_seconds": fit_cpu_seconds,
        "setup_seconds": {name: value for name, value in fit.seconds.items() if name != "steps"},
        "path": str(many.target.path),
        "peak_mib": peak_mib(),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/large.json"))
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)  # one case, in this process
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.point is not None:
        pyro.set_rng_seed(args.point["seed"])
        print(json.dumps({"multinomial": multinomial, "rows": rows}[args.point["case"]](args.point)))
        return

    results = []
    for case in args.cases:
        settings = (QUICK if args.quick else CASES)[case]
        results.append(run_fresh(__file__, {"case": case, "seed": args.seed, **settings}))
        print(case)
        for key, value in results[-1].items():
            print(f"  {key:20s} {value:.4g}" if isinstance(value, float) else f"  {key:20s} {value}", flush=True)
    record.write(args, results)


if __name__ == "__main__":
    main()
