"""Decentered models through the whole package: draws, predictives, InferenceData and NUTS at the model's own sites."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule, PyroSample
from schools import EFFECT, STANDARD_ERROR, eight_schools

from pyro_sivism import SIVISM, FixedGaussian, Target, compare_with_nuts, decenter, nuts_from
from pyro_sivism.assessment import _decentered_errors
from pyro_sivism.diagnostics import judge, stein_statistics
from pyro_sivism.errors import ArgumentError
from pyro_sivism.inference_data import split_keywords
from pyro_sivism.layout import LatentLayout
from pyro_sivism.own_sites import OwnSites, own_sites_first
from pyro_sivism.reparametrization import decentered_target

SCHOOLS = [f"school {i}" for i in range(8)]

pytestmark = [
    # ArviZ 0.2x reads attributes that newer xarray and numpy deprecate.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:arviz.*"),
]


def started(model, *args, dim):
    """A fit that has only started: N(0, I) in the decentered coordinates."""
    fixed = FixedGaussian(torch.zeros(dim), torch.ones(dim))
    return SIVISM(model, preconditioner=fixed, num_particles=8).setup(*args)


@pytest.fixture(scope="module")
def schools():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    data = EFFECT, STANDARD_ERROR
    return started(decenter(eight_schools, *data), *data, dim=10)


def theta_of(values):
    return values["mu"][..., None] + values["tau"][..., None] * values["theta_decentered"]


# --- draws ------------------------------------------------------------------------------------------


def test_the_latents_are_the_decentered_ones_and_the_score_is_fast(schools):
    assert {name: tuple(value.shape) for name, value in schools.sample(5).items()} == {
        "mu": (5,),
        "tau": (5,),
        "theta_decentered": (5, 8),
    }
    assert schools.guide.layout["theta_decentered"].dims == ("school",)
    assert schools.target.path.name == "captured"


def test_the_inference_data_has_the_models_own_sites_first(schools):
    idata = schools.to_inference_data(num_samples=30, coords={"school": SCHOOLS})
    for group in ("posterior", "prior"):
        assert list(idata[group].data_vars) == ["mu", "tau", "theta", "twice", "theta_decentered"]
    theta = idata["posterior"]["theta"]
    assert theta.dims == ("chain", "draw", "school")
    assert list(theta["school"].values) == SCHOOLS
    values = {name: torch.tensor(idata["posterior"][name].values[0]) for name in ("mu", "tau", "theta_decentered")}
    np.testing.assert_allclose(theta[0], theta_of(values), rtol=1e-5, atol=1e-5)
    assert idata["posterior_predictive"]["effect"].shape == (1, 30, 8)
    want = dist.Normal(torch.tensor(theta.values), STANDARD_ERROR).log_prob(EFFECT)
    np.testing.assert_allclose(idata["log_likelihood"]["effect"], want, rtol=1e-4)


def test_predictive_draws_the_models_own_sites(schools):
    draws = Predictive(schools.model, guide=schools.guide, num_samples=6)(EFFECT, STANDARD_ERROR)
    assert {"theta", "theta_decentered"} <= draws.keys()
    torch.testing.assert_close(draws["theta"], theta_of({k: v.reshape(6, -1).squeeze(-1) for k, v in draws.items()}))


def test_a_saved_fit_is_loaded_with_the_decentered_model(schools, tmp_path):
    schools.save(tmp_path / "fit.pt")
    loaded = SIVISM.load(tmp_path / "fit.pt", decenter(eight_schools, EFFECT, STANDARD_ERROR))
    idata = loaded.to_inference_data(EFFECT, STANDARD_ERROR, num_samples=5, prior=False)
    assert idata["posterior"]["theta"].shape == (1, 5, 8)


def test_the_models_own_keywords_are_seen_through_the_handler():
    def model(y, coords=None):
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        pyro.sample("theta", dist.Normal(0.0, tau))

    decentered = decenter(model, EFFECT, coords=1)
    with pytest.raises(ArgumentError, match="coords: the model and the conversion"):
        split_keywords(decentered, {"coords": 1})


class Module(PyroModule):
    def __init__(self):
        super().__init__()
        self.tau = PyroSample(dist.HalfNormal(1.0))
        self.theta = PyroSample(lambda self: dist.Normal(torch.zeros(3), self.tau).to_event(1))

    def forward(self, y):
        return pyro.sample("y", dist.Normal(self.theta, 1.0).to_event(1), obs=y)


def test_a_module(no_warnings):
    y = torch.tensor([1.0, -2.0, 0.5])
    sivism = started(decenter(Module(), y), y, dim=4)
    idata = sivism.to_inference_data(num_samples=10)
    assert list(idata["posterior"].data_vars) == ["tau", "theta", "theta_decentered"]
    want = idata["posterior"]["tau"].values[..., None] * idata["posterior"]["theta_decentered"].values
    np.testing.assert_allclose(idata["posterior"]["theta"], want, rtol=1e-5)


def test_minibatches_are_put_together():
    y = torch.linspace(-1.0, 1.0, 6)

    def model(y):
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        with pyro.plate("group", 6, subsample_size=2) as rows:
            theta = pyro.sample("theta", dist.Normal(0.0, tau))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y[rows])

    sivism = started(decenter(model, y), y, dim=7)
    sivism.step(y)
    posterior = sivism.to_inference_data(num_samples=10)["posterior"]
    assert posterior["theta"].dims == ("chain", "draw", "group")
    want = posterior["tau"].values[..., None] * posterior["theta_decentered"].values
    np.testing.assert_allclose(posterior["theta"], want, rtol=1e-5)


# --- beside NUTS ------------------------------------------------------------------------------------


def test_own_sites_are_compared_with_draws_of_the_centered_model(schools):
    generator = torch.Generator().manual_seed(0)
    latents = {"mu": torch.randn(400, generator=generator), "tau": torch.randn(400, generator=generator).exp()}
    latents["theta_decentered"] = torch.randn(400, 8, generator=generator)
    centered = {"mu": latents["mu"], "tau": latents["tau"], "theta": theta_of(latents)}
    of_centered = compare_with_nuts(schools, nuts=centered)
    assert {row.site for row in of_centered.table} == {"mu", "tau", "theta"}
    assert not of_centered.left_out
    # Latents alone are what NUTS draws of the decentered model; theta is computed from them, in chains too.
    of_latents = compare_with_nuts(schools, nuts={name: v.reshape(2, 200, *v.shape[1:]) for name, v in latents.items()})
    assert not of_latents.left_out
    np.testing.assert_allclose(of_latents.reference["theta[3]"], centered["theta"][:, 3], rtol=1e-5)
    # Both are draws of what the fit has started from, N(0, I) in decentered coordinates. KS exceeds 2.5 / 1.358 times
    # its 5% quantile with probability 2 exp(-2 x 2.5^2) = 7e-6.
    assert all(row.ks < 2.5 / 1.358 * row.ks_noise for row in of_centered.table)


def test_nuts_runs_on_a_decentered_model(schools):
    comparison = compare_with_nuts(
        schools, num_samples=20, warmup_steps=10, kernel=nuts_from(schools), progress_bar=False
    )
    assert {row.site for row in comparison.table} == {"mu", "tau", "theta"}


def test_sites_without_draws_are_named(schools):
    comparison = compare_with_nuts(schools, nuts={"mu": torch.randn(100)})
    assert {row.site for row in comparison.table} == {"mu"}
    assert comparison.left_out == ("tau", "theta")


# --- own sites --------------------------------------------------------------------------------------


def own_sites(model):
    trace = poutine.trace(model).get_trace()
    return OwnSites(model, LatentLayout.from_trace(trace), trace), trace


def test_a_model_without_reparametrization_is_left_alone():
    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.deterministic("twice", 2.0 * mu)
        pyro.sample("mu_raw", dist.Normal(mu, 1.0))

    own, trace = own_sites(model)
    draws = {"mu": torch.zeros(2), "mu_raw": torch.ones(2)}
    assert own.draws(draws) == draws
    assert list(own_sites_first({**draws, "twice": torch.zeros(2)}, trace)) == ["mu", "mu_raw", "twice"]


def test_own_sites_keep_the_models_order_and_constrained_values():
    def model():
        omega = pyro.sample("omega", dist.HalfNormal(1.0))
        rate = pyro.sample("rate", dist.LogNormal(1.0, omega))
        pyro.sample("last", dist.Normal(rate, 1.0))

    own, trace = own_sites(decenter(model))
    assert [site.name for site in own.sites] == ["omega", "rate", "last"]
    values = dict.fromkeys(("last", "rate", "rate_base_decentered", "omega"), torch.zeros(1))
    assert list(own_sites_first(values, trace)) == ["omega", "rate", "last", "rate_base_decentered"]
    omega, white, last = torch.tensor([0.5]), torch.tensor([2.0]), torch.tensor([0.1])
    draws = own.draws({"omega": omega, "rate_base_decentered": white, "last": last})
    torch.testing.assert_close(draws["rate"], (1.0 + omega * white).exp())


def test_a_site_without_one_value_leaves_its_auxiliary_latent():
    """theta depends on a discrete latent that is summed over, by a handler of the user's own."""

    def model():
        with pyro.plate("component", 2):
            tau = pyro.sample("tau", dist.HalfNormal(1.0))
        k = pyro.sample("k", dist.Categorical(torch.ones(2)))
        pyro.sample("theta", dist.Normal(0.0, tau[k]))

    own, _ = own_sites(poutine.reparam(model, config={"theta": LocScaleReparam(0.0)}))
    assert [site.name for site in own.sites] == ["tau", "theta_decentered"]


# --- what the verdict sees decentered -----------------------------------------------------------------


def neck():
    """A funnel that no data cut off."""
    tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
    with pyro.plate("group", 8):
        pyro.sample("theta", dist.Normal(0.0, tau))
    pyro.sample("free", dist.Normal(0.0, 1.0))


def target_of(model, *args):
    trace = poutine.trace(model).get_trace(*args)
    return Target(model, LatentLayout.from_trace(trace), trace, args)


def neck_draws(count):
    log_tau = torch.randn(count, 1)
    return torch.cat([log_tau, torch.randn(count, 8) * log_tau.exp(), torch.randn(count, 1)], 1)


def test_the_decentered_density_at_given_draws():
    target = target_of(eight_schools, EFFECT, STANDARD_ERROR)
    x = torch.cat([torch.randn(20, 2), 5.0 * torch.randn(20, 8)], 1)
    names = target.layout.names
    assert names == ("mu", "tau", "theta")
    other, points = decentered_target(target, x)
    values = other.layout.constrain(points)
    theta = values["mu"][:, None] + values["tau"][:, None] * values["theta_decentered"]
    torch.testing.assert_close(theta, x[:, 2:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(values["tau"].log(), x[:, 1])
    # d theta = tau d theta_decentered, eight times
    want = target.log_density(x) + 8.0 * x[:, 1]
    torch.testing.assert_close(other.log_density(points), want, rtol=1e-4, atol=1e-3)


def test_a_model_without_centered_sites_is_not_decentered():
    def model():
        pyro.sample("mu", dist.Normal(0.0, 1.0))

    assert decentered_target(target_of(model), torch.randn(5, 1)) is None


def informed(y):
    """Errors of .1 for effects of 1: the decentered values have posterior sds of .1."""
    tau = pyro.sample("tau", dist.LogNormal(0.0, 0.1))
    with pyro.plate("group", len(y)):
        theta = pyro.sample("theta", dist.Normal(0.0, tau))
        pyro.sample("y", dist.Normal(theta, 0.1), obs=y)


@pytest.mark.parametrize(("num_groups", "spread", "is_decentered"), [(8, 0.1, True), (80, 0.1, False), (80, 1.0, True)])
def test_many_sites_are_decentered_only_where_the_data_say_little(num_groups, spread, is_decentered):
    y = torch.randn(num_groups)
    x = torch.cat([0.1 * torch.randn(64, 1), y + spread * torch.randn(64, num_groups)], 1)
    assert (decentered_target(target_of(informed, y), x) is not None) == is_decentered


def test_the_decentered_density_is_computed_as_the_other_is():
    trace = poutine.trace(neck).get_trace()
    target = Target(neck, LatentLayout.from_trace(trace), trace, paths=("vmap",))
    other, _ = decentered_target(target, neck_draws(5))
    assert other.path.name == "vmap"


def test_a_model_that_cannot_be_decentered_is_fitted_and_judged_without():
    """Its own latent has the name that decentering makes."""

    def model(y):
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        pyro.sample("theta_decentered", dist.Normal(0.0, 1.0))
        with pyro.plate("group", len(y)):
            theta = pyro.sample("theta", dist.Normal(0.0, tau))
            pyro.sample("y", dist.Normal(theta, 10.0), obs=y)

    sivism = SIVISM(model).setup(torch.randn(8))
    assert sivism.guide.reparams == {}
    assert _decentered_errors(sivism.target, sivism.sample_unconstrained(100)) is None


@pytest.mark.filterwarnings("ignore:the fit is:pyro_sivism.errors.FitWarning")
def test_a_fits_verdict_says_what_was_found_decentered(monkeypatch):
    seen = []

    def found(target, x):
        seen.append(x)
        errors = stein_statistics(x, -(x - 2.0)).coordinates  # two sds off
        return errors.at_places([0], [0], target.dim)

    def model():
        pyro.sample("mu", dist.Normal(0.0, 1.0).expand([2]).to_event(1))

    monkeypatch.setattr("pyro_sivism.assessment._decentered_errors", found)
    sivism = SIVISM(model, preconditioner=FixedGaussian(torch.zeros(2), torch.ones(2)))
    verdict = sivism.run(None, progress_bar=False).verdict
    assert verdict.level == "bad"
    assert verdict.worst.instrument == "decentered"
    assert verdict.worst.sites == ("mu[0]",)
    assert [tuple(x.shape) for x in seen] == [(1024, 2)]
    assert verdict.as_dict()["decentered_mean_max"] == pytest.approx(2.0, abs=0.1)


def test_decentered_chains_that_cannot_run_are_none_and_their_statistics_hide_no_error(monkeypatch):
    target = target_of(neck)
    x = neck_draws(200)
    assert _decentered_errors(target, x[:1].expand(200, -1)) is None  # no spread

    def broken(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr("pyro_sivism.assessment.drift_statistics", broken)
    with pytest.raises(ZeroDivisionError):
        _decentered_errors(target, x)


def test_a_neck_without_draws_is_found_decentered():
    """By its scale, under the name that this has in both; where q is right nothing is."""
    pyro.set_rng_seed(0)
    target = target_of(neck)
    x = neck_draws(4000)
    right = _decentered_errors(target, x[:1024])
    assert target.num_evaluations >= 8 * 1024  # of eight trajectories' steps
    assert max(right.sure_mean.abs().max(), right.sure_log2_sd.abs().max()) < 0.1
    cut = x[x[:, 0] > -1.0]  # 16% of the mass is below
    errors = _decentered_errors(target, cut[:1024])
    tau, free = target.layout["tau"].offset, target.layout["free"].offset
    # By the moments of a cut normal they are -.33 and .29.
    assert -0.33 - 3 * errors.log2_sd_se[tau] < errors.log2_sd[tau] < -0.33 + 3 * errors.log2_sd_se[tau]
    assert 0.29 - 3 * errors.mean_se[tau] < errors.mean[tau] < 0.29 + 3 * errors.mean_se[tau]
    assert errors.log2_sd_se[tau] < 0.06
    assert errors.mean_se[tau] < 0.06
    assert abs(errors.sure_log2_sd[free]) < 0.1
    assert (errors.sure_log2_sd[target.layout["theta"].offset :][:8] == 0.0).all()  # not among those of both
    verdict = judge(stein_statistics(x, target.score(x)), decentered=errors, labels=target.layout.coordinate_names)
    assert verdict.level != "good"
    assert verdict.worst.instrument == "decentered"
    assert verdict.sentence.startswith("tau: ")
