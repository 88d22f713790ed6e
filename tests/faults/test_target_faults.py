"""Models that the target cannot take, or takes only by care: each works, or raises an error that names the cure."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger, init_to_median, init_to_value

from pyro_sivism.errors import (
    ArgumentError,
    EmptyModelError,
    ModelError,
    NonDeterministicModelError,
    NonFiniteError,
    UnsupportedSiteError,
)
from pyro_sivism.layout import LatentLayout
from pyro_sivism.target.density import Target
from pyro_sivism.target.starts import check_finite_start

pytestmark = pytest.mark.usefixtures("float64")


def trace_of(model, *args, init=init_to_median, **kwargs):
    return poutine.trace(InitMessenger(init)(model)).get_trace(*args, **kwargs)


def make_target(model, *args, init=init_to_median, **kwargs):
    trace = trace_of(model, *args, init=init)
    return Target(model, LatentLayout.from_trace(trace), trace, args, **kwargs)


def observe(mean, sd=1.0):
    pyro.sample("y", dist.Normal(mean, sd), obs=torch.tensor(0.7))


# --- refused ------------------------------------------------------------------------------------------


def hidden_noise():
    observe(pyro.sample("a", dist.Normal(0.0, 1.0)) + torch.randn(()))


def hidden_discrete_site():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with poutine.block():
        k = pyro.sample("k", dist.Bernoulli(0.1))
    observe(a + 3 * k)


def dropout():
    w = pyro.sample("w", dist.Normal(torch.zeros(20), 1.0).to_event(1))
    observe(torch.nn.functional.dropout(w, 0.5).sum())


def counting_calls(calls=[0.0]):  # noqa: B006 -- state kept between the runs is the fault
    calls[0] += 1.0
    observe(pyro.sample("a", dist.Normal(0.0, 1.0)) + calls[0])


@pytest.mark.parametrize("model", [hidden_noise, hidden_discrete_site, dropout, counting_calls])
@pytest.mark.parametrize("seed", range(3))
def test_a_random_model_is_refused(model, seed):
    pyro.set_rng_seed(seed)
    with pytest.raises(NonDeterministicModelError, match=r"differed between two runs.*pyro\.sample.*poutine\.block"):
        make_target(model)


def test_a_support_that_moves_with_a_latent_is_refused():
    def model():
        theta = pyro.sample("theta", dist.Exponential(1.0))
        pyro.sample("x", dist.Uniform(0.0, theta))

    with pytest.raises(ModelError, match=r"support of latent site 'x' depends on other latents.*Uniform\(0, 1\)"):
        make_target(model)


def test_a_support_that_moves_with_new_data_is_refused():
    def model(y):
        top = pyro.sample("top", dist.Uniform(0.0, y.max()))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(top, 1.0), obs=y)

    target = make_target(model, torch.tensor([1.0, 2.0]))
    target.rebind((torch.tensor([2.0, 0.5]),))  # the same bounds
    with pytest.raises(ModelError, match=r"'top' depends on .* the data"):
        target.rebind((torch.tensor([1.0, 3.0]),))


def branch_that_draws():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    if a > 0:
        pyro.sample("b", dist.Normal(0.0, 1.0))
    observe(a)


@pytest.mark.parametrize(
    ("start", "message"),
    [(1.0, "'b' was there at set-up but not at other values.*torch.where"), (-1.0, "drew latent site 'b'")],
)
@pytest.mark.parametrize("distance", [0.0, 5.0], ids=["seen at set-up", "seen later"])
def test_a_set_of_latents_that_depends_on_a_latent_is_refused(start, message, distance):
    init = init_to_value(values={"a": torch.tensor(start * (0.05 + distance))})

    def fit():
        target = make_target(branch_that_draws, init=init)
        target.log_density(torch.full((2, target.dim), -start))

    with pytest.raises(ModelError, match=message):
        fit()


def test_an_infinite_discrete_latent_is_refused():
    def model():
        pyro.sample("n", dist.Poisson(3.0))
        pyro.sample("a", dist.Normal(0.0, 1.0))

    with pytest.raises(UnsupportedSiteError, match=r"'n' \(Poisson\).*truncate.*Categorical.*poutine\.condition"):
        LatentLayout.from_trace(trace_of(model))


@pytest.mark.parametrize("fn", [dist.ProjectedNormal(torch.ones(3)), dist.VonMises3D(torch.tensor([3.0, 0.0, 0.0]))])
def test_a_spherical_support_is_refused(fn):
    def model():
        pyro.sample("direction", fn)

    # No initial value: initializing on a sphere fails in Pyro itself.
    trace = poutine.trace(poutine.condition(model, {"direction": torch.tensor([1.0, 0.0, 0.0])})).get_trace()
    trace.nodes["direction"]["is_observed"] = False
    with pytest.raises(UnsupportedSiteError, match=r"'direction'.*ProjectedNormalReparam"):
        LatentLayout.from_trace(trace)


def test_a_delta_latent_is_refused():
    def model():
        a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("copy", dist.Delta(a, event_dim=1).mask(torch.tensor(True)))

    with pytest.raises(UnsupportedSiteError, match=r"'copy' is a Delta.*pyro\.deterministic\('copy', value\)"):
        LatentLayout.from_trace(trace_of(model))


@pytest.mark.parametrize("mark", ["none", "observed", "conditioned", "discrete only"])
def test_an_empty_model_is_refused(mark):
    def model():
        if mark == "observed":
            observe(0.0)
        if mark == "conditioned":
            pyro.sample("a", dist.Normal(0.0, 1.0))
        if mark == "discrete only":
            pyro.sample("k", dist.Bernoulli(0.3))

    with pytest.raises(EmptyModelError, match=r"no continuous latent site.*poutine\.condition"):
        LatentLayout.from_trace(trace_of(poutine.condition(model, {"a": torch.tensor(0.0)})))


def test_sequential_enumeration_is_refused():
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        observe(a + pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "sequential"}))

    with pytest.raises(ModelError, match=r"'k' is marked infer=\{'enumerate': 'sequential'\}.*Remove the mark"):
        make_target(model)


def test_sites_of_one_sum_with_different_scales_are_refused():
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        k = pyro.sample("k", dist.Bernoulli(0.3))
        with poutine.scale(scale=2.0):
            observe(a + k)

    with pytest.raises(ModelError, match=r"'k' and 'y' share an enumerated variable but have different scales"):
        make_target(model)


def test_a_scale_that_varies_inside_one_sum_is_refused():
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with poutine.scale(scale=torch.tensor(2.0)):
            k = pyro.sample("k", dist.Bernoulli(0.3))
        with pyro.plate("data", 2), poutine.scale(scale=torch.tensor([1.0, 2.0])):
            pyro.sample("y", dist.Normal(a + k, 1.0), obs=torch.zeros(2))

    with pytest.raises(ModelError, match=r"'k' and 'y' .* different scales"):
        make_target(model)


def test_an_initial_value_of_the_wrong_shape_is_refused():
    def model():
        with pyro.plate("group", 4):
            pyro.sample("theta", dist.Normal(0.0, 1.0))

    init = init_to_value(values={"theta": torch.zeros(3)})
    with pytest.raises(ModelError, match=r"'theta' has an initial value of shape \(3,\); expected \(4,\)"):
        make_target(model, init=init)
    # One number is every group's start, not one latent for all of them.
    assert make_target(model, init=init_to_value(values={"theta": torch.tensor(0.5)})).dim == 4


@pytest.mark.parametrize("shape", [(2,), (0, 2), (3, 1), (2, 3, 2)])
def test_points_of_a_wrong_shape_are_refused(shape):
    def model():
        pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    with pytest.raises(ArgumentError, match=r"expected points of shape \(B, 2\) with B > 0"):
        make_target(model).score(torch.zeros(shape))


def test_an_error_of_the_model_s_own_is_shown_as_it_is():
    def model(y):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        if y > 5:
            raise ValueError("my own complaint")
        observe(a)

    target = make_target(model, torch.tensor(1.0))
    assert target.rebind((torch.tensor(10.0),))
    with pytest.raises(ValueError, match="my own complaint"):
        target.score(torch.zeros(2, 1))


# --- not finite ---------------------------------------------------------------------------------------


def test_nan_in_the_data_is_named():
    def model(y):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("temperature", dist.Normal(a, 1.0), obs=y)

    target = make_target(model, torch.tensor([1.0, torch.nan]))
    with pytest.raises(NonFiniteError, match=r"any of 3 starting points.*site\(s\) temperature\..*NaN.*init_loc_fn"):
        check_finite_start(target, torch.zeros(3, 1))


def test_an_observation_off_its_support_is_named():
    def model():
        a = pyro.sample("a", dist.Gamma(2.0, 1.0))
        pyro.sample("waiting", dist.LogNormal(a, 1.0, validate_args=False), obs=torch.tensor(-1.0))

    with pytest.raises(NonFiniteError, match=r"site\(s\) waiting"):
        check_finite_start(make_target(model), torch.zeros(1, 1))


def test_finite_starts_are_kept_and_others_left_out():
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.factor("fence", torch.where(a > 0, 0.0, -torch.inf))

    starts = torch.tensor([[1.0], [-1.0], [2.0]])
    target = make_target(model, init=init_to_value(values={"a": torch.tensor(1.5)}))
    assert torch.equal(check_finite_start(target, starts), starts[[0, 2]])


def covariance():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), a * torch.eye(2)), obs=torch.ones(2))


def validated():
    a = pyro.sample("a", dist.Normal(0.0, 1.0, validate_args=True))
    pyro.sample("y", dist.Normal(torch.zeros(2), a.expand(2), validate_args=True).to_event(1), obs=torch.ones(2))


@pytest.mark.parametrize("model", [covariance, validated])
@pytest.mark.parametrize("with_grad", [False, True])
def test_a_particle_that_fails_is_nan_and_the_others_right(model, with_grad):
    target = make_target(model, init=init_to_value(values={"a": torch.tensor(2.0)}))
    assert target.path.name == ("captured" if model is covariance else "vmap")
    x = torch.tensor([[1.0], [-1.0], [2.0]], requires_grad=with_grad)
    log_density, score = target.log_density_and_score(x)
    good = x[[0, 2]].detach()
    power = 0.5 if model is covariance else 1.0  # the scale is a variance, or a standard deviation
    a = good.clone().requires_grad_()
    want = dist.Normal(0.0, 1.0).log_prob(a) + 2 * dist.Normal(0.0, a**power).log_prob(torch.tensor(1.0))
    torch.testing.assert_close(log_density[[0, 2]].detach(), want[:, 0].detach())
    torch.testing.assert_close(score[[0, 2]].detach(), torch.autograd.grad(want.sum(), a)[0])
    assert log_density[1].isnan()
    assert score[1].isnan().all()
    alone = target.log_density(x)
    torch.testing.assert_close(alone, log_density, equal_nan=True)


def test_starts_at_which_no_matrix_factorizes_are_reported():
    target = make_target(covariance, init=init_to_value(values={"a": torch.tensor(2.0)}))
    with pytest.raises(NonFiniteError, match=r"the model itself: .*cholesky"):
        check_finite_start(target, torch.tensor([[-1.0], [-2.0]]))


# --- taken by the loop --------------------------------------------------------------------------------


def item():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    observe(a * a.item())


def numpy():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    observe(a * float(a.detach().numpy()))


def loop_until():
    a, sd = pyro.sample("a", dist.Normal(0.0, 1.0)), 1.0
    while sd < a.exp():
        sd += 1.0
    observe(a, sd)


def written_buffer():
    a, buffer = pyro.sample("a", dist.Normal(0.0, 1.0)), BUFFER
    buffer[0] = a.detach()
    observe(a * buffer[0])


BUFFER = torch.zeros(1, dtype=torch.float64)


def all_on_one_side():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    observe(a, 1.0 if torch.all(a > 0) else 2.0)


@pytest.mark.parametrize("model", [item, numpy, loop_until, written_buffer, all_on_one_side])
def test_python_control_flow_falls_back_to_the_loop_and_is_right(model):
    init = init_to_value(values={"a": torch.tensor(0.5)})
    target = make_target(model, init=init)
    assert target.path.name == "loop"
    assert "vmap: " in target.path.reason
    assert "plate: " in target.path.reason
    x = torch.tensor([[0.3], [-1.2], [1.5]])
    score = []
    for row in x:
        a = row[0].clone().requires_grad_()
        log_joint = poutine.trace(poutine.condition(model, {"a": a})).get_trace().log_prob_sum()
        score.append(torch.autograd.grad(log_joint, a)[0])
    torch.testing.assert_close(target.score(x)[:, 0], torch.stack(score))


def test_a_target_leaves_no_trace_in_the_handlers_around_it():
    def model():
        observe(pyro.sample("a", dist.Normal(0.0, 1.0)))

    with poutine.trace() as outer, pyro.validation_enabled(True):
        target = make_target(model)
        before = set(outer.trace.nodes)
        target.score(torch.zeros(2, 1))
        target.params()
        assert set(outer.trace.nodes) == before
        assert torch.distributions.Distribution._validate_args is True
