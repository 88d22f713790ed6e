"""Data that a site cannot have are refused by name, as Pyro's SVI and NUTS refuse them, and no others are."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nan

from pyro_sivism import SIVISM, FixedGaussian
from pyro_sivism.errors import ModelError

pytestmark = pytest.mark.usefixtures("small_recipe")


def step(model, *args, dim=1):
    """One step of a fit, whose target is bound to the data first; the fit, for more."""
    sivism = SIVISM(model, preconditioner=FixedGaussian(torch.zeros(dim), torch.ones(dim)))
    sivism.step(*args)
    return sivism


def rows_of(make_likelihood):
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 3):
            pyro.sample("y", make_likelihood(mu), obs=y)

    return model


# --- shapes ------------------------------------------------------------------------------------------


def regression(y):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 3):
        pyro.sample("y", dist.Normal(slope * torch.arange(3.0), 1.0), obs=y)


def without_plate(y):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(slope * torch.arange(3.0), 1.0), obs=y)


def as_event(y):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(slope * torch.arange(3.0), 1.0).to_event(1), obs=y)


@pytest.mark.parametrize("model", [regression, without_plate, as_event])
def test_a_column_beside_a_row(model):
    """Nine terms for three: the posterior would be a third as wide."""
    with pytest.raises(ModelError, match=r"site 'y' has shape \(3,\) and observations of shape \(3, 1\), .* 9 numbers"):
        step(model, torch.ones(3, 1))


def test_more_observations_than_a_plate_has():
    with pytest.raises(ModelError, match=r"site 'y' has shape \(3,\) and observations of shape \(2, 3\).*a plate"):
        step(regression, torch.ones(2, 3))


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (regression, (3,)),
        (regression, (1, 3)),
        (without_plate, (3,)),
        (without_plate, (5, 3)),
        (as_event, (3,)),
        (as_event, (5, 3)),
    ],
)
def test_shapes_that_are_right(model, shape):
    step(model, torch.ones(shape))


# --- supports ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("likelihood", "y", "off"),
    [
        (lambda mu: dist.Bernoulli(logits=mu), [1.0, -1.0, -1.0], 2),
        (lambda mu: dist.Poisson(mu.exp()), [0.0, 1.5, 2.0], 1),
        (lambda mu: dist.Exponential(mu.exp()), [0.5, -1.0, 2.0], 1),
        (lambda mu: dist.NegativeBinomial(3.0, logits=mu), [0.5, 1.0, 2.0], 1),
        (lambda mu: dist.Binomial(torch.tensor([3.0, 4.0, 5.0]), logits=mu), [3.0, 5.0, 5.0], 1),
        (lambda mu: dist.LogNormal(mu, 1.0), [-1.0, nan, 2.0], 1),
    ],
    ids=["labels", "no_count", "waiting", "negative_binomial", "beyond_the_total", "beside_a_missing_one"],
)
def test_observations_off_the_support(likelihood, y, off):
    with pytest.raises(
        ModelError,
        match=f"site 'y' .* has observations off its support, .*: {off} of them; .* from [-0-9.]* to .*Recode",
    ):
        step(rows_of(likelihood), torch.tensor(y))


def test_an_event_off_its_support():
    def model(shares):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("shares", dist.Dirichlet(mu.exp().expand(3)), obs=shares)

    step(model, torch.tensor([0.5, 0.25, 0.25]))
    with pytest.raises(ModelError, match=r"site 'shares' \(Dirichlet\).*off its support"):
        step(model, torch.tensor([0.5, 0.5, 0.5]))


def test_later_minibatches_are_looked_at_too():
    sivism = step(rows_of(lambda mu: dist.Bernoulli(logits=mu)), torch.tensor([1.0, 0.0, 0.0]))
    with pytest.raises(ModelError, match="off its support"):
        sivism.step(torch.tensor([1.0, -1.0, -1.0]))


def masked(y):
    with poutine.mask(mask=y > 0):
        rows_of(lambda mu: dist.Exponential(mu.exp()))(y)


def masked_in_part(y):
    rate = pyro.sample("mu", dist.Normal(0.0, 1.0)).exp().expand(3)
    pyro.sample("y", dist.Exponential(rate).mask(torch.tensor([True, False, True])).to_event(1), obs=y)


@pytest.mark.parametrize(
    ("model", "y"),
    [
        (rows_of(lambda mu: dist.Bernoulli(logits=mu, validate_args=False)), [0.2, 0.9, 1.0]),
        (rows_of(lambda mu: dist.Uniform(0.0, 3.0 * mu.exp())), [0.5, 1.0, 2.9]),  # at other latents off its support
        (masked, [1.0, -1.0, 2.0]),
        (rows_of(lambda mu: dist.Exponential(mu.exp()).mask(torch.tensor([True, False, True]))), [1.0, -1.0, 2.0]),
        (masked_in_part, [1.0, -1.0, 2.0]),
    ],
    ids=["soft_labels", "moving_support", "masked", "masked_distribution", "event_masked_in_part"],
)
def test_observations_that_are_right(model, y):
    step(model, torch.tensor(y))


def test_whoever_turned_validation_off_wants_no_check():
    with pyro.validation_enabled(False):
        step(rows_of(lambda mu: dist.Bernoulli(logits=mu)), torch.tensor([1.0, -1.0, 0.5]))


def test_what_is_computed_is_no_observation():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 3):
            pyro.deterministic("column", mu * torch.ones(3, 1))
            pyro.factor("term", -torch.ones(3, 1) * mu.square())
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    step(model, torch.ones(3))
