"""Posteriors that can be drawn from exactly: conjugate ones, mixtures, and hierarchies with one or two hyperparameters.

Hyperparameters with an intractable but computable marginal are drawn from a fine grid, uniformly within its cell. A
cell is at most a twentieth of their sd, so that the error is far below that of any reference's draws.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from posterior_zoo.registry import Draws, generator, posterior

_DOUBLE = torch.double


@posterior()
def conjugate_regression() -> tuple:
    """The variance has an inverse gamma law and scales the coefficients' prior: all is in closed form.

    With V = X'X + I / 100, m = V^-1 X'y:  variance ~ InverseGamma(2 + N/2, 1 + (y'y - m'Vm)/2),
    coefficients | variance ~ Normal(m, variance V^-1).
    """
    from sklearn.datasets import load_diabetes

    bunch = load_diabetes(scaled=False)
    columns = torch.as_tensor(bunch.data, dtype=_DOUBLE)[:60]
    covariates = torch.cat([torch.ones(60, 1, dtype=_DOUBLE), (columns - columns.mean(0)) / columns.std(0)], 1).float()
    y = (torch.as_tensor(bunch.target)[:60] / 50.0).float()

    def model(covariates: Tensor, y: Tensor) -> None:
        variance = pyro.sample("variance", dist.InverseGamma(2.0, 1.0))
        with pyro.plate("columns", covariates.shape[1]):
            coefficients = pyro.sample("coefficients", dist.Normal(0.0, 10.0 * variance.sqrt()))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(covariates @ coefficients, variance.sqrt()), obs=y)

    def exact(num_draws: int) -> Draws:
        x, outcome = covariates.double(), y.double()
        precision = x.T @ x + 0.01 * torch.eye(x.shape[1], dtype=_DOUBLE)
        mean = torch.linalg.solve(precision, x.T @ outcome)
        rate = 1.0 + 0.5 * (outcome @ outcome - mean @ precision @ mean)
        shape = torch.tensor(2.0 + 0.5 * len(outcome), dtype=_DOUBLE)
        variance = dist.InverseGamma(shape, rate).sample((num_draws,))
        noise = torch.randn(num_draws, len(mean), dtype=_DOUBLE)
        root = torch.linalg.cholesky(precision)
        deviations = torch.linalg.solve_triangular(root.T, noise.T, upper=True).T
        return {"variance": variance, "coefficients": mean + variance[:, None].sqrt() * deviations}

    return model, (covariates, y), exact


@posterior()
def two_modes() -> tuple:
    """Two separate normals at -4 and 4 in the first of three coordinates, of weights .3 and .7."""
    locs = torch.tensor([[-4.0, 0.0, 0.0], [4.0, 0.0, 0.0]])
    weights = torch.tensor([0.3, 0.7])

    def model(locs: Tensor, weights: Tensor) -> None:
        pyro.sample("x", dist.MixtureOfDiagNormals(locs, torch.ones_like(locs), weights.log()))

    def exact(num_draws: int) -> Draws:
        part = torch.multinomial(weights, num_draws, replacement=True)
        return {"x": locs.double()[part] + torch.randn(num_draws, 3, dtype=_DOUBLE)}

    return model, (locs, weights), exact


@posterior()
def dirichlet_multinomial() -> tuple:
    """Shares of eight answers of which some were given once or never: ``Dirichlet(1/2 + counts)``."""
    counts = torch.tensor([120.0, 61.0, 33.0, 17.0, 8.0, 3.0, 1.0, 0.0])

    def model(counts: Tensor) -> None:
        shares = pyro.sample("shares", dist.Dirichlet(0.5 * torch.ones(len(counts))))
        pyro.sample("counts", dist.Multinomial(int(counts.sum()), shares), obs=counts)

    def exact(num_draws: int) -> Draws:
        return {"shares": dist.Dirichlet(0.5 + counts.double()).sample((num_draws,))}

    return model, (counts,), exact


@posterior()
def beta_binomial() -> tuple:
    """Success rates of thirty groups about a common mean: centered, most groups small."""
    random = generator(31)
    trials = (10.0 + 40.0 * torch.rand(30, generator=random)).round()
    rates = (-1.1 + 0.6 * torch.randn(30, generator=random)).sigmoid()
    successes = torch.binomial(trials, rates, generator=random)

    def model(trials: Tensor, successes: Tensor) -> None:
        mean = pyro.sample("mean", dist.Beta(1.0, 1.0))
        concentration = pyro.sample("concentration", dist.LogNormal(2.5, 1.0))
        with pyro.plate("groups", len(trials)):
            rate = pyro.sample("rate", dist.Beta(mean * concentration, (1.0 - mean) * concentration))
            pyro.sample("successes", dist.Binomial(trials, rate), obs=successes)

    def exact(num_draws: int) -> Draws:
        mean = _centres(0.05, 0.6, 400)
        log_concentration = _centres(-1.0, 8.0, 400)
        a = mean[:, None] * log_concentration.exp()
        b = (1.0 - mean[:, None]) * log_concentration.exp()
        log_density = dist.Normal(2.5, 1.0).log_prob(log_concentration).double() + torch.zeros_like(a)
        for n, k in zip(trials.double(), successes.double()):
            log_density += _log_beta(a + k, b + n - k) - _log_beta(a, b)
        cell = torch.multinomial(log_density.flatten().softmax(0), num_draws, replacement=True)
        jitter = torch.rand(2, num_draws, dtype=_DOUBLE) - 0.5
        mean = mean[cell // 400] + jitter[0] * (mean[1] - mean[0])
        concentration = (
            log_concentration[cell % 400] + jitter[1] * (log_concentration[1] - log_concentration[0])
        ).exp()
        a, b = (mean * concentration)[:, None], ((1.0 - mean) * concentration)[:, None]
        rate = dist.Beta(a + successes.double(), b + (trials - successes).double()).sample()
        return {"mean": mean, "concentration": concentration, "rate": rate}

    return model, (trials, successes), exact


@posterior()
def eight_schools_centered() -> tuple:
    """The funnel that makes its non-centered form the textbook's advice. Data: Rubin (1981).

    Given tau the rest is normal: with v = errors^2 + tau^2, W = sum 1/v + 1/25, p(tau | y) is proportional to
    p(tau) W^-1/2 prod N(y; mu_hat, v)-terms, and mu, theta follow in turn.
    """
    effects = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    errors = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])

    def model(effects: Tensor, errors: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", len(effects)):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("effects", dist.Normal(theta, errors), obs=effects)

    def exact(num_draws: int) -> Draws:
        y, noise = effects.double(), errors.double().square()
        log_tau = _centres(-12.0, 8.0, 100_000)
        tau = log_tau.exp()
        variance = noise + tau[:, None].square()
        weight = (1.0 / variance).sum(-1) + 1.0 / 25.0
        mean = (y / variance).sum(-1) / weight
        log_density = -0.5 * variance.log().sum(-1) - 0.5 * (y.square() / variance).sum(-1)
        log_density += 0.5 * weight * mean.square() - 0.5 * weight.log()
        log_density += log_tau - (1.0 + (tau / 5.0).square()).log()
        cell = torch.multinomial(log_density.softmax(0), num_draws, replacement=True)
        jitter = torch.rand(num_draws, dtype=_DOUBLE) - 0.5
        tau = (log_tau[cell] + jitter * (log_tau[1] - log_tau[0])).exp()
        mu = mean[cell] + torch.randn(num_draws, dtype=_DOUBLE) / weight[cell].sqrt()
        precision = 1.0 / noise + 1.0 / tau[:, None].square()
        centre = (y / noise + (mu / tau.square())[:, None]) / precision
        theta = centre + torch.randn(num_draws, 8, dtype=_DOUBLE) / precision.sqrt()
        return {"mu": mu, "tau": tau, "theta": theta}

    return model, (effects, errors), exact


def _centres(low: float, high: float, count: int) -> Tensor:
    """The middles of so many cells."""
    return low + (high - low) * (torch.arange(count, dtype=_DOUBLE) + 0.5) / count


def _log_beta(a: Tensor, b: Tensor) -> Tensor:
    return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)
