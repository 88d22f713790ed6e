"""Handwritten digits: D = 650 weights, a default fit against a long run of NUTS on the same split.

    python benchmarks/digits.py                     # the fit, then two chains of NUTS
    python benchmarks/digits.py --no-reference      # the fit alone

Multinomial logistic regression with N(0, 1) weights on the 8 x 8 images that scikit-learn comes with: 64 pixels in
[0, 1] and an intercept, ten classes, three quarters of the 1,797 images to fit and one quarter to test.

Both posteriors are judged by the log of the posterior predictive probability of the test labels,

    1 / n  sum_i  log 1 / S  sum_s  softmax(W_s x_i)[y_i],

with S draws each; ``difference`` is ours less the reference's, ``standard_error`` that of the paired differences over
the test images. The reference is Pyro's NUTS on the log density written by hand, with the split R-hat and the effective
sample size of its worst weight. Seconds are wall-clock and CPU, set-up included, on one thread.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import pyro
import record
import torch
from problems import multinomial_model
from pyro.infer import MCMC, NUTS
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
from sklearn.datasets import load_digits
from torch import Tensor

from pyro_sivism import SIVISM

NUM_CLASSES = 10


def split(seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images with an intercept and labels: three quarters to fit, one quarter to test."""
    images, labels = load_digits(return_X_y=True)
    covariates = torch.tensor(images / 16.0, dtype=torch.float32)
    covariates = torch.cat([covariates, torch.ones(len(covariates), 1)], -1)
    order = torch.randperm(len(covariates), generator=torch.Generator().manual_seed(seed))
    fit, test = order.tensor_split([3 * len(order) // 4])
    labels = torch.tensor(labels)
    return (covariates[fit], labels[fit]), (covariates[test], labels[test])


def log_predictive(weights: Tensor, covariates: Tensor, labels: Tensor) -> Tensor:
    """The log posterior predictive probability of each label, from draws of the weights ``(S, 10, 65)``."""
    log_probs = torch.log_softmax(covariates @ weights.mT, -1)  # (S, n, 10)
    of_labels = log_probs[:, torch.arange(len(labels)), labels]
    return torch.logsumexp(of_labels, 0) - math.log(len(weights))


def nuts(covariates: Tensor, labels: Tensor, num_warmup: int, num_samples: int) -> tuple[Tensor, dict[str, float]]:
    """Draws of the weights ``(S, 10, 65)`` by NUTS, and how far they can be trusted."""
    shape = (NUM_CLASSES, covariates.shape[1])

    def potential(values: dict[str, Tensor]) -> Tensor:
        weights = values["weights"]
        negative_log_likelihood = torch.nn.functional.cross_entropy(covariates @ weights.mT, labels, reduction="sum")
        return negative_log_likelihood + 0.5 * weights.square().sum()

    chains, started = [], time.process_time()
    for _ in range(2):
        kernel = NUTS(potential_fn=potential, jit_compile=False, max_tree_depth=8)
        start = {"weights": 0.1 * torch.randn(shape)}
        mcmc = MCMC(kernel, num_samples, warmup_steps=num_warmup, initial_params=start, disable_progbar=True)
        mcmc.run()
        chains.append(mcmc.get_samples()["weights"])
    draws = torch.stack(chains)
    return draws.flatten(0, 1), {
        "reference_r_hat": split_gelman_rubin(draws).max().item(),
        "reference_ess": effective_sample_size(draws).min().item(),
        "reference_cpu_seconds": time.process_time() - started,
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    pyro.set_rng_seed(args.seed)
    (covariates, labels), test = split(args.seed)
    model = multinomial_model(len(labels), NUM_CLASSES, covariates.shape[1])
    started, cpu_started = time.perf_counter(), time.process_time()
    sivism = SIVISM(model)
    fit = sivism.run(args.steps, covariates, labels, progress_bar=False)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started

    weights = sivism.sample(args.draws)["weights"]
    ours = log_predictive(weights, *test)
    row: dict[str, Any] = {
        "dim": sivism.target.dim,
        "num_steps": fit.num_steps,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "seconds_by_part": fit.seconds,
        "path": str(sivism.target.path),
        "final_loss": fit.losses[-100:].median().item(),
        "log_predictive": ours.mean().item(),
    }
    if not args.no_reference:
        reference, trust = nuts(covariates, labels, args.warmup, args.samples)
        theirs = log_predictive(reference, *test)
        difference = ours - theirs
        mean_errors = (weights.mean(0) - reference.mean(0)) / reference.std(0)
        row |= trust | {
            "reference_log_predictive": theirs.mean().item(),
            "difference": difference.mean().item(),
            "standard_error": (difference.std() / len(difference) ** 0.5).item(),
            "mean_error_max": mean_errors.abs().max().item(),
            "mean_error_rms": mean_errors.square().mean().sqrt().item(),
            "sd_ratio_median": (weights.std(0) / reference.std(0)).median().item(),
        }
    return row


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=None, help="of the fit; the default if not given")
    parser.add_argument("--draws", type=int, default=2000, help="S, of the fit")
    parser.add_argument("--warmup", type=int, default=300, help="of each of two chains of the reference")
    parser.add_argument("--samples", type=int, default=500, help="of each of two chains of the reference")
    parser.add_argument("--no-reference", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few steps of each")
    parser.add_argument("--out", type=Path, default=Path("results/digits.json"))
    args = parser.parse_args(argv)
    if args.quick:
        args.steps, args.draws, args.warmup, args.samples = 2, 20, 2, 4
    torch.set_num_threads(1)

    row = measure(args)
    for key, value in row.items():
        print(f"{key:25s} {value:.4g}" if isinstance(value, float) else f"{key:25s} {value}")
    record.write(args, [row])


if __name__ == "__main__":
    main()
