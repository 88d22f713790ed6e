"""Chains from q's draws go to p, whatever q is, and stay where q is p."""

from __future__ import annotations

import pytest
import torch

from pyro_sivism.diagnostics import Chains
from pyro_sivism.errors import NonFiniteError
from tests.statistical.oracle import NUM_STANDARD_ERRORS, GaussianTarget, random_covariance

pytestmark = pytest.mark.usefixtures("float64")

DIM = 4


@pytest.fixture
def p():
    return GaussianTarget(torch.linspace(-1.0, 2.0, DIM), random_covariance(DIM))


def draws(p, num_draws=4096, shift=0.0, scale=1.0):
    """Of p, moved by so many of its sds and scaled about their mean."""
    root = torch.linalg.cholesky(p.covariance)
    return p.loc + shift * p.covariance.diagonal().sqrt() + scale * torch.randn(num_draws, DIM) @ root.T


@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (1.0, 1.0), (0.0, 0.5), (0.0, 2.0)])
def test_chains_arrive_at_p(p, shift, scale):
    chains = Chains(p, draws(p, shift=shift, scale=scale), 1024).run(16)
    arrived = chains.frame.affine.forward(chains.late)
    assert arrived.shape == (8, 1024, DIM)
    sd = p.covariance.diagonal().sqrt()
    error = NUM_STANDARD_ERRORS / 1024**0.5  # what the eight ends of a chain add is left out
    assert ((arrived.flatten(0, 1).mean(0) - p.loc) / sd).abs().max() < error
    covariance = arrived.flatten(0, 1).T.cov()
    correlation_errors = (covariance - p.covariance) / (sd[:, None] * sd)
    assert correlation_errors.abs().max() < 1.5 * error


def test_chains_that_forget_go_on_from_where_they_are(p):
    chains = Chains(p, draws(p, shift=2.0), 1024).run(4)
    state, starts, num_evaluations = chains._state, chains.starts, chains.num_evaluations
    assert chains.forget() is chains
    assert chains.num_trajectories == 0
    assert chains._state is state
    chains.run(2)
    assert chains.late.shape == (1, 1024, DIM)  # the second half of the new ones
    assert chains.starts is starts
    assert chains.num_evaluations == num_evaluations + 2 * 1024 * chains._num_steps
    assert chains.stuck < 0.1  # from the starts, not since


def test_steps_in_a_gaussian_like_q_are_exact(p):
    """However long; were position and momentum not turned, or the kicks not of what p differs by, few were accepted."""
    half = Chains(p, draws(p, num_draws=100_000), 1024).run(4)
    assert half._step_size == 1.0
    assert half.acceptance > 0.99


def test_coarse_steps_are_corrected(p, monkeypatch):
    """q is half as wide as p, so that kicks are three quarters of the way, and long steps wrong."""

    def coarse(chains):
        chains._step_size, chains._num_steps = 1.5, 2  # times .2 to 1.2, by chance

    monkeypatch.setattr(Chains, "_tune", coarse)
    chains = Chains(p, draws(p, scale=0.5), 2048).run(60)
    assert chains.acceptance < 0.95
    arrived = chains.frame.affine.forward(chains.late).flatten(0, 1)
    sd = p.covariance.diagonal().sqrt()
    assert (((arrived.T.cov() - p.covariance) / (sd[:, None] * sd)).abs() < 0.1).all()


def test_chains_start_at_the_first_draws_and_go_on_from_where_they_are(p):
    x = draws(p)
    chains = Chains(p, x, 100)
    affine = chains.frame.affine
    torch.testing.assert_close(affine.forward(chains.starts), x[:100])
    torch.testing.assert_close(affine.forward(chains.others), x[100:])
    torch.testing.assert_close(torch.cat([chains.starts, chains.others]).T.cov(correction=0), torch.eye(DIM))
    first = chains.run(2).late
    assert chains.num_trajectories == 2
    evaluations = chains.num_evaluations
    assert torch.equal(chains.run(2).late, first), "there are so many"
    assert chains.num_evaluations == evaluations
    assert len(chains.run(5).late) == 3
    assert torch.equal(Chains(p, x, 100).starts, chains.starts)


def test_what_chains_cost_is_what_the_target_counts(p):
    chains = Chains(p, draws(p, 500), 200).run(3)
    assert chains.num_evaluations == p.num_evaluations
    assert 0.8 < chains.acceptance <= 1.0
    assert chains.stuck < 0.05


def test_log_densities_are_those_of_the_ends_of_trajectories(p):
    """Scores alone cost less."""

    class Counting(GaussianTarget):
        num_log_densities = 0

        def score(self, x):
            return super().log_density_and_score(x)[1]

        def log_density_and_score(self, x):
            self.num_log_densities += 1
            return super().log_density_and_score(x)

    counting = Counting(p.loc, p.covariance)
    chains = Chains(counting, draws(p, 500))
    counting.num_log_densities = 0
    chains.run(8)
    assert counting.num_log_densities == 8


def test_steps_are_as_short_as_p_is_narrow(p):
    """In one coordinate of 64 by a factor of 200, so that q's draws are all far up its walls."""
    sd = torch.ones(64)
    sd[3] = 1.0 / 200.0
    narrow = GaussianTarget(torch.zeros(64), torch.diag(sd**2))
    assert Chains(narrow, torch.randn(1000, 64), 128).run(2).acceptance > 0.7


def test_chains_do_not_start_where_p_is_not_finite(p):
    class Cut(GaussianTarget):
        """p, with nothing below its mean less an sd in the first coordinate."""

        def log_density_and_score(self, x):
            log_density, score = super().log_density_and_score(x)
            outside = x[:, 0] < self.loc[0] - self.covariance[0, 0].sqrt()
            return torch.where(outside, -torch.inf, log_density), torch.where(outside[:, None], torch.nan, score)

    cut, x = Cut(p.loc, p.covariance), draws(p)
    wall = p.loc[0] - p.covariance[0, 0].sqrt()
    chains = Chains(cut, x, 1000).run(8)
    assert len(chains.starts) == int((x[:1000, 0] >= wall).sum())
    assert (chains.frame.affine.forward(chains.late)[..., 0] >= wall).all()
    with pytest.raises(NonFiniteError, match="finite at only"):
        Chains(cut, x - 3.0 * p.covariance.diagonal().sqrt())
