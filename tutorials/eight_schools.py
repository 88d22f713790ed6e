"""Eight schools: from a Pyro model to an ArviZ posterior, beside NUTS.

Rubin (1981) collected the effect of coaching on test scores in eight schools, with standard errors. The hierarchical
model asks how much the schools differ (tau) and what each effect is once they inform one another. It is one posterior
in two geometries: *centered*, as the model is written, where theta ~ Normal(mu, tau) makes a funnel, and *decentered*,
where theta = mu + tau * theta_decentered and the funnel is gone. SIVISM sees which of them suits it.

    python tutorials/eight_schools.py [--out DIR]

fits the model with the defaults; fits it centered as well, which takes many steps, and leaves the narrow end of the
funnel all but empty; runs NUTS for comparison; and writes ``eight_schools.nc`` and ``eight_schools.png``.
"""

import argparse
import time
import warnings
from pathlib import Path

import arviz as az
import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS, Predictive

from pyro_sivism import SIVISM, decenter
from pyro_sivism.errors import FitWarning

SCHOOLS = [
    "Choate",
    "Deerfield",
    "Phillips Andover",
    "Phillips Exeter",
    "Hotchkiss",
    "Lawrenceville",
    "St. Paul's",
    "Mt. Hermon",
]
EFFECT = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
STANDARD_ERROR = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def model(effect: torch.Tensor, standard_error: torch.Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(effect)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("effect", dist.Normal(theta, standard_error), obs=effect)


def fit_sivism(**settings):
    """The posterior as ArviZ holds it, the verdict on it, and the seconds of each part."""
    sivism = SIVISM(model, **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FitWarning)
        fit = sivism.run(None, EFFECT, STANDARD_ERROR, progress_bar=False)
    for warning in caught:
        print(f"\nwarning: {warning.message}")
    started = time.perf_counter()
    idata = sivism.to_inference_data(EFFECT, STANDARD_ERROR, num_samples=2000, coords={"school": SCHOOLS})
    return idata, fit.verdict, {**fit.seconds, "conversion": time.perf_counter() - started}


def run_nuts() -> tuple[dict[str, np.ndarray], float]:
    """1,000 draws after 1,000 of warm-up of the decentered model, with every site of the model."""
    started = time.perf_counter()
    decentered = decenter(model, EFFECT, STANDARD_ERROR)
    mcmc = MCMC(NUTS(decentered, jit_compile=True, ignore_jit_warnings=True), 1000, 1000, disable_progbar=True)
    mcmc.run(EFFECT, STANDARD_ERROR)
    draws = mcmc.get_samples()
    draws |= Predictive(decentered, draws, return_sites=["theta"])(EFFECT, STANDARD_ERROR)
    seconds = time.perf_counter() - started
    return {name: draws[name].reshape(1000, -1).squeeze(-1).numpy() for name in ("mu", "tau", "theta")}, seconds


def plot(
    nuts: dict[str, np.ndarray], fits: dict[str, dict[str, np.ndarray]], verdicts: dict[str, str], path: Path
) -> None:
    """A row for each fit: the funnel of log tau against one effect, and two marginals."""
    figure, rows = plt.subplots(len(fits), 3, figsize=(12, 3.6 * len(fits)), constrained_layout=True, squeeze=False)
    for axes, (name, fit) in zip(rows, fits.items()):
        title = f"SIVISM, {name} ({verdicts[name]})"
        for label, draws, colour in (("NUTS", nuts, "#333333"), (title, fit, "#0072b2")):
            log_tau = np.log(draws["tau"][:1000])
            axes[0].scatter(draws["theta"][:1000, 0], log_tau, s=5, alpha=0.4, linewidths=0, color=colour, label=label)
            for axis, values in ((axes[1], np.log(draws["tau"])), (axes[2], draws["mu"])):
                axis.hist(values, bins=40, density=True, histtype="step", linewidth=1.5, color=colour)
        axes[0].set(xlabel=f"theta[{SCHOOLS[0]}]", ylabel="log tau", xlim=(-25, 45), ylim=(-5, 4))
        axes[0].legend(markerscale=4, loc="lower right")
        axes[1].set(xlabel="log tau", ylabel="density", xlim=(-6, 5))
        axes[2].set(xlabel="mu", ylabel="density", xlim=(-10, 20))
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("."), help="where the .nc file and the picture go")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the model is small: threads only get in each other's way
    pyro.set_rng_seed(0)

    nuts, nuts_seconds = run_nuts()
    fits, verdicts, rows = {}, {}, [("NUTS, decentered", nuts, nuts_seconds)]
    for name, settings in (("centered", {"decenter": False}), ("default", {})):
        idata, verdict, seconds = fit_sivism(**settings)
        verdicts[name] = verdict.level
        fits[name] = {site: idata.posterior[site].values[0] for site in ("mu", "tau", "theta")}
        rows.append((f"SIVISM, {name}", fits[name], sum(seconds.values())))
        print(f"\nSIVISM, {name}: " + ", ".join(f"{part} {s:.1f} s" for part, s in seconds.items()))
        print(f"verdict: {verdict}")
        print(az.summary(idata, var_names=["mu", "tau", "theta"], kind="stats", round_to=2))
        if name == "default":
            path = out / "eight_schools.nc"
            idata.to_netcdf(path)
            print(f"posterior in {path}")
    plot(nuts, fits, verdicts, out / "eight_schools.png")

    print(f"\n{'':24s} {'seconds':>8s} {'E[mu]':>8s} {'E[tau]':>8s} {'sd[tau]':>8s}")
    for label, draws, took in rows:
        mu, tau = draws["mu"], draws["tau"]
        print(f"{label:24s} {took:8.1f} {mu.mean():8.2f} {tau.mean():8.2f} {tau.std():8.2f}")
    print("Whatever the coordinates, the draws are of the model's own sites.")
    print(f"picture in {out / 'eight_schools.png'}")


if __name__ == "__main__":
    main()
