"""Functions of time: a Gaussian process, an ordinary differential equation, stochastic volatility."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from posterior_zoo.registry import generator, posterior


@posterior()
def gaussian_process() -> tuple:
    """The hyperparameters of a squared exponential kernel, thirty noisy points."""
    random = generator(21)
    x = 10.0 * torch.rand(30, generator=random).sort().values
    y = 2.0 + 1.5 * (0.9 * x).sin() + 0.4 * torch.randn(30, generator=random)

    def model(x: Tensor, y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
        length = pyro.sample("length", dist.InverseGamma(3.0, 3.0))
        amplitude = pyro.sample("amplitude", dist.HalfNormal(3.0))
        noise = pyro.sample("noise", dist.HalfNormal(1.0))
        covariance = amplitude**2 * torch.exp(-0.5 * ((x[:, None] - x) / length) ** 2)
        covariance = covariance + (noise**2 + 1e-5) * torch.eye(len(x))
        pyro.sample("y", dist.MultivariateNormal(mean * torch.ones(len(x)), covariance), obs=y)

    return model, (x, y), None


def _runge_kutta(state: Tensor, rates: Tensor, interactions: Tensor, num_observations: int) -> Tensor:
    """Prey and predators at times 1, ..., T, (T, 2), by the classical fourth-order method with two steps between."""

    def slope(state: Tensor) -> Tensor:
        return state * (rates + interactions * state.flip(0))

    h, states = 0.5, []
    for _ in range(num_observations):
        for _ in range(2):
            k1 = slope(state)
            k2 = slope(state + 0.5 * h * k1)
            k3 = slope(state + 0.5 * h * k2)
            k4 = slope(state + h * k3)
            state = state + h / 6.0 * (k1 + 2.0 * k2 + 2.0 * k3 + k4)
        states.append(state)
    return torch.stack(states)


@posterior()
def lotka_volterra() -> tuple:
    """Predators and prey in twenty years, with log-normal errors; the model is the solver's map itself."""
    random = generator(22)
    truth = _runge_kutta(torch.tensor([30.0, 5.0]), torch.tensor([0.55, -0.8]), torch.tensor([-0.028, 0.024]), 20)
    populations = truth * (0.25 * torch.randn(20, 2, generator=random)).exp()

    def model(populations: Tensor) -> None:
        births = pyro.sample("births", dist.LogNormal(-0.6, 0.5))
        hunting = pyro.sample("hunting", dist.LogNormal(-3.5, 0.5))
        deaths = pyro.sample("deaths", dist.LogNormal(-0.2, 0.5))
        growth = pyro.sample("growth", dist.LogNormal(-3.7, 0.5))
        start = pyro.sample("start", dist.LogNormal(torch.tensor([3.0, 2.0]), 1.0).to_event(1))
        sigma = pyro.sample("sigma", dist.LogNormal(torch.tensor([-1.0, -1.0]), 1.0).to_event(1))
        rates, interactions = torch.stack([births, -deaths]), torch.stack([-hunting, growth])
        states = _runge_kutta(start, rates, interactions, len(populations))
        pyro.sample("populations", dist.LogNormal(states.log(), sigma).to_event(2), obs=populations)

    return model, (populations,), None


@posterior()
def stochastic_volatility() -> tuple:
    """A hundred returns; their log volatilities are an AR(1) process, non-centered, written as a loop."""
    random = generator(23)
    num_steps = 100
    noise = torch.randn(num_steps, 2, generator=random)
    log_volatility, returns = torch.tensor(0.0), []
    for t in range(num_steps):
        log_volatility = 0.95 * log_volatility + 0.3 * noise[t, 0]
        returns.append((0.5 * (log_volatility - 1.0)).exp() * noise[t, 1])

    def model(returns: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(-1.0, 2.0))
        phi = pyro.sample("phi", dist.Beta(20.0, 1.5))
        sigma = pyro.sample("sigma", dist.HalfNormal(0.5))
        with pyro.plate("steps", len(returns)):
            raw = pyro.sample("raw", dist.Normal(0.0, 1.0))
        deviation = raw[0] / torch.sqrt(1.0 - phi**2)
        deviations = [deviation]
        for t in range(1, len(returns)):
            deviation = phi * deviation + raw[t]
            deviations.append(deviation)
        log_volatility = mu + sigma * torch.stack(deviations)
        with pyro.plate("days", len(returns)):
            pyro.sample("returns", dist.Normal(0.0, torch.exp(0.5 * log_volatility)), obs=returns)

    return model, (torch.stack(returns),), None
