"""A fit on an accelerator: nothing is made on the wrong device, and no step waits; see ``tests/accelerator.py``."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC

from pyro_sivism import SIVISM, FisherDivergence, nuts_from
from pyro_sivism.errors import NonFiniteError
from pyro_sivism.family import FixedGaussian
from pyro_sivism.stopping import Evidence
from tests.accelerator import DEVICE, accelerator

DATA = torch.sin(1.7 * torch.arange(1.0, 31.0, dtype=torch.double)) + 0.5
STEPS = 25


def normal(y):
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), device=y.device), 2.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(torch.ones((), device=y.device)))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, sigma), obs=y)


def on_the_cpu_in_part(y):
    """Scalars may stay on the CPU: torch mixes them with anything."""
    sigma = pyro.sample("sigma", dist.HalfNormal(torch.ones((), device=y.device)))
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, sigma), obs=y)


def minibatches(y):
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), device=y.device), 2.0))
    with pyro.plate("rows", len(y), subsample_size=10, device=y.device) as rows:
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y[rows])


def learned_scale(y):
    scale = pyro.param("scale", torch.ones((), device=y.device), constraint=dist.constraints.positive)
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), device=y.device), scale))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def mixture(y):
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), device=y.device), 2.0))
    with pyro.plate("rows", len(y)):
        k = pyro.sample("k", dist.Bernoulli(torch.full((), 0.3, device=y.device)))
        pyro.sample("y", dist.Normal(mu + k, 1.0), obs=y)


def improper(y):
    mu = pyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
    sigma = pyro.sample("sigma", dist.HalfNormal(torch.ones((), device=y.device)))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, sigma), obs=y)


def wide(y):
    """More than 256 dimensions, where the Gaussian is of low rank and z shorter than x."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), device=y.device), 2.0))
    with pyro.plate("rows", len(y)), pyro.plate("columns", 10):
        x = pyro.sample("x", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=y.expand(10, -1))


def walled(y):
    """Not finite on half of the line."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), device=y.device), 1.0))
    pyro.factor("wall", torch.where(mu > 0, mu.abs().log(), -torch.inf))


@pytest.fixture(autouse=True)
def in_double():
    """Whose roundings, which depend on the path of the scores, do not grow to anything in some steps."""
    torch.set_default_dtype(torch.double)
    yield
    torch.set_default_dtype(torch.float32)


def set_up(model, y, **settings):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    sivism = SIVISM(model, capture=False, **{"num_particles": 16, **settings})
    sivism.step(y)
    return sivism


def given(dim):
    """A Gaussian that need not be looked for, which takes long where scores are computed one by one, as here they are
    in some cases."""
    return {"preconditioner": FixedGaussian(torch.zeros(dim), torch.ones(dim)), "num_particles": 4}


CASES = {
    "normal": (normal, {}),
    "scalars on the CPU": (on_the_cpu_in_part, given(2)),
    "minibatches": (minibatches, {}),
    "learned parameter": (learned_scale, {}),
    "discrete latents": (mixture, given(1)),
    "improper prior": (improper, given(2)),
    "many dimensions": (wide, {}),
    "not finite": (walled, {}),
    "second derivatives": (normal, {"loss": FisherDivergence()}),
}


@pytest.mark.filterwarnings(
    *(f"ignore::pyro_sivism.errors.{name}" for name in ("NonFiniteWarning", "FitWarning", "TargetPathWarning"))
)
@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_of_the_cpu_and_do_not_wait(case):
    model, settings = CASES[case]
    want = set_up(model, DATA, **settings).run(STEPS, DATA, progress_bar=False)
    with accelerator() as waits:
        y = DATA.to(DEVICE)
        sivism = set_up(model, y, **settings)
        waits.clear()
        got = sivism.run(STEPS, y, progress_bar=False)
    assert len(waits) <= 10  # three numbers and two flags at two looks, at twenty and at five steps
    assert got.num_nonfinite == want.num_nonfinite
    assert torch.allclose(got.losses, want.losses, rtol=1e-4)


def test_chains_are_followed_where_the_model_is(monkeypatch):
    found = {1: (0.3, 3.0), 21: (0.01, 0.1)}
    monkeypatch.setattr("pyro_sivism.stopping._FIRST_CYCLE", 20)
    monkeypatch.setattr(
        "pyro_sivism.cycles.gather_evidence", lambda *args: (Evidence(args[-2], *found[args[-2]]), None)
    )
    want = set_up(normal, DATA).run(None, DATA, progress_bar=False)
    with accelerator():
        y = DATA.to(DEVICE)
        got = set_up(normal, y).run(None, y, progress_bar=False)
    assert got.seconds["chains"] > 0
    assert torch.allclose(got.losses, want.losses, rtol=1e-3, atol=1e-4)


def test_what_follows_a_fit():
    """The verdict with its chains and modes, InferenceData, NUTS and files, none of which mixes devices."""
    with accelerator():
        y = DATA.to(DEVICE)
        sivism = set_up(normal, y)
        fit = sivism.run(None, y, progress_bar=False)
        assert fit.verdict.level == "good"
        assert sivism.sample(10)["mu"].device == DEVICE
        data = sivism.to_inference_data(y, num_samples=20, posterior_predictive=True, log_likelihood=True)
        assert data.log_likelihood["y"].shape == (1, 20, len(DATA))
        chain = MCMC(nuts_from(sivism), num_samples=5, warmup_steps=5, disable_progbar=True)
        chain.run(y)
        assert chain.get_samples()["mu"].device == DEVICE


@pytest.mark.parametrize("whose", ["guide", "critic"])
def test_a_gradient_that_is_not_finite_moves_nothing_and_is_an_error_at_the_next_look(whose):
    with accelerator():
        y = DATA.to(DEVICE)
        sivism = set_up(normal, y)
        training = sivism._training
        stepper = getattr(training, f"_{whose}_stepper")
        before = [parameter.detach().clone() for parameter in stepper.params.values()]
        gradients = [torch.full_like(parameter, torch.nan) for parameter in before]
        training._update(whose, stepper, gradients, 1.0)
        assert all(torch.equal(a, b) for a, b in zip(before, stepper.params.values()))
        with pytest.raises(NonFiniteError, match=f"the {whose}'s gradient is not finite"):
            training.read([training.step()])
        training.read([training.step()])


def test_particles_that_are_all_not_finite_are_an_error_at_the_next_look():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(torch.zeros((), device=y.device), 1.0))
        pyro.factor("gone", torch.where(is_gone, torch.nan, 0.0) * mu)

    with accelerator():
        is_gone = torch.tensor(False, device=DEVICE)
        y = DATA.to(DEVICE)
        sivism = set_up(model, y)
        before = [parameter.detach().clone() for parameter in sivism._training.family.parameters()]
        is_gone.fill_(True)
        with pytest.raises(NonFiniteError, match=r"step 2: .* not finite at any of 16 particles"):
            sivism.run(40, y, progress_bar=False)
        after = list(sivism._training.family.parameters())
        assert all(torch.equal(a, b) for a, b in zip(before, after))
