"""Rubin's eight schools (1981), centered: the funnel that the tests of decentering share."""

import pyro
import pyro.distributions as dist
import torch

__all__ = ["EFFECT", "STANDARD_ERROR", "eight_schools"]

EFFECT = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
STANDARD_ERROR = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def eight_schools(effect, standard_error):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(effect)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.deterministic("twice", 2.0 * theta)
        pyro.sample("effect", dist.Normal(theta, standard_error), obs=effect)
