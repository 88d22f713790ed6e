"""Which regression predicts better? Two models of a real data set, compared by leave-one-out cross-validation.

The data: disease progression of 442 diabetes patients against ten measurements (Efron, Hastie, Johnstone and
Tibshirani, "Least angle regression", 2004), as it ships with scikit-learn. The models differ in one thing: errors that
are normal, or Student-t with the degrees of freedom learned.

    python tutorials/diabetes.py [--out DIR]

fits both with SIVISM's defaults and compares them by ``az.compare``. The pointwise log likelihoods that it needs are
in the InferenceData already.
"""

import argparse
from pathlib import Path

import arviz as az
import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from sklearn.datasets import load_diabetes

from pyro_sivism import SIVISM


def load_data() -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Standardized measurements (442, 10) and progression (442,), and the measurements' names."""
    data = load_diabetes(scaled=False)
    x, y = torch.as_tensor(data.data), torch.as_tensor(data.target)
    return ((x - x.mean(0)) / x.std(0)).float(), ((y - y.mean()) / y.std()).float(), data.feature_names


def normal_regression(x: torch.Tensor, y: torch.Tensor) -> None:
    intercept = pyro.sample("intercept", dist.Normal(0.0, 1.0))
    with pyro.plate("measurement", x.shape[1]):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("patient", len(y)):
        pyro.sample("progression", dist.Normal(intercept + x @ slope, sigma), obs=y)


def student_regression(x: torch.Tensor, y: torch.Tensor) -> None:
    intercept = pyro.sample("intercept", dist.Normal(0.0, 1.0))
    with pyro.plate("measurement", x.shape[1]):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    dof = pyro.sample("dof", dist.Gamma(2.0, 0.1))
    with pyro.plate("patient", len(y)):
        pyro.sample("progression", dist.StudentT(dof, intercept + x @ slope, sigma), obs=y)


def plot(fits: dict, names: list[str], path: Path) -> None:
    """Each slope's median, 50% and 90% intervals, one colour a model."""
    figure, axis = plt.subplots(figsize=(7, 5), constrained_layout=True)
    for offset, (label, idata), colour in zip((0.12, -0.12), fits.items(), ("#0072b2", "#d55e00")):
        slopes = idata.posterior["slope"].values[0]
        low, lower, middle, upper, high = np.quantile(slopes, [0.05, 0.25, 0.5, 0.75, 0.95], axis=0)
        rows = np.arange(len(names))[::-1] + offset
        axis.hlines(rows, low, high, color=colour, linewidth=1)
        axis.hlines(rows, lower, upper, color=colour, linewidth=3)
        axis.plot(middle, rows, "o", color=colour, markersize=5, label=label)
    axis.axvline(0.0, color="0.7", linewidth=1, zorder=0)
    axis.set_yticks(np.arange(len(names))[::-1], names)
    axis.set(xlabel="slope, in standard deviations", title="Disease progression against ten measurements")
    axis.legend(title="errors")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("."), help="where the picture goes")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)

    x, y, names = load_data()
    fits = {}
    for label, model in (("normal", normal_regression), ("student", student_regression)):
        sivism = SIVISM(model)
        fit = sivism.run(None, x, y, progress_bar=False)
        fits[label] = sivism.to_inference_data(x, y, num_samples=2000, coords={"measurement": names})
        print(f"\n{label}: {sum(fit.seconds.values()):.1f} s")
        print(az.summary(fits[label], kind="stats", round_to=2))

    comparison = az.compare(fits)
    print("\nLeave-one-out cross-validation, best first:")
    print(comparison)

    plot(fits, names, out / "diabetes.png")
    print(f"picture in {out / 'diabetes.png'}")


if __name__ == "__main__":
    main()
