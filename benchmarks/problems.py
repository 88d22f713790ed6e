"""The models that cost is measured on: synthetic data of stated sizes, and plates throughout.

Every model is right on one draw of its latents and under an outermost plate of particles alike, so that all ways of
evaluating a batch, and ``SVI`` with ``vectorize_particles=True``, can be compared on the same code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.ops.indexing import Vindex
from torch import Tensor

__all__ = ["PROBLEMS", "Problem", "logistic_regression", "multinomial_regression"]


@dataclass(frozen=True)
class Problem:
    """A model and its arguments."""

    name: str
    model: Callable
    args: tuple[Any, ...]


PROBLEMS: dict[str, Callable[[], Problem]] = {}


def problem(make: Callable[[], tuple]) -> Callable[[], tuple]:
    """Register a function without arguments that returns ``(model, *args)``."""

    def made() -> Problem:
        model, *args = make()
        return Problem(make.__name__, model, tuple(args))

    PROBLEMS[make.__name__] = made
    return make


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _randn(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator)


def _covariates(num_rows: int, dim: int, generator: torch.Generator) -> Tensor:
    """An intercept and standard normal columns, (N, D)."""
    covariates = _randn(num_rows, dim, generator=generator)
    covariates[:, 0] = 1.0
    return covariates


def logistic_regression(num_rows: int, dim: int, *, subsample_size: int | None = None, device: str = "cpu") -> Problem:
    """Logistic regression with standard normal coefficients: N rows, D columns, perhaps in minibatches."""
    generator = _generator()
    covariates = _covariates(num_rows, dim, generator)
    logits = covariates @ _randn(dim, generator=generator) / dim**0.5
    outcomes = torch.bernoulli(logits.sigmoid(), generator=generator)

    def model(covariates: Tensor, outcomes: Tensor) -> None:
        with pyro.plate("coefficients", dim, dim=-1):
            weights = pyro.sample("weights", dist.Normal(covariates.new_zeros(()), 1.0))
        with pyro.plate("rows", num_rows, subsample_size=subsample_size, dim=-1, device=device) as rows:
            batch = covariates if subsample_size is None else covariates[rows]
            observed = outcomes if subsample_size is None else outcomes[rows]
            pyro.sample("outcomes", dist.Bernoulli(logits=weights @ batch.mT), obs=observed)

    name = f"logistic regression N={num_rows} D={dim}"
    return Problem(name, model, (covariates.to(device), outcomes.to(device)))


def multinomial_regression(
    num_rows: int, num_classes: int, dim: int, *, subsample_size: int | None = None, prior_scale: float = 1.0
) -> Problem:
    """Multinomial logistic regression: K classes times P columns make D = K P coefficients."""
    generator = _generator()
    covariates = _covariates(num_rows, dim, generator)
    logits = covariates @ _randn(dim, num_classes, generator=generator) * (2.0 / dim**0.5)
    labels = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    return Problem(
        f"multinomial regression N={num_rows} D={num_classes * dim}",
        multinomial_model(num_rows, num_classes, dim, subsample_size=subsample_size, prior_scale=prior_scale),
        (covariates, labels),
    )


def multinomial_model(
    num_rows: int, num_classes: int, dim: int, *, subsample_size: int | None = None, prior_scale: float = 1.0
) -> Callable:
    """``labels[i] ~ Categorical(softmax(W covariates[i]))``, ``W (K, P)`` with independent normal priors."""

    def model(covariates: Tensor, labels: Tensor) -> None:
        with pyro.plate("classes", num_classes, dim=-2), pyro.plate("columns", dim, dim=-1):
            weights = pyro.sample("weights", dist.Normal(0.0, prior_scale))
        with pyro.plate("rows", num_rows, subsample_size=subsample_size, dim=-1) as rows:
            batch = covariates if subsample_size is None else covariates[rows]
            observed = labels if subsample_size is None else labels[rows]
            # (*particles, 1, rows, K): the plate of particles is at -3, left of the classes.
            logits = (batch @ weights.mT).unsqueeze(-3)
            pyro.sample("labels", dist.Categorical(logits=logits), obs=observed)

    return model


@problem
def eight_schools() -> tuple:
    effects = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    errors = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])

    def model(effects: Tensor, errors: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", 8, dim=-1):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("effects", dist.Normal(theta, errors), obs=effects)

    return model, effects, errors


@problem
def logistic() -> tuple:
    made = logistic_regression(400, 22)
    return made.model, *made.args


@problem
def subsampled_regression() -> tuple:
    made = logistic_regression(10_000, 22, subsample_size=100)
    return made.model, *made.args


@problem
def radon() -> tuple:
    """Varying intercepts in 85 groups, 919 rows."""
    generator = _generator()
    group = torch.randint(85, (919,), generator=generator)
    floor = torch.bernoulli(torch.full((919,), 0.2), generator=generator)
    log_radon = 1.3 - 0.7 * floor + 0.3 * _randn(85, generator=generator)[group]
    log_radon = log_radon + 0.75 * _randn(919, generator=generator)

    def model(group: Tensor, floor: Tensor, log_radon: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        slope = pyro.sample("slope", dist.Normal(0.0, 10.0))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        with pyro.plate("groups", 85, dim=-1):
            intercepts = pyro.sample("intercepts", dist.Normal(mu, tau))
        with pyro.plate("rows", 919, dim=-1):
            pyro.sample("log_radon", dist.Normal(intercepts[..., group] + slope * floor, sigma), obs=log_radon)

    return model, group, floor, log_radon


@problem
def mixture() -> tuple:
    """Three normals, 200 rows, their assignments summed out by enumeration."""
    generator = _generator()
    centres = torch.tensor([-3.0, 0.0, 4.0])
    y = centres[torch.randint(3, (200,), generator=generator)] + _randn(200, generator=generator)

    def model(y: Tensor) -> None:
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
        locs = pyro.sample("locs", dist.Normal(0.0, 5.0).expand([3]).to_event(1))
        scale = pyro.sample("scale", dist.HalfNormal(2.0))
        with pyro.plate("rows", 200, dim=-1):
            z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(Vindex(locs)[..., z], scale), obs=y)

    return model, y


@problem
def hidden_markov() -> tuple:
    """Three states, 20 steps, summed out by enumeration."""
    generator = _generator()
    y = torch.tensor([-2.0, 0.0, 2.0]).repeat_interleave(7)[:20] + 0.5 * _randn(20, generator=generator)

    def model(y: Tensor) -> None:
        transition = pyro.sample("transition", dist.Dirichlet(torch.ones(3)).expand([3]).to_event(1))
        locs = pyro.sample("locs", dist.Normal(0.0, 3.0).expand([3]).to_event(1))
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        state: Tensor | int = 0
        for t in pyro.markov(range(20)):
            row = Vindex(transition)[..., state, :]
            state = pyro.sample(f"state_{t}", dist.Categorical(row), infer={"enumerate": "parallel"})
            pyro.sample(f"y_{t}", dist.Normal(Vindex(locs)[..., state], scale), obs=y[t])

    return model, y


@problem
def neural_network() -> tuple:
    """A regression network 13 -> 50 -> 1: 751 weights, 400 rows."""
    generator = _generator()
    covariates = _randn(400, 13, generator=generator)
    y = covariates[:, 0].sin() + 0.1 * _randn(400, generator=generator)

    def model(covariates: Tensor, y: Tensor) -> None:
        with pyro.plate("hidden", 50, dim=-1):
            with pyro.plate("inputs", 13, dim=-2):
                first = pyro.sample("first", dist.Normal(0.0, 1.0))
            first_bias = pyro.sample("first_bias", dist.Normal(0.0, 1.0))
            with pyro.plate("outputs", 1, dim=-2):
                second = pyro.sample("second", dist.Normal(0.0, 0.3))
        second_bias = pyro.sample("second_bias", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 400, dim=-1):
            hidden = torch.tanh(covariates @ first + first_bias)  # (*particles, rows, hidden)
            mean = second @ hidden.mT + second_bias  # (*particles, 1, rows)
            pyro.sample("y", dist.Normal(mean, 0.1), obs=y)

    return model, covariates, y


@problem
def multinomial() -> tuple:
    made = multinomial_regression(500, 10, 65)
    return made.model, *made.args


@problem
def correlated_ordinal() -> tuple:
    """An ordinal outcome in five levels; 30 groups of three effects with an LKJ prior."""
    generator = _generator()
    group = torch.arange(300) % 30
    covariates = _covariates(300, 3, generator)
    levels = torch.randint(5, (300,), generator=generator)

    def model(group: Tensor, covariates: Tensor, levels: Tensor) -> None:
        factor = pyro.sample("factor", dist.LKJCholesky(3, 2.0))
        scales = pyro.sample("scales", dist.HalfNormal(1.0).expand([3]).to_event(1))
        steps = dist.Normal(torch.linspace(-1.5, 1.5, 4), 1.0).to_event(1)
        cutpoints = pyro.sample("cutpoints", dist.TransformedDistribution(steps, dist.transforms.OrderedTransform()))
        with pyro.plate("groups", 30, dim=-1):
            scale_tril = scales[..., None] * factor
            effects = pyro.sample("effects", dist.MultivariateNormal(torch.zeros(3), scale_tril=scale_tril))
        with pyro.plate("rows", 300, dim=-1):
            predictor = (effects[..., group, :] * covariates).sum(-1)
            pyro.sample("levels", dist.OrderedLogistic(predictor, cutpoints), obs=levels)

    return model, group, covariates, levels


@problem
def gaussian_process() -> tuple:
    """A squared exponential kernel, 40 points."""
    generator = _generator()
    x = torch.linspace(-2.0, 2.0, 40)
    y = (2.0 * x).sin() + 0.2 * _randn(40, generator=generator)
    squared_distance = (x[:, None] - x).square()

    def model(squared_distance: Tensor, y: Tensor) -> None:
        length = pyro.sample("length", dist.InverseGamma(5.0, 5.0))[..., None, None]
        amplitude = pyro.sample("amplitude", dist.HalfNormal(1.0))[..., None, None]
        noise = pyro.sample("noise", dist.HalfNormal(1.0))[..., None, None]
        covariance = amplitude**2 * torch.exp(-0.5 * squared_distance / length**2)
        covariance = covariance + (noise**2 + 1e-4) * torch.eye(40)
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(40), covariance), obs=y)

    return model, squared_distance, y


@problem
def horseshoe() -> tuple:
    """Sparse regression, 50 columns, 100 rows."""
    generator = _generator()
    covariates = _randn(100, 50, generator=generator)
    y = 2.0 * covariates[:, 0] - covariates[:, 1] + 0.5 * _randn(100, generator=generator)

    def model(covariates: Tensor, y: Tensor) -> None:
        tau = pyro.sample("tau", dist.HalfCauchy(0.1))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        with pyro.plate("columns", 50, dim=-1):
            local = pyro.sample("local", dist.HalfCauchy(1.0))
            raw = pyro.sample("raw", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 100, dim=-1):
            pyro.sample("y", dist.Normal((tau * local * raw) @ covariates.mT, sigma), obs=y)

    return model, covariates, y


@problem
def categorical() -> tuple:
    """Twenty tables of five shares each, 500 rows."""
    generator = _generator()
    table = torch.arange(500) % 20
    y = torch.randint(5, (500,), generator=generator)

    def model(table: Tensor, y: Tensor) -> None:
        concentration = pyro.sample("concentration", dist.Gamma(2.0, 1.0))
        with pyro.plate("tables", 20, dim=-1):
            shares = pyro.sample("shares", dist.Dirichlet(concentration[..., None] * torch.ones(5)))
        with pyro.plate("rows", 500, dim=-1):
            pyro.sample("y", dist.Categorical(shares[..., table, :]), obs=y)

    return model, table, y
