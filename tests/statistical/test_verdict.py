"""How often the verdict is wrong: false alarms on exact draws, and known ways to be wrong that must not pass.

Every test draws fresh data from fixed seeds. False alarms are counted against the rate that two standard errors and
the threshold leave, see each test.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import gumbel_l, norm
from torch.distributions import Gamma

from pyro_sivism.diagnostics import Chains, drift_statistics, find_modes, fisher_statistics, judge, stein_statistics
from pyro_sivism.family import BatchAndMatch

pytestmark = pytest.mark.usefixtures("float64")


class Posterior:
    """A density with exact draws."""

    def __init__(self, dim, log_density, sample):
        self.dim, self.log_density, self.sample = dim, log_density, sample

    def score(self, x):
        return self.log_density_and_score(x)[1]

    def log_density_and_score(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            log_density = self.log_density(x)
            (score,) = torch.autograd.grad(log_density.sum(), x)
        return log_density.detach(), score


def banana():
    def sample(n):
        x = torch.randn(n, 3)
        x[:, 1] += x[:, 0].square()
        return x

    def log_density(x):
        return -0.5 * (x[:, 0].square() + (x[:, 1] - x[:, 0].square()).square() + x[:, 2].square())

    return Posterior(3, log_density, sample)


def funnel():
    def sample(n):
        v = torch.randn(n, 1)
        return torch.cat([v, torch.randn(n, 3) * (0.5 * v).exp()], 1)

    def log_density(x):
        v = x[:, 0]
        return -0.5 * v.square() - 0.5 * x[:, 1:].square().sum(-1) * (-v).exp() - 1.5 * v

    return Posterior(4, log_density, sample)


def skewed(dim=5):
    """Logarithms of Gamma(1) variables: an exponential left tail, a doubly exponential right one."""
    return Posterior(
        dim, lambda x: (x - x.exp()).sum(-1), lambda n: Gamma(torch.tensor(1.0), 1.0).sample((n, dim)).log()
    )


def correlated():
    root = torch.linalg.cholesky(0.1 * torch.eye(20) + 0.9 * torch.ones(20, 20))
    precision = torch.cholesky_inverse(root)
    return Posterior(20, lambda x: -0.5 * ((x @ precision) * x).sum(-1), lambda n: torch.randn(n, 20) @ root.T)


def two_modes():
    def sample(n):
        x = torch.randn(n, 2)
        x[:, 0] += torch.where(torch.rand(n) < 0.5, 4.0, -4.0)
        return x

    def log_density(x):
        return torch.logaddexp(-0.5 * (x[:, 0] - 4).square(), -0.5 * (x[:, 0] + 4).square()) - 0.5 * x[:, 1].square()

    return Posterior(2, log_density, sample)


POSTERIORS = {"banana": banana, "funnel": funnel, "skewed": skewed, "correlated": correlated, "two modes": two_modes}


def full_verdict(p, x):
    return judge(stein_statistics(x, p.score(x)), drift=drift_statistics(Chains(p, x[:2000])), modes=find_modes(p, x))


@pytest.mark.parametrize("name", POSTERIORS)
def test_exact_draws_are_good(name):
    """Three seeds each, all good.

    The alarm is raised .17 beyond two standard errors. Those of the chains, the larger ones, are below .045 for all but
    the heavy banana and funnel, where they reach .07: 4.4 standard errors there and 5.8 elsewhere, so that the
    largest of up to 42 statistics raises a wrong alarm with probability below 42 x 1e-5 in a fresh run.
    """
    p = POSTERIORS[name]()
    for seed in range(3):
        torch.manual_seed(seed)
        verdict = full_verdict(p, p.sample(4000))
        assert verdict.level == "good", f"seed {seed}: {verdict}"


def test_false_alarm_rate_of_the_sure_errors():
    """What is left beyond two standard errors is 0 in 95.4% of a Gaussian fit's coordinates, to 5 standard errors."""
    fraction, num = 0.0, 0
    for _ in range(20):
        x = torch.randn(2000, 20)
        errors = stein_statistics(x, -x).coordinates
        both = torch.cat([errors.sure_mean, errors.sure_log2_sd])
        fraction += (both == 0).double().sum().item()
        num += len(both)
    want = math.erf(2.0 / math.sqrt(2.0))
    assert abs(fraction / num - want) < 5.0 * math.sqrt(want * (1 - want) / num)


def shifted(x):
    return x + 0.5 * x.std(0)


def narrow(x):
    return x.mean(0) + 0.7 * (x - x.mean(0))


def wide(x):
    return x.mean(0) + 1.5 * (x - x.mean(0))


def one_narrow(x):
    x = x.clone()
    x[:, 0] = x[:, 0].mean() + 0.6 * (x[:, 0] - x[:, 0].mean())
    return x


def collapsed(x):
    return x.mean(0) + 0.01 * (x - x.mean(0))


def cut_off(x):
    kept = x[x[:, 0] < x[:, 0].quantile(0.6)]
    return kept[torch.randint(len(kept), (len(x),))]


def stray(x):
    return torch.where(torch.rand(len(x), 1) < 0.15, x.mean(0) + 3.0 * x.std(0), x)


def no_tails(x):
    return x.mean(0) + x.std(0) * (1.2 * (x - x.mean(0)) / x.std(0)).tanh()


SABOTAGES = [shifted, narrow, wide, one_narrow, collapsed, cut_off, stray, no_tails]


@pytest.mark.parametrize("sabotage", SABOTAGES, ids=lambda sabotage: sabotage.__name__)
@pytest.mark.parametrize("name", POSTERIORS)
def test_spoiled_draws_are_not_good(name, sabotage):
    """Each has an error of .5 sds or a factor of 1.4 in an sd, more than ten standard errors beyond the threshold."""
    p = POSTERIORS[name]()
    verdict = full_verdict(p, sabotage(p.sample(4000)))
    assert verdict.level != "good", str(verdict)


def test_wrong_correlations_are_not_good():
    p = correlated()
    x = p.sample(4000)
    verdict = full_verdict(p, torch.stack([column[torch.randperm(len(x))] for column in x.T], 1))
    assert verdict.level == "bad"
    assert verdict.sentence.startswith("along ")


@pytest.mark.parametrize("name", ["banana", "funnel", "two modes"])
def test_the_best_gaussian_is_not_good_where_the_target_is_none(name):
    p = POSTERIORS[name]()
    affine = BatchAndMatch().fit(p, p.sample(4)).affine
    verdict = full_verdict(p, affine.forward(torch.randn(4000, p.dim)))
    assert verdict.level != "good"


def test_a_lost_mode_is_bad_though_scores_and_chains_see_nothing():
    p = two_modes()
    x = p.sample(4000)
    x[:, 0] = x[:, 0].abs()
    verdict = full_verdict(p, x)
    assert verdict.level == "bad"
    assert verdict.worst.instrument == "modes"
    assert [finding.instrument for finding in verdict.findings if finding.instrument != "modes"] == []


def test_a_small_mode_far_away_is_suspect_though_scores_and_chains_see_nothing():
    """.3% of the mass 12 sds away: the sd is 1.2 where q's is 1."""
    weight, distance = 0.003, 12.0

    def log_density(x):
        near, far = (-0.5 * (x[:, 0] - at).square() for at in (0.0, distance))
        return torch.logaddexp(near + math.log(1 - weight), far + math.log(weight)) - 0.5 * x[:, 1].square()

    verdict = full_verdict(Posterior(2, log_density, None), torch.randn(4000, 2))
    assert verdict.level == "suspect"
    assert [finding.instrument for finding in verdict.findings] == ["modes"]
    assert verdict.worst.sites == ("x[0]",)
    (mode,) = verdict.modes.lost
    assert f"about {100.0 * mode.share:.2g}% of the posterior's mass has no draws" in verdict.sentence
    assert mode.share == pytest.approx(weight, rel=0.2)
    assert mode.effect == pytest.approx(0.5 * math.log2(1 + weight * (1 - weight) * distance**2), abs=0.03)


@pytest.mark.parametrize(("height", "level"), [(0.05, "good"), (0.15, "bad")])
def test_ripples_of_the_density_are_no_error_though_scores_differ_unless_they_differ_badly(height, level):
    """log p = -x^2 / 2 + a sin(k x), k = 40: moments and distribution functions are N(0, 1)'s to a / k and less, but
    the Fisher divergence is (a k)^2 / 2 in each of two dimensions, 4 and 36.
    """
    p = Posterior(2, lambda x: (height * (40.0 * x).sin() - 0.5 * x.square()).sum(-1), None)
    x = torch.randn(4000, 2)
    score = p.score(x)
    stein, fisher = stein_statistics(x, score), fisher_statistics(x, score, -x, -x)
    assert fisher.total == pytest.approx((40.0 * height) ** 2, rel=0.1)
    verdict = judge(stein, fisher=fisher, drift=drift_statistics(Chains(p, x), min_trajectories=32))
    assert verdict.level == level, str(verdict)
    assert judge(stein, fisher=fisher).level != "good"


def test_a_shape_that_moments_do_not_show_is_seen_by_the_distance():
    """q is the Gaussian of p's mean and sd: chains find no moment off, but p's skewness keeps the scores' alarm up.

    The distance of 2,000 draws from what 32 trajectories make of them has noise of .015.
    """
    mean, sd = gumbel_l.mean(), gumbel_l.std()
    p, x = skewed(dim=1), mean + sd * torch.randn(4000, 1)
    grid = np.linspace(-15.0, 5.0, 10_001)
    want = abs(gumbel_l.cdf(grid) - norm(mean, sd).cdf(grid)).max()
    drift = drift_statistics(Chains(p, x), min_trajectories=32)
    assert drift.distance.item() == pytest.approx(want, abs=0.02)
    assert drift.coordinates.upper_bound().item() < 0.12
    assert not drift.rules_out(0.2, 0.05)
    score, own = p.score(x), (mean - x) / sd**2
    verdict = judge(stein_statistics(x, score), fisher=fisher_statistics(x, score, own, own), drift=drift)
    assert (verdict.level, [finding.instrument for finding in verdict.findings]) == ("suspect", ["fisher"])
