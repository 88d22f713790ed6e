"""Simulation-based calibration of the defaults, ``SIVISM(model).run(None, *args)``: are fits right on the average?

Talts, Betancourt, Simpson, Vehtari and Gelman, "Validating Bayesian inference algorithms with simulation-based
calibration" (2018, arXiv 1804.06788). Draw parameters from the prior and data from the model, and fit: if the draws
come from the posterior, the rank of the true value among L of them,

    r = #{l : h(theta_l) < h(theta)},

is uniform on 0..L for every scalar h. It needs no reference, and sees what an error on one data set does not: a bias
that is the same in every fit. Ranks heaped at both ends (a U) tell of draws too narrow, in the middle (a hump) of draws
too wide, on one side (a slope) of draws that are biased. Draws are independent, so none is thinned away.

h is every latent number, every deterministic one, and the log likelihood, which depends on the data and so sees what
the others cannot (Modrak et al., "Simulation-based calibration checking for Bayesian computation", 2023). For each:

    p chi2     that ranks are uniform, Pearson's test on 10 bins; failed below 1%
    p ecdf     the same by their distribution function, as near to the ends of 0..L as at its middle
    bias       the mean of Phi^-1((r + 1/2) / (L + 1)): about how many sds the draws are too low
    spread     the sd of the same: about the sd of the posterior over the sd of the draws

over all fits, and over those called good. That a verdict does not see the true values leaves those ranks uniform, too,
if draws are right. The smallest p times the number of tests bounds the chance of one so small among them (Bonferroni).

The picture has a panel for each h: the distribution function of the ranks less the uniform one, in a band that it stays
in throughout with probability 95%, and in one for all the panels together (Säilynoja, Bürkner and Vehtari,
"Graphical test for discrete uniformity", Statistics and Computing 2022).

    python benchmarks/sbc.py                                        # 3 models x 200 replications
    python benchmarks/sbc.py --first 100 --replications 100 --add earlier.json   # pooled with those of another run
    python benchmarks/sbc.py --replications 0 --add a.json b.json   # no fits: the table and the picture again
"""

from __future__ import annotations

import argparse
import functools
import math
import multiprocessing
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import record
import torch
from pyro import poutine
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyro_sivism import SIVISM

NUM_DRAWS, NUM_BINS = 99, 10
CHI2_LEVEL, BAND_LEVEL = 0.01, 0.05
NUM_SIMULATED = 20_000  # of uniform ranks, behind the bands
LOG_LIKELIHOOD = "log likelihood"


# --- models: ``model(*args, y)`` with proper priors, that draws y where it is not given ------------------


def eight_schools(sigma: Tensor, y: Tensor | None = None) -> None:
    """Ten latents, whose shape depends on the data: a funnel's mouth where the schools differ much."""
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    tau = pyro.sample("tau", dist.HalfNormal(10.0))
    with pyro.plate("school", 8):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * eta)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def logistic(covariates: Tensor, y: Tensor | None = None) -> None:
    """Three coefficients, that 40 outcomes say little about: near a Gaussian, and skewed where they separate."""
    beta = pyro.sample("beta", dist.Normal(0.0, 1.5).expand([3]).to_event(1))
    with pyro.plate("row", len(covariates)):
        pyro.sample("y", dist.Bernoulli(logits=covariates @ beta), obs=y)


def counts(group: Tensor, y: Tensor | None = None) -> None:
    """Overdispersed counts: three positive latents; the concentration's posterior has a long right tail."""
    concentration = pyro.sample("concentration", dist.Gamma(2.0, 0.5))
    rate = pyro.sample("rate", dist.Gamma(3.0, 0.5).expand([2]).to_event(1))
    with pyro.plate("row", len(group)):
        pyro.sample("y", dist.GammaPoisson(concentration, concentration / rate[group]), obs=y)


@dataclass(frozen=True)
class Model:
    model: Callable
    args: tuple[Tensor, ...]


def _covariates() -> Tensor:
    normal = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    correlated = torch.stack([normal[:, 0], 0.7 * normal[:, 0] + 0.7 * normal[:, 1]], -1)
    return torch.cat([torch.ones(40, 1), correlated], -1)


MODELS = {
    "eight_schools": Model(eight_schools, (torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]),)),
    "logistic": Model(logistic, (_covariates(),)),
    "counts": Model(counts, (torch.arange(40) % 2,)),
}


# --- replications --------------------------------------------------------------------------------------


def quantities(model: Callable, args: tuple, latents: dict[str, Tensor]) -> dict[str, float]:
    """Every h by its name, at one value of the latents; ``args`` end with the data."""
    trace = poutine.trace(poutine.condition(model, latents)).get_trace(*args)
    deterministic = [name for name, node in trace.nodes.items() if node.get("infer", {}).get("_deterministic")]
    found: dict[str, float] = {}
    for name in [*latents, *deterministic]:
        value = trace.nodes[name]["value"]
        names = [name] if value.dim() == 0 else [f"{name}[{i}]" for i in range(value.numel())]
        found |= dict(zip(names, value.flatten().tolist()))
    y = trace.nodes["y"]
    return found | {LOG_LIKELIHOOD: y["fn"].log_prob(y["value"]).sum().item()}


def simulate(case: Model) -> tuple[dict[str, Tensor], Tensor]:
    """Latents from the prior, and data from them."""
    trace = prune_subsample_sites(poutine.trace(case.model).get_trace(*case.args))
    values = {name: trace.nodes[name]["value"] for name in trace.stochastic_nodes}
    y = values.pop("y")
    return values, y


def replicate(point: tuple[str, int]) -> dict[str, Any]:
    """One row: the ranks of the true values among the draws of one fit, or the error that it ended with."""
    name, replication = point
    row: dict[str, Any] = {"model": name, "replication": replication}
    case = MODELS[name]
    torch.set_num_threads(1)
    pyro.clear_param_store()
    pyro.set_rng_seed(1_000_000 * (1 + list(MODELS).index(name)) + replication)
    try:
        latents, y = simulate(case)
        args = (*case.args, y)
        started, cpu_started = time.perf_counter(), time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the verdict is in the row
            sivism = SIVISM(case.model)
            result = sivism.run(None, *args, progress_bar=False)
        row |= {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu_started}
        row["steps"] = result.num_steps
        row["verdict"] = "none" if result.verdict is None else result.verdict.level
        row["sentence"] = "" if result.verdict is None else result.verdict.sentence
        truth = quantities(case.model, args, latents)
        sampled = sivism.sample(NUM_DRAWS)
        draws = [quantities(case.model, args, {k: v[i] for k, v in sampled.items()}) for i in range(NUM_DRAWS)]
        row["truth"] = truth
        row["ranks"] = {h: sum(draw[h] < value for draw in draws) for h, value in truth.items()}
    except Exception as error:  # a failure is a result: it stays in the table
        row["error"] = f"{type(error).__name__}: {error}"
    return row


def replicate_all(points: Sequence[tuple[str, int]], processes: int) -> Iterator[dict[str, Any]]:
    if processes == 1:
        yield from map(replicate, points)
        return
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield from pool.imap(replicate, points)


# --- are ranks uniform? --------------------------------------------------------------------------------


def chi_square(ranks: Tensor) -> float:
    """The p-value of Pearson's test that ``ranks`` in 0..L are uniform."""
    observed = torch.bincount(ranks * NUM_BINS // (NUM_DRAWS + 1), minlength=NUM_BINS).double()
    expected = len(ranks) / NUM_BINS
    statistic = ((observed - expected).square() / expected).sum()
    return torch.special.gammaincc(torch.tensor((NUM_BINS - 1) / 2).double(), statistic / 2).item()


def below(ranks: Tensor) -> Tensor:
    """How many of ``ranks (..., N)`` are below k, for k = 1..L; each Binomial(N, k / (L + 1)) if they are uniform."""
    counted = torch.zeros(*ranks.shape[:-1], NUM_DRAWS + 1, dtype=torch.long)
    return counted.scatter_add_(-1, ranks, torch.ones_like(ranks)).cumsum(-1)[..., :-1]


class Uniformity:
    """The distribution function of N uniform ranks: the chance of one that strays as far, and simultaneous bands.

    How far one strays is its least two-sided tail probability over k = 1..L. What that is for uniform ranks is
    simulated.
    """

    def __init__(self, num_ranks: int) -> None:
        k = torch.arange(1, NUM_DRAWS + 1, dtype=torch.double)[:, None]
        binomial = torch.distributions.Binomial(num_ranks, k / (NUM_DRAWS + 1))
        mass = binomial.log_prob(torch.arange(num_ranks + 1, dtype=torch.double)).exp()
        self._at_most, self._at_least = mass.cumsum(1), mass.flip(1).cumsum(1).flip(1)  # each (L, N + 1)
        generator = torch.Generator().manual_seed(0)
        uniform = torch.randint(0, NUM_DRAWS + 1, (NUM_SIMULATED, num_ranks), generator=generator)
        self._simulated = self.tail(below(uniform))

    def tail(self, counted: Tensor) -> Tensor:
        k = torch.arange(NUM_DRAWS)
        return 2.0 * torch.minimum(self._at_most[k, counted], self._at_least[k, counted]).amin(-1)

    def p_value(self, ranks: Tensor) -> float:
        as_far = (self._simulated <= self.tail(below(ranks)) * (1 + 1e-9)).sum().item()
        return (1 + as_far) / (1 + NUM_SIMULATED)

    def band(self, level: float) -> tuple[Tensor, Tensor]:
        """The fewest and most ranks below k = 1..L that are inside, for all k at once but with chance ``level``."""
        gamma = self._simulated.quantile(level)
        inside = 2.0 * torch.minimum(self._at_most, self._at_least) >= gamma
        most = inside.shape[1] - 1 - inside.flip(1).long().argmax(1)
        return inside.long().argmax(1), most


uniformity = functools.lru_cache(Uniformity)


@dataclass(frozen=True)
class Calibration:
    """What the ranks of one h say."""

    num_ranks: int
    p_chi2: float
    p_ecdf: float
    bias: float
    spread: float

    @classmethod
    def of(cls, ranks: Sequence[int]) -> Calibration:
        """NaNs where there are fewer than two."""
        if len(ranks) < 2:
            return cls(len(ranks), *(4 * [math.nan]))
        tensor = torch.tensor(ranks)
        normal = torch.special.ndtri((tensor + 0.5).double() / (NUM_DRAWS + 1))
        p_ecdf = uniformity(len(ranks)).p_value(tensor)
        return cls(len(ranks), chi_square(tensor), p_ecdf, normal.mean().item(), normal.std().item())


def ranks_of(rows: list[dict[str, Any]], *, only_good: bool = False) -> dict[tuple[str, str], list[int]]:
    """By model and h."""
    found: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        for h, rank in row.get("ranks", {}).items():
            of = found.setdefault((row["model"], h), [])
            if row["verdict"] == "good" or not only_good:
                of.append(rank)
    return found


# --- the table and the picture -------------------------------------------------------------------------


def print_table(rows: list[dict[str, Any]]) -> None:
    for name in dict.fromkeys(row["model"] for row in rows):
        group = [row for row in rows if row["model"] == name]
        done = [row for row in group if "error" not in row]
        print(f"\n{name}: {len(done)} of {len(group)} replications fitted")
        for row in group:
            if "error" in row:
                print(f"    replication {row['replication']} failed: {row['error'][:120]}")
        if not done:
            continue
        levels = Counter(row["verdict"] for row in done)
        verdicts = ", ".join(f"{level} {count} ({count / len(done):.0%})" for level, count in levels.most_common())
        wall, cpu, steps = (statistics.median(row[key] for row in done) for key in ("seconds", "cpu_seconds", "steps"))
        print(f"verdicts: {verdicts}; medians: {wall:.1f} s, {cpu:.1f} s of CPU, {steps:.0f} steps")
        columns = f"{'p chi2':>7s} {'p ecdf':>7s} {'bias':>6s} {'spread':>6s}"
        print(f"{'':18s} {'all fits:':>9s} {columns}   {'good:':>9s} {columns}")
        everything, good = ranks_of(done), ranks_of(done, only_good=True)
        for key in everything:
            both = [Calibration.of(ranks[key]) for ranks in (everything, good)]
            cells = "   ".join(
                f"{c.num_ranks:9d} {c.p_chi2:7.3f} {c.p_ecdf:7.3f} {c.bias:6.2f} {c.spread:6.2f}" for c in both
            )
            print(f"{key[1]:18s} {cells}")
    print()
    for what, only_good in (("all fits", False), ("fits called good", True)):
        print_family(what, ranks_of(rows, only_good=only_good))


def print_family(what: str, ranks: dict[tuple[str, str], list[int]]) -> None:
    """Every test at once."""
    tests = {key: calibration for key, of in ranks.items() if (calibration := Calibration.of(of)).num_ranks > 1}
    if not tests:
        return
    for label, attribute in (("chi2", "p_chi2"), ("ecdf", "p_ecdf")):
        p = {key: getattr(calibration, attribute) for key, calibration in tests.items()}
        least = min(p, key=p.__getitem__)
        failed = [" ".join(key) for key in p if p[key] < CHI2_LEVEL]
        print(
            f"{what}, {label}: {len(p)} tests, {len(failed)} below {CHI2_LEVEL:.0%}{': ' if failed else ''}"
            f"{', '.join(failed)} ({CHI2_LEVEL * len(p):.1f} expected); smallest p {p[least]:.4f} ({' '.join(least)}), "
            f"times {len(p)}: {min(1.0, len(p) * p[least]):.2f}"
        )


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """One panel for each h."""
    everything, good = ranks_of(rows), ranks_of(rows, only_good=True)
    columns = min(6, max(1, len(everything)))
    num_rows = max(1, math.ceil(len(everything) / columns))
    figure, axes = plt.subplots(
        num_rows, columns, figsize=(2.3 * columns, 1.9 * num_rows), squeeze=False, sharex=True, sharey=True
    )
    at = torch.arange(1, NUM_DRAWS + 1) / (NUM_DRAWS + 1)
    for i, (axis, (key, ranks)) in enumerate(zip(axes.flat, everything.items())):
        for level, shade in ((BAND_LEVEL / len(everything), "0.9"), (BAND_LEVEL, "0.78")):
            fewest, most = uniformity(len(ranks)).band(level)
            edges = (fewest / len(ranks) - at, most / len(ranks) - at)
            axis.fill_between(at, *edges, color=shade, step="mid", linewidth=0)
        for of, style in ((ranks, {"color": "C0"}), (good[key], {"color": "C1", "linewidth": 0.8})):
            if of:
                axis.plot(at, below(torch.tensor(of)) / len(of) - at, drawstyle="steps-mid", **style)
        axis.set_title("\n".join(key), fontsize=8)
        axis.tick_params(labelsize=7, labelbottom=i + columns >= len(everything))
    for axis in axes.flat[len(everything) :]:
        axis.set_visible(False)
    figure.supxlabel("rank / (L + 1)", fontsize=8)
    figure.supylabel("share of ranks below, less the uniform's", fontsize=8)
    figure.suptitle(
        "Ranks of true values: all fits (blue) and those called good (orange); 95% bands of all fits, for a panel and "
        "for all",
        fontsize=8,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--replications", type=int, default=200, help="of each model")
    parser.add_argument("--first", type=int, default=0, help="the first replication, which is its seed, too")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--add", nargs="+", type=Path, default=[], help="JSON of other runs, pooled with this one")
    parser.add_argument("--quick", action="store_true", help="two replications of one model")
    parser.add_argument("--out", type=Path, default=Path("results/sbc.json"), help="JSON; the plot beside")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if args.quick:
        args.models, args.replications = ["logistic"], 2

    rows = record.read(args.add)
    points = [(name, args.first + i) for name in args.models for i in range(args.replications)]
    again = {(row["model"], row["replication"]) for row in rows} & set(points)
    if again:
        parser.error(f"{len(again)} replications are in --add already, which would count twice: give another --first")
    for row in replicate_all(points, args.processes):
        rows.append(row)
        record.write(args, rows, quiet=True)
    print_table(rows)
    plot(rows, args.out.with_suffix(".png"))
    record.write(args, rows)


if __name__ == "__main__":
    main()
