"""The estimate of log q(x) errs the way its label says, where log q is exact: a linear mixing map."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from .oracle import NUM_STANDARD_ERRORS, GaussianQ, linear_family

pytestmark = pytest.mark.usefixtures("float64")


def errors(family, num_mixing: int, own_z: bool, num_calls: int = 100, batch_size: int = 50):
    """Mean and standard error of estimate minus log q, over calls: within one the points share their mixing draws."""
    q = GaussianQ.of(family)
    means = []
    with torch.no_grad():
        for _ in range(num_calls):
            sample = family.rsample(batch_size)
            estimate = family.log_prob_estimate(sample.x, num_mixing, sample.z if own_z else None)
            means.append((estimate.value - q.log_prob(sample.x)).mean())
    means = torch.stack(means)
    return means.mean(), means.std() / math.sqrt(num_calls)


@pytest.mark.parametrize("kind", ["diagonal", "low_rank"])
@pytest.mark.parametrize("num_mixing", [1, 5, 50])
def test_fresh_draws_err_low_and_own_draws_high(kind, num_mixing):
    family = linear_family(kind)
    low, low_se = errors(family, num_mixing, own_z=False)
    high, high_se = errors(family, num_mixing, own_z=True)
    assert low < -NUM_STANDARD_ERRORS * low_se
    assert high > NUM_STANDARD_ERRORS * high_se


@pytest.mark.parametrize("own_z", [False, True])
def test_error_vanishes_as_mixing_draws_grow(own_z):
    """By 1/K: a hundred times the draws leave less than a twentieth of the error."""
    family = linear_family("diagonal")
    few, _ = errors(family, 20, own_z)
    many, se = errors(family, 2000, own_z, num_calls=100)
    assert many.abs() < few.abs() / 20 + NUM_STANDARD_ERRORS * se
    assert few.abs() > 0.05


def test_own_draw_alone_gives_log_q_given_z():
    """At K = 1 with the own z the estimate is log q(x|z), whose mean is minus the entropy of the conditional."""
    family = linear_family("low_rank")
    conditional = family.conditional
    with torch.no_grad():
        _, scale = conditional.loc_scale(torch.zeros(family.mixing_dim))
        covariance = scale.square().diag() + conditional.factor @ conditional.factor.T
        sample = family.rsample(20_000)
        got = family.log_prob_estimate(sample.x, 1, sample.z).value
    entropy = 0.5 * (3 * (1 + math.log(2 * math.pi)) + torch.linalg.slogdet(covariance).logabsdet)
    assert (got.mean() + entropy).abs() < NUM_STANDARD_ERRORS * got.std() / math.sqrt(len(got))


@pytest.mark.parametrize("batch_shape", [(), (4,), (2, 3)])
def test_points_of_any_batch_shape(batch_shape):
    """Each point has the value it would have on its own, from the same mixing draws."""
    family = linear_family("low_rank")
    x = torch.randn(*batch_shape, 3)
    torch.manual_seed(1)
    together = family.log_prob_estimate(x, 30).value
    for index in itertools.product(*map(range, batch_shape)):
        torch.manual_seed(1)
        alone = family.log_prob_estimate(x[index], 30).value
        torch.testing.assert_close(together[index], alone)
    assert together.shape == batch_shape
