"""A run that ends by itself lets q follow chains from its draws; whether it does, where it does not, and what it is
for."""

from __future__ import annotations

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_sivism import SIVISM, FisherDivergence
from pyro_sivism.assessment import distance_to_chains
from pyro_sivism.errors import FitWarning
from pyro_sivism.objectives import SlicedDistance
from pyro_sivism.stopping import Evidence
from pyro_sivism.training import Training


def banana():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.sample("b", dist.Normal(a * a, 0.5))


def minibatches(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(y), subsample_size=10) as rows:
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y[rows])


def wide():
    pyro.sample("x", dist.Normal(torch.zeros(257), 1.0).to_event(1))


def fit(model, *args, num_steps=None, callbacks=(), **settings):
    sivism = SIVISM(model, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FitWarning)
        return sivism, sivism.run(num_steps, *args, progress_bar=False, callbacks=callbacks)


@pytest.fixture
def followed(monkeypatch):
    """What each call of ``Training.follow`` was given, with the number of steps taken before."""
    seen = []
    follow = Training.follow

    def record(self, distance):
        seen.append((self.num_steps, distance is not None))
        follow(self, distance)

    monkeypatch.setattr(Training, "follow", record)
    return seen


def evidence(monkeypatch, *found):
    """Let a run find this, (moment error, divergence) before each cycle."""
    left = list(found)

    def gathered(target, affine, family, objective, num_steps, rule):
        return Evidence(num_steps, *left.pop(0)), None

    monkeypatch.setattr("pyro_sivism.cycles.gather_evidence", gathered)


UNSETTLED, SETTLED = (0.3, 3.0), (0.01, 0.1)


@pytest.mark.usefixtures("small_recipe")
def test_a_cycle_follows_new_chains_every_300_steps(monkeypatch, followed):
    monkeypatch.setattr("pyro_sivism.stopping._FIRST_CYCLE", 390)
    evidence(monkeypatch, UNSETTLED, UNSETTLED, SETTLED)
    sivism, result = fit(banana)
    assert result.num_steps == 400
    assert followed == [(0, True), (300, True), (390, True), (400, False)]
    assert result.seconds["chains"] > 0
    assert sivism._training._distance is None


@pytest.mark.usefixtures("small_recipe")
def test_chains_are_not_followed_where_q_is_settled(monkeypatch, followed):
    evidence(monkeypatch, SETTLED, SETTLED)
    _, result = fit(banana)
    assert result.num_steps == 300
    assert not any(follows for _, follows in followed)
    assert "chains" not in result.seconds


@pytest.mark.usefixtures("small_recipe")
def test_the_papers_game_is_left_alone(monkeypatch, followed):
    for objective, follows in ((FisherDivergence(path_weight=0), False), (FisherDivergence(), True)):
        followed.clear()
        evidence(monkeypatch, UNSETTLED, SETTLED)
        fit(banana, loss=objective)
        assert any(each for _, each in followed) == follows


@pytest.mark.usefixtures("small_recipe")
def test_a_run_of_so_many_steps_follows_nothing(followed):
    fit(banana, num_steps=100)
    assert followed == []


@pytest.mark.parametrize(("model", "args"), [(minibatches, (torch.randn(40),)), (wide, ())])
def test_no_chains_can_be_followed_in_the_noise_of_minibatches_or_in_many_dimensions(model, args):
    sivism = SIVISM(model).setup(*args)
    assert distance_to_chains(sivism.target, sivism.guide.affine, sivism._training.averaged, 128) is None


def test_a_run_that_is_cut_short_leaves_nothing_to_follow(monkeypatch):
    evidence(monkeypatch, UNSETTLED)
    following = []

    def stop(sivism, info):
        following.append(sivism._training._distance is not None)
        return info.step == 5

    sivism, _ = fit(banana, callbacks=[stop])
    assert following == [True] * 5
    assert sivism._training._distance is None


def test_the_guides_gradient_is_that_of_both():
    training = SIVISM(banana).setup()._training
    training.warm_up()
    distance = SlicedDistance(torch.randn(1000, 2) + 3.0, torch.eye(2), training.num_own_particles)

    def gradients():
        torch.manual_seed(0)
        return training._own_guide_gradients()

    alone = gradients()
    training.follow(distance)
    both = gradients()
    torch.manual_seed(0)
    params = list(training._guide_stepper.params.values())
    extra = torch.autograd.grad(distance(training.family.rsample(128).x), params, allow_unused=True)
    assert any(part is not None and part.abs().max() > 0.1 for part in extra)
    for one, two, more in zip(alone, both, extra):
        if more is not None:
            torch.testing.assert_close(two, one + more)
    assert both[len(params)] == alone[len(params)], "what is reported is the objective's"


def test_what_is_followed_is_measured_along_the_coordinates_of_x():
    """In the whitened space, where these are rows of A."""
    sivism = SIVISM(banana).setup()
    affine = sivism.guide.affine
    distance = distance_to_chains(sivism.target, affine, sivism._training.averaged, 128)
    y = torch.randn(1000, 2)
    x = affine.forward(y) - affine.loc
    along = y @ distance.directions[:2].mT
    torch.testing.assert_close(along * affine.variances.sqrt(), x)


def test_steps_read_new_chains_where_they_have_read_the_old_ones():
    """As compiled ones must, which know where, but not what."""
    training = SIVISM(banana).setup()._training
    training.follow(SlicedDistance(torch.randn(100, 2), torch.eye(2), 128))
    before = training._distance
    other = SlicedDistance(torch.randn(100, 2) + 5.0, torch.eye(2), 128)
    training.follow(other)
    assert training._distance is before
    y = torch.randn(128, 2)
    assert before(y) == other(y)


@pytest.mark.slow
def test_following_chains_reaches_the_ends_of_a_banana():
    """b is N(a^2, .25): sd^2 of b is 2.25. The Gaussian that the fit starts from has a third of that."""
    sds = []
    for seed in range(3):
        pyro.set_rng_seed(seed)
        sivism, _ = fit(banana)
        x = sivism.sample_unconstrained(20_000)
        sds.append(x.std(0))
    median = torch.stack(sds).median(0).values
    assert abs(math.log2(median[0])) < 0.1
    assert abs(math.log2(median[1] / 1.5)) < 0.15
