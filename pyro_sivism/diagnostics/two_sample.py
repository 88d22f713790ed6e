"""Are two sets of draws from one distribution? Distances between samples, in units that need no model.

All take draws x (S, D) and y (R, D) as rows, in float64 inside, and leave the global random state alone. Rows may be
autocorrelated, as those of a chain are; where that matters they are expected in the order in which they were drawn.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["ClassifierTest", "classifier_test", "kolmogorov_smirnov", "sliced_wasserstein"]

_NUM_FOLDS = 5
_MAX_ROWS = 2000  # of each sample for the classifier
_ROWS_PER_FEATURE = 10
_CLIP = 5.0
_NEWTON_STEPS = 20


def kolmogorov_smirnov(x: Tensor, y: Tensor) -> Tensor:
    """The largest difference of the two empirical distribution functions, of each of D coordinates: (D,).

    Example:

        >>> kolmogorov_smirnov(torch.tensor([[0.0], [1.0]]), torch.tensor([[0.5], [3.0]])).item()
        0.5
    """
    x, y = (draws.double().mT.contiguous().sort(-1).values for draws in (x, y))
    both = torch.cat([x, y], -1)
    x_below, y_below = (torch.searchsorted(draws, both, right=True).double() / draws.shape[-1] for draws in (x, y))
    return (x_below - y_below).abs().amax(-1)


def sliced_wasserstein(x: Tensor, y: Tensor, num_directions: int = 200, seed: int = 0) -> float:
    """The Wasserstein-1 distance along a random direction, in the mean over ``num_directions`` of them.

    Standardize the draws first: a coordinate counts by its scale.

    Source: Bonneel, Rabin, Peyre and Pfister, Sliced and Radon Wasserstein barycenters of measures, JMIV 51 (2015).

    Example:

        >>> round(sliced_wasserstein(torch.zeros(10, 1), torch.ones(10, 1)), 6)
        1.0
    """
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(x.shape[1], num_directions, generator=generator, dtype=torch.float64)
    directions = directions / directions.norm(dim=0)
    along_x, along_y = ((draws.double().cpu() @ directions).sort(0).values for draws in (x, y))
    # Both inverse distribution functions are constant between these multiples of 1 / (n m), those of 1 / n and 1 / m.
    n, m = len(x), len(y)
    starts = torch.cat([m * torch.arange(n), n * torch.arange(m)]).unique()
    widths = torch.diff(starts, append=torch.tensor([n * m])).double() / (n * m)
    return (widths @ (along_x[starts // m] - along_y[starts // n]).abs()).mean().item()


class ClassifierTest(NamedTuple):
    """How well a classifier tells two samples apart.

    Attributes:
        accuracy: on draws that it was not trained on; 0.5 if it cannot.
        se: standard error, from the folds.
    """

    accuracy: float
    se: float


def classifier_test(x: Tensor, y: Tensor) -> ClassifierTest:
    """The classifier two-sample test, by logistic regression on the coordinates, their squares and products.

    It sees a difference in any mean, variance or covariance, and most others through them. Products are left out where
    there would be less than ten draws to a feature. Each fold is a stretch of consecutive draws, so that a chain's
    chance fluctuations in one stretch do not help to tell another one.

    Source: Lopez-Paz and Oquab, Revisiting classifier two-sample tests, ICLR 2017.

    Example:

        >>> _ = torch.manual_seed(0)
        >>> test = classifier_test(torch.randn(2000, 2), 2.0 * torch.randn(2000, 2))
        >>> test.accuracy > 0.7
        True
    """
    count = min(len(x), len(y), _MAX_ROWS)
    x, y = (draws[torch.arange(count) * len(draws) // count].double().cpu() for draws in (x, y))
    features = _features(torch.cat([x, y]))
    labels = torch.cat([torch.ones(count), torch.zeros(count)]).double()
    fold = (torch.arange(count) * _NUM_FOLDS // count).repeat(2)
    accuracies = []
    for held_out in range(_NUM_FOLDS):
        train, test = fold != held_out, fold == held_out
        weights = _fit_logistic(features[train], labels[train])
        accuracies.append(((features[test] @ weights > 0) == (labels[test] > 0.5)).double().mean())
    folds = torch.stack(accuracies)
    return ClassifierTest(folds.mean().item(), (folds.std() / _NUM_FOLDS**0.5).item())


def _features(z: Tensor) -> Tensor:
    """Whitened coordinates, cut off at five sds, with squares and, where there are draws enough, products."""
    centered = z - z.mean(0)
    centered = centered / centered.std(0).clamp(min=torch.finfo(z.dtype).tiny)
    variances, axes = torch.linalg.eigh(centered.mT @ centered / len(z))
    kept = variances > 1e-8 * variances.max()  # a simplex has a direction that does not vary
    white = (centered @ axes[:, kept] / variances[kept].sqrt()).clamp(-_CLIP, _CLIP)
    dim = white.shape[1]
    parts = [torch.ones(len(z), 1, dtype=z.dtype), white, white.square() - 1.0]
    if dim * (dim + 3) // 2 * _ROWS_PER_FEATURE <= len(z):
        i, j = torch.triu_indices(dim, dim, offset=1)
        parts.append(white[:, i] * white[:, j])
    return torch.cat(parts, 1)


def _fit_logistic(features: Tensor, labels: Tensor) -> Tensor:
    """Weights of a logistic regression with a standard normal prior on each, by Newton steps."""
    weights = features.new_zeros(features.shape[1])
    ridge = torch.eye(len(weights), dtype=weights.dtype)
    for _ in range(_NEWTON_STEPS):
        probability = torch.sigmoid(features @ weights)
        gradient = features.mT @ (probability - labels) + weights
        curvature = (features * (probability * (1.0 - probability))[:, None]).mT @ features + ridge
        step = torch.linalg.solve(curvature, gradient)
        weights = weights - step
        if step.abs().max() < 1e-4:
            break
    return weights
