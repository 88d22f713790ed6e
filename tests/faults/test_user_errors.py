"""Every mistake a user is likely to make gets an error of ours that names the site or argument and the cure."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal

from pyro_sivism import SIVISM, BatchAndMatch, FixedGaussian, ScoreNetwork, SemiImplicitGuide, SivismError
from pyro_sivism.errors import (
    ArgumentError,
    EmptyModelError,
    LayoutChangedError,
    ModelError,
    NonDeterministicModelError,
    NonFiniteError,
    NotSetUpError,
    OptimizerError,
    UnsupportedSiteError,
)

Y = torch.linspace(0.0, 2.0, 5)


def model(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def quick(model, dim=1, **kwargs):
    gaussian = FixedGaussian(torch.zeros(dim), torch.ones(dim))
    return SIVISM(
        model, preconditioner=gaussian, critic=ScoreNetwork(dim, (4,)), num_particles=8, critic_steps=1, **kwargs
    )


# --- arguments of the constructors ------------------------------------------------------------------


@pytest.mark.parametrize("bad", ["model", None, 3])
def test_a_model_that_cannot_be_called(bad):
    for make in (SIVISM, SemiImplicitGuide):
        with pytest.raises(ArgumentError, match=rf"model is a {type(bad).__name__}; expected a callable"):
            make(bad)


@pytest.mark.parametrize("make", [AutoNormal, AutoGuideList])
def test_another_autoguide(make):
    with pytest.raises(ArgumentError, match=rf"guide is a {make.__name__}; expected a SemiImplicitGuide.*SVI"):
        SIVISM(model, make(model))


def test_a_loss_of_svi():
    with pytest.raises(ArgumentError, match="loss is a Trace_ELBO; expected an objective such as PathGradientKL"):
        SIVISM(model, loss=Trace_ELBO())


@pytest.mark.parametrize(
    ("name", "bad", "cure"),
    [
        ("critic", lambda x: -x, "expected None or a torch.nn.Module"),
        ("preconditioner", "none", r"expected None, BatchAndMatch\(\), FixedGaussian"),
        ("preconditioner", BatchAndMatch, "expected None, BatchAndMatch"),
        ("compile", "max-autotune", "expected True, False or None"),
    ],
)
def test_an_argument_of_another_kind(name, bad, cure):
    with pytest.raises(ArgumentError, match=f"^{name} is a {type(bad).__name__}; {cure}"):
        SIVISM(model, **{name: bad})


@pytest.mark.parametrize("name", ["num_particles", "critic_steps"])
def test_a_count_below_one(name):
    with pytest.raises(ArgumentError, match=f"expected {name} to be an integer of at least 1, got 0"):
        SIVISM(model, **{name: 0})


@pytest.mark.parametrize("name", ["num_particles", "critic_steps"])
@pytest.mark.parametrize("bad", ["x", 2.5, True])
def test_a_count_that_is_no_integer(name, bad):
    with pytest.raises(ArgumentError, match=rf"expected {name} to be an integer of at least 1, got {bad!r}"):
        SIVISM(model, **{name: bad})


@pytest.mark.parametrize("name", ["optim", "critic_optim"])
@pytest.mark.parametrize(
    "make",
    [lambda: "Adam", lambda: {"lr": 0.1}, lambda: torch.optim.Adam([torch.zeros(1)])],
    ids=["string", "dict", "torch_instance"],
)
def test_a_wrong_optimizer_is_named_at_once(name, make):
    with pytest.raises(OptimizerError, match=rf"^{name} is a (str|dict|Adam)\b"):
        SIVISM(model, **{name: make()})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_scale": 0.0}, "init_scale > 0, got 0.0"),
        ({"init_scale": math.nan}, "init_scale > 0, got nan"),
        ({"num_mixing": 0}, "num_mixing of at least 1, got 0"),
    ],
)
def test_guide_settings_out_of_range(settings, message):
    with pytest.raises(ArgumentError, match=message):
        SemiImplicitGuide(model, **settings)


@pytest.mark.parametrize("settings", [{"mixing_dim": 0}, {"mixing_dim": -1}])
def test_guide_sizes_out_of_range(settings):
    with pytest.raises(ArgumentError, match="mixing_dim of at least 1"):
        SemiImplicitGuide(model, **settings).setup(Y)


# --- calls out of order, and wrong calls ------------------------------------------------------------


@pytest.mark.parametrize(
    "use",
    [
        lambda sivism: sivism.sample(3),
        lambda sivism: sivism.sample_unconstrained(3),
        lambda sivism: sivism.evaluate_loss(Y),
        lambda sivism: sivism.target,
        lambda sivism: sivism.critic,
        lambda sivism: sivism.save("never_written"),
    ],
    ids=["sample", "sample_unconstrained", "evaluate_loss", "target", "critic", "save"],
)
def test_results_before_set_up(use):
    with pytest.raises(NotSetUpError, match=r"Call (sivism|guide)\.setup\(\*args, \*\*kwargs\)"):
        use(SIVISM(model))


@pytest.mark.parametrize("bad", ["x", Y, -1, 2.5, True])
def test_run_with_the_data_first(bad):
    with pytest.raises(ArgumentError, match=r"expected num_steps to be None or an integer.*run\(None, data\)"):
        SIVISM(model).run(bad, Y)


def test_sampling_nothing():
    sivism = quick(model).setup(Y)
    with pytest.raises(ArgumentError, match="num_samples of at least 1, got 0"):
        sivism.sample(0)


def test_missing_arguments_are_the_models_own_error():
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'y'"):
        SIVISM(model).step()


def test_wrong_arguments_leave_the_fit_usable():
    sivism = quick(model)
    sivism.step(Y)
    with pytest.raises(TypeError, match="unexpected keyword argument 'z'"):
        sivism.step(Y, z=1)
    assert math.isfinite(sivism.step(Y))


# --- models that cannot be fitted -------------------------------------------------------------------


def test_no_latents():
    def nothing():
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0))

    with pytest.raises(EmptyModelError, match="no continuous latent site"):
        SIVISM(nothing).step()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dist.Poisson(3.0), "latent site 'bad'.*Poisson.*finitely many values.*poutine.condition"),
        (lambda: dist.VonMises3D(torch.tensor([0.0, 0.0, 1.0])), "latent site 'bad'.*ProjectedNormalReparam"),
    ],
    ids=["poisson", "sphere"],
)
def test_supports_without_a_bijection(make, message):
    def unsupported():
        pyro.sample("fine", dist.Normal(0.0, 1.0))
        pyro.sample("bad", make())

    with pytest.raises(UnsupportedSiteError, match=message):
        SIVISM(unsupported).step()


def test_a_log_density_that_is_never_finite():
    def impossible():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("wall", x - math.inf)

    with pyro.validation_enabled(False), pytest.raises(NonFiniteError, match=r"\bwall\b"):
        SIVISM(impossible).step()


def test_random_numbers_outside_pyro_sample():
    def noisy():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("noise", torch.randn(()) * x)

    with pytest.raises(NonDeterministicModelError, match=r"pyro\.sample"):
        SIVISM(noisy).step()


def test_a_support_that_moves_with_a_latent():
    def moving():
        top = pyro.sample("top", dist.LogNormal(0.0, 1.0))
        pyro.sample("below", dist.Uniform(0.0, top))

    with pytest.raises(ModelError, match="support of latent site 'below' depends on other latents"):
        SIVISM(moving).step()


@pytest.mark.parametrize("event_dim", [0, 1], ids=["batch", "event"])
def test_a_support_with_a_learned_bound(event_dim):
    def learned():
        top = pyro.param("top", torch.tensor(2.0), constraint=dist.constraints.positive)
        with pyro.plate_stack("group", (3,)[event_dim:]):
            pyro.sample("below", dist.Uniform(torch.zeros(3), top).to_event(event_dim))

    with pytest.raises(UnsupportedSiteError, match=r"latent site 'below'.*bounds are learned.*Uniform\(0, 1\)"):
        SIVISM(learned).step()


# --- a guide of something else ----------------------------------------------------------------------


def two_latents():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.sample("b", dist.Normal(a, 1.0))


def test_a_guide_of_a_part_of_the_model():
    guide = SemiImplicitGuide(poutine.block(two_latents, hide=["b"]))
    with pytest.raises(ModelError, match="latent site 'b'"):
        quick(two_latents, guide=guide).step()


def test_a_guide_of_another_model():
    with pytest.raises(ModelError, match="guide was made for another model: latent site 'mu'"):
        quick(two_latents, guide=SemiImplicitGuide(lambda: model(Y))).step()


def test_a_guide_of_more_than_the_model():
    def only_a():
        pyro.sample("a", dist.Normal(0.0, 1.0))

    with pytest.raises(ModelError, match="latent site 'b'"):
        quick(only_a, 2, guide=SemiImplicitGuide(two_latents)).step()


# --- data that changes the latents ------------------------------------------------------------------


def test_data_of_another_shape_that_changes_a_latent():
    def local(y):
        with pyro.plate("data", len(y)):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)

    sivism = quick(local, 5)
    sivism.step(Y)
    with pytest.raises(LayoutChangedError, match=r"latent site 'theta' had shape \(5,\).*\(3,\).*subsample_size"):
        sivism.step(Y[:3])
    with pytest.raises(LayoutChangedError, match="'theta'"):
        sivism.evaluate_loss(Y[:3])
    assert math.isfinite(sivism.step(Y))


def test_an_argument_that_adds_a_latent():
    def optional(extra):
        pyro.sample("a", dist.Normal(0.0, 1.0))
        if extra:
            pyro.sample("b", dist.Normal(0.0, 1.0))

    sivism = quick(optional)
    sivism.step(False)
    with pytest.raises(LayoutChangedError, match="latent site 'b' exists only with the new arguments"):
        sivism.step(True)


def test_data_that_grows_inside_the_same_argument():
    """An object of the user's own looks the same before and after; minibatches would never see its new end."""

    def streaming(data):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(data.y), subsample_size=2) as index:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=data.y[index])

    data = SimpleNamespace(y=Y)
    sivism = quick(streaming)
    sivism.step(data)
    data.y = torch.cat([Y, Y])
    with pytest.raises(LayoutChangedError, match=r"plate 'rows' had size 5 .* has 10 now.*Pass new arguments"):
        sivism.step(data)
    assert math.isfinite(sivism.step(SimpleNamespace(y=data.y)))


def test_a_param_store_cleared_during_variational_em():
    def learnable(y):
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("data", len(y)):
            theta = pyro.sample("theta", dist.Normal(loc, 1.0))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)

    sivism = quick(learnable, 5)
    sivism.step(Y)
    pyro.clear_param_store()
    with pytest.raises(ModelError, match=r"no longer depends on .*\['loc'\].*store was cleared, make a new SIVISM"):
        sivism.step(Y)


def test_a_gaussian_of_another_size():
    with pytest.raises(ArgumentError, match="Gaussian has 3 dims, the target 1"):
        quick(model, 3).step(Y)


def test_all_errors_have_one_base_and_a_builtin():
    for error, builtin in (
        (ArgumentError, ValueError),
        (OptimizerError, ValueError),
        (ModelError, ValueError),
        (NonFiniteError, ArithmeticError),
        (NotSetUpError, RuntimeError),
    ):
        assert issubclass(error, SivismError)
        assert issubclass(error, builtin)


def test_a_discrete_latent_of_many_dims():
    def model(y):
        z = pyro.sample("z", dist.Bernoulli(0.3).expand([3]).to_event(1))
        pyro.sample("y", dist.Normal(z.sum(), 1.0), obs=y)

    with pytest.raises(UnsupportedSiteError, match=r"latent site 'z'.*put them into a pyro\.plate in the place of"):
        SIVISM(model).setup(torch.tensor(1.0))
