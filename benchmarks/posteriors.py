"""Accuracy, verdict and wall-clock on posteriors with reference draws.

    python benchmarks/posteriors.py --make-references            # once: long chains, kept in the user's cache folder
    python benchmarks/posteriors.py [--names house_prices ...] [--methods default NUTS ...] [--seeds 5]
    python benchmarks/posteriors.py --posteriors DIR             # and a collection of others
    python benchmarks/posteriors.py --seeds 0 --add a.json b.json    # no fits: the tables again, of all these runs

The project's own posteriors are in ``posterior_zoo``; some have exact draws and need no reference made. ``DIR`` holds
others as a module ``models.py`` with ``POSTERIORS`` and ``load(name) -> (model, data, reference draws by site)``, and
perhaps ``metrics.py`` with ``load_stats(name)``, the sites' means and sds where they are known better.

Every (posterior, method, seed) is one row, failures too; rows are written as JSON, with versions and the commit, and
printed as a table for each method, those of the fewest latents first. Errors are those of ``accuracy.py``. Seconds are
of wall-clock, from the model to the fit or the last draw, the verdict included; evaluations are of the log density with
its gradient at one point.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pyro
import record
import torch
from accuracy import Reference, errors
from posterior_zoo import POSTERIORS
from pyro.infer import MCMC, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoGuide, AutoIAFNormal, AutoMultivariateNormal, AutoNormal
from references import default_folder, load_reference, make_reference

from pyro_sivism import SIVISM, FisherDivergence, PathGradientKL, SemiImplicitGuide
from pyro_sivism.compare import _CountingNUTS
from pyro_sivism.layout import LatentLayout

NUM_DRAWS = 10_000
NUM_SVI_STEPS = 3000
NUM_NUTS, NUTS_SECONDS = 1000, 600.0
LEVELS = ("good", "suspect", "bad")

Draws = dict[str, torch.Tensor]
Method = Callable[[Callable, tuple], "tuple[Callable[[], Draws], dict[str, Any]]"]


@dataclass(frozen=True)
class Case:
    """A posterior and how to get its reference, which may fail."""

    name: str
    model: Callable
    args: tuple
    reference: Callable[[], Reference]


# --- methods: from a model and its arguments to a sampler and what it cost -----------------------------


def sivism(loss: Callable) -> Method:
    """The defaults, with this objective."""

    def fit(model: Callable, args: tuple) -> tuple[Callable[[], Draws], dict[str, Any]]:
        inference = SIVISM(model, loss=loss())
        result = inference.run(None, *args, progress_bar=False)
        facts: dict[str, Any] = {"steps": result.num_steps, "evaluations": result.num_evaluations}
        facts["seconds_of"] = result.seconds
        if result.preconditioner is not None:
            facts["gaussian_discrepancy"] = result.preconditioner.discrepancy
        facts["verdict"] = "none" if result.verdict is None else result.verdict.level
        facts["sentence"] = "" if result.verdict is None else result.verdict.sentence
        return lambda: inference.sample(NUM_DRAWS), facts

    return fit


def svi(make_guide: Callable[[Callable], AutoGuide], budget: int | None = None) -> Method:
    """``SVI`` with an autoguide, 3,000 steps of Adam at 1e-2 decayed to 1e-3, or another number of them."""

    def fit(model: Callable, args: tuple) -> tuple[Callable[[], Draws], dict[str, Any]]:
        num_steps = NUM_SVI_STEPS if budget is None else budget
        guide = make_guide(model)
        optim = pyro.optim.ClippedAdam({"lr": 1e-2, "lrd": 0.1 ** (1 / num_steps)})
        inference = SVI(model, guide, optim, Trace_ELBO())
        for _ in range(num_steps):
            inference.step(*args)

        def draw() -> Draws:
            sites = guide.prototype_trace.stochastic_nodes
            draws = Predictive(guide, num_samples=NUM_DRAWS, return_sites=sites, parallel=True)(*args)
            shapes = {name: guide.prototype_trace.nodes[name]["value"].shape for name in sites}
            return {name: draws[name].reshape(NUM_DRAWS, *shape) for name, shape in shapes.items()}

        return draw, {"steps": num_steps, "evaluations": num_steps}

    return fit


def nuts(model: Callable, args: tuple) -> tuple[Callable[[], Draws], dict[str, Any]]:
    """Pyro's NUTS, compiled: 1,000 draws after a warm-up of as many, one chain.

    Raises:
        TimeoutError: it takes more than ten minutes.
    """
    started = time.perf_counter()

    def check_time(*_: Any) -> None:
        if time.perf_counter() - started > NUTS_SECONDS:
            raise TimeoutError(f"stopped after {NUTS_SECONDS:.0f} s")

    kernel = _CountingNUTS(model, jit_compile=True, ignore_jit_warnings=True)
    mcmc = MCMC(kernel, num_samples=NUM_NUTS, warmup_steps=NUM_NUTS, disable_progbar=True, hook_fn=check_time)
    mcmc.run(*args)
    return mcmc.get_samples, {"steps": 2 * NUM_NUTS, "evaluations": mcmc._diagnostics[0]["evaluations"]}


METHODS: dict[str, Method] = {
    "default": sivism(PathGradientKL),
    "FisherDivergence": sivism(FisherDivergence),
    "AutoNormal": svi(AutoNormal),
    "AutoMultivariateNormal": svi(AutoMultivariateNormal),
    "AutoIAFNormal": svi(AutoIAFNormal),
    "NUTS": nuts,
}


# --- posteriors ----------------------------------------------------------------------------------------


def own_cases(names: Iterable[str], references: Path) -> list[Case]:
    made = [POSTERIORS[name]() for name in names]
    return [Case(each.name, each.model, each.args, lambda each=each: load_reference(each, references)) for each in made]


def other_cases(folder: Path, names: Iterable[str] | None) -> list[Case]:
    """Those of a folder, all of them or some, without the functions of latents that its metrics call optional."""
    models, metrics = _module(folder / "models.py"), None
    if (folder / "metrics.py").exists():
        metrics = _module(folder / "metrics.py")
    optional = getattr(metrics, "OPTIONAL", ())

    def case(name: str) -> Case:
        model, data, draws = models.load(name)
        draws = {site: values for site, values in draws.items() if site not in optional}
        return Case(name, model, (data,), lambda: Reference.from_draws(draws, moments=_moments(name, draws, metrics)))

    return [case(name) for name in models.POSTERIORS if names is None or name in names]


def _moments(name: str, draws: Draws, metrics: ModuleType | None) -> tuple[torch.Tensor, torch.Tensor] | None:
    stats = None if metrics is None else metrics.load_stats(name)
    if stats is None:
        return None
    mean, sd = (
        torch.cat([torch.as_tensor(stats[site][key], dtype=torch.double).reshape(-1) for site in draws])
        for key in ("mean", "sd")
    )
    return mean, sd


def _module(path: Path) -> ModuleType:
    """A module by its file, whatever else is called like it."""
    spec = importlib.util.spec_from_file_location(f"posteriors_given_{path.stem}", path)
    if spec is None or spec.loader is None or not path.exists():
        raise FileNotFoundError(f"no module {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- rows ----------------------------------------------------------------------------------------------


def run_one(case: Case, method: str, seed: int) -> dict[str, Any]:
    """One row: the errors of one method's draws, or the error that it ended with."""
    row: dict[str, Any] = {"posterior": case.name, "method": method, "seed": seed}
    started = time.perf_counter()
    try:
        row["dim"] = LatentLayout.from_trace(SemiImplicitGuide(case.model).trace_model(*case.args)).dim
        reference = case.reference()
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        started = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the verdict is in the row
            draw, facts = METHODS[method](case.model, case.args)
        row["seconds"] = time.perf_counter() - started
        row |= facts
        row |= errors(draw(), reference)
    except Exception as error:  # a failure is a result: it stays in the table
        row.setdefault("seconds", time.perf_counter() - started)
        row["error"] = f"{type(error).__name__}: {error}"
    return row


def progress(row: dict[str, Any]) -> str:
    """One line, while other fits are still to come."""
    what = f"failed: {row['error'][:120]}" if "error" in row else ""
    if not what:
        ratio, worst = row["sw1"] / row["sw1_floor"], f"{row['sd_max']:.2f} ({row['sd_worst']})"
        what = f"error {ratio:.2f}, mean {row['mean_max']:.2f}, sd {worst}  {row.get('verdict', '')}"
    return f"{row['posterior']:28s} {row['method']:22s} seed {row['seed']} {row['seconds']:7.1f} s  {what}"


def print_tables(rows: list[dict[str, Any]]) -> None:
    """One for each method: medians over the seeds, the worst in brackets. Then what failed."""
    header = ("posterior", "D", "seeds", "error", "mean", "sd", "verdicts", "steps", "scores", "seconds")
    dims = {row["posterior"]: row["dim"] for row in rows if "dim" in row}
    names = sorted({row["posterior"] for row in rows}, key=lambda name: (dims.get(name, 0), name))
    for method in dict.fromkeys(row["method"] for row in rows):
        groups = [[row for row in rows if (row["posterior"], row["method"]) == (name, method)] for name in names]
        print(f"\n{method}:\n")
        record.print_table(header, [_line(group, dims) for group in groups if group])
    print()
    for row in rows:
        if "error" in row:
            print(progress(row))


def _line(group: list[dict[str, Any]], dims: dict[str, int]) -> tuple[str, ...]:
    """What the seeds of one posterior and method came to."""
    name, done = group[0]["posterior"], [row for row in group if "error" not in row]
    seeds = f"{len(done)}" if len(done) == len(group) else f"{len(done)} of {len(group)}"
    label = f"`{name}`", f"{dims.get(name, '')}", seeds
    if not done:
        return (*label, *7 * ("",))
    levels = Counter(row["verdict"] for row in done if "verdict" in row)
    return (
        *label,
        _median_and_worst([row["sw1"] / row["sw1_floor"] for row in done]),
        *(_median_and_worst([row[key] for row in done]) for key in ("mean_max", "sd_max")),
        ", ".join(f"{levels[level]} {level}" for level in (*LEVELS, "none") if level in levels),
        *(f"{statistics.median(row[key] for row in done):,.0f}" for key in ("steps", "evaluations", "seconds")),
    )


def _median_and_worst(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({max(values):.2f})"


def print_verdicts(rows: list[dict[str, Any]]) -> None:
    """The verdicts that say another thing than the true error, max(mean_max, sd_max), with their sentences."""
    judged = [row | {"true": max(row["mean_max"], row["sd_max"])} for row in rows if "verdict" in row and "sw1" in row]
    if not judged:
        return
    wrong = {
        "good with an error over .3": [row for row in judged if row["verdict"] == "good" and row["true"] > 0.3],
        "not good with an error under .1": [row for row in judged if row["verdict"] != "good" and row["true"] < 0.1],
    }
    for what, group in wrong.items():
        print(f"\n{what}: {len(group)} of {len(judged)} verdicts")
        for row in group:
            where = f"{row['posterior']}, {row['method']}, seed {row['seed']}"
            print(f"    {where}: {row['verdict']} with {row['true']:.2f}. {row['sentence']}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--posteriors", type=Path, help="a folder with others; see above")
    parser.add_argument("--references", type=Path, default=default_folder(), help="where long chains are kept")
    parser.add_argument("--make-references", action="store_true", help="run the long chains, and nothing else")
    parser.add_argument("--names", nargs="*", help="of posteriors; all if not given")
    parser.add_argument("--methods", nargs="*", default=["default", "AutoMultivariateNormal"], choices=METHODS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--add", nargs="+", type=Path, default=[], help="JSON of other runs, pooled with this one")
    parser.add_argument("--quick", action="store_true", help="one small posterior, two methods, one seed")
    parser.add_argument("--out", type=Path, default=Path("results/posteriors.json"))
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if args.quick:
        args.names, args.methods, args.seeds = ["dirichlet_multinomial"], ["default", "AutoNormal"], 1
    own = [name for name in POSTERIORS if args.names is None or name in args.names]
    if args.make_references:
        make_references(own, args.references)
        return
    cases = own_cases(own, args.references)
    if args.posteriors is not None:
        cases += other_cases(args.posteriors, args.names)
    unknown = set(args.names or ()) - {case.name for case in cases}
    if unknown:
        parser.error(f"no posterior is called {', '.join(sorted(unknown))}")

    rows = record.read(args.add)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    points = [(case, method, seed) for case in cases for method in args.methods for seed in seeds]
    again = {(row["posterior"], row["method"], row["seed"]) for row in rows}
    again &= {(case.name, method, seed) for case, method, seed in points}
    if again:
        parser.error(f"{len(again)} fits are in --add already, which would count twice: give another --first-seed")
    for point in points:
        rows.append(run_one(*point))
        print(progress(rows[-1]), flush=True)
        record.write(args, rows, quiet=True)
    print_tables(rows)
    print_verdicts(rows)
    record.write(args, rows)


def make_references(names: Iterable[str], folder: Path) -> None:
    """Of those posteriors that have no exact draws; one line each."""
    torch.set_default_dtype(torch.double)
    for name in names:
        posterior = POSTERIORS[name]()
        if posterior.exact is not None:
            print(f"{name:28s} has exact draws", flush=True)
            continue
        report = make_reference(posterior, folder)
        print(
            f"{name:28s} {report['num_draws']} draws, R-hat {report['r_hat']:.4f}, least ESS {report['min_ess']:.0f}, "
            f"{report['num_divergences']} divergences, {report['seconds']:.0f} s"
            + (f": REFUSED, {report['refused']}" if report["refused"] else ""),
            flush=True,
        )


if __name__ == "__main__":
    main()
