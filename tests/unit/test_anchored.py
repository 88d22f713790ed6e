"""The anchored target: exact at the anchor, unbiased elsewhere, and with far less noise than a minibatch."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_sivism import SIVISM
from pyro_sivism.errors import TargetPathWarning
from pyro_sivism.family import WhitenedTarget
from pyro_sivism.layout import LatentLayout
from pyro_sivism.target import Target
from pyro_sivism.target.anchored import AnchoredTarget

pytestmark = pytest.mark.usefixtures("float64")

DIM = 3


def data(num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    covariates = torch.randn(num_rows, DIM, generator=generator)
    return covariates, covariates.sum(-1) + torch.randn(num_rows, generator=generator)


def make_model(num_rows: int, subsample_size: int | None):
    def model(covariates, outcomes):
        weights = pyro.sample("weights", dist.Normal(0.0, 10.0).expand([DIM]).to_event(1))
        with pyro.plate("rows", num_rows, subsample_size=subsample_size) as rows:
            pyro.sample("outcomes", dist.Normal(covariates[rows] @ weights, 1.0), obs=outcomes[rows])

    return model


def make_target(model, *args) -> Target:
    trace = pyro.poutine.trace(model).get_trace(*args)
    return Target(model, LatentLayout.from_trace(trace), trace, args)


@pytest.mark.parametrize("width", [10, 25])
def test_exact_at_the_anchor_whichever_the_minibatch(width):
    args = data(60)
    full, anchor = make_target(make_model(60, None), *args), torch.ones(DIM)
    target = AnchoredTarget(make_target(make_model(60, width), *args), anchor)
    for _ in range(3):
        target.resample_minibatch()
        torch.testing.assert_close(target.log_density_and_score(anchor[None]), full.log_density_and_score(anchor[None]))


@pytest.mark.parametrize(("num_rows", "width", "most"), [(60, 10, 1), (60, 25, 5), (61, 60, 8), (1009, 20, 5)])
def test_the_anchor_sees_all_rows_about_equally_often(num_rows, width, most):
    target = AnchoredTarget(make_target(make_model(num_rows, width), *data(num_rows)), torch.ones(DIM))
    visits = sum(indices["rows"].bincount(minlength=num_rows) for indices in target._cover())
    assert visits.max() - visits.min() <= (num_rows in (61, 1009))
    assert visits.max() <= most


def test_unbiased_and_less_noisy_away_from_it():
    num_rows, width = 2000, 20
    args = data(num_rows)
    full = make_target(make_model(num_rows, None), *args)
    plain = make_target(make_model(num_rows, width), *args)
    anchor = torch.ones(DIM)
    x = anchor + torch.tensor([[1.0, -1.0, 1.0]]) / num_rows**0.5  # an sd away in each coordinate
    anchored = AnchoredTarget(plain, anchor)
    scores, noisy = [], []
    for _ in range(400):
        anchored.resample_minibatch()
        scores.append(anchored.score(x))
        noisy.append(plain.score(x))
    scores, noisy, want = torch.cat(scores), torch.cat(noisy), full.score(x)[0]
    standard_error = scores.std(0) / len(scores) ** 0.5
    assert bool(((scores.mean(0) - want).abs() < 4.5 * standard_error).all())  # fails once in 50,000
    # sqrt(N / n) = 10 sds of noise become about sqrt(D / n): 30 times less, give or take a tenth.
    assert bool((scores.std(0) < noisy.std(0) / 10).all())


def test_log_density_and_score_belong_together():
    args = data(60)
    target = AnchoredTarget(make_target(make_model(60, 10), *args), torch.ones(DIM))
    x = torch.randn(4, DIM, requires_grad=True)
    log_density, score = target.log_density_and_score(x)
    (gradient,) = torch.autograd.grad(log_density.sum(), x)
    torch.testing.assert_close(score, gradient)
    torch.testing.assert_close(target.score(x), gradient)
    torch.testing.assert_close(target.log_density(x), log_density)


def test_no_longer_current_when_the_data_change():
    covariates, outcomes = data(60)
    plain = make_target(make_model(60, 10), covariates, outcomes)
    target = AnchoredTarget(plain, torch.ones(DIM))
    assert target.is_current
    outcomes[0] += 1.0
    assert not target.is_current
    target = AnchoredTarget(plain, torch.ones(DIM))
    assert target.is_current
    plain.rebind((covariates, outcomes.clone()))
    assert not target.is_current


@pytest.mark.parametrize("what", ["data", "module"])
def test_no_longer_current_when_what_the_model_closes_over_changes(what):
    covariates, outcomes = data(60)
    shift = torch.nn.Linear(1, 1)

    def model():
        weights = pyro.sample("weights", dist.Normal(0.0, 10.0).expand([DIM]).to_event(1))
        mean = covariates @ weights + shift(covariates[:, :1])[:, 0]
        with pyro.plate("rows", 60, subsample_size=10) as rows:
            pyro.sample("outcomes", dist.Normal(mean[rows], 1.0), obs=outcomes[rows])

    plain = make_target(model)
    target = AnchoredTarget(plain, torch.ones(DIM))
    target.score(torch.zeros(1, DIM))
    assert target.is_current
    with torch.no_grad():
        (outcomes if what == "data" else shift.bias).add_(1.0)
    assert not target.is_current
    plain.score(torch.zeros(1, DIM))  # recorded anew, perhaps
    assert not target.is_current


def test_data_of_inference_mode_can_be_anchored():
    with torch.inference_mode():
        args = data(60)
    assert AnchoredTarget(make_target(make_model(60, 10), *args), torch.ones(DIM)).is_current


def test_no_longer_current_when_the_graph_is_given_up():
    covariates, outcomes = data(60)
    shift = [0.0]

    def model(covariates, outcomes):
        weights = pyro.sample("weights", dist.Normal(0.0, 10.0).expand([DIM]).to_event(1))
        with pyro.plate("rows", 60, subsample_size=10) as rows:
            pyro.sample("outcomes", dist.Normal(covariates[rows] @ weights + shift[0], 1.0), obs=outcomes[rows])

    plain = make_target(model, covariates, outcomes)
    target = AnchoredTarget(plain, torch.ones(DIM))
    shift[0] = 1.0
    plain.check_soon()
    with pytest.warns(TargetPathWarning, match="no longer agrees"):
        target.score(torch.zeros(1, DIM))
    assert not target.is_current
    assert not AnchoredTarget.applies(plain)


def test_a_subsampled_fit_has_its_mean_right():
    """A step sees 20 of 2,000 rows, whose score alone has a noise of 10 posterior sds."""
    covariates, outcomes = data(2000)
    sivism = SIVISM(make_model(2000, 20))
    sivism.run(300, covariates, outcomes, progress_bar=False)
    precision = covariates.mT @ covariates + 1e-2 * torch.eye(DIM)
    mean = torch.linalg.solve(precision, covariates.mT @ outcomes)
    draws = sivism.sample(20_000)["weights"]  # whose mean has a standard error of .007 sds
    errors = (draws.mean(0) - mean) / torch.linalg.inv(precision).diagonal().sqrt()
    assert bool((errors.abs() < 0.15).all())


@pytest.mark.parametrize("how", ["in place", "another tensor"])
def test_a_fit_whose_data_change_is_anchored_no_more(how):
    covariates, outcomes = data(60)
    sivism = SIVISM(make_model(60, 10))
    sivism.step(covariates, outcomes)
    x = torch.zeros(1, DIM)
    plain = WhitenedTarget(sivism.target, sivism.guide.affine)
    assert not torch.allclose(sivism._training.target.score(x), plain.score(x))
    if how == "in place":
        outcomes += 1.0
    sivism.step(covariates, outcomes if how == "in place" else outcomes + 1.0)
    torch.testing.assert_close(sivism._training.target.score(x), plain.score(x))
    sivism.step(covariates, outcomes)
    torch.testing.assert_close(sivism._training.target.score(x), plain.score(x))


def test_applies_to_one_plate_without_latents_or_parameters():
    args = data(60)
    assert AnchoredTarget.applies(make_target(make_model(60, 10), *args))
    assert not AnchoredTarget.applies(make_target(make_model(60, None), *args))

    def local(covariates, outcomes):
        with pyro.plate("rows", 60, subsample_size=10) as rows:
            effects = pyro.sample("effects", dist.Normal(0.0, 1.0))
            pyro.sample("outcomes", dist.Normal(effects, 1.0), obs=outcomes[rows])

    def learned(covariates, outcomes):
        pyro.sample("weights", dist.Normal(pyro.param("loc", torch.zeros(())), 1.0))
        with pyro.plate("rows", 60, subsample_size=10) as rows:
            pyro.sample("outcomes", dist.Normal(0.0, 1.0), obs=outcomes[rows])

    assert not AnchoredTarget.applies(make_target(local, *args))
    assert not AnchoredTarget.applies(make_target(learned, *args))
