"""Which sites are centered, and that the decentered model is the same model in other coordinates."""

from __future__ import annotations

import random
import time

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.distributions.transforms import AffineTransform, ExpTransform
from pyro.infer.autoguide.initialization import init_to_median, init_to_value
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule, PyroSample

from pyro_sivism import Target, decenter
from pyro_sivism.errors import EmptyModelError
from pyro_sivism.layout import LatentLayout
from pyro_sivism.prototype import Prototype
from pyro_sivism.reparametrization import MultivariateNormalReparam, centered_sites, suggestion

EFFECT = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
STANDARD_ERROR = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
GROUP = torch.tensor([0, 0, 1, 2, 2, 2])
Y = torch.tensor([0.1, -0.4, 1.2, 0.3, 0.9, -1.1])


def half_normal(name, scale=1.0):
    return pyro.sample(name, dist.HalfNormal(scale))


def found(model, *args, **kwargs):
    return {site.name: site.scale_depends_on for site in centered_sites(model, *args, **kwargs)}


def eight_schools():
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("effect", dist.Normal(theta, STANDARD_ERROR), obs=EFFECT)


def eight_schools_non_centered():
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", 8):
        theta = pyro.deterministic("theta", mu + tau * pyro.sample("theta_raw", dist.Normal(0.0, 1.0)))
        pyro.sample("effect", dist.Normal(theta, STANDARD_ERROR), obs=EFFECT)


def radon(group=GROUP, y=Y):
    """Two kinds of effects for each group, in vectorized plates, and an index from data to groups."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 10.0).to_event(1))
    sigma_a, sigma_b = half_normal("sigma_a"), half_normal("sigma_b")
    sigma_y = half_normal("sigma_y")
    with pyro.plate("county", 3):
        a = pyro.sample("a", dist.Normal(mu[0], sigma_a))
        b = pyro.sample("b", dist.Normal(mu[1], sigma_b))
    with pyro.plate("house", len(y)):
        pyro.sample("y", dist.Normal(a[group] + b[group], sigma_y), obs=y)


def crossed():
    tau = half_normal("tau")
    rows, columns = pyro.plate("row", 3, dim=-2), pyro.plate("column", 2, dim=-1)
    with rows:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with columns:
            pyro.sample("cell", dist.Normal(0.0, tau * scale))


def group_scales():
    """A scale for each group, looked up for each member."""
    with pyro.plate("group", 3):
        tau = half_normal("tau")
    with pyro.plate("member", len(GROUP)):
        pyro.sample("theta", dist.StudentT(4.0, 0.0, tau[GROUP]))


def random_walk():
    sigma = half_normal("sigma")
    x = torch.tensor(0.0)
    for t in pyro.plate("time", 3):
        x = pyro.sample(f"x_{t}", dist.Laplace(x, sigma))


def nested():
    omega = half_normal("omega")
    with pyro.plate("group", 3):
        tau = pyro.sample("tau", dist.LogNormal(0.0, omega))
        with pyro.plate("member", 2, dim=-2):
            pyro.sample("theta", dist.Normal(0.0, tau))


def horseshoe():
    tau = pyro.sample("tau", dist.HalfCauchy(1.0))
    with pyro.plate("feature", 4):
        width = pyro.sample("width", dist.HalfCauchy(1.0))
        pyro.sample("beta", dist.Normal(0.0, tau * width))


def gaussian_process():
    amplitude, length = half_normal("amplitude"), half_normal("length")
    t = torch.arange(3.0)
    kernel = amplitude**2 * torch.exp(-0.5 * ((t[:, None] - t) / length).square()) + 1e-3 * torch.eye(3)
    pyro.sample("f", dist.MultivariateNormal(torch.ones(3), kernel))


def varying_slopes():
    sd = pyro.sample("sd", dist.HalfNormal(torch.ones(2)).to_event(1))
    root = pyro.sample("root", dist.LKJCholesky(2, 2.0))
    with pyro.plate("group", 4):
        pyro.sample("beta", dist.MultivariateNormal(torch.zeros(2), scale_tril=sd[:, None] * root))


def events():
    tau = half_normal("tau")
    pyro.sample("theta", dist.Normal(torch.zeros(2, 3), tau).to_event(2))


def transformed():
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 1.0)), half_normal("tau")
    affine = AffineTransform(mu, tau)
    pyro.sample("shifted", dist.TransformedDistribution(dist.StudentT(5.0), [affine]))
    pyro.sample("positive", dist.TransformedDistribution(dist.Normal(0.0, 1.0), [affine, ExpTransform()]))
    pyro.sample("both", dist.TransformedDistribution(dist.Normal(mu, tau), [affine]))


def normalized_scales():
    """The product of the scales is 1 whatever the latents are."""
    log_scale = pyro.sample("log_scale", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("theta", dist.Normal(torch.zeros(3), (log_scale - log_scale.mean()).exp()).to_event(1))


def flat_at_the_start():
    """The latent starts at 0, where the scale does not move with it."""
    slope = pyro.sample("slope", dist.ImproperUniform(constraints.real, (), ()))
    pyro.sample("theta", dist.Normal(0.0, 1.0 + slope.square()))


class Module(PyroModule):
    def __init__(self):
        super().__init__()
        self.tau = PyroSample(dist.HalfNormal(1.0))
        self.theta = PyroSample(lambda self: dist.Normal(torch.zeros(3), self.tau).to_event(1))

    def forward(self):
        pyro.sample("y", dist.Normal(self.theta, 1.0).to_event(1), obs=torch.ones(3))


def minibatches():
    tau = half_normal("tau")
    with pyro.plate("group", 6, subsample_size=2) as rows:
        theta = pyro.sample("theta", dist.Normal(0.0, tau))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=Y[rows])


CENTERED = {
    "eight schools": (eight_schools, {"theta": ("tau",)}),
    "radon": (radon, {"a": ("sigma_a",), "b": ("sigma_b",)}),
    "crossed plates": (crossed, {"cell": ("tau", "scale")}),
    "looked up": (group_scales, {"theta": ("tau",)}),
    "sequential plate": (random_walk, {f"x_{t}": ("sigma",) for t in range(3)}),
    "nested": (nested, {"tau": ("omega",), "theta": ("tau",)}),
    "horseshoe": (horseshoe, {"beta": ("tau", "width")}),
    "Gaussian process": (gaussian_process, {"f": ("amplitude", "length")}),
    "varying slopes": (varying_slopes, {"beta": ("sd", "root")}),
    "events": (events, {"theta": ("tau",)}),
    "transformed": (transformed, dict.fromkeys(("shifted", "positive", "both"), ("tau",))),
    "normalized scales": (normalized_scales, {"theta": ("log_scale",)}),
    "flat at the start": (flat_at_the_start, {"theta": ("slope",)}),
    "module": (Module(), {"theta": ("tau",)}),
    "minibatches": (minibatches, {"theta": ("tau",)}),
}


@pytest.mark.parametrize("name", CENTERED)
def test_centered_sites_are_found_with_what_sets_their_scale(name):
    model, want = CENTERED[name]
    assert found(model) == want


# --- what is no centered site -----------------------------------------------------------------------


def fixed_scale():
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 1.0)), half_normal("tau")
    pyro.sample("location", dist.Normal(mu * tau, 2.0))
    pyro.sample("constant", dist.Normal(mu, tau / tau + 0.0 * mu))
    pyro.sample("detached", dist.Normal(mu, tau.detach()))


def learned_scale():
    pyro.sample("theta", dist.Normal(0.0, pyro.param("scale", torch.tensor(2.0), constraint=constraints.positive)))


def positive_sites():
    """tau moves the logarithms of these, by which they are fitted, or moves what is the logarithm of another."""
    tau = half_normal("tau")
    pyro.sample("half_normal", dist.HalfNormal(tau))
    pyro.sample("half_cauchy", dist.HalfCauchy(tau))
    pyro.sample("gamma", dist.Gamma(2.0, tau))
    pyro.sample("weibull", dist.Weibull(tau, 2.0))
    pyro.sample("log_normal", dist.LogNormal(tau, 2.0))
    log_of_scaled = [AffineTransform(0.0, tau), ExpTransform().inv]
    pyro.sample("log_exponential", dist.TransformedDistribution(dist.Exponential(1.0), log_of_scaled))
    pyro.sample("folded", dist.FoldedDistribution(dist.Normal(0.0, tau)))


def observed_site():
    tau = half_normal("tau")
    pyro.sample("y", dist.Normal(0.0, tau), obs=torch.tensor(0.3))


def masked_site():
    tau = half_normal("tau")
    with pyro.plate("group", 3), poutine.mask(mask=torch.tensor([True, False, True])):
        pyro.sample("theta", dist.Normal(0.0, tau))
    with pyro.plate("other", 3):
        pyro.sample("phi", dist.Normal(0.0, tau).mask(torch.tensor([True, False, True])))


def scaled_site():
    tau = half_normal("tau")
    with poutine.scale(scale=2.0):
        pyro.sample("theta", dist.Normal(0.0, tau))


def partly_observed():
    sigma = half_normal("sigma")
    with pyro.plate("data", 3):
        pyro.sample("y", dist.Normal(0.0, sigma), obs=torch.ones(3), obs_mask=torch.tensor([True, False, True]))


def simplex():
    """Pyro cannot draw the base of a LogisticNormal in its place."""
    tau = half_normal("tau")
    pyro.sample("weights", dist.LogisticNormal(torch.zeros(2), tau * torch.ones(2)))


def mixture():
    """The scale of x is that of its component, which is summed over."""
    with pyro.plate("component", 2):
        tau = half_normal("tau")
    k = pyro.sample("k", dist.Categorical(torch.ones(2)))
    pyro.sample("x", dist.Normal(0.0, tau[k]))


NOT_CENTERED = [
    eight_schools_non_centered,
    fixed_scale,
    learned_scale,
    positive_sites,
    observed_site,
    masked_site,
    scaled_site,
    partly_observed,
    simplex,
    mixture,
]


@pytest.mark.parametrize("model", NOT_CENTERED, ids=lambda model: model.__name__)
def test_other_sites_are_not_named_and_such_a_model_is_returned_as_it_is(model):
    assert found(model) == {}
    assert decenter(model) is model


def test_a_mask_that_hides_nothing_is_none():
    def model():
        tau = half_normal("tau")
        with pyro.plate("group", 3), poutine.mask(mask=torch.ones(3, dtype=torch.bool)):
            pyro.sample("theta", dist.Normal(0.0, tau))

    assert found(model) == {"theta": ("tau",)}


# --- the decentered model ---------------------------------------------------------------------------


def target_of(model):
    trace = Prototype.of(model, init_to_median).trace()
    return Target(model, LatentLayout.from_trace(trace), trace, paths=())


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", [name for name in CENTERED if name != "minibatches"])
def test_the_decentered_model_is_the_same_model(name):
    """log p'(x') = log p(x) + log |det dx/dx'| at random x', x being the model's own sites at x'.

    In float64 the two sides agree to 1e-9, some thousand roundings; the Jacobian is by autograd.
    """
    torch.manual_seed(0)
    model, _ = CENTERED[name]
    if isinstance(model, torch.nn.Module):
        model = Module()  # in this dtype
    own, decentered = target_of(model), target_of(decenter(model))
    assert own.dim == decentered.dim

    def own_coordinates(x):
        """The centered model's unconstrained latents, as functions of the decentered model's."""
        values = poutine.trace(poutine.condition(decenter(model), decentered.layout.constrain(x))).get_trace()
        return own.layout.pack({site.name: values.nodes[site.name]["value"] for site in own.layout.sites})

    for x in 0.5 * torch.randn(3, decentered.dim):
        jacobian = torch.autograd.functional.jacobian(own_coordinates, x)
        want = own.log_density(own_coordinates(x)[None]) + torch.linalg.slogdet(jacobian).logabsdet
        torch.testing.assert_close(decentered.log_density(x[None]), want, rtol=1e-9, atol=1e-9)


def test_a_decentered_model_has_nothing_more_to_decenter():
    for model, _ in CENTERED.values():
        decentered = decenter(model)
        assert found(decentered) == {}
        assert decenter(decentered) is decentered


def test_a_partly_centered_site_of_the_users_own_is_decentered_the_rest_of_the_way():
    half = poutine.reparam(eight_schools, config={"theta": LocScaleReparam(0.5)})
    assert found(half) == {"theta_decentered": ("tau",)}
    trace = poutine.trace(decenter(half)).get_trace()
    assert float(trace.nodes["theta_decentered_decentered"]["fn"].scale[0]) == 1.0


def test_arguments_reach_the_model():
    def model(y, *, sites):
        tau = half_normal("tau")
        for name in sites:
            pyro.sample(name, dist.Normal(0.0, tau))
        pyro.sample("y", dist.Normal(0.0, tau), obs=y)

    assert found(model, Y[0], sites=["a", "b"]) == {"a": ("tau",), "b": ("tau",)}
    trace = poutine.trace(decenter(model, Y[0], sites=["a", "b"])).get_trace(Y[1], sites=["a"])
    assert {"a", "a_decentered"} <= trace.nodes.keys()


def test_nothing_is_left_behind():
    def model():
        tau = pyro.param("tau", lambda: torch.rand(()), constraint=constraints.positive)
        omega = half_normal("omega", tau)
        random.random(), np.random.rand()
        pyro.sample("theta", dist.Normal(0.0, omega))

    def state():
        _, keys, *rest = np.random.get_state()
        return torch.get_rng_state().tolist(), random.getstate(), keys.tolist(), rest

    pyro.param("mine", torch.ones(2))
    before, mine = state(), pyro.param("mine")
    assert found(model) == {"theta": ("omega",)}
    assert state() == before
    assert list(pyro.get_param_store().keys()) == ["mine"]
    assert pyro.param("mine") is mine


def test_a_model_that_cannot_be_fitted_says_so():
    with pytest.raises(EmptyModelError, match="no continuous latent"):
        decenter(lambda: None)


def test_a_multivariate_normal_that_is_given_a_value_is_whitened_to_it():
    value = torch.tensor([1.0, -2.0, 0.5])
    model = poutine.reparam(gaussian_process, config={"f": MultivariateNormalReparam()})
    trace = Prototype.of(model, init_to_value(values={"f": value})).trace()
    white, fn = trace.nodes["f_decentered"], dist.MultivariateNormal(torch.ones(3), scale_tril=root_of(trace))
    assert not white["is_observed"]
    torch.testing.assert_close(fn.loc + fn.scale_tril @ white["value"], value)
    assert torch.equal(trace.nodes["f"]["value"], value)


def root_of(trace):
    amplitude, length = (trace.nodes[name]["value"] for name in ("amplitude", "length"))
    t = torch.arange(3.0)
    kernel = amplitude**2 * torch.exp(-0.5 * ((t[:, None] - t) / length).square()) + 1e-3 * torch.eye(3)
    return torch.linalg.cholesky(kernel)


# --- the suggestion ---------------------------------------------------------------------------------


def test_the_suggestion_names_the_sites_and_the_cure():
    sentence = suggestion(target_of(eight_schools))
    assert "the scale of theta depends on tau" in sentence
    assert "pyro_sivism.decenter(model, *args)" in sentence


def test_the_suggestion_lists_a_few_of_many_sites():
    def model():
        tau = half_normal("tau")
        for i in range(7):
            pyro.sample(f"x_{i}", dist.Normal(0.0, tau))

    assert "the scales of x_0, x_1, x_2 and 4 more depend on tau" in suggestion(target_of(model))
    assert "the scales of a and b depend on sigma_a and sigma_b" in suggestion(target_of(radon_without_data))


def radon_without_data():
    sigma_a, sigma_b = half_normal("sigma_a"), half_normal("sigma_b")
    with pyro.plate("county", 3):
        pyro.sample("a", dist.Normal(0.0, sigma_a))
        pyro.sample("b", dist.Normal(0.0, sigma_b))


@pytest.mark.parametrize("model", NOT_CENTERED, ids=lambda model: model.__name__)
def test_there_is_no_suggestion_without_a_centered_site(model):
    assert suggestion(target_of(model)) is None


def test_the_suggestion_never_raises():
    runs = iter([True] * 100)

    def model():
        tau = half_normal("tau")
        if not next(runs):
            raise RuntimeError("the data are gone")
        pyro.sample("theta", dist.Normal(0.0, tau))

    target = target_of(model)
    assert suggestion(target) is not None
    runs = iter([False])
    assert suggestion(target) is None


def test_the_suggestion_is_cheap():
    """Well under a second of CPU, with many sites in a loop."""

    def model():
        sigma, x = half_normal("sigma"), torch.tensor(0.0)
        for t in range(200):
            x = pyro.sample(f"x_{t}", dist.Normal(x, sigma))

    target = target_of(model)
    started = time.process_time()
    assert "and 197 more" in suggestion(target)
    assert time.process_time() - started < 1.0
