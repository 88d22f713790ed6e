"""What the method is for: a posterior that no Gaussian fits, against its exact quantiles."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch

from pyro_sivism import SIVISM


def skewed():
    """On the unconstrained space, ``log tau``, of skewness -1.5, with a left tail as heavy as exp(x / 2)."""
    pyro.sample("tau", dist.Gamma(0.5, 1.0))


def test_the_defaults_leave_a_quarter_of_what_the_best_gaussian_leaves():
    """In the Wasserstein distance of log tau, the mean of |quantile of q - quantile of p|.

    ``2 tau`` is the square of a standard normal, so that the quantiles of tau are ``erfinv(u)^2``. The Gaussian nearest
    in this distance, found on a grid, leaves .415; the one nearest in KL, where the fit starts, .545. The defaults at
    300 steps left .024 to .073 over four seeds, where 20,000 exact draws leave .025.
    """
    num_draws = 20_000
    u = (torch.arange(num_draws, dtype=torch.double) + 0.5) / num_draws
    exact, normal = 2.0 * torch.special.erfinv(u).log(), torch.special.ndtri(u)
    means, sds = torch.linspace(-3.0, -1.0, 21).tolist(), torch.linspace(1.0, 3.0, 21).tolist()
    best_gaussian = min((mean + sd * normal - exact).abs().mean() for mean in means for sd in sds)

    sivism = SIVISM(skewed)
    sivism.run(300, progress_bar=False)
    draws = sivism.sample(num_draws)["tau"].double().log().sort().values
    assert best_gaussian > 0.4
    assert (draws - exact).abs().mean() < best_gaussian / 4
