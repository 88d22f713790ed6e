"""Many groups of few rows, centered and non-centered."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from posterior_zoo.registry import generator, posterior


@posterior()
def many_groups() -> tuple:
    """Logistic regression with 200 non-centered intercepts, six rows each."""
    random = generator(11)
    num_groups, num_rows = 200, 1200
    group = torch.arange(num_rows) % num_groups
    covariate = torch.randn(num_rows, generator=random)
    intercepts = -0.5 + 0.8 * torch.randn(num_groups, generator=random)
    answers = torch.bernoulli((intercepts[group] + 0.7 * covariate).sigmoid(), generator=random)

    def model(group: Tensor, covariate: Tensor, answers: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        slope = pyro.sample("slope", dist.Normal(0.0, 2.0))
        with pyro.plate("groups", num_groups):
            raw = pyro.sample("raw", dist.Normal(0.0, 1.0))
        intercepts = mu + tau * raw
        with pyro.plate("rows", len(answers)):
            pyro.sample("answers", dist.Bernoulli(logits=intercepts[group] + slope * covariate), obs=answers)

    return model, (group, covariate, answers), None


@posterior()
def growth_curves() -> tuple:
    """Thirty animals weighed five times: centered intercepts and slopes, which the data inform well."""
    random = generator(12)
    days = torch.tensor([8.0, 15.0, 22.0, 29.0, 36.0])
    intercepts = 240.0 + 14.0 * torch.randn(30, generator=random)
    slopes = 6.2 + 0.5 * torch.randn(30, generator=random)
    weights = intercepts[:, None] + slopes[:, None] * (days - 22.0) + 6.0 * torch.randn(30, 5, generator=random)

    def model(days: Tensor, weights: Tensor) -> None:
        mean_intercept = pyro.sample("mean_intercept", dist.Normal(0.0, 1000.0))
        mean_slope = pyro.sample("mean_slope", dist.Normal(0.0, 100.0))
        sd_intercept = pyro.sample("sd_intercept", dist.HalfCauchy(25.0))
        sd_slope = pyro.sample("sd_slope", dist.HalfCauchy(5.0))
        sigma = pyro.sample("sigma", dist.HalfCauchy(25.0))
        with pyro.plate("animals", 30, dim=-2):
            intercept = pyro.sample("intercept", dist.Normal(mean_intercept, sd_intercept))
            slope = pyro.sample("slope", dist.Normal(mean_slope, sd_slope))
            with pyro.plate("days", 5, dim=-1):
                pyro.sample("weights", dist.Normal(intercept + slope * (days - 22.0), sigma), obs=weights)

    return model, (days, weights), None


@posterior()
def correlated_effects() -> tuple:
    """Twelve groups of three effects with an unknown correlation matrix."""
    random = generator(13)
    num_groups, num_rows = 12, 180
    group = torch.arange(num_rows) % num_groups
    covariates = torch.randn(num_rows, 3, generator=random)
    covariates[:, 0] = 1.0
    mixing = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.6, 0.0], [-0.3, 0.2, 0.4]])
    effects = torch.tensor([1.0, -0.5, 0.3]) + torch.randn(num_groups, 3, generator=random) @ mixing.T
    y = (effects[group] * covariates).sum(-1) + 0.7 * torch.randn(num_rows, generator=random)

    def model(group: Tensor, covariates: Tensor, y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0).expand([3]).to_event(1))
        scales = pyro.sample("scales", dist.HalfNormal(1.0).expand([3]).to_event(1))
        factor = pyro.sample("factor", dist.LKJCholesky(3, 2.0))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        with pyro.plate("groups", num_groups):
            raw = pyro.sample("raw", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        effects = mean + raw @ (scales[:, None] * factor).T
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal((effects[group] * covariates).sum(-1), sigma), obs=y)

    return model, (group, covariates, y), None
