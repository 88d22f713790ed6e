"""From a fit to ArviZ: the groups, their values against closed forms, and what ArviZ does with them."""

import math
import warnings

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule, PyroSample

from pyro_sivism import SIVISM, SemiImplicitGuide
from pyro_sivism.errors import ArgumentError, LayoutChangedError, NotSetUpError, SivismWarning
from pyro_sivism.inference_data import to_inference_data

ARVIZ_1 = "InferenceData" not in vars(az)
Y = torch.tensor([0.3, -1.2, 2.0, 0.7, -0.4, 1.1])

pytestmark = [
    # ArviZ 0.2x plots through matplotlib calls that newer versions deprecate.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:arviz.*"),
    pytest.mark.filterwarnings("ignore::PendingDeprecationWarning:arviz.*"),
]


class Untrained(SIVISM):
    """A fit of no steps: draws of the guide around its starting point, without the cost of training."""

    def __init__(self, model, *args, **kwargs):
        super().__init__(model, SemiImplicitGuide(model, init_scale=0.5))
        self.guide.setup(*args, **kwargs)

    def sample_unconstrained(self, num_samples, batch_size=10_000):
        return self.guide.sample_unconstrained(num_samples)


def convert(model, *args, num_samples=40, fit_kwargs=None, **kwargs):
    return to_inference_data(Untrained(model, *args, **(fit_kwargs or {})), *args, num_samples=num_samples, **kwargs)


def groups_of(idata):
    return set(idata.children) if ARVIZ_1 else set(idata.groups())


def schools(y, sigma):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def normal(y, prior_sd=3.0):
    mu = pyro.sample("mu", dist.Normal(0.0, prior_sd))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 2.0), obs=y)


def simplex():
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    pyro.deterministic("largest", weights.max())


# --- groups, shapes, names ---------------------------------------------------------------------------


def test_every_group_with_the_plates_as_dims():
    sigma = torch.full((6,), 2.0)
    idata = convert(schools, Y, sigma, prior=30, coords={"school": list("abcdef")})
    assert groups_of(idata) == {
        "posterior",
        "posterior_predictive",
        "log_likelihood",
        "sample_stats",
        "prior",
        "prior_predictive",
        "observed_data",
        "constant_data",
        "unconstrained_posterior",
    }
    assert idata["posterior"]["mu"].dims == ("chain", "draw")
    for group, name in (("posterior", "theta"), ("posterior_predictive", "y"), ("log_likelihood", "y")):
        assert idata[group][name].dims == ("chain", "draw", "school")
        assert idata[group][name].shape == (1, 40, 6)
        assert list(idata[group]["school"].values) == list("abcdef")
    assert idata["prior"]["theta"].shape == idata["prior_predictive"]["y"].shape == (1, 30, 6)
    assert idata["observed_data"]["y"].dims == ("school",)
    np.testing.assert_array_equal(idata["observed_data"]["y"], Y)
    assert set(idata["constant_data"].data_vars) == {"sigma"}  # the observations are not repeated there
    assert idata["sample_stats"]["lp"].shape == (1, 40)
    tau, log_tau = idata["posterior"]["tau"], idata["unconstrained_posterior"]["tau"]
    np.testing.assert_allclose(np.log(tau), log_tau, rtol=1e-5, atol=1e-6)


def test_scalars_stay_scalars_and_events_have_dims_of_their_own():
    idata = convert(simplex)
    assert idata["posterior"]["weights"].dims == ("chain", "draw", "weights_dim_0")
    assert idata["posterior"]["largest"].dims == ("chain", "draw")
    np.testing.assert_array_equal(idata["posterior"]["largest"], idata["posterior"]["weights"].max("weights_dim_0"))
    assert idata["unconstrained_posterior"]["weights"].dims == ("chain", "draw", "weights_unconstrained_dim_0")
    assert groups_of(idata) == {"posterior", "prior", "sample_stats", "unconstrained_posterior"}


def test_the_users_dims_win():
    sigma = torch.full((6,), 2.0)
    idata = convert(
        schools, Y, sigma, dims={"theta": ["place"], "sigma": ["school"]}, coords={"place": range(10, 16)}, prior=False
    )
    assert idata["posterior"]["theta"].dims == ("chain", "draw", "place")
    assert idata["posterior"]["place"].values.tolist() == list(range(10, 16))
    assert idata["posterior_predictive"]["y"].dims == ("chain", "draw", "school")
    assert idata["constant_data"]["sigma"].dims == ("school",)


@pytest.mark.parametrize(
    ("dims", "coords", "message"),
    [
        ({"thta": ["school"]}, None, "thta.*expected one of.*theta"),
        ({"theta": ["school", "pupil"]}, None, "'theta'.*expected 1 names"),
        ({"theta": "school"}, None, "'theta'.*in a list"),
        (None, {"scool": list("abcdef")}, "scool.*expected one of.*school"),
        (None, {"school": list("abc")}, "3 labels for dim 'school'.*size 6"),
        ({"weights": ["school"]}, None, "dim 'school' has size"),
    ],
)
def test_dims_and_coords_that_do_not_fit_say_so(dims, coords, message):
    def model(y, sigma):
        pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
        schools(y, sigma)

    with pytest.raises(ArgumentError, match=message):
        convert(model, Y, torch.ones(6), dims=dims, coords=coords)


def test_plates_named_as_arviz_or_a_site_names_things():
    def model(y):
        with pyro.plate("draw", 6), pyro.plate("chain", 2):
            pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("pair", 2):
            pyro.deterministic("f", torch.zeros(2))
        pyro.sample("x_dim_0", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    idata = convert(model, Y)
    assert idata["posterior"]["x"].dims == ("chain", "draw", "chain_dim", "draw_dim")
    assert idata["posterior"]["f"].dims == ("chain", "draw", "pair")


def test_a_site_of_crossed_plates_keeps_the_shape_the_model_gives_it():
    """A size-1 dim for the plate that a site is outside of, by the name ``az.from_pyro`` gives it too."""

    def model(y):
        rows, columns = pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 3, dim=-1)
        with rows:
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with columns:
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with rows, columns:
            pyro.sample("y", dist.Normal(a + b, 1.0), obs=y)

    idata = convert(model, Y.reshape(2, 3))
    assert idata["posterior"]["a"].dims == ("chain", "draw", "rows", "a_dim_1")
    assert idata["posterior"]["a"].shape == (1, 40, 2, 1)
    assert idata["posterior"]["b"].dims == ("chain", "draw", "columns")
    assert idata["log_likelihood"]["y"].dims == ("chain", "draw", "rows", "columns")


# --- values ------------------------------------------------------------------------------------------


def test_lp_is_the_log_joint_on_the_unconstrained_space(float64):
    sigma = torch.full((6,), 2.0)
    idata = convert(schools, Y.double(), sigma)
    draws = {name: torch.tensor(value.values[0]) for name, value in idata["posterior"].data_vars.items()}
    mu, tau, theta = draws["mu"], draws["tau"], draws["theta"]
    want = dist.Normal(0.0, 5.0).log_prob(mu) + dist.HalfCauchy(5.0).log_prob(tau) + tau.log()
    want += dist.Normal(mu[:, None], tau[:, None]).log_prob(theta).sum(-1)
    want += dist.Normal(theta, sigma).log_prob(Y.double()).sum(-1)
    np.testing.assert_allclose(idata["sample_stats"]["lp"][0], want, rtol=1e-12)


def test_log_likelihood_is_that_of_each_draw_and_observation(float64):
    idata = convert(normal, Y.double())
    mu = torch.tensor(idata["posterior"]["mu"].values[0])
    want = dist.Normal(mu[:, None], 2.0).log_prob(Y.double())
    np.testing.assert_allclose(idata["log_likelihood"]["y"][0], want, rtol=1e-12)


def test_minibatches_give_the_full_data(float64):
    y = Y.double()

    def model(y, size):
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(y), subsample_size=size) as i:
            pyro.sample("y", dist.Normal(mu, 2.0), obs=y[i])

    idata = convert(model, y, 2)
    mu = torch.tensor(idata["posterior"]["mu"].values[0])
    log_likelihood = dist.Normal(mu[:, None], 2.0).log_prob(y)
    np.testing.assert_allclose(idata["log_likelihood"]["y"][0], log_likelihood, rtol=1e-12)
    np.testing.assert_array_equal(idata["observed_data"]["y"], y)
    assert idata["posterior_predictive"]["y"].dims == ("chain", "draw", "data")
    lp = dist.Normal(0.0, 3.0).log_prob(mu) + log_likelihood.sum(-1)
    np.testing.assert_allclose(idata["sample_stats"]["lp"][0], lp, rtol=1e-12)
    with pytest.warns(SivismWarning, match="lp.*plate 'data' subsamples"):  # 6 is no multiple of 4
        idata = convert(model, y, 4)
    assert "sample_stats" not in groups_of(idata)
    assert idata["log_likelihood"]["y"].shape == (1, 40, 6)


def test_a_minibatch_that_ignores_the_plates_indices_is_left_out_by_name():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("data", 60, subsample_size=6):
            pyro.sample("y", dist.Normal(mu, 2.0), obs=y)

    with pytest.warns(SivismWarning) as caught:
        idata = convert(model, Y)
    messages = [str(warning.message) for warning in caught]
    assert any("site 'y'" in message and "plate 'data'" in message for message in messages)
    assert groups_of(idata) == {"posterior", "prior", "constant_data", "unconstrained_posterior"}


def test_discrete_latents_are_summed_out_and_drawn(float64):
    y = Y.double()

    def model(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Bernoulli(0.3)).long()
            pyro.sample("y", dist.Normal(loc[z], 1.0), obs=y)

    idata = convert(model, y)
    loc = torch.tensor(idata["posterior"]["loc"].values[0])
    terms = dist.Normal(loc[:, None], 1.0).log_prob(y[:, None]) + torch.tensor([0.7, 0.3]).log()
    np.testing.assert_allclose(idata["log_likelihood"]["y"][0], terms.logsumexp(-1), rtol=1e-12)
    assert set(idata["posterior"].data_vars) == {"loc"}
    assert idata["posterior_predictive"]["y"].shape == (1, 40, 6)
    prior = dist.Normal(0.0, 1.0).log_prob(loc).sum(-1)
    np.testing.assert_allclose(idata["sample_stats"]["lp"][0], prior + terms.logsumexp(-1).sum(-1), rtol=1e-12)


# --- models of every kind ----------------------------------------------------------------------------


def test_a_pyro_module_with_keyword_arguments_that_predicts_without_data():
    class Regression(PyroModule):
        def __init__(self):
            super().__init__()
            self.weight = PyroSample(dist.Normal(0.0, 1.0).expand([2]).to_event(1))

        def forward(self, features, y=None, *, noise=1.0):
            scale = pyro.param("scale", torch.tensor(2.0), constraint=dist.constraints.positive)
            mean = pyro.deterministic("mean", features @ self.weight)
            with pyro.plate("row", len(features)):
                return pyro.sample("y", dist.Normal(mean, noise * scale), obs=y)

    features = torch.randn(6, 2)
    model = Regression()
    sivism = Untrained(model, features, y=Y, noise=0.5)
    idata = to_inference_data(sivism, features, y=Y, noise=0.5, num_samples=40)
    mean = torch.tensor(idata["posterior"]["mean"].values[0])
    want = dist.Normal(mean, 1.0).log_prob(Y)
    np.testing.assert_allclose(idata["log_likelihood"]["y"][0], want, rtol=1e-5, atol=1e-5)
    assert set(idata["constant_data"].data_vars) == {"features"}
    with pytest.raises(LayoutChangedError, match="'y'"):
        to_inference_data(sivism, features, y=None, noise=0.5)


def test_conditioned_and_reparametrized_sites():
    def model():
        tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
        with pyro.plate("group", 6):
            theta = pyro.sample("theta", dist.Normal(0.0, tau))
            pyro.sample("y", dist.Normal(theta, 1.0))

    conditioned = poutine.condition(poutine.reparam(model, {"theta": LocScaleReparam(0.0)}), {"y": Y})
    idata = convert(conditioned)
    assert set(idata["posterior"].data_vars) == {"tau", "theta_decentered", "theta"}
    assert idata["posterior"]["theta"].dims == ("chain", "draw", "group")
    np.testing.assert_array_equal(idata["observed_data"]["y"], Y)
    assert idata["posterior_predictive"]["y"].shape == (1, 40, 6)
    assert not np.allclose(idata["posterior_predictive"]["y"], Y)


def test_obs_mask_and_factor():
    mask = torch.tensor([True, True, False, True, False, True])

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        pyro.factor("penalty", -(mu**2))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 2.0), obs=y, obs_mask=mask)

    idata = convert(model, Y)
    assert (idata["log_likelihood"]["y_observed"].values[..., ~mask.numpy()] == 0).all()
    imputed = idata["posterior"]["y"].values[0]
    assert (imputed[:, mask.numpy()] == Y[mask].numpy()).all()
    np.testing.assert_array_equal(imputed[:, ~mask.numpy()], idata["posterior"]["y_unobserved"][0][:, ~mask.numpy()])
    assert "penalty" not in idata["log_likelihood"].data_vars


def test_a_flat_prior_is_not_passed_off_as_the_distribution_it_masks():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0).mask(False))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 2.0), obs=y)

    with pytest.warns(SivismWarning, match="prior.*'mu' is masked"):
        idata = convert(model, Y)
    assert not {"prior", "prior_predictive"} & groups_of(idata)
    assert not {"prior", "prior_predictive"} & groups_of(convert(model, Y, prior=False))  # and no warning


def test_an_observation_of_a_latent_is_a_prior_and_no_data():
    def model(y):
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        pyro.sample("sigma_prior", dist.Gamma(2.0, 1.0), obs=sigma)
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(0.0, sigma), obs=y)

    with pytest.warns(SivismWarning) as caught:
        idata = convert(model, Y)
    assert all("'sigma_prior'" in str(warning.message) for warning in caught)
    for group in ("observed_data", "log_likelihood", "posterior_predictive"):
        assert set(idata[group].data_vars) == {"y"}
    assert "prior" not in groups_of(idata)


def test_a_prior_without_a_sampler_costs_no_other_group():
    class OnlyDensity(dist.Normal):
        def sample(self, sample_shape=()):
            raise NotImplementedError("no sampler")

        rsample = sample

        def expand(self, batch_shape, _instance=None):
            return self

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", OnlyDensity(mu.expand(6), 1.0), obs=y)

    with pytest.warns(SivismWarning) as caught:
        idata = convert(model, Y)
    messages = [str(warning.message) for warning in caught]
    assert any("posterior_predictive" in m and "no sampler" in m for m in messages)
    assert any("prior and prior_predictive" in m for m in messages)
    assert {"posterior", "log_likelihood", "sample_stats", "observed_data"} <= groups_of(idata)


def test_a_chain_of_discrete_latents_gives_one_warning_for_all_its_sites():
    def model(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        z = torch.tensor(0)
        for t in pyro.markov(range(len(y))):
            z = pyro.sample(f"z_{t}", dist.Categorical(torch.tensor([[0.9, 0.1], [0.2, 0.8]])[z]))
            pyro.sample(f"y_{t}", dist.Normal(loc[z], 1.0), obs=y[t])

    with pytest.warns(SivismWarning) as caught:
        idata = convert(model, torch.cat([Y, Y]))
    (warning,) = caught
    assert str(warning.message).startswith(
        "the InferenceData leaves out 'y_0', 'y_1', 'y_2', 'y_3', 'y_4', 'y_5' and 6 more of log_likelihood: "
        "a chain of discrete latents (z_0, z_1, z_2, ...)"
    )
    assert "log_likelihood" not in groups_of(idata)
    assert len(idata["posterior_predictive"].data_vars) == 12


def test_warnings_of_torchs_samplers_are_not_the_users():
    """torch's Wishart calls its valid draws singular; vmap complains of operators without a batched form."""

    def model():
        pyro.sample("covariance", dist.Wishart(torch.tensor(5.0), torch.eye(2)))
        pyro.sample("correlation", dist.LKJCholesky(3, torch.tensor(1.0)))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        idata = convert(model)
    assert caught == []
    assert idata["prior"]["covariance"].shape == (1, 40, 2, 2)


def test_groups_can_be_left_out_and_batches_change_nothing():
    idata = convert(normal, Y, posterior_predictive=False, log_likelihood=False, prior=False, constant_data={})
    assert groups_of(idata) == {"posterior", "sample_stats", "observed_data", "unconstrained_posterior"}
    pyro.set_rng_seed(1)
    whole = convert(normal, Y)
    pyro.set_rng_seed(1)
    parts = convert(normal, Y, batch_size=7)
    np.testing.assert_array_equal(whole["log_likelihood"]["y"], parts["log_likelihood"]["y"])


def test_constant_data_given():
    idata = convert(normal, Y, constant_data={"year": np.arange(6)}, dims={"year": ["data"]})
    assert idata["constant_data"]["year"].dims == ("data",)


def test_an_argument_named_like_a_site_of_another_shape():
    def of_column(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y.squeeze(-1))

    def of_part(y, keep):
        normal(y[keep])

    idata = convert(of_column, Y[:, None], coords={"row": list("abcdef")})
    assert idata["observed_data"]["y"].dims == ("row",)
    assert idata["constant_data"]["y"].shape == (6, 1)
    keep = torch.tensor([True, True, True, False, False, True])
    idata = convert(of_part, Y, keep, coords={"data": list("abcd")})
    assert list(idata["observed_data"]["data"].values) == list("abcd")
    np.testing.assert_array_equal(idata["constant_data"]["y"].values, Y.numpy())
    # Of one shape they share their dims, as where the logarithm of the argument is observed.
    idata = convert(lambda y: normal(y.exp()), Y)
    assert idata["constant_data"]["y"].dims == idata["observed_data"]["y"].dims == ("data",)


def test_wrong_calls():
    sivism = Untrained(normal, Y)
    with pytest.raises(ArgumentError, match="num_samples of at least 1"):
        to_inference_data(sivism, Y, num_samples=0)
    with pytest.raises(NotSetUpError):
        to_inference_data(SIVISM(normal), Y)


# --- a real fit, and what ArviZ does with it ---------------------------------------------------------


@pytest.fixture(scope="module")
def fitted():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    sivism = SIVISM(normal)
    sivism.run(30, Y, progress_bar=False)
    return sivism


def test_the_last_arguments_are_taken_if_none_are_given(fitted):
    idata = to_inference_data(fitted, num_samples=10)
    np.testing.assert_array_equal(idata["observed_data"]["y"], Y)


def test_posterior_predictive_moments(fitted):
    """y_rep = mu + 2 eps: given the draws of mu its mean and variance are closed forms."""
    idata = to_inference_data(fitted, Y, num_samples=4000)
    mu, y = idata["posterior"]["mu"].values[0], idata["posterior_predictive"]["y"].values[0]
    z = (y - mu[:, None]) / 2.0
    # Five standard errors: a failure rate of 1e-6 each.
    assert abs(z.mean()) < 5 / math.sqrt(z.size)
    assert abs(z.var() - 1) < 5 * math.sqrt(2 / z.size)
    prior = idata["prior_predictive"]["y"].values[0][:, 0]
    assert abs(prior.var() / 13.0 - 1) < 5 * math.sqrt(2 / len(prior))


def test_attrs_say_how_the_fit_came_about(fitted):
    attrs = to_inference_data(fitted, Y, num_samples=10)["posterior"].attrs
    assert attrs["inference_library"] == "pyro_sivism"
    assert attrs["num_steps"] == 30
    assert attrs["objective"] == "PathGradientKL"
    assert attrs["sampling_time"] > 0
    assert attrs["seconds_steps"] > 0
    assert {"created_at", "seed", "torch_version", "pyro_version", "arviz_version"} <= set(attrs)


def test_summary_loo_compare_and_plots(fitted):
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    idata = to_inference_data(fitted, Y, num_samples=500)
    summary = az.summary(idata)
    assert list(summary.index) == ["mu"]
    loo = az.loo(idata)
    exact = _exact_loo(Y.double())
    # The fit is rough and PSIS has its own noise; the scale of elpd differences that matter is a few tenths.
    assert abs(float(loo.elpd_loo if hasattr(loo, "elpd_loo") else loo.elpd) - exact) < 0.3
    wide = convert(lambda y: normal(y, prior_sd=30.0), Y, num_samples=500)
    comparison = az.compare({"fitted": idata, "wide": wide})
    assert set(comparison.index) == {"fitted", "wide"}
    az.plot_pair(convert(schools, Y, torch.ones(6)), var_names=["mu", "tau"])
    plt.close("all")


def _exact_loo(y):
    """sum_i log p(y_i | y_-i) of the conjugate model."""
    total = 0.0
    for i in range(len(y)):
        rest = torch.cat([y[:i], y[i + 1 :]])
        precision = 1 / 9 + len(rest) / 4
        total += dist.Normal(rest.sum() / 4 / precision, math.sqrt(1 / precision + 4)).log_prob(y[i]).item()
    return total


def test_netcdf_round_trip(fitted, tmp_path):
    idata = to_inference_data(fitted, Y, num_samples=20)
    path = tmp_path / "fit.nc"
    idata.to_netcdf(path, engine="h5netcdf")
    back = az.from_netcdf(path, engine="h5netcdf")
    assert groups_of(back) == groups_of(idata)
    np.testing.assert_array_equal(back["posterior"]["mu"], idata["posterior"]["mu"])
    assert back["posterior"].attrs["num_steps"] == 30
    back.close()


if not ARVIZ_1:  # ArviZ 1.x has no from_pyro

    def test_beside_nuts_from_pyro(fitted):
        kernel = NUTS(normal)
        mcmc = MCMC(kernel, num_samples=400, warmup_steps=50, disable_progbar=True)
        mcmc.run(Y)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # ArviZ's own deprecations in its Pyro converter
            nuts = az.from_pyro(mcmc, log_likelihood=True)
        ours = to_inference_data(fitted, Y, num_samples=400)
        assert ours["log_likelihood"]["y"].shape == nuts["log_likelihood"]["y"].shape
        assert set(az.compare({"sivism": ours, "nuts": nuts}).index) == {"sivism", "nuts"}
