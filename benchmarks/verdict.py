"""What a verdict is worth: its level against the true error, over known posteriors and known ways to be wrong.

    python benchmarks/verdict.py                                # toys with exact draws, every sabotage
    python benchmarks/verdict.py --posteriors DIR               # and posteriors with reference draws

Every row takes draws from a toy posterior, or the reference draws of a real one, spoils them in one known way, and asks
for two verdicts: ``quick`` from draws and scores alone, and ``full`` with the chains and the search for modes. Nothing
is fitted, except by ``gaussian fit``, which draws from the Gaussian that batch and match finds.

Errors are population values, from 50,000 draws of either side (from the given draws for real posteriors):

    error   the largest |difference of means| / sd and |log2 ratio of sds| over the coordinates whose sd is finite
    along   the same over all directions: what a wrong correlation leaves the coordinates right about
    ks      the largest difference of a coordinate's distribution functions, at nine quantiles

A verdict fails if it is "good" with an error above .3. It is a false alarm if it is not "good" with an error below .1;
those where ``along`` or three times ``ks`` are no smaller than that see something that the error does not measure,
and are counted apart.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import pyro
import torch
from pyro import poutine
from record import versions
from torch import Tensor
from torch.distributions import Chi2, Gamma

from pyro_sivism.diagnostics import Chains, drift_statistics, find_modes, judge, stein_statistics, tail_indices
from pyro_sivism.errors import SivismError
from pyro_sivism.family import BatchAndMatch, TargetDensity
from pyro_sivism.layout import LatentLayout
from pyro_sivism.target import Target

LEVELS = ("good", "suspect", "bad")
NUM_CHAINS = 512  # as the verdict has
NUM_TRUTH, QUANTILES = 50_000, torch.arange(0.1, 1.0, 0.1, dtype=torch.double)
DOUBLE = torch.double


# --- posteriors with exact draws ------------------------------------------------------------------------


@dataclass(frozen=True)
class Toy:
    """A density on R^D with a sampler; ``num_usable`` leading coordinates have an sd to speak of."""

    dim: int
    log_density: Callable[[Tensor], Tensor]
    sample: Callable[[int], Tensor]
    num_usable: int
    has_two_modes: bool = False

    def score(self, x: Tensor) -> Tensor:
        return self.log_density_and_score(x)[1]

    def log_density_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            log_density = self.log_density(x)
            (score,) = torch.autograd.grad(log_density.sum(), x)
        return log_density.detach(), score


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE)


def gaussian(dim: int, log10_units: float = 0.0) -> Toy:
    generator = torch.Generator().manual_seed(dim)
    factor = torch.randn(dim, dim, generator=generator, dtype=DOUBLE)
    units = torch.logspace(-log10_units, log10_units, dim, dtype=DOUBLE)
    covariance = 0.3 * torch.eye(dim, dtype=DOUBLE) + 0.7 * factor @ factor.T / dim
    root = units[:, None] * torch.linalg.cholesky(covariance)
    precision = torch.cholesky_inverse(root)
    return Toy(dim, lambda x: -0.5 * ((x @ precision) * x).sum(-1), lambda n: normal(n, dim) @ root.T, dim)


def banana(dim: int, bend: float) -> Toy:
    def log_density(x: Tensor) -> Tensor:
        straight = torch.cat([x[:, :1], x[:, 1:2] - bend * x[:, :1].square(), x[:, 2:]], 1)
        return -0.5 * straight.square().sum(-1)

    def sample(n: int) -> Tensor:
        x = normal(n, dim)
        x[:, 1] += bend * x[:, 0].square()
        return x

    return Toy(dim, log_density, sample, dim)


def funnel(dim: int, sd: float, num_usable: int) -> Toy:
    def log_density(x: Tensor) -> Tensor:
        v, rest = x[:, 0], x[:, 1:]
        return -0.5 * (v / sd).square() - 0.5 * rest.square().sum(-1) * (-v).exp() - 0.5 * (dim - 1) * v

    def sample(n: int) -> Tensor:
        v = sd * normal(n, 1)
        return torch.cat([v, normal(n, dim - 1) * (0.5 * v).exp()], 1)

    return Toy(dim, log_density, sample, num_usable)


def student_t(dim: int, df: float) -> Toy:
    def sample(n: int) -> Tensor:
        return normal(n, dim) * (Chi2(torch.tensor(df, dtype=DOUBLE)).sample((n, dim)) / df).rsqrt()

    return Toy(dim, lambda x: -0.5 * (df + 1) * (x.square() / df).log1p().sum(-1), sample, dim)


def log_gamma(dim: int, shape: float) -> Toy:
    gamma = Gamma(torch.tensor(shape, dtype=DOUBLE), 1.0)
    return Toy(dim, lambda x: (shape * x - x.exp()).sum(-1), lambda n: gamma.sample((n, dim)).log(), dim)


def quartic(dim: int) -> Toy:
    """``exp(-x^4 / 4)``: tails thinner than a Gaussian's."""
    gamma = Gamma(torch.tensor(0.25, dtype=DOUBLE), 1.0)

    def sample(n: int) -> Tensor:
        return (4.0 * gamma.sample((n, dim))) ** 0.25 * normal(n, dim).sign()

    return Toy(dim, lambda x: -0.25 * (x**4).sum(-1), sample, dim)


def mixture(dim: int, distance: float, weight: float) -> Toy:
    def log_density(x: Tensor) -> Tensor:
        right, left = (-0.5 * (x[:, 0] - side * distance).square() for side in (1, -1))
        return torch.logaddexp(right + math.log(weight), left + math.log(1 - weight)) - 0.5 * x[:, 1:].square().sum(-1)

    def sample(n: int) -> Tensor:
        x = normal(n, dim)
        x[:, 0] += torch.where(torch.rand(n) < weight, distance, -distance)
        return x

    return Toy(dim, log_density, sample, dim, has_two_modes=True)


TOYS = {
    "gaussian 1": gaussian(1),
    "gaussian 10, units of 1e-4 to 1e4": gaussian(10, 4.0),
    "gaussian 50": gaussian(50),
    "banana 2": banana(2, 1.0),
    "banana 5, sharp": banana(5, 2.0),
    "funnel 5, sd 1": funnel(5, 1.0, 5),
    "funnel 10, sd 3 (Neal)": funnel(10, 3.0, 1),
    "student t 5, df 4": student_t(5, 4.0),
    "log gamma 4, shape 2": log_gamma(4, 2.0),
    "log gamma 3, shape 1/2": log_gamma(3, 0.5),
    "quartic 5": quartic(5),
    "mixture 2 at 1.5": mixture(2, 1.5, 0.5),
    "mixture 3 at 2, 70/30": mixture(3, 2.0, 0.7),
    "mixture 2 at 4": mixture(2, 4.0, 0.5),
    "mixture 5 at 4, 85/15": mixture(5, 4.0, 0.85),
}


# --- ways to be wrong -----------------------------------------------------------------------------------

Sabotage = Callable[[Tensor], Tensor]


def standardized(spoil: Sabotage) -> Sabotage:
    """Spoil draws in units of their own median and interquartile range, which every posterior has."""

    def apply(x: Tensor) -> Tensor:
        low, middle, high = x.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=x.dtype), 0)
        sd = (high - low) / 1.349
        return middle + sd * spoil((x - middle) / sd)

    return apply


def one_coordinate(spoil: Sabotage, index: int) -> Sabotage:
    def apply(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, index] = spoil(x[:, index])
        return x

    return apply


def cut_off(x: Tensor, quantile: float) -> Tensor:
    """The draws below a quantile of the first coordinate, repeated to as many: a support cut off."""
    kept = x[x[:, 0] <= x[:, 0].quantile(quantile)]
    return kept[torch.randint(len(kept), (len(x),))]


def stray_cluster(x: Tensor, fraction: float) -> Tensor:
    stray = 3.0 + 0.3 * torch.randn_like(x)
    return torch.where(torch.rand(len(x), 1) < fraction, stray, x)


def moment_matched(x: Tensor) -> Tensor:
    """A Gaussian of the same mean and covariance: the wrong shape."""
    root = torch.linalg.cholesky(x.T.cov().reshape(x.shape[1], -1))
    return x.mean(0) + torch.randn_like(x) @ root.T


def independent(x: Tensor) -> Tensor:
    return torch.stack([column[torch.randperm(len(x))] for column in x.T], 1)


def reweighted(x: Tensor, weight: float) -> Tensor:
    """Draws of which ``weight`` have a positive first coordinate."""
    right, left = x[x[:, 0] > 0], x[x[:, 0] <= 0]
    take_right = torch.rand(len(x)) < weight
    return torch.where(
        take_right[:, None],
        right[torch.randint(len(right), (len(x),))],
        left[torch.randint(len(left), (len(x),))],
    )


SABOTAGES: dict[str, Sabotage] = {
    "none": lambda x: x,
    "none, again": lambda x: x.flip(0),
    "mean +.05": standardized(lambda x: x + 0.05),
    "mean +.1": standardized(lambda x: x + 0.1),
    "mean +.5": standardized(lambda x: x + 0.5),
    "one mean +.4": standardized(one_coordinate(lambda x: x + 0.4, 0)),
    "sd x .95": standardized(lambda x: 0.95 * x),
    "sd x .75": standardized(lambda x: 0.75 * x),
    "sd x .5": standardized(lambda x: 0.5 * x),
    "sd x .01": standardized(lambda x: 0.01 * x),
    "sd x 1.4": standardized(lambda x: 1.4 * x),
    "sd x 3": standardized(lambda x: 3.0 * x),
    "one sd x .7": standardized(one_coordinate(lambda x: 0.7 * x, -1)),
    "one sd x .01": standardized(one_coordinate(lambda x: 0.01 * x, -1)),
    "one sd x 10": standardized(one_coordinate(lambda x: 10.0 * x, -1)),
    "mean +.3, sd x .8": standardized(lambda x: 0.3 + 0.8 * x),
    "independent": independent,
    "moment matched": moment_matched,
    "thin tails": standardized(lambda x: 2.0 * (x / 2.0).tanh()),
    "no tails": standardized(lambda x: (1.2 * x).tanh()),
    "cut off at 95%": lambda x: cut_off(x, 0.95),
    "cut off at 75%": lambda x: cut_off(x, 0.75),
    "cut off at 50%": lambda x: cut_off(x, 0.5),
    "stray 10%": standardized(lambda x: stray_cluster(x, 0.1)),
    "stray 30%": standardized(lambda x: stray_cluster(x, 0.3)),
}
MODE_SABOTAGES: dict[str, Sabotage] = {
    "right mode lost": lambda x: reweighted(x, 0.0),
    "left mode lost": lambda x: reweighted(x, 1.0),
    "weights 60/40": lambda x: reweighted(x, 0.6),
    "weights 95/5": lambda x: reweighted(x, 0.95),
}


# --- rows -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One posterior, spoiled in one way and judged; see the module docstring."""

    posterior: str
    sabotage: str
    error: float
    along: float
    ks: float
    quick: str
    full: str
    sentence: str
    seconds: float


def true_errors(x: Tensor, truth: Tensor, num_usable: int) -> tuple[float, float, float]:
    """The error, that along the worst direction, and the largest difference of distribution functions."""
    ks = 0.0
    for column, want in zip(x[:20_000].T, truth[:20_000].T):
        at = want.quantile(QUANTILES.to(want))
        ks = max(ks, ((column[:, None] <= at).double().mean(0) - QUANTILES).abs().max().item())
    x, truth = x[:, :num_usable], truth[:, :num_usable]
    sd = truth.std(0)
    mean, log2_sd = (x.mean(0) - truth.mean(0)) / sd, (x.std(0) / sd).log2()
    error = max(mean.abs().max().item(), log2_sd.abs().max().item())
    root = torch.linalg.cholesky(truth.T.cov().reshape(num_usable, num_usable))
    y = torch.linalg.solve_triangular(root, (x - truth.mean(0)).T, upper=False)
    eigenvalues = torch.linalg.eigvalsh(y.cov().reshape(num_usable, num_usable)).clamp(min=1e-12)
    along = max(error, y.mean(1).norm().item(), 0.5 * eigenvalues.log2().abs().max().item())
    return error, along, ks


def judge_draws(target: TargetDensity, x: Tensor, labels: list[str] | None) -> tuple[str, str, str, float]:
    """The levels of the quick and the full verdict, the latter's sentence, and the processor's seconds."""
    started = time.process_time()
    try:
        stein = stein_statistics(x, target.score(x))
        quick = judge(stein, labels=labels)
        full = judge(
            stein,
            drift=drift_statistics(Chains(target, x, NUM_CHAINS)),
            modes=find_modes(target, x),
            tails=tail_indices(target, x),
            labels=labels,
        )
    except SivismError as error:
        return "bad", "bad", f"{type(error).__name__}: {error}", time.process_time() - started
    return quick.level, full.level, full.sentence, time.process_time() - started


def toy_rows(name: str, num_draws: int, seed: int) -> list[Row]:
    toy = TOYS[name]
    sabotages = SABOTAGES | (MODE_SABOTAGES if toy.has_two_modes else {})
    rows = []
    for label, spoil in sabotages.items():
        torch.manual_seed(seed)
        errors = true_errors(spoil(toy.sample(NUM_TRUTH)), toy.sample(NUM_TRUTH), toy.num_usable)
        rows.append(Row(name, label, *errors, *judge_draws(toy, spoil(toy.sample(num_draws)), None)))
    affine = BatchAndMatch().fit(toy, toy.sample(4)).affine
    errors = true_errors(affine.forward(normal(NUM_TRUTH, toy.dim)), toy.sample(NUM_TRUTH), toy.num_usable)
    verdicts = judge_draws(toy, affine.forward(normal(num_draws, toy.dim)), None)
    return [*rows, Row(name, "gaussian fit", *errors, *verdicts)]


def posterior_rows(name: str, models, seed: int) -> list[Row]:
    """Reference draws, spoiled in the unconstrained space, against themselves."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    model, data, reference = models.load(name)
    trace = poutine.trace(model).get_trace(data)
    layout = LatentLayout.from_trace(trace)
    target = Target(model, layout, trace, (data,))
    x = layout.pack({site: torch.as_tensor(reference[site], dtype=DOUBLE) for site in layout.names}).double()
    rows = []
    for label, spoil in SABOTAGES.items():
        torch.manual_seed(seed)
        spoiled = spoil(x)
        errors = true_errors(spoiled, x, layout.dim)
        rows.append(Row(name, label, *errors, *judge_draws(target, spoiled, layout.coordinate_names)))
    return rows


# --- tables ---------------------------------------------------------------------------------------------


def print_rows(rows: list[Row]) -> None:
    for row in rows:
        print(
            f"{row.posterior[:28]:28s} {row.sabotage:18s} {row.error:6.2f} {row.along:6.2f} {row.ks:5.2f}  "
            f"{row.quick:8s}{row.full:8s}{row.seconds:6.2f}  {row.sentence}",
            flush=True,
        )


def print_summary(rows: list[Row]) -> None:
    """Levels by true error, and the two figures that the thresholds are chosen for."""
    edges = [0.0, 0.1, 0.2, 0.3, 0.5, 1.0, math.inf]
    for kind in ("quick", "full"):
        print(f"\n{kind} verdict, rows by true error\n{'error':>12s}" + "".join(f"{level:>9s}" for level in LEVELS))
        for low, high in pairwise(edges):
            levels = [getattr(row, kind) for row in rows if low <= row.error < high]
            print(f"{low:5.1f} - {high:4.1f}" + "".join(f"{levels.count(level):9d}" for level in LEVELS))
        missed = [row for row in rows if row.error > 0.3 and getattr(row, kind) == "good"]
        small = [row for row in rows if row.error < 0.1]
        right = [row for row in small if max(row.along, 3.0 * row.ks) < 0.1]
        for label, group in (("error", small), ("error, along and ks", right)):
            alarms = sum(getattr(row, kind) != "good" for row in group)
            print(f"not good with {label} under .1: {alarms} of {len(group)}")
        print(f"good with an error over .3: {len(missed)}")
        for row in missed:
            print(f"    {row.posterior}, {row.sabotage}: {row.error:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toys", nargs="*", choices=TOYS, default=list(TOYS))
    parser.add_argument("--posteriors", type=Path, help="a folder with models.py: POSTERIORS and load(name)")
    parser.add_argument("--draws", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/verdict.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    arguments.out.parent.mkdir(parents=True, exist_ok=True)

    def keep(new: list[Row]) -> None:
        print_rows(new)
        rows.extend(new)
        report = {"versions": versions(), "rows": [asdict(row) for row in rows]}
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")

    for name in arguments.toys:
        keep(toy_rows(name, arguments.draws, arguments.seed))
    if arguments.posteriors is not None:
        sys.path.insert(0, str(arguments.posteriors))
        models = importlib.import_module("models")
        for name in models.POSTERIORS:
            keep(posterior_rows(name, models, arguments.seed))
    print_summary(rows)


if __name__ == "__main__":
    main()
