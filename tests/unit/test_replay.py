"""Replaying a model at draws of its latents, against closed forms."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam
from torch.func import vmap

from pyro_sivism.layout import LatentLayout
from pyro_sivism.target.replay import Replay
from pyro_sivism.target.sampling import functional_sampling

S = 50


def make(model, *args, **kwargs):
    trace = poutine.trace(model).get_trace(*args, **kwargs)
    return Replay(model, LatentLayout.from_trace(trace), trace, args, kwargs)


def normal_log_prob(y, mean, sd):
    return -0.5 * ((y - mean) / sd) ** 2 - math.log(sd) - 0.5 * math.log(2 * math.pi)


def path_of(replay, values):
    return replay._choose_evaluation(values).__name__, replay._choose_simulation(values).__name__


Y = torch.tensor([0.3, -1.2, 2.0, 0.7, -0.4, 1.1, 0.0])


def plain(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 2.0), obs=y)


def branching(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    sign = 1.0 if mu > 0 else -1.0
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu * sign * sign, 2.0), obs=y)


def scaled(y):
    with poutine.scale(scale=7.0):
        plain(y)


def subsampled(y, size=3):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y), subsample_size=size) as i:
        pyro.sample("y", dist.Normal(mu, 2.0), obs=y[i])


def without_plate(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(mu, 2.0), obs=y)


@pytest.mark.parametrize("model", [plain, branching, scaled, subsampled, without_plate])
def test_log_likelihood_of_each_observation(model, float64):
    y = Y.double()
    mu = torch.linspace(-1.0, 1.0, S)
    replay = make(model, y)
    assert path_of(replay, {"mu": mu})[0] == ("_loop" if model is branching else "_vmap")
    got = replay.evaluate({"mu": mu}, batch_size=13).log_likelihood["y"]
    torch.testing.assert_close(got, normal_log_prob(y, mu[:, None], 2.0), rtol=1e-12, atol=1e-12)
    assert torch.equal(replay.observed["y"], y)
    assert not replay.moving_sites


@pytest.mark.parametrize("model", [plain, branching, subsampled, without_plate])
def test_simulated_observations_follow_the_model_at_each_draw(model):
    mu = torch.linspace(-5.0, 5.0, 4000)
    replay = make(model, Y)
    drawn = replay.simulate(4000, {"mu": mu}, batch_size=1500)
    assert set(drawn) == {"y"}
    z = (drawn["y"].double() - mu[:, None].double()) / 2.0
    n = z.numel()
    # Five standard errors each: a failure rate of 1e-6.
    assert abs(z.mean()) < 5 / math.sqrt(n)
    assert abs(z.square().mean() - 1.0) < 5 * math.sqrt(2 / n)
    correlation = (z[:, 0] * z[:, -1]).mean()  # different observations, and minibatches, are drawn apart
    assert abs(correlation) < 5 / math.sqrt(len(z))
    assert abs((z[1:] * z[:-1]).mean()) < 5 / math.sqrt(n)  # and so are different draws


def test_subsampled_local_latents_are_taken_at_their_own_rows(float64):
    y = Y.double()

    def model(y):
        with pyro.plate("data", len(y), subsample_size=3) as i:
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            pyro.deterministic("twice", 2 * theta)
            pyro.sample("y", dist.Normal(theta, 2.0), obs=y[i])

    theta = torch.randn(S, len(y))
    evaluation = make(model, y).evaluate({"theta": theta})
    torch.testing.assert_close(evaluation.log_likelihood["y"], normal_log_prob(y, theta, 2.0), rtol=1e-12, atol=1e-12)
    assert torch.equal(evaluation.deterministic["twice"], 2 * theta)


def test_two_subsampled_plates_are_covered_together(float64):
    y = torch.randn(5, 4)

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        rows = pyro.plate("rows", 5, subsample_size=2, dim=-2)
        columns = pyro.plate("columns", 4, subsample_size=3, dim=-1)
        with columns as j:
            beta = pyro.sample("beta", dist.Normal(0.0, 1.0))
        with rows as i, columns:
            pyro.sample("y", dist.Normal(mu + beta, 2.0), obs=y[i][:, j])

    mu, beta = torch.randn(S), torch.randn(S, 4)
    replay = make(model, y)
    assert torch.equal(replay.observed["y"], y)
    got = replay.evaluate({"mu": mu, "beta": beta}).log_likelihood["y"]
    mean = (mu[:, None] + beta)[:, None]
    torch.testing.assert_close(got, normal_log_prob(y, mean, 2.0), rtol=1e-12, atol=1e-12)


def test_a_prior_draw_is_one_whole_across_minibatches():
    """theta_i and y_i hang together and all share tau, though they were drawn in different minibatches."""

    def model(y):
        tau = pyro.sample("tau", dist.Normal(0.0, 100.0))
        with pyro.plate("data", len(y), subsample_size=3) as i:
            theta = pyro.sample("theta", dist.Normal(tau, 1.0))
            pyro.sample("y", dist.Normal(theta, 0.01), obs=y[i])

    drawn = make(model, Y).simulate(500)
    assert drawn["theta"].shape == drawn["y"].shape == (500, 7)
    assert (drawn["theta"] - drawn["tau"][:, None]).abs().max() < 6.0
    assert (drawn["y"] - drawn["theta"]).abs().max() < 0.06
    assert (drawn["theta"][:, 0] != drawn["theta"][:, -1]).all()


@pytest.mark.parametrize("explicit", [False, True])
def test_data_that_ignore_the_plates_indices_are_left_out(explicit):
    minibatch = Y[:3]

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        how = {"subsample": torch.arange(3)} if explicit else {"subsample_size": 3}
        with pyro.plate("everything", 7, **how):
            pyro.sample("y", dist.Normal(mu, 2.0), obs=y)

    replay = make(model, minibatch)
    assert "everything" in replay.left_out["y"]
    assert "y" not in replay.evaluate({"mu": torch.zeros(S)}).log_likelihood
    assert "y" not in replay.simulate(S, {"mu": torch.zeros(S)})
    assert replay.even_minibatches() is None


# --- discrete latents --------------------------------------------------------------------------------


def test_local_discrete_latents_are_summed_out(float64):
    y, weights = Y.double(), torch.tensor([0.2, 0.5, 0.3])

    def model(y, subsample_size=None):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        with pyro.plate("data", len(y), subsample_size=subsample_size) as i:
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.deterministic("mean", loc[z])
            pyro.sample("y", dist.Normal(loc[z], 2.0), obs=y[i])

    loc = torch.randn(S, 3)
    want = (weights.log() + normal_log_prob(y[:, None], loc[:, None], 2.0)).logsumexp(-1)
    for size in (None, 3):
        evaluation = make(model, y, subsample_size=size).evaluate({"loc": loc})
        torch.testing.assert_close(evaluation.log_likelihood["y"], want, rtol=1e-12, atol=1e-12)
        assert "discrete" in evaluation.left_out["mean"]
    drawn = make(model, y).simulate(4000, {"loc": torch.tensor([-100.0, 0.0, 100.0]).expand(4000, 3)})
    share = (drawn["y"] > 50).double().mean()
    assert abs(share - 0.3) < 5 * math.sqrt(0.3 * 0.7 / drawn["y"].numel())


def test_a_discrete_latent_with_a_continuous_child_is_summed_out(float64):
    """p(y_i | theta) = sum_z p(z | theta) p(y | z, theta): the rest of the factors is divided out."""
    y = Y.double()

    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            theta = pyro.sample("theta", dist.Normal(z, 1.0))
            pyro.sample("y", dist.Normal(theta + z, 2.0), obs=y)

    theta = torch.randn(S, len(y))
    joint = torch.stack([math.log(p) + normal_log_prob(theta, z, 1.0) for z, p in ((0.0, 0.7), (1.0, 0.3))])
    like = torch.stack([normal_log_prob(y, theta + z, 2.0) for z in (0.0, 1.0)])
    want = (joint + like).logsumexp(0) - joint.logsumexp(0)
    got = make(model, y).evaluate({"theta": theta}).log_likelihood["y"]
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def shared_label(y):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    z = pyro.sample("z", dist.Bernoulli(0.5)).long()
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(loc[z], 1.0), obs=y)


def two_outcomes(y):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Bernoulli(0.5)).long()
        pyro.sample("y", dist.Normal(loc[z], 1.0), obs=y)
        pyro.sample("w", dist.Normal(loc[z], 1.0), obs=y)


def markov_chain(y):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    z = torch.tensor(0)
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Categorical(torch.tensor([[0.9, 0.1], [0.2, 0.8]])[z]))
        pyro.sample("y" if t == 0 else f"y_{t}", dist.Normal(loc[z], 1.0), obs=y[t])


@pytest.mark.parametrize("model", [shared_label, two_outcomes, markov_chain])
def test_observations_that_share_a_discrete_latent_have_no_log_likelihood(model):
    replay = make(model, Y)
    evaluation = replay.evaluate({"loc": torch.randn(S, 2)})
    assert "y" not in evaluation.log_likelihood
    assert "independent" in evaluation.left_out["y"]
    assert replay.simulate(S, {"loc": torch.randn(S, 2)})["y"].shape == (S, *replay.sites["y"].shape)


def test_a_shared_discrete_latent_is_one_draw_across_minibatches():
    def model(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        z = pyro.sample("z", dist.Bernoulli(0.5)).long()
        with pyro.plate("data", len(y), subsample_size=3) as i:
            pyro.sample("y", dist.Normal(loc[z], 0.01), obs=y[i])

    drawn = make(model, Y).simulate(200, {"loc": torch.tensor([-5.0, 5.0]).expand(200, 2)})["y"]
    assert ((drawn > 0) == (drawn[:, :1] > 0)).all()
    assert 0 < (drawn[:, 0] > 0).sum() < 200


# --- sites of other kinds ----------------------------------------------------------------------------


def test_masked_observations_have_log_likelihood_zero():
    mask = Y > 0
    y = torch.where(mask, Y, torch.nan)

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)), poutine.mask(mask=mask):
            pyro.sample("y", dist.Normal(mu, 2.0), obs=y)

    replay = make(model, y)
    got = replay.evaluate({"mu": torch.zeros(S)}).log_likelihood["y"]
    torch.testing.assert_close(got[0], torch.where(mask, normal_log_prob(Y, 0.0, 2.0), torch.tensor(0.0)))
    assert replay.simulate(S, {"mu": torch.zeros(S)})["y"].isfinite().all()


def test_reparametrized_sites_come_back_under_their_own_name():
    def centered(y):
        tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
        with pyro.plate("group", len(y)):
            theta = pyro.sample("theta", dist.Normal(1.0, tau))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)

    model = poutine.reparam(centered, config={"theta": LocScaleReparam(0.0)})
    replay = make(model, Y)
    assert replay.sites["theta"].dims == ("group",)
    tau, base = torch.rand(S) + 0.5, torch.randn(S, 7)
    theta = replay.evaluate({"tau": tau, "theta_decentered": base}).deterministic["theta"]
    torch.testing.assert_close(theta, 1.0 + tau[:, None] * base)


def test_a_factor_is_no_observation():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("penalty", -(x**2))

    replay = make(model)
    assert set(replay.sites) == {"x"}
    assert replay.evaluate({"x": torch.zeros(S)}).log_likelihood == {}


def test_an_observation_that_moves_with_the_latents_is_no_data():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("gap", dist.Normal(0.0, 1.0), obs=x - 1.0)

    replay = make(model)
    assert replay.observed == {}
    assert replay.moving_sites == ["gap"]
    assert replay.evaluate({"x": torch.zeros(S)}).log_likelihood == {}


def test_sequential_minibatches_are_left_out():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        for i in pyro.plate("data", len(y), subsample_size=2):
            pyro.sample(f"y_{i}", dist.Normal(mu, 1.0), obs=y[i])

    replay = make(model, Y)
    assert replay.of_kind("observed") == {}
    assert all("'data'" in reason for reason in replay.left_out.values())
    assert len(replay.left_out) == 2


@pytest.mark.parametrize(
    ("event_dim", "value", "dims"),
    [
        (None, torch.zeros(7), ("data",)),
        (None, torch.zeros(7, 2), ("data", "f_dim_1")),
        (1, torch.zeros(7, 2), ("data", "f_dim_1")),
        (None, torch.zeros(3), ("f_dim_0",)),
        (None, torch.tensor(0.0), ()),
    ],
)
def test_dims_of_deterministic_sites(event_dim, value, dims):
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 7):
            pyro.deterministic("f", value + x, event_dim=event_dim)

    replay = make(model)
    assert replay.sites["f"].dims == dims
    assert replay.evaluate({"x": torch.zeros(S)}).deterministic["f"].shape == (S, *value.shape)


# --- sampling under vmap -----------------------------------------------------------------------------

SAMPLERS = {
    "normal": lambda t: dist.Normal(t, 2.0),
    "exponential": lambda t: dist.Exponential(t),
    "cauchy": lambda t: dist.Cauchy(t, 2.0),
    "student": lambda t: dist.StudentT(5.0, t, 2.0),
    "beta": lambda t: dist.Beta(t, 2.0),
    "lognormal": lambda t: dist.LogNormal(t, 0.5),
    "uniform": lambda t: dist.Uniform(-t, t),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_under_vmap_follow_their_distribution(name):
    """The probability integral transform of the draws is uniform: Kolmogorov's bound at a failure rate of 1e-6."""
    from scipy import stats

    t = torch.full((4000,), 1.5)
    with functional_sampling(), torch.no_grad():
        draws = vmap(lambda one: SAMPLERS[name](one).sample(), randomness="different")(t)
    reference = {
        "normal": stats.norm(1.5, 2.0),
        "exponential": stats.expon(scale=1 / 1.5),
        "cauchy": stats.cauchy(1.5, 2.0),
        "student": stats.t(5.0, 1.5, 2.0),
        "beta": stats.beta(1.5, 2.0),
        "lognormal": stats.lognorm(0.5, scale=math.exp(1.5)),
        "uniform": stats.uniform(-1.5, 3.0),
    }[name]
    assert stats.kstest(draws.double().numpy(), reference.cdf).pvalue > 1e-6
