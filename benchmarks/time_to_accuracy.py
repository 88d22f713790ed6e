"""Wall-clock to an accuracy: SIVISM's defaults beside Pyro's NUTS and ``SVI`` with autoguides.

    python benchmarks/time_to_accuracy.py --posteriors DIR       # a collection of others, see posteriors.py
    python benchmarks/time_to_accuracy.py --names house_prices   # the project's own
    python benchmarks/time_to_accuracy.py --methods --add a.json b.json    # no fits: tables and picture of these runs

Each fit is a process of its own, one at a time on one thread, and everything counts from its start: imports, set-up,
capture or compilation, the fit, the verdict, and 2,000 draws. A method's *curve* is its error at several budgets:
steps of SIVISM and ``SVI``, draws of NUTS; each budget is a fit from scratch. The last budget of SIVISM is
``run(None)`` and of NUTS 1,000 draws after a warm-up of as many, compiled. One table compares those two by posterior,
another the last budgets of all methods, on the posteriors where each of them came to its end.

The error is the sliced Wasserstein-1 distance of ``accuracy.py``, in units of its floor. NUTS that takes longer than
``--patience`` is stopped and counted as having taken so long, in NUTS's favour.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import record
from fresh import run_fresh

NUM_DRAWS = 2000
BUDGETS: dict[str, list[int | None]] = {
    "SIVISM": [150, None],
    "NUTS": [250, 1000],
    "AutoNormal": [1000, 3000],
    "AutoMultivariateNormal": [1000, 3000],
}
BASELINE, OURS = ("NUTS", 1000), ("SIVISM", None)
_KEYS = ("posterior", "method", "budget", "seed")


def fit(case: Any, method: str, budget: int | None, patience: float) -> dict[str, Any]:
    """Draws by site of one fit."""
    import posteriors
    from pyro.infer import MCMC, NUTS

    from pyro_sivism import SIVISM

    if method == "SIVISM":
        sivism = SIVISM(case.model)
        sivism.run(budget, *case.args, progress_bar=False)
        return sivism.sample(NUM_DRAWS)
    if method != "NUTS":
        guide = getattr(posteriors, method)
        draw, _ = posteriors.svi(guide, budget)(case.model, case.args)
        return {site: value[:NUM_DRAWS] for site, value in draw().items()}
    started = time.perf_counter()

    def check_time(*_: Any) -> None:
        if time.perf_counter() - started > patience:
            raise TimeoutError

    mcmc = MCMC(
        NUTS(case.model, jit_compile=True, ignore_jit_warnings=True),
        num_samples=budget,
        warmup_steps=budget,
        disable_progbar=True,
        hook_fn=check_time,
    )
    mcmc.run(*case.args)
    return mcmc.get_samples()


def measure(point: dict[str, Any]) -> dict[str, Any]:
    """One fit, in this process: seconds since it started, and the errors of its draws."""
    import posteriors
    import pyro
    import torch
    from accuracy import errors

    torch.set_num_threads(1)
    pyro.set_rng_seed(point["seed"])
    if point["folder"] is None:
        (case,) = posteriors.own_cases([point["posterior"]], Path(point["references"]))
    else:
        (case,) = posteriors.other_cases(Path(point["folder"]), [point["posterior"]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            draws = fit(case, point["method"], point["budget"], point["patience"])
        except TimeoutError:
            return {"seconds": point["patience"], "timed_out": True}
    seconds = time.time() - point["started"]
    return {"seconds": seconds, "timed_out": False} | errors(draws, case.reference())


def progress(row: dict[str, Any]) -> str:
    """One line, while other fits are still to come."""
    where = f"{row['posterior']:28s} {row['method']:22s} {row['budget'] or 'to its end':>10} seed {row['seed']}"
    if "error" in row:
        return f"{where}  failed: {row['error'][:120]}"
    end = "stopped" if row["timed_out"] else f"error {row['sw1'] / row['sw1_floor']:.2f}"
    return f"{where} {row['seconds']:7.1f} s  {end}"


def print_comparison(rows: list[dict[str, Any]]) -> None:
    """Medians over the seeds of the two that are compared, and the geometric mean of the ratios of their seconds."""
    lines: list[tuple[str, ...]] = []
    ratios: list[float] = []
    for name in dict.fromkeys(row["posterior"] for row in rows):
        ours, theirs = (_medians(rows, name, *which) for which in (OURS, BASELINE))
        if ours is None or theirs is None:
            lines.append((f"`{name}`", "failed", "", "", "", ""))
            continue
        ratios.append(theirs["seconds"] / ours["seconds"])
        numbers = (f"{each:.1f}" for each in (ours["seconds"], theirs["seconds"], ratios[-1]))
        lines.append((f"`{name}`", *numbers, f"{ours['ratio']:.2f}", f"{theirs['ratio']:.2f}"))
    record.print_table(("posterior", "seconds", "of NUTS", "times", "error", "of NUTS"), lines)
    if ratios:
        print(f"\ngeometric mean of {len(ratios)}: {math.exp(statistics.fmean(map(math.log, ratios))):.1f} times")


def print_summary(rows: list[dict[str, Any]]) -> None:
    """Each method's last budget over the posteriors where all methods came to an end."""
    methods = dict.fromkeys(row["method"] for row in rows)
    names = dict.fromkeys(row["posterior"] for row in rows)
    fits = {name: [_medians(rows, name, method, BUDGETS[method][-1]) for method in methods] for name in names}
    ended = [of for of in fits.values() if all(fit is not None and math.isfinite(fit["ratio"]) for fit in of)]
    print(f"\n{len(ended)} of {len(names)} posteriors, on which each of these came to its end:\n")
    lines = []
    for method, of_method in zip(methods, zip(*ended)):
        errors, seconds = ([fit[key] for fit in of_method] for key in ("ratio", "seconds"))
        of_errors = f"{statistics.median(errors):.2f}", f"{max(errors):.2f}"
        lines.append((method, *of_errors, f"{statistics.median(seconds):.0f}", f"{sum(seconds) / 60:.0f}"))
    record.print_table(("method", "error, median", "worst", "seconds, median", "minutes, all"), lines)


def _medians(rows: list[dict[str, Any]], name: str, method: str, budget: int | None) -> dict[str, float] | None:
    """Seconds and sw1 over its floor; the latter NaN where the fit took longer than anybody waits."""
    of = [row for row in rows if (row["posterior"], row["method"], row["budget"]) == (name, method, budget)]
    done = [row for row in of if "error" not in row]
    if not done:
        return None
    errors = [row["sw1"] / row["sw1_floor"] for row in done if not row["timed_out"]]
    return {
        "seconds": statistics.median(row["seconds"] for row in done),
        "ratio": statistics.median(errors) if errors else math.nan,
    }


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """One panel for each posterior: error against seconds, a line for each method."""
    import matplotlib.pyplot as plt  # here, for its second is none of the fits'
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    names = list(dict.fromkeys(row["posterior"] for row in rows))
    columns = min(4, len(names))
    num_rows = math.ceil(len(names) / columns)
    figure, axes = plt.subplots(
        num_rows, columns, figsize=(3.4 * columns, 2.6 * num_rows), squeeze=False, sharex=True, sharey=True
    )
    for axis, name in zip(axes.flat, names):
        for i, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
            budgets = dict.fromkeys(row["budget"] for row in rows if row["method"] == method)
            points = [_medians(rows, name, method, budget) for budget in budgets]
            shown = [(p["seconds"], p["ratio"]) for p in points if p is not None and math.isfinite(p["ratio"])]
            if shown:
                style = "-o" if method in ("SIVISM", "NUTS") else ":o"
                axis.plot(*zip(*sorted(shown)), style, color=f"C{i}", markersize=4, label=method)
        axis.axhline(1.0, color="gray", linewidth=0.8)
        axis.set(xscale="log", yscale="log", title=name, xlabel="seconds", ylabel="sw1 / floor")
        axis.title.set_fontsize(9)
        axis.tick_params(labelbottom=True)  # where the panel below is none
        for each in (axis.xaxis, axis.yaxis):
            each.set_major_locator(LogLocator(subs=(1.0, 3.0)))
            each.set_major_formatter(FormatStrFormatter("%g"))
            each.set_minor_formatter(NullFormatter())
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    axes.flat[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    from posterior_zoo import POSTERIORS
    from references import default_folder

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--posteriors", type=Path, help="a folder with others, in the place of the project's own")
    parser.add_argument("--references", type=Path, default=default_folder(), help="where long chains are kept")
    parser.add_argument("--names", nargs="*")
    parser.add_argument("--methods", nargs="*", default=list(BUDGETS), choices=BUDGETS, help="none: see --add")
    parser.add_argument("--add", nargs="+", type=Path, default=[], help="JSON of other runs, pooled with this one")
    parser.add_argument("--last-budgets-only", action="store_true", help="no curves: what the table compares")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--patience", type=float, default=300.0, help="seconds after which NUTS is stopped")
    parser.add_argument("--quick", action="store_true", help="one small posterior, tiny budgets")
    parser.add_argument("--out", type=Path, default=Path("results/time_to_accuracy.json"), help="JSON; the plot beside")
    args = parser.parse_args(arguments)
    budgets = {method: BUDGETS[method] for method in args.methods}
    if args.last_budgets_only:
        budgets = {method: of[-1:] for method, of in budgets.items()}
    names = args.names or list(POSTERIORS)
    if args.quick:
        names, budgets = ["dirichlet_multinomial"], {"SIVISM": [10, None], "AutoNormal": [10]}
    elif args.posteriors is not None and not args.names:
        import posteriors

        names = [case.name for case in posteriors.other_cases(args.posteriors, None)]

    rows = record.read(args.add)
    fits = [(method, budget, seed) for method, of in budgets.items() for budget in of for seed in range(args.seeds)]
    points = [dict(zip(_KEYS, (name, *fit))) for name in names for fit in fits]
    again = [point for point in points if any(point.items() <= row.items() for row in rows)]
    if again:
        parser.error(
            f"{len(again)} fits are in --add already, which would count twice: give other --names or --methods"
        )
    for point in points:
        where = {
            "folder": None if args.posteriors is None else str(args.posteriors),
            "references": str(args.references),
            "patience": args.patience,
            "started": time.time(),
        }
        rows.append(run_fresh(__file__, point | where))
        print(progress(rows[-1]), flush=True)
        record.write(args, rows, quiet=True)
    print()
    print_comparison(rows)
    print_summary(rows)
    plot(rows, args.out.with_suffix(".png"))
    record.write(args, rows)


if __name__ == "__main__":
    if "--point" in sys.argv:
        print(json.dumps(measure(json.loads(sys.argv[-1]))))
    else:
        main()
