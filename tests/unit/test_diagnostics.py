"""Each instrument against Gaussians, where what it estimates is a closed form; what it refuses; the verdict's words."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from scipy.stats import ks_2samp, norm

from pyro_sivism.diagnostics import (
    Chains,
    DriftStatistics,
    FisherStatistics,
    Mode,
    ModeSearch,
    MomentErrors,
    SteinStatistics,
    Thresholds,
    drift_statistics,
    find_modes,
    fisher_statistics,
    is_alarming,
    judge,
    stein_statistics,
)
from pyro_sivism.diagnostics.drift import _as_log2_sd, _far_changes, _moment_errors
from pyro_sivism.diagnostics.moments import Frame, standard_error
from pyro_sivism.diagnostics.two_sample import kolmogorov_smirnov
from pyro_sivism.errors import ArgumentError, NonFiniteError
from tests.statistical.oracle import NUM_STANDARD_ERRORS, GaussianTarget, random_covariance

pytestmark = pytest.mark.usefixtures("float64")

DIM = 4


class Density:
    """A target from a function of points (B, D) to log densities (B,)."""

    def __init__(self, dim, log_density):
        self.dim, self._log_density = dim, log_density

    def log_density(self, x):
        return self._log_density(x)

    def score(self, x):
        return self.log_density_and_score(x)[1]

    def log_density_and_score(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            log_density = self._log_density(x)
            (score,) = torch.autograd.grad(log_density.sum(), x)
        return log_density.detach(), score


def two_modes(distance, weight=0.5, dim=2):
    """Unit normals at plus and minus ``distance`` along the first coordinate."""

    def log_density(x):
        right, left = (-0.5 * (x[:, 0] - sign * distance).square() for sign in (1, -1))
        rest = -0.5 * x[:, 1:].square().sum(-1)
        return torch.logaddexp(right + math.log(weight), left + math.log(1 - weight)) + rest

    return Density(dim, log_density)


def gaussian_problem():
    """A Gaussian p, and draws of a Gaussian q with another mean, other sds and other correlations."""
    p = GaussianTarget(torch.randn(DIM), random_covariance(DIM))
    loc, root = p.loc + 0.3 * torch.randn(DIM), torch.linalg.cholesky(random_covariance(DIM))
    return p, loc, root


# --- the frame ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_draws", [1000, 20 * DIM])
def test_frame_whitens_the_draws_and_gives_back_standardized_coordinates(num_draws):
    x = 3.0 + torch.randn(num_draws, DIM) @ random_covariance(DIM)
    frame = Frame.of(x)
    y = frame.affine.inverse(x)
    torch.testing.assert_close(y.T.cov(correction=0), torch.eye(DIM))
    torch.testing.assert_close(frame.along_coordinates(y), (x - x.mean(0)) / x.std(0, correction=0))
    direction = torch.nn.functional.normalize(torch.randn(DIM), dim=0)
    torch.testing.assert_close(frame.loadings(direction), frame.affine.linear(direction) / x.std(0, correction=0))


def test_frame_of_few_draws_is_diagonal():
    x = 3.0 + torch.randn(60, 8) @ random_covariance(8)
    frame = Frame.of(x)
    y = frame.affine.inverse(x)
    assert frame.directions is None
    torch.testing.assert_close(frame.along_coordinates(y), (x - x.mean(0)) / x.std(0, correction=0))


def test_frame_of_collinear_draws_is_diagonal():
    x = torch.randn(1000, 1).expand(1000, 2)
    assert Frame.of(x).directions is None


# --- Stein's identity ---------------------------------------------------------------------------------


def test_control_variates_find_the_moments_of_a_gaussian_exactly():
    """Whatever Gaussian q the draws are from, as all quadratic functions are combinations of the control variates."""
    p, loc, root = gaussian_problem()
    x = loc + (torch.randn(1000, DIM) @ root.T).clamp(-4.0, 4.0)
    errors = stein_statistics(x, p.score(x)).coordinates
    sd = p.covariance.diagonal().sqrt()
    torch.testing.assert_close(errors.mean, (x.mean(0) - p.loc) / sd, atol=1e-5, rtol=0.0)
    torch.testing.assert_close(errors.log2_sd, (x.std(0, correction=0) / sd).log2(), atol=1e-5, rtol=0.0)


@pytest.mark.parametrize("ratio", [0.25, 0.7, 1.0, 1.4, 3.0])
@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_stein_finds_mean_and_sd_of_one_coordinate_exactly(ratio, shift):
    """For D = 1 and p Gaussian both moments are combinations of the control variates."""
    x = shift + ratio * torch.randn(2000, 1)
    x = x.clamp(shift - 4.0 * ratio, shift + 4.0 * ratio)  # no draw is beyond the cut-off of the second moment
    errors = stein_statistics(x, -x).coordinates
    mean, sd = x.mean(), x.var(correction=0).sqrt()
    # to rounding and the ridge of 1e-9 on the control variates
    assert errors.mean.item() == pytest.approx(mean.item(), abs=1e-5)
    assert errors.log2_sd.item() == pytest.approx(math.log2(sd), abs=1e-5)


def test_stein_statistics_do_not_depend_on_units():
    p, loc, root = gaussian_problem()
    x = loc + torch.randn(1000, DIM) @ root.T
    units = torch.tensor([1e-4, 1.0, 30.0, 1e5])
    a, b = stein_statistics(x, p.score(x)), stein_statistics(x * units, p.score(x) / units)
    for one, other in ((a.coordinates, b.coordinates), (a.direction.errors, b.direction.errors)):
        torch.testing.assert_close(one.mean, other.mean)
        torch.testing.assert_close(one.log2_sd, other.log2_sd)


def test_stein_finds_the_direction_of_a_wrong_correlation():
    """Marginals are right; along (1, -1) the sd is too large by sqrt(1 / .1), along (1, 1) too small."""
    p = GaussianTarget(torch.zeros(2), torch.tensor([[1.0, 0.9], [0.9, 1.0]]))
    x = torch.randn(4096, 2)
    found = stein_statistics(x, p.score(x))
    loadings = found.direction.loadings
    torch.testing.assert_close(loadings[0], -loadings[1], atol=0.1, rtol=0.0)
    assert found.direction.errors.log2_sd.item() == pytest.approx(0.5 * math.log2(1 / 0.1), abs=0.2)


def test_stein_of_more_dims_than_a_dense_frame_has_draws_for():
    dim = 60
    x = torch.randn(400, dim)
    x[:, 7] *= 0.5
    found = stein_statistics(x, -x)
    assert found.direction is None
    assert found.coordinates.log2_sd.argmin() == 7
    assert found.coordinates.log2_sd[7].item() == pytest.approx(-1.0, abs=0.2)


def test_shared_noise_is_counted_by_blocks():
    """32 blocks of draws share a minibatch's noise: the standard error of the mean is that of 32 numbers."""
    noise = torch.randn(32, 1).repeat_interleave(64, 0)
    assert standard_error(noise, 32).item() == pytest.approx(noise[::64].std().item() / math.sqrt(32))
    assert standard_error(noise).item() < 0.2 * standard_error(noise, 32).item()
    x = torch.randn(2048, 1)
    found = stein_statistics(x, -x + 0.5 * noise, num_blocks=32)
    assert found.mean_score_se.item() > 0.5 / math.sqrt(32) / 1.5
    assert abs(found.mean_score.item()) < NUM_STANDARD_ERRORS * found.mean_score_se.item()


def test_rows_that_are_not_finite_are_left_out_and_counted():
    x = torch.randn(1000, 2)
    score = -x
    score[3, 1], x[5, 0] = torch.nan, torch.inf
    found = stein_statistics(x, score)
    assert (found.num_draws, found.num_nonfinite) == (998, 2)
    keep = [i for i in range(1000) if i not in (3, 5)]
    torch.testing.assert_close(found.coordinates.mean, stein_statistics(x[keep], score[keep]).coordinates.mean)


@pytest.mark.parametrize(
    ("x", "score", "error", "match"),
    [
        (torch.zeros(100, 2), torch.zeros(100, 2), ArgumentError, r"coordinates \[0, 1\] do not"),
        (torch.zeros(10, 2), torch.zeros(10, 2), ArgumentError, "at least 50 draws, got 10"),
        (torch.zeros(100), torch.zeros(100), ArgumentError, r"draws \(N, D\)"),
        (torch.zeros(100, 2), torch.zeros(90, 2), ArgumentError, r"\(90, 2\)"),
        (torch.zeros(100, 2), torch.full((100, 2), torch.nan), NonFiniteError, "only 0 of 100"),
    ],
)
def test_unusable_draws_are_refused(x, score, error, match):
    with pytest.raises(error, match=match):
        stein_statistics(x, score)


# --- the Fisher divergence ----------------------------------------------------------------------------


def gaussian_mixture_of_normals(num_draws, sigma=0.6):
    """Draws of q = N(0, 1) as ``x = mu(z) + sigma eps``: q's score is -x, the conditional one is -eps / sigma."""
    eps = torch.randn(num_draws, 2)
    x = math.sqrt(1 - sigma**2) * torch.randn(num_draws, 2) + sigma * eps
    return x, -eps / sigma


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_fisher_divergence_of_gaussians_at_any_scale_of_the_critic(scale):
    """q = N(0, I) and p = N(m, I): s_p - grad log q = m, and ``f = scale m`` is as good as f = m."""
    x, conditional = gaussian_mixture_of_normals(4000)
    m = torch.tensor([0.6, -0.3])
    score = m - x
    found = fisher_statistics(x, score, score - scale * m, conditional)
    # in units of q's sample covariance, which the 4,000 draws know to 2%
    assert abs(found.total - m.square().sum()) < NUM_STANDARD_ERRORS * found.total_se + 0.05 * found.total
    assert (found.coordinates - m.square()).abs().max() < NUM_STANDARD_ERRORS * found.bulk_se + 0.02
    assert found.total_se < 0.1


@pytest.mark.parametrize("with_second", [False, True])
def test_fisher_divergence_of_a_wrong_scale(with_second):
    """q = N(0, I) and p = N(0, 4 I): the difference is 3 x / 4, its mean square 9 / 16 a dimension."""
    x, conditional = gaussian_mixture_of_normals(20_000)
    noise = 0.3 * torch.randn(2, 40, 2).repeat_interleave(500, 1) if with_second else torch.zeros(2, 1, 1)
    first, second = -0.25 * x + noise
    found = fisher_statistics(x, first, -x, conditional, second_score=second, num_blocks=40 if with_second else 1)
    assert abs(found.total - 18 / 16) < NUM_STANDARD_ERRORS * found.total_se
    assert found.total_se < 0.15


def test_the_bulk_of_a_fisher_divergence_leaves_a_thin_tail_out(float64):
    """p has a wall at x = 2.5, in which .6% of q's draws meet scores of -1000; elsewhere p = N(.3, 1)."""
    torch.manual_seed(0)
    x = torch.randn(20_000, 1)
    score = 0.3 - x - 1000.0 * (x > 2.5)
    found = fisher_statistics(x, score, -x, -x)
    assert found.total > 1000.0
    assert found.bulk == pytest.approx(0.3**2 * x.var(correction=0).item(), rel=1e-6)  # where q has sd 1
    assert found.coordinates.item() == pytest.approx(found.bulk, rel=1e-6)
    assert found.bulk_se < 0.01 < found.total_se


def test_fisher_divergence_is_none_where_the_critic_is_q_score_and_q_is_p():
    x, conditional = gaussian_mixture_of_normals(1000)
    found = fisher_statistics(x, -x, -x, conditional)
    assert found.total == 0.0


def test_second_minibatch_takes_the_noise_out_of_the_divergence():
    x, conditional = gaussian_mixture_of_normals(4000)
    first, second = (-x + torch.randn(32, 2).repeat_interleave(125, 0) for _ in range(2))
    noisy = fisher_statistics(x, first, -x, conditional, num_blocks=32)
    clean = fisher_statistics(x, first, -x, conditional, second_score=second, num_blocks=32)
    assert noisy.total > 1.0
    assert clean.total < 2.0 * clean.total_se + 0.1


# --- the chains ---------------------------------------------------------------------------------------


def test_chains_find_the_moments_of_a_gaussian():
    p, loc, root = gaussian_problem()
    x = loc + torch.randn(4000, DIM) @ root.T
    found = drift_statistics(Chains(p, x))
    sd, q_sd = p.covariance.diagonal().sqrt(), root.norm(dim=-1)
    # What is not forgotten is extrapolated linearly, which is good to a tenth of the error.
    mean, log2_sd = (loc - p.loc) / sd, (q_sd / sd).log2()
    assert (
        (found.coordinates.mean - mean).abs() < NUM_STANDARD_ERRORS * found.coordinates.mean_se + 0.1 * mean.abs()
    ).all()
    slack = NUM_STANDARD_ERRORS * found.coordinates.log2_sd_se + 0.1 * log2_sd.abs()
    assert ((found.coordinates.log2_sd - log2_sd).abs() < slack).all()
    assert found.acceptance > 0.6
    assert log2_sd.abs().max() > 0.3


def test_chains_find_a_narrow_room_that_q_has_no_draws_in():
    """A tenth of p's mass is 2.5 sds away and narrow across: hard to enter, and steps there must be small.

    Chains from the rest forget where they started within a trajectory or two, with 99% of their steps accepted.
    """
    weight, distance, sd = 0.1, 2.5, 0.3

    def log_density(x):
        across = x[:, 1:].square().sum(-1)
        room = -0.5 * ((x[:, 0] - distance).square() + across / sd**2) - 3 * math.log(sd) + math.log(weight)
        return torch.logaddexp(-0.5 * (x[:, 0].square() + across) + math.log(1 - weight), room)

    errors = drift_statistics(Chains(Density(4, log_density), torch.randn(2048, 4), 512)).coordinates
    variance = 1.0 + weight * (1.0 - weight) * distance**2
    # four standard errors of 8,192 chains' worth, and a fifth for what has not yet been entered
    want = -weight * distance / math.sqrt(variance), -0.5 * math.log2(variance)
    for value, se, truth in zip(
        (errors.mean[0], errors.log2_sd[0]), (errors.mean_se[0], errors.log2_sd_se[0]), want, strict=True
    ):
        assert abs(value - truth) < NUM_STANDARD_ERRORS * se + 0.2 * abs(truth)
    assert errors.sure_log2_sd[0] < -0.17


def test_chains_that_forget_limit_what_others_found():
    p = GaussianTarget(torch.zeros(2), torch.eye(2))
    drift = drift_statistics(Chains(p, torch.randn(2048, 2)))
    two = torch.ones(2)
    found = MomentErrors(0.6 * two, 0.01 * two, -0.4 * two, 0.01 * two, 0.58 * two, -0.38 * two)
    limited = drift.limit(found)
    bound = drift.coordinates.mean.abs() + 2 * drift.coordinates.mean_se
    torch.testing.assert_close(limited.sure_mean, bound)
    assert (limited.sure_log2_sd > -0.2).all()
    slow = replace(drift, correlation=torch.tensor([0.1, 0.9]))
    assert slow.limit(found).sure_mean[1] == found.sure_mean[1]


def test_chains_stop_where_nothing_is_found_and_go_on_where_something_is():
    p = GaussianTarget(torch.zeros(DIM), torch.eye(DIM))
    x = torch.randn(2048, DIM)
    assert drift_statistics(Chains(p, x)).num_trajectories == 8
    assert drift_statistics(Chains(p, x + 0.2)).num_trajectories == 32
    assert drift_statistics(Chains(p, x + 0.2), max_trajectories=3).num_trajectories == 3
    assert drift_statistics(Chains(p, x + 1.0)).num_trajectories == 8


def test_chains_go_on_as_long_as_they_are_told_to_and_end_early_where_an_error_is_large():
    p = GaussianTarget(torch.zeros(DIM), torch.eye(DIM))
    x = torch.randn(2048, DIM)

    def num_trajectories(shift, **how):
        return drift_statistics(Chains(p, x + shift), **how).num_trajectories

    assert num_trajectories(0.0, min_trajectories=9) == 16
    assert num_trajectories(0.0, min_trajectories=32) == 32
    assert num_trajectories(0.0, min_trajectories=32, max_trajectories=12) == 12
    assert num_trajectories(1.0, min_trajectories=32) == 16
    assert num_trajectories(0.2, min_trajectories=32, large_error=0.05) == 16
    assert num_trajectories(1.0, large_error=2.0) == 32
    x[:, 0] += torch.where(torch.rand(2048) < 0.5, 6.0, -6.0)
    stay = drift_statistics(Chains(two_modes(6.0, dim=DIM), x))
    assert stay.num_trajectories == 32, "nothing is found where nothing moves"


@pytest.mark.parametrize("decimals", [0, 1, 12])
def test_distances_of_distribution_functions_are_scipys(decimals):
    """Of samples of unlike sizes, many of whose values are equal where they are rounded."""
    a = torch.randn(700, 2).round(decimals=decimals)
    b = torch.stack([0.4 + torch.randn(300), 1.6 * torch.randn(300)], 1).round(decimals=decimals)
    want = [ks_2samp(a[:, i], b[:, i]).statistic for i in range(2)]
    assert kolmogorov_smirnov(a, b).tolist() == pytest.approx(want, abs=1e-6)
    assert kolmogorov_smirnov(b, a).tolist() == pytest.approx(want, abs=1e-6)


def test_chains_measure_the_distance_of_two_normals_in_each_coordinate():
    """Of N(0, 1) and N(d, 1) it is 2 Phi(d / 2) - 1, whatever the correlations; 4,000 draws leave noise of .01."""
    shift = torch.tensor([-1.0, 0.0, 0.4])
    covariance = 0.2 * torch.eye(3) + 0.8
    p = GaussianTarget(torch.tensor([5.0, 0.0, 0.0]), covariance)
    x = p.loc + shift + torch.randn(4000, 3) @ torch.linalg.cholesky(covariance).T
    want = [2.0 * norm.cdf(abs(d) / 2.0) - 1.0 for d in shift.tolist()]
    assert drift_statistics(Chains(p, x)).distance.tolist() == pytest.approx(want, abs=0.04)


def test_chains_that_never_move_rule_nothing_out():
    """p is finite at multiples of 1/8 alone, so that no step is accepted: what is compared are all draws with some."""

    def log_density(x):
        return torch.where((8.0 * x == (8.0 * x).round()).all(-1), 0.0 * x.sum(-1), -torch.inf)

    x = torch.randn(2000, 1).mul(8.0).round() / 8.0
    drift = drift_statistics(Chains(Density(1, log_density), x, 200))
    assert drift.stuck == 1.0
    assert drift.distance.item() == pytest.approx(ks_2samp(x[:, 0], x[:200, 0]).statistic, abs=1e-6)
    assert not drift.rules_out(10.0, 2.0)


@pytest.mark.parametrize(("ratio", "rules_out"), [(1.0, True), (0.8, False), (1.25, False)])
def test_chains_rule_out_errors_of_exact_draws_and_not_of_sds_a_fifth_off(ratio, rules_out):
    p = GaussianTarget(torch.zeros(DIM), torch.eye(DIM))
    x = torch.randn(2048, DIM)
    x[:, 1] *= ratio
    assert drift_statistics(Chains(p, x), min_trajectories=32).rules_out(0.2, 0.05) == rules_out


def drift_of(error=0.0, se=0.0, distance=0.0, correlation=0.0, far=0.0, far_se=0.0, share=0.01):
    """Chains of three coordinates that found an error of the second one's sd, and all else where it says."""
    zero, at = torch.zeros(3), torch.tensor([0.0, 1.0, 0.0])
    errors = MomentErrors(zero, zero, error * at, se * at, zero, zero)
    change = 4.0**far - 1.0
    return DriftStatistics(
        errors,
        None,
        correlation * at,
        distance * at,
        change * at,
        far_se * at,
        share * at,
        zero,
        0.9,
        0.0,
        1000,
        500,
        32,
    )


def test_errors_are_ruled_out_with_two_standard_errors():
    assert drift_of(error=-0.1, se=0.04).rules_out(0.181, 0.05)
    assert not drift_of(error=-0.1, se=0.04).rules_out(0.179, 0.05)
    assert not drift_of(error=0.1, se=0.04).rules_out(0.179, 0.05)
    assert drift_of(distance=0.03).rules_out(0.2, 0.031)
    assert drift_of(far_se=0.5 * (4.0**0.19 - 1.0)).rules_out(0.2, 0.05)
    assert not drift_of(far_se=0.5 * (4.0**0.21 - 1.0)).rules_out(0.2, 0.05)
    assert not drift_of(distance=0.03).rules_out(0.2, 0.029)


def test_chains_that_remember_their_starts_rule_nothing_out():
    assert drift_of(correlation=0.39).rules_out(0.2, 0.05)
    assert not drift_of(correlation=0.41).rules_out(0.2, 0.05)


def test_the_upper_bound_of_an_error_is_that_of_mean_or_sd():
    mean, log2_sd = torch.tensor([0.1, -0.3, 0.0]), torch.tensor([-0.2, 0.05, 0.1])
    mean_se, log2_sd_se = torch.tensor([0.01, 0.02, 0.2]), torch.tensor([0.03, 0.04, 0.05])
    errors = MomentErrors(mean, mean_se, log2_sd, log2_sd_se, 9.0 * mean, 9.0 * log2_sd)
    torch.testing.assert_close(errors.upper_bound(), torch.tensor([0.26, 0.34, 0.4]))


def test_the_worst_direction_of_exact_draws_is_not_off():
    """Of 60 dimensions the one that varies least by chance in half of the draws varies most in the other half, in a
    frame of all draws; judged there its sd seemed 15% off on average. Fifteen draws: their mean is off by its own se.
    """
    p, logs, ses = GaussianTarget(torch.zeros(60), torch.eye(60)), [], []
    for _ in range(15):
        errors = drift_statistics(Chains(p, torch.randn(1024, 60), 512), max_trajectories=2).direction.errors
        logs.append(errors.log2_sd)
        ses.append(errors.log2_sd_se)
    se = torch.cat(ses).square().mean().sqrt() / math.sqrt(len(ses))
    assert torch.cat(logs).mean().abs() < NUM_STANDARD_ERRORS * se


def test_no_direction_is_named_where_half_of_the_draws_are_too_few_for_one():
    p = GaussianTarget(torch.zeros(60), torch.eye(60))
    assert drift_statistics(Chains(p, torch.randn(500, 60)), max_trajectories=2).direction is None


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.7])
def test_slow_chains_are_extrapolated_with_their_standard_error(correlation):
    """Chains whose ends are ``rho start + (1 - rho) m`` and noise: the mean is off by -m, whatever rho; over 200
    replicates, the errors scatter as they say they do.
    """
    m, scores, means = 0.5, [], []
    for _ in range(200):
        before = torch.randn(2400, 1)
        noise = math.sqrt(1 - correlation**2) * torch.randn(1, 1200, 1)
        late = correlation * before[:1200] + (1 - correlation) * m + noise
        errors, _ = _moment_errors(before, late)
        sd = 2.0 ** -errors.log2_sd[0]  # of p in sds of q, which is extrapolated too
        means.append(errors.mean[0] * sd)
        scores.append((errors.mean[0] * sd + m) / (errors.mean_se[0] * sd))
    se = torch.stack(means).std() / math.sqrt(200)
    assert abs(torch.stack(means).mean() + m) < NUM_STANDARD_ERRORS * se + 0.02
    assert torch.stack(scores).std().item() == pytest.approx(1.0, abs=0.25)


def test_draws_beyond_a_wall_are_a_finding():
    """p falls like exp(-exp(x)), q's sd is ten times as large: chains from beyond the wall cannot move, those from near
    it shoot far to the left, and on their way back have any spread.
    """
    target = Density(1, lambda x: (2.0 * x - x.exp()).sum(-1))
    drift = drift_statistics(Chains(target, 8.0 * torch.randn(1024, 1)))
    assert 0.1 < drift.stuck < 0.5
    verdict = judge(statistics_of(), drift=drift)
    assert any("where chains cannot move" in finding.text for finding in verdict.findings)
    assert drift_statistics(Chains(target, torch.distributions.Gamma(2.0, 1.0).sample((1024, 1)).log())).stuck == 0.0


def test_far_ends_count_by_what_they_add_to_a_variance():
    """A hundredth of p is 15 sds out, where q has nothing, in the second coordinate; in the third q has as much."""
    before = torch.randn(8192, 3).clamp(-4.0, 4.0)
    late = torch.randn(4, 500, 3).clamp(-4.0, 4.0)
    late[:, :5, 1:] = 15.0
    before[:82, 2] = -15.0
    change, se = _far_changes(before, late)
    torch.testing.assert_close(change[:2], torch.tensor([0.0, 0.01 * 200.0]))
    torch.testing.assert_close(_as_log2_sd(change)[1].item(), 0.5 * math.log2(3.0))
    assert change[2].abs() < 0.01
    assert se[0] == 0.0
    assert se[1].item() == pytest.approx(200.0 * math.sqrt(0.01 * 0.99 / 500), rel=0.01)
    assert se[2] > se[1]


def test_chains_find_far_ends_that_q_lacks():
    """p = .95 N(0, 1) + .05 N(0, 8^2): few chains from the bulk come into the wings, which are most of its variance."""

    def log_density(x):
        bulk, wings = -0.5 * x[:, 0].square(), -0.5 * (x[:, 0] / 8.0).square()
        return torch.logaddexp(math.log(0.95) + bulk, math.log(0.05 / 8.0) + wings)

    target, bulk, is_wing = Density(1, log_density), torch.randn(8192, 1), torch.rand(8192, 1) < 0.05
    drift = drift_statistics(Chains(target, bulk, 512))
    assert drift.num_trajectories == 32, "few are there after 8, which is reason to go on"
    assert 0.17 < drift.far.item() < 0.5 * math.log2(0.95 + 0.05 * 64.0)
    verdict = judge(statistics_of(), drift=drift, labels=["mu"])
    assert any("mu: chains are over 5 sds" in finding.text for finding in verdict.findings)
    assert 0.01 < drift.far_share.item() < 0.04
    assert drift.far_share_of_draws.item() == 0.0
    right = drift_statistics(Chains(target, torch.where(is_wing, 8.0 * torch.randn(8192, 1), bulk), 512))
    assert right.far.item() < 0.05
    sd = math.sqrt(0.95 + 0.05 * 64.0)
    assert right.far_share_of_draws.item() == pytest.approx(0.05 * 2.0 * norm.sf(5.0 * sd / 8.0), rel=0.25)


def test_a_far_end_is_suspect_and_never_bad():
    for far, share, level, percent in (
        (0.1, 0.01, "good", ""),
        (0.3, 0.003, "suspect", "0.3%"),
        (3.0, 0.12, "suspect", "12%"),
    ):
        verdict = judge(statistics_of(), drift=drift_of(far=far, share=share), labels=["a", "b", "c"])
        text = f"b: chains are over 5 sds from the draws' mean {percent} of the time, q's draws 0%"
        assert verdict.level == level
        assert (verdict.sentence == text) == (level == "suspect")
    assert verdict.as_dict()["drift_far_max"] == pytest.approx(3.0)


def test_far_ends_count_beyond_their_noise():
    """A change of .5 is .29 in log2 of an sd; less one standard error of .2 it is .19, less two .07."""
    found = drift_of(far=0.5 * math.log2(1.5), far_se=0.2)
    assert found.far[1].item() == pytest.approx(0.5 * math.log2(1.3))
    chance = math.sqrt(2.0 * math.log(6.0))
    assert found.largest() == pytest.approx(0.5 * math.log2(1.5 - 0.2 * chance))
    assert drift_of(far=0.5 * math.log2(1.5), far_se=0.3).largest() == 0.0


def test_chains_that_hardly_move_vouch_for_nothing():
    """Exact draws of two modes: no chain crosses. Only where the modes are known is their weight judged otherwise."""
    x = torch.randn(2048, 2)
    x[:, 0] += torch.where(torch.rand(2048) < 0.5, 4.0, -4.0)
    target = two_modes(4.0)
    stein, drift = stein_statistics(x, target.score(x)), drift_statistics(Chains(target, x))
    verdict = judge(stein, drift=drift, labels=["mu", "tau"])
    assert (verdict.level, verdict.worst.sites) == ("suspect", ("mu",))
    assert (
        "mu: cannot be vouched for, as chains hardly moved from q's draws (they still correlate by 0.9"
        in verdict.sentence
    )
    assert judge(stein, drift=drift, modes=find_modes(target, x)).level == "good"


@pytest.mark.parametrize("score_outside", [torch.nan, 0.0])
def test_chains_stay_inside_a_bounded_support(score_outside):
    """p is uniform on the square |x| < 1: -inf outside; q has draws in the left half."""

    class Square:
        dim = 2

        def score(self, x):
            inside = (x.abs() < 1.0).all(-1)
            return torch.where(inside[:, None], 0.0, score_outside).expand_as(x)

        def log_density_and_score(self, x):
            return torch.where((x.abs() < 1.0).all(-1), 0.0, -torch.inf), self.score(x)

    x = 2.0 * torch.rand(2000, 2) - 1.0
    x[:, 0] = -x[:, 0].abs()
    chains = Chains(Square(), x)
    errors = drift_statistics(chains).coordinates
    assert (chains.frame.affine.forward(chains.late).abs() < 1.0).all()
    assert errors.sure_mean[0] < -0.1
    assert errors.sure_mean[1] == 0.0


def test_chains_count_their_evaluations():
    p = GaussianTarget(torch.zeros(DIM), torch.eye(DIM))
    found = drift_statistics(Chains(p, torch.randn(500, DIM)))
    assert found.num_evaluations == p.num_evaluations
    assert found.num_draws == 500


# --- modes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.5, 0.9])
def test_a_lost_mode_is_found_and_weighed(weight):
    x = torch.randn(1000, 2) + torch.tensor([4.0, 0.0])
    found = find_modes(two_modes(4.0, weight), x)
    (mode,) = found.lost
    torch.testing.assert_close(mode.x, torch.tensor([-4.0, 0.0]), atol=0.02, rtol=0.0)
    assert mode.share == pytest.approx(1 - weight, abs=0.01)
    assert mode.displacement[0].item() == pytest.approx(-8.0, rel=0.1)
    assert mode.draw_share == 0.0


def test_modes_that_q_has_are_not_lost():
    x = torch.randn(1000, 2)
    x[:, 0] += torch.where(torch.rand(1000) < 0.5, 4.0, -4.0)
    found = find_modes(two_modes(4.0), x)
    assert found.lost == ()
    assert [mode.x[0].sign().item() for mode in found.modes] in ([1, -1], [-1, 1])
    # 1,000 draws and twice 1,000 proposals: 5 standard errors of about .02
    assert found.weight_error < 0.1


def test_maxima_without_a_valley_are_one_mode():
    """At plus and minus 2.2 log p falls by 1.73 nats between the maxima, and by more than 2 at 2.5."""
    for distance, num_modes in ((2.2, 1), (2.5, 2)):
        x = torch.randn(1000, 1) + torch.where(torch.rand(1000, 1) < 0.5, distance, -distance)
        assert len(find_modes(two_modes(distance, dim=1), x).modes) == num_modes


def test_modes_of_different_widths_are_weighed_right():
    """Half the mass in a normal of sd .3, half in one of sd 1; Student t proposals make of it 1/2 to about .02."""

    def log_density(x):
        narrow = -0.5 * ((x - 4.0) / 0.3).square().sum(-1) - 2.0 * math.log(0.3)
        return torch.logaddexp(narrow, -0.5 * (x + 4.0).square().sum(-1))

    left = torch.rand(2000, 1) < 0.5
    noise = torch.randn(2000, 2)
    found = find_modes(Density(2, log_density), torch.where(left, noise - 4.0, 0.3 * noise + 4.0))
    assert [mode.share for mode in found.modes] == pytest.approx([0.5, 0.5], abs=0.1)
    assert found.weight_error < 0.1


@pytest.mark.parametrize(("draw_weight", "level"), [(0.5, "good"), (0.7, "suspect"), (0.9, "bad")])
def test_wrong_weights_of_modes_are_a_finding(draw_weight, level):
    x = torch.randn(2000, 2)
    x[:, 0] += torch.where(torch.rand(2000) < draw_weight, 4.0, -4.0)
    target = two_modes(4.0)
    found = find_modes(target, x)
    assert found.weight_error == pytest.approx(draw_weight - 0.5, abs=0.06)
    verdict = judge(stein_statistics(x, target.score(x)), drift=drift_statistics(Chains(target, x)), modes=found)
    assert verdict.level == level
    assert level == "good" or "x[0] by " in verdict.sentence


def test_extra_starts_find_what_blown_up_draws_miss():
    """A mode a thousand sds away, where no draw of q is blown up to."""
    x = torch.randn(1000, 2) + torch.tensor([1000.0, 0.0])
    target = two_modes(1000.0)
    assert find_modes(target, x).lost == ()
    (mode,) = find_modes(target, x, extra_starts=torch.tensor([[-999.0, 1.0]])).lost
    assert mode.share == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(("share", "distance"), [(1e-3, 100.0), (3e-3, 8.0), (1e-5, 30.0)])
def test_the_effect_of_a_small_mode_is_that_on_the_sd_of_a_mixture(share, distance):
    """(1 - w) N(0, 1) + w N(d, 1) has variance 1 + w (1 - w) d^2, in which the last w does not matter."""
    for sign in (-1.0, 1.0):
        mode = Mode(torch.zeros(3), torch.tensor([2.0, sign * distance, 0.0]), share, 0.0, True)
        want = 0.5 * math.log2(1.0 + share * (1.0 - share) * distance**2)
        assert mode.effect == pytest.approx(want, rel=1e-2)


@pytest.mark.parametrize(("half", "is_lost"), [(4.0, False), (15.0, True)])
def test_a_small_mode_is_lost_where_it_is_far_enough_away_to_ruin_an_sd(half, is_lost):
    """Of .3% of the mass, 8 or 30 sds from the rest: an sd that is too small by 8% or by half."""
    target, x = two_modes(half, weight=0.997), torch.randn(2000, 2) + torch.tensor([half, 0.0])
    start = torch.tensor([[-half, 0.5]])
    found = find_modes(target, x, extra_starts=start)
    assert [mode.is_lost for mode in found.modes] == [False, is_lost]
    assert found.modes[1].share == pytest.approx(0.003, rel=0.2)
    want = 0.5 * math.log2(1.0 + 0.003 * 0.997 * (2.0 * half) ** 2)
    assert found.modes[1].effect == pytest.approx(want, rel=0.2)
    for factor, changed in ((0.7, True), (1.4, False)):
        (mode,) = find_modes(target, x, extra_starts=start, min_effect=factor * want).modes[1:]
        assert mode.is_lost == changed
    x[-6:, 0] -= 2.0 * half
    assert find_modes(target, x, extra_starts=start).lost == (), "q has the draws there that it should have"


@pytest.mark.parametrize(("num_draws", "is_lost"), [(1600, False), (1800, True)])
def test_a_mode_that_q_should_have_hardly_a_draw_in_is_not_lost(num_draws, is_lost):
    """.3% of the mass: 4.8 draws or 5.4."""
    torch.manual_seed(0)
    x = torch.randn(num_draws, 2) + torch.tensor([15.0, 0.0])
    found = find_modes(two_modes(15.0, weight=0.997), x, extra_starts=torch.tensor([[-15.0, 0.5]]))
    assert [mode.is_lost for mode in found.modes] == [False, is_lost]


@pytest.mark.parametrize(("noise", "num_lost"), [(0.0, 1), (0.1, 1), (5.0, 0)])
def test_a_maximum_that_roundings_make_is_no_mode(noise, num_lost):
    """In float32, with a log density that in the second mode differs by nats from one number to the next."""

    class Rounded(Density):
        def log_density_and_score(self, x):
            x = x.float().double()
            log_density, score = super().log_density_and_score(x)
            return log_density + noise * (x[:, 0] < 0) * (1e8 * x[:, 0]).cos(), score

    torch.manual_seed(0)
    target = Rounded(2, two_modes(4.0).log_density)
    assert len(find_modes(target, torch.randn(1000, 2) + torch.tensor([4.0, 0.0])).lost) == num_lost


def student_t(x):
    return -1.5 * (x.square() / 2.0).log1p().sum(-1)


def funnel(x):
    return -x[:, 0].square() / 8.0 - 0.5 * (x[:, 1:].square().sum(-1) * (-x[:, 0]).exp()) - x[:, 0]


def banana(x):
    return -0.5 * (x[:, 0].square() + (x[:, 1] - 2.0 * x[:, 0].square()).square())


def plateau(x):
    return -(1.0 + x.square().sum(-1)).log() * 3.0 + 0.1 * (-(x.square().sum(-1) - 400.0).square() / 1e4).exp()


@pytest.mark.parametrize(("log_density", "dim"), [(student_t, 3), (funnel, 3), (banana, 2), (plateau, 2)])
def test_tails_funnels_ridges_and_plateaus_are_no_modes(log_density, dim):
    for seed in range(3):
        torch.manual_seed(seed)
        assert find_modes(Density(dim, log_density), torch.randn(500, dim)).lost == ()


# --- the verdict --------------------------------------------------------------------------------------


def errors_of(mean=0.0, log2_sd=0.0, at=0, dim=3):
    """Known errors of one coordinate, with standard errors of 0."""
    zero = torch.zeros(dim)
    ratio = 2.0 ** (-log2_sd)
    first = torch.zeros(dim)
    first[at] = -mean * ratio
    second = torch.zeros(dim)
    second[at] = ratio**2 - 1.0 + first[at] ** 2
    return MomentErrors.from_changes(first, zero, second, zero)


def statistics_of(**errors):
    zero = torch.zeros(3)
    return SteinStatistics(errors_of(**errors), None, zero, zero, num_draws=1000, num_nonfinite=0)


def test_of_one_coordinate_the_chains_say_what_is_wrong_if_they_find_as_much():
    """Where q is narrow and far off, the sign of what Stein's identity extrapolates may be wrong."""

    def findings(stein_at, log2_sd):
        errors = errors_of(log2_sd=log2_sd, at=1)
        drift = replace(drift_of(), coordinates=errors, correlation=torch.full((3,), 0.5))
        verdict = judge(statistics_of(log2_sd=0.3, at=stein_at), drift=drift, labels="abc")
        return [finding.text for finding in verdict.findings]

    assert findings(1, -0.4) == ["b: sd probably 24% too small"]
    assert findings(1, -0.6) == ["b: sd probably 34% too small"], "it is bad, and the other suspect"
    assert findings(1, -0.1) == ["b: sd probably 23% too large"], "chains have found nothing that matters"
    assert len(findings(0, -0.4)) == 2, "of another coordinate"


def test_moment_errors_are_the_inverse_of_the_changes():
    errors = errors_of(mean=0.4, log2_sd=-0.7, at=1)
    torch.testing.assert_close(errors.mean, torch.tensor([0.0, 0.4, 0.0]))
    torch.testing.assert_close(errors.log2_sd, torch.tensor([0.0, -0.7, 0.0]))
    torch.testing.assert_close(errors.sure_log2_sd, errors.log2_sd)


def test_sure_errors_leave_out_what_noise_would_do():
    one = torch.ones(3)
    errors = MomentErrors.from_changes(torch.tensor([0.1, -0.3, 0.3]), 0.1 * one, torch.zeros(3), 0.1 * one)
    torch.testing.assert_close(errors.sure_mean, torch.tensor([0.0, 0.1, -0.1]))


@pytest.mark.parametrize(
    ("errors", "level", "sentence"),
    [
        ({}, "good", "means right to about 0.01 sds, sds to about 1%"),
        ({"mean": 0.1}, "good", "means right to about 0.10 sds, sds to about 1%"),
        ({"mean": 0.3}, "suspect", "mu: mean probably 0.3 sds too high"),
        ({"mean": -0.8, "at": 1}, "bad", "tau: mean probably 0.8 sds too low"),
        ({"mean": -8.0, "at": 1}, "bad", "tau: mean more than 3 sds too low"),
        ({"log2_sd": math.log2(0.7), "at": 1}, "bad", "tau: sd probably 30% too small"),
        ({"log2_sd": math.log2(1.2), "at": 2}, "suspect", "theta[0]: sd probably 20% too large"),
        ({"log2_sd": -3.0, "at": 2}, "bad", "theta[0]: sd less than a third of what it should be"),
        ({"log2_sd": 3.0, "at": 2}, "bad", "theta[0]: sd more than three times what it should be"),
    ],
)
def test_verdict_says_what_is_wrong_and_where(errors, level, sentence):
    verdict = judge(statistics_of(**errors), labels=["mu", "tau", "theta[0]"])
    assert (verdict.level, verdict.sentence) == (level, sentence)
    assert str(verdict) == f"{level}: {sentence}"
    assert (verdict.worst is None) == (level == "good")


def test_verdict_names_a_direction_where_no_coordinate_says_as_much():
    p = GaussianTarget(torch.zeros(3), torch.tensor([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 1.0]]))
    x = torch.randn(4096, 3)
    verdict = judge(stein_statistics(x, p.score(x)), labels="abc".__getitem__)
    assert verdict.level == "bad"
    assert set(verdict.worst.sites) == {"a", "b"}
    assert " - " in verdict.sentence
    assert "too large" in verdict.sentence or "more than three times" in verdict.sentence


def test_verdict_takes_the_worst_of_all_instruments():
    small = torch.zeros(3)
    fisher = FisherStatistics(20.0, 1.0, 20.0, 1.0, coordinates=torch.tensor([0.0, 20.0, 0.0]))
    modes = ModeSearch((Mode(small, torch.tensor([0.0, 0.0, -5.0]), 0.05, 0.0, True),), 0.05, 48, 1000)
    stein = statistics_of(mean=0.2)
    assert judge(stein).worst.instrument == "stein"
    assert judge(stein, modes=modes).worst.instrument == "modes"
    assert judge(stein, modes=modes).level == "suspect"
    verdict = judge(stein, modes=modes, fisher=fisher)
    assert (verdict.level, verdict.worst.instrument, verdict.worst.sites) == ("bad", "fisher", ("x[1]",))
    assert [finding.instrument for finding in verdict.findings] == ["fisher", "modes", "stein"]
    assert "x[2] by -5.0 sds" in verdict.findings[1].text


def test_a_thin_tail_alone_is_suspect_and_never_bad():
    """A few draws may make up the total: only what it is without them, beyond its noise, makes a fit bad."""
    coordinates = torch.tensor([0.1, 0.0, 0.0])
    for total, bulk, bulk_se, level in (
        (0.9, 0.1, 0.01, "good"),
        (2000.0, 0.1, 0.01, "suspect"),
        (2000.0, 15.0, 3.0, "suspect"),
        (20.0, 15.0, 0.1, "bad"),
    ):
        fisher = FisherStatistics(total, 0.1, bulk, bulk_se, coordinates)
        assert judge(statistics_of(), fisher=fisher).level == level


def fisher_of(total, bulk=None, dim=3):
    return FisherStatistics(total, 0.0, total if bulk is None else bulk, 0.0, torch.full((dim,), total / dim))


@pytest.mark.parametrize(
    ("fisher", "is_alarm"),
    [
        (fisher_of(0.99), False),
        (fisher_of(1.01), True),
        (fisher_of(2000.0, bulk=0.1), True),
        (fisher_of(20.0), True),
        (fisher_of(0.0), False),
        (fisher_of(1.99, dim=64), False),
        (fisher_of(2.01, dim=64), True),
    ],
)
def test_a_divergence_is_alarming_where_it_makes_a_fit_suspect(fisher, is_alarm):
    assert is_alarming(fisher) == is_alarm
    assert (judge(statistics_of(), fisher=fisher).level != "good") == is_alarm


@pytest.mark.parametrize("fisher", [fisher_of(3.0), fisher_of(9.9), fisher_of(2000.0, bulk=0.1)])
def test_a_suspect_divergence_is_dismissed_where_chains_rule_errors_out_and_nowhere_else(fisher):
    verdict = judge(statistics_of(), fisher=fisher, drift=drift_of(error=0.1, se=0.04, distance=0.04))
    assert (verdict.level, verdict.findings, verdict.fisher) == ("good", (), fisher)
    for drift in (
        None,
        drift_of(error=0.1, se=0.06),
        drift_of(distance=0.06),
        drift_of(correlation=0.5),
    ):
        verdict = judge(statistics_of(), fisher=fisher, drift=drift)
        assert (verdict.level, [finding.instrument for finding in verdict.findings]) == ("suspect", ["fisher"])


def test_a_bad_divergence_is_never_dismissed():
    verdict = judge(statistics_of(), fisher=fisher_of(10.1), drift=drift_of())
    assert (verdict.level, verdict.worst.instrument) == ("bad", "fisher")


def test_what_dismisses_a_divergence_is_in_the_table_of_thresholds():
    fisher, drift = fisher_of(3.0), drift_of(error=0.1, distance=0.04)
    for ruled_out, level in (((0.2, 0.03), "suspect"), ((0.09, 0.05), "suspect"), ((0.11, 0.041), "good")):
        assert judge(statistics_of(), fisher=fisher, drift=drift, thresholds=Thresholds(ruled_out=ruled_out)).level == (
            level
        )


@pytest.mark.parametrize(
    ("share", "distance", "level", "percentage"),
    [
        (0.0031, 30.0, "suspect", "0.31%"),
        (0.0031, 3000.0, "suspect", "0.31%"),
        (0.0031, 5.0, "good", ""),  # an effect of .05
        (0.05, 0.1, "suspect", "5%"),  # by its share alone
        (0.09, 3000.0, "suspect", "9%"),
        (0.31, 0.1, "bad", "31%"),
    ],
)
def test_a_small_lost_mode_is_suspect_by_its_effect_and_bad_by_its_share_alone(share, distance, level, percentage):
    mode = Mode(torch.zeros(3), torch.tensor([0.0, 0.0, -distance]), share, 0.0, True)
    verdict = judge(statistics_of(), modes=ModeSearch((mode,), 0.0, 48, 1000))
    assert verdict.level == level
    if level != "good":
        assert verdict.sentence.startswith(f"another mode with about {percentage} of the posterior's mass has no draws")
        assert verdict.worst.sites == ("x[2]",)


def test_draws_without_a_density_are_a_finding():
    zero = torch.zeros(3)
    verdict = judge(SteinStatistics(errors_of(), None, zero, zero, num_draws=900, num_nonfinite=100))
    assert verdict.level == "bad"
    assert "not finite at 100 of 1000 draws" in verdict.sentence


def test_thresholds_can_be_replaced():
    stein = statistics_of(mean=0.3)
    assert judge(stein, thresholds=Thresholds(moment=(0.4, 0.8))).level == "good"
    assert judge(stein, thresholds=Thresholds(moment=(0.1, 0.2))).level == "bad"


def test_verdict_as_plain_values():
    values = judge(statistics_of(mean=0.3), drift=None).as_dict()
    assert values["verdict"] == "suspect"
    assert values["stein_mean_max"] == pytest.approx(0.3)
    assert all(isinstance(value, (str, int, float)) for value in values.values())


@pytest.mark.parametrize("count", [1, 10, 1000])
def test_the_largest_of_many_errors_counts_beyond_chance(count):
    """Noise of so many standard errors has a largest of about ``sqrt(2 log 4K)``; .5 is an error whatever its noise."""
    torch.manual_seed(count)
    se = torch.full((count,), 0.05, dtype=torch.double)

    def largest(mean):
        none, sure = torch.zeros_like(se), mean.sign() * (mean.abs() - 2.0 * se).clamp(min=0.0)
        return MomentErrors(mean, se, none, se, sure, none).largest()

    noise = [largest(se * torch.randn_like(se)) for _ in range(200)]
    assert sum(noise) / len(noise) < 0.005
    spike = torch.zeros_like(se)
    spike[0] = 0.4
    assert largest(spike) == pytest.approx(0.4 - 0.05 * max(2.0, math.sqrt(2.0 * math.log(4.0 * count))))
    spike[0] = 0.7
    assert largest(spike) == pytest.approx(0.6)


@pytest.mark.parametrize(("total", "se", "level"), [(18.0, 11.0, "suspect"), (0.5, 0.5, "good"), (0.0, 0.0, "good")])
def test_a_divergence_that_few_draws_make_up_counts(total, se, level):
    x = torch.randn(4096, 2, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    fisher = FisherStatistics(total, se, 0.1, 0.05, torch.tensor([0.1, 0.0], dtype=torch.double))
    assert judge(stein_statistics(x, -x), fisher=fisher).level == level


def test_errors_in_some_directions_stand_at_their_places_among_others():
    errors = MomentErrors(*(10.0 * (k + 1) + torch.arange(3.0) for k in range(6)))
    placed = errors.at_places([4, 0], [2, 1], 5)
    assert placed.mean.tolist() == [11.0, 0.0, 0.0, 0.0, 12.0]
    assert placed.sure_log2_sd.tolist() == [61.0, 0.0, 0.0, 0.0, 62.0]
