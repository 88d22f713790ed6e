"""Fits beside NUTS: distances against SciPy and closed forms, errors against their spread, and kernels from fits."""

import math
import pickle
import sys

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.mcmc.util import initialize_model
from scipy import stats

import pyro_sivism.compare as compare_module
from pyro_sivism import SIVISM, FixedGaussian, Target, compare_with_nuts, nuts_from
from pyro_sivism.diagnostics.two_sample import classifier_test, kolmogorov_smirnov, sliced_wasserstein
from pyro_sivism.errors import ArgumentError, LayoutChangedError, MissingDependencyError, ModelError, NotSetUpError
from pyro_sivism.inference_data import effective_sample_size
from pyro_sivism.nuts import _taken_on
from pyro_sivism.plots import plot_comparison

Y = torch.tensor([0.3, -1.2, 2.0, 0.7, -0.4, 1.1])

pytestmark = [
    # ArviZ 0.2x reads attributes that newer xarray and numpy deprecate.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:arviz.*"),
]

SD = torch.tensor([1e-3, 200.0, 1.0])
COVARIANCE = torch.tensor([[1.0, 0.9, 0.0], [0.9, 1.0, -0.4], [0.0, -0.4, 1.0]]) * SD * SD[:, None]
LOC = torch.tensor([5e-3, 1000.0, -2.0])


def correlated():
    """Latents in another order than their names', in units far apart: ``z`` holds the first two, ``a`` the log."""
    joint = dist.MultivariateNormal(LOC, COVARIANCE)
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).mask(False).to_event(1))
    a = pyro.sample("a", dist.LogNormal(0.0, 1.0).mask(False))
    x = torch.cat([z, a.log()[..., None]], -1)
    pyro.factor("joint", joint.log_prob(x) - a.log())


def normal(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 2.0), obs=y)


def posterior_of_normal(y):
    precision = 1 / 9 + len(y) / 4
    return (y.sum() / 4 / precision).item(), precision**-0.5


def exact(model, *args, mean, covariance):
    """A fit that starts, and here ends, as the Gaussian that is given."""
    return SIVISM(model, preconditioner=FixedGaussian(mean, covariance), num_particles=8).setup(*args)


@pytest.fixture(scope="module")
def fitted():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    mean, sd = posterior_of_normal(Y)
    return exact(normal, Y, mean=torch.tensor([mean]), covariance=torch.tensor([[sd**2]]))


@pytest.fixture(scope="module")
def raw_units():
    pyro.set_rng_seed(0)
    return exact(correlated, mean=LOC, covariance=COVARIANCE)


# --- distances ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [300, 450, 7])
def test_ks_and_wasserstein_agree_with_scipy(count):
    x, y = torch.randn(600, 1).double(), (1.3 * torch.randn(count, 1) + 0.4).double()
    want = stats.ks_2samp(x[:, 0].numpy(), y[:, 0].numpy()).statistic
    assert kolmogorov_smirnov(x, y).item() == pytest.approx(want, abs=1e-12)
    want = stats.wasserstein_distance(x[:, 0].numpy(), y[:, 0].numpy())
    assert sliced_wasserstein(x, y) == pytest.approx(want, rel=1e-9)


def test_sliced_wasserstein_of_a_shift_is_its_mean_projection():
    """W1 of x and x + c along a direction w is |c.w|, in the mean over the sphere in 3-D |c| / 2."""
    x, shift = torch.randn(500, 3), torch.tensor([0.0, 0.6, 0.8])
    # |c.w| is uniform on [0, 1] there; five standard errors of the mean over 4,000 directions.
    assert abs(sliced_wasserstein(x, x + shift, 4000) - 0.5) < 5 * math.sqrt(1 / 12 / 4000)


@pytest.mark.parametrize(
    "covariance", [torch.eye(2), torch.diag(torch.tensor([1.0, 3.0])), torch.tensor([[1.0, 0.8], [0.8, 1.0]])]
)
@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_the_classifier_is_as_good_as_the_likelihood_ratio(covariance, shift):
    p = dist.MultivariateNormal(torch.zeros(2), torch.eye(2))
    q = dist.MultivariateNormal(torch.tensor([0.0, shift]), covariance)
    x, y = p.sample((2000,)), q.sample((2000,))
    right = [(p.log_prob(each) > q.log_prob(each)).double().mean() for each in (x, y)]
    best = 0.5 if covariance.equal(torch.eye(2)) and shift == 0.0 else 0.5 * (right[0] + 1.0 - right[1]).item()
    # Both on 4,000 draws of accuracy about 1/2: four standard errors of .008 each, a failure rate of 1e-4.
    assert abs(classifier_test(x, y).accuracy - best) < 0.032


def test_the_classifier_is_not_told_by_a_direction_that_does_not_vary():
    weights = dist.Dirichlet(torch.ones(3)).sample((4000,))
    assert abs(classifier_test(weights[:2000], weights[2000:]).accuracy - 0.5) < 0.032


# --- errors and their standard errors ----------------------------------------------------------------


def autoregressive(num_chains, num_draws, dim, correlation):
    """Stationary chains of standard normals (C, R, D)."""
    noise = torch.randn(num_draws, num_chains, dim).double() * math.sqrt(1 - correlation**2)
    chain = [torch.randn(num_chains, dim).double()]
    for step in noise[1:]:
        chain.append(correlation * chain[-1] + step)
    return torch.stack(chain, 1).numpy()


def test_ess_is_that_of_an_autoregression():
    """n (1 - r) / (1 + r) = 4 x 2000 / 19 of them at r = .9."""
    ess = effective_sample_size(autoregressive(4, 2000, 50, 0.9))
    assert abs(np.median(ess) / (8000 / 19) - 1) < 0.1


def compared(draws, reference):
    names = [f"x[{i}]" for i in range(draws.shape[-1])]
    cost = compare_module.Cost(len(draws), None, None)
    return compare_module._compare(names, ["x"] * len(names), draws, reference, fit=cost, nuts=cost)


@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (3.0, 0.5)])
def test_standard_errors_are_those_of_the_errors(shift, scale):
    """Over 200 elements, what an error is off its true value, in its standard errors, has mean square 1."""
    chains = autoregressive(2, 1000, 200, 0.8)
    draws = shift + scale * torch.randn(1000, 200).double().numpy()
    table = compared(draws, chains).table
    of_mean = np.array([(row.mean_difference - shift) / row.mean_difference_se for row in table])
    of_sd = np.array([(row.sd_ratio - scale) / row.sd_ratio_se for row in table])
    for z in (of_mean, of_sd):
        # sd sqrt(2 / 200) = .1: four of them, and a tenth for the noise of the ESS
        assert abs((z**2).mean() - 1) < 0.5
    noisy = np.mean([row.ks > row.ks_noise for row in table])
    if shift == 0.0:
        assert noisy < 0.05 + 4 * math.sqrt(0.05 * 0.95 / 200)


def test_the_worst_element_of_each_site_comes_first():
    chains = autoregressive(1, 2000, 3, 0.0)
    draws = torch.randn(2000, 3).double().numpy() * [1.0, 0.5, 1.0] + [0.0, 0.0, 2.0]
    comparison = compared(draws, chains)
    assert [row.element for row in sorted(comparison.table, key=lambda row: -row.sure_error)] == [
        "x[2]",
        "x[1]",
        "x[0]",
    ]
    assert [row.element for row in comparison.worst] == ["x[2]"]
    assert comparison.worst[0].sure_error == pytest.approx(2.0, abs=0.2)


def test_what_does_not_vary_is_left_out_and_overflows_are_counted():
    chains = autoregressive(1, 400, 2, 0.0) * [1.0, 0.0] + [0.0, 1.0]
    draws = torch.randn(400, 2).double().numpy()
    draws[:3] = np.inf
    comparison = compared(draws, chains)
    assert [row.element for row in comparison.table] == ["x[0]"]
    assert comparison.num_nonfinite == 3
    assert "3 draws of SIVISM" in str(comparison)
    assert len(comparison.draws["x[0]"]) == 397


# --- a fit beside NUTS -------------------------------------------------------------------------------


def test_an_exact_fit_agrees_with_nuts_and_costs_are_counted(fitted):
    comparison = compare_with_nuts(fitted, num_samples=300, warmup_steps=100, progress_bar=False)
    (row,) = comparison.table
    assert (row.site, row.element) == ("mu", "mu")
    assert abs(row.mean_difference) < 4 * row.mean_difference_se
    assert abs(row.sd_ratio - 1) < 4 * row.sd_ratio_se
    assert abs(comparison.classifier.accuracy - 0.5) < 4 * 0.5 / math.sqrt(600)
    assert comparison.nuts.num_draws == comparison.fit.num_draws == 300
    assert comparison.nuts.num_evaluations >= 400  # one a step at least
    assert comparison.nuts.seconds > 0
    assert comparison.fit.num_evaluations == fitted.target.num_evaluations
    text = str(comparison)
    assert "mu " in text
    assert f"{comparison.nuts.num_evaluations:,} scores" in text


def test_wrong_fits_are_told_by_how_much(fitted):
    mean, sd = posterior_of_normal(Y)
    reference = mean - 0.5 * sd + 2.0 * sd * torch.randn(4000)
    row = compare_with_nuts(fitted, nuts={"mu": reference}).worst[0]
    assert abs(row.mean_difference - 0.25) < 5 * row.mean_difference_se
    assert abs(row.sd_ratio - 0.5) < 5 * row.sd_ratio_se
    # sup |Phi(z) - Phi((z - m) / s)| of a shift .25 and a scale .5, and the noise of both samples
    z = torch.linspace(-5, 5, 1001)
    want = (dist.Normal(0.25, 0.5).cdf(z) - dist.Normal(0.0, 1.0).cdf(z)).abs().max().item()
    assert abs(row.ks - want) < 0.05


def test_draws_come_as_arrays_chains_inference_data_or_an_mcmc(fitted):
    import xarray

    chains = posterior_of_normal(Y)[0] + torch.randn(2, 100)
    posterior = xarray.Dataset({"mu": (("chain", "draw"), chains.numpy())}, attrs={"sampling_time": 7.5})
    of_dict = compare_with_nuts(fitted, nuts={"mu": chains})
    of_tree = compare_with_nuts(fitted, nuts=xarray.DataTree.from_dict({"posterior": posterior}))
    of_file = compare_with_nuts(fitted, nuts={"posterior": posterior})
    for comparison in (of_dict, of_tree, of_file):
        np.testing.assert_array_equal(comparison.reference["mu"], chains.flatten())
    assert of_dict.nuts == (200, None, None)
    assert of_tree.nuts.seconds == of_file.nuts.seconds == 7.5
    mcmc = MCMC(nuts_from(fitted), num_samples=30, warmup_steps=10, disable_progbar=True)
    mcmc.run()
    of_mcmc = compare_with_nuts(fitted, nuts=mcmc)
    np.testing.assert_array_equal(of_mcmc.reference["mu"], mcmc.get_samples()["mu"])


@pytest.mark.parametrize(
    ("nuts", "message"),
    [
        ({"nu": torch.randn(100)}, "none of the model's latent sites.*'mu'.*'nu'"),
        ({"mu": torch.randn(100, 2, 1)}, r"'mu' have shape \(100, 2, 1\); expected \(chains, draws\) or \(draws\)"),
        ({"mu": torch.full((100,), math.nan)}, "100 numbers that are not finite"),
        ({"mu": torch.randn(5)}, "5 in a chain"),
        ({"mu": torch.ones(100)}, "varies"),
        (torch.randn(100), "nuts is a Tensor; expected an InferenceData"),
    ],
)
def test_reference_draws_that_do_not_fit_say_so(fitted, nuts, message):
    with pytest.raises(ArgumentError, match=message):
        compare_with_nuts(fitted, nuts=nuts)


def test_sites_without_reference_draws_are_named(raw_units):
    comparison = compare_with_nuts(raw_units, nuts={"z": LOC[:2] + torch.randn(200, 2)})
    assert [row.element for row in comparison.table] == ["z[0]", "z[1]"]
    assert comparison.left_out == ("a",)
    assert "want of draws: a" in str(comparison)


def test_only_fits_are_compared(fitted):
    with pytest.raises(NotSetUpError, match="not been fitted"):
        compare_with_nuts(SIVISM(normal), Y)
    with pytest.raises(NotSetUpError, match="not been fitted"):
        nuts_from(SIVISM(normal), Y)
    with pytest.raises(ArgumentError, match="FitResult; expected the SIVISM"):
        compare_with_nuts(fitted.run(0, Y, progress_bar=False))


# --- NUTS from a fit ---------------------------------------------------------------------------------


def draw(kernel, *args, num_samples=200, warmup_steps=30, **kwargs):
    mcmc = MCMC(kernel, num_samples=num_samples, warmup_steps=warmup_steps, disable_progbar=True, **kwargs)
    mcmc.run(*args)
    return mcmc


def test_the_posterior_in_raw_units_after_thirty_steps(raw_units):
    """From about seven gradients a draw."""
    mcmc = draw(nuts_from(raw_units))
    assert effective_sample_size(check_draws(mcmc)).min() > 100
    (evaluations,) = mcmc.diagnostics()["evaluations"].values()
    assert evaluations < 230 * 12


@pytest.mark.parametrize(
    "options", [{"full_mass": False}, {"full_mass": [("a",)]}, {"full_mass": [("z",), ("a",)]}, {"full_mass": [("z",)]}]
)
def test_the_posterior_with_other_mass_matrices(raw_units, options):
    check_draws(draw(nuts_from(raw_units, **options)))


def test_the_posterior_with_a_mass_matrix_that_goes_on_adapting(fitted):
    kernel = nuts_from(fitted, adapt_mass_matrix=True)
    before = kernel.mass_matrix_adapter
    mu = draw(kernel, warmup_steps=100).get_samples(group_by_chain=True)["mu"].double().numpy()
    mean, sd = posterior_of_normal(Y)
    assert abs(mu.mean() - mean) < 5 * sd / math.sqrt(effective_sample_size(mu[..., None])[0])
    assert kernel.mass_matrix_adapter is before
    (found,) = kernel.inverse_mass_matrix.values()
    assert found.item() != pytest.approx(before._draws.var().item(), rel=1e-3)
    assert found.item() == pytest.approx(sd**2, rel=0.8)


@pytest.mark.parametrize("why", ["one by one", "no spread"])
def test_draws_that_no_chain_takes_on_are_taken_as_they_are(fitted, why):
    draws, trace = fitted.sample_unconstrained(100), fitted.guide.trace_model(Y)
    target = fitted.target
    if why == "one by one":
        target = Target(normal, fitted.guide.layout, trace, (Y,), paths=())
        assert target.path.name == "loop"
    else:
        draws = torch.full_like(draws, 0.5)
    before = target.num_evaluations
    assert _taken_on(target, draws) is draws
    assert target.num_evaluations - before <= 100


def check_draws(mcmc):
    """Means and covariance within five standard errors; returns the standardized draws, (chains, draws, 3)."""
    samples = mcmc.get_samples(group_by_chain=True)
    x = torch.cat([samples["z"], samples["a"].log()[..., None]], -1).double()
    white = torch.linalg.solve_triangular(
        torch.linalg.cholesky(COVARIANCE.double()), (x - LOC.double())[..., None], upper=False
    )[..., 0]
    second = (white[..., :, None] * white[..., None, :] - torch.eye(3)).flatten(2)
    for quantities in (white, second):
        values = quantities.numpy()
        se = values.std((0, 1)) / np.sqrt(effective_sample_size(values))
        assert (abs(values.mean((0, 1))) < 5 * se).all()
    return white.numpy()


@pytest.mark.parametrize("full_mass", [True, False, [("a",)], [("z",)]])
def test_the_mass_matrix_is_the_covariance_in_pyros_order(raw_units, full_mass):
    check_mass_matrix(nuts_from(raw_units, full_mass=full_mass))


def test_the_mass_matrix_of_a_rough_fit_is_mended():
    """Two sds off, and with sds and correlations that are not the posterior's."""
    rough = exact(correlated, mean=LOC + 2.0 * SD, covariance=(0.4 * SD).square().diag())
    check_mass_matrix(nuts_from(rough))


def check_mass_matrix(kernel):
    kernel.setup(10)
    columns = {"z": [0, 1], "a": [2]}
    blocks = kernel.inverse_mass_matrix
    assert sorted(name for names in blocks for name in names) == ["a", "z"]
    for names, inverse in blocks.items():
        index = [i for name in names for i in columns[name]]
        # From 512 chains' 16 ends each: correlations are right to 5 / sqrt(4000), say.
        scale = SD[index]
        if inverse.dim() == 1:
            torch.testing.assert_close(inverse / scale**2, torch.ones(len(index)), atol=0.15, rtol=0.0)
        else:
            want = COVARIANCE[index][:, index] / scale / scale[:, None]
            torch.testing.assert_close(inverse / scale / scale[:, None], want, atol=0.15, rtol=0.0)


def hierarchical(y):
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    scale = pyro.param("scale", torch.tensor(1.5), constraint=dist.constraints.positive)
    bound = pyro.sample("bound", dist.Uniform(-1.0, 3.0))
    with pyro.plate("row", len(y)):
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(bound + weights[0] * z, scale), obs=y)


def test_the_potential_is_pyros_own(float64):
    """Constraints, a learned parameter, and a discrete latent summed out without ``max_plate_nesting``."""
    y = Y.double()
    fit = exact(hierarchical, y, mean=torch.zeros(3), covariance=torch.eye(3))
    kernel = nuts_from(fit)
    kernel.setup(0)
    _, potential, transforms, _ = initialize_model(hierarchical, (y,), max_plate_nesting=1)
    for _ in range(3):
        params = {name: torch.randn_like(value) for name, value in kernel.initial_params.items()}
        ours, theirs = ({k: v.clone().requires_grad_() for k, v in params.items()} for _ in range(2))
        value, want = kernel.potential_fn(ours), potential(theirs)
        torch.testing.assert_close(value, want)
        torch.testing.assert_close(
            torch.autograd.grad(value, list(ours.values())), torch.autograd.grad(want, list(theirs.values()))
        )
    kernel.cleanup()
    draws = draw(kernel, num_samples=30, warmup_steps=10).get_samples()
    assert draws["weights"].shape == (30, 3)
    torch.testing.assert_close(draws["weights"].sum(-1), torch.ones(30).double())
    assert set(draws) == {"weights", "bound"}
    assert set(transforms) == set(draws)


@pytest.mark.filterwarnings("ignore:num_chains=.* is more than available_cpu:UserWarning")
def test_every_chain_starts_at_its_own_draw_of_the_fit(fitted):
    starts = []

    class Recorded(type(nuts_from(fitted))):
        def setup(self, *args, **kwargs):
            super().setup(*args, **kwargs)
            starts.append(self.initial_params["mu"].item())

    kernel = nuts_from(fitted)
    kernel.__class__ = Recorded
    available = torch.multiprocessing.cpu_count() - 1  # with more chains than these they run here, one by one
    mcmc = draw(kernel, num_samples=5, warmup_steps=5, num_chains=max(2, available + 1))
    mean, sd = posterior_of_normal(Y)
    assert len(set(starts)) == len(starts) == mcmc.num_chains
    assert all(abs(start - mean) < 5 * sd for start in starts)
    draw(kernel, num_samples=5, warmup_steps=5)  # a kernel can be used again


@pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")  # torch's own pytrees, unpickled
def test_a_kernel_goes_to_processes_that_are_spawned(fitted):
    """As ``MCMC(num_chains=...)`` sends it on macOS and Windows, or with ``mp_context="spawn"``."""
    kernel = nuts_from(fitted)
    draw(kernel, num_samples=30)  # graphs have been recorded and traced
    there = pickle.loads(pickle.dumps(kernel))
    assert there._target._binding.replays._num_recordings == 0  # of so many that a binding may make
    mu = draw(there, num_samples=100).get_samples()["mu"]
    mean, sd = posterior_of_normal(Y)
    assert abs(mu.mean() - mean) < sd
    assert there._target.path.name == "captured"


def test_a_fit_that_may_not_capture_makes_a_kernel_that_does_not():
    given = FixedGaussian(torch.zeros(1), torch.ones(1))
    sivism = SIVISM(normal, preconditioner=given, num_particles=8, capture=False).setup(Y)
    assert nuts_from(sivism)._target.path.name == sivism.target.path.name == "vmap"


def test_other_arguments_give_their_own_posterior(fitted):
    y = torch.full((6,), 3.0)
    for kernel, args in ((nuts_from(fitted, y), ()), (nuts_from(fitted), (y,))):
        mu = draw(kernel, *args, num_samples=100).get_samples(group_by_chain=True)["mu"].double().numpy()
        mean, sd = posterior_of_normal(y)
        ess = effective_sample_size(mu[..., None])[0]
        assert abs(mu.mean() - mean) < 5 * sd / math.sqrt(ess)


def test_keywords_go_to_nuts_or_to_the_model(fitted):
    kernel = nuts_from(fitted, target_accept_prob=0.95, max_tree_depth=4)
    assert kernel._max_tree_depth == 4
    assert kernel._adapter.target_accept_prob == 0.95
    assert not kernel._adapter.adapt_mass_matrix
    assert nuts_from(fitted, adapt_mass_matrix=True)._adapter.adapt_mass_matrix
    nuts_from(fitted, y=Y)
    with pytest.raises(ArgumentError, match="sets jit_compile itself"):
        nuts_from(fitted, jit_compile=True)


def test_random_minibatches_are_refused():
    def model(y, size):
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(y), subsample_size=size) as i:
            pyro.sample("y", dist.Normal(mu, 2.0), obs=y[i])

    fit = exact(model, Y, 2, mean=torch.zeros(1), covariance=torch.eye(1))
    with pytest.raises(ModelError, match=r"random minibatches.*'data'"):
        nuts_from(fit)
    with pytest.raises(ModelError, match="random minibatches"):
        compare_with_nuts(fit)
    assert compare_with_nuts(fit, nuts={"mu": torch.randn(100)}).left_out == ()
    nuts_from(fit, Y, 6)  # the full data


def test_arguments_with_other_latents_are_refused():
    def model(count):
        with pyro.plate("group", count):
            pyro.sample("x", dist.Normal(0.0, 1.0))

    fit = exact(model, 2, mean=torch.zeros(2), covariance=torch.eye(2))
    with pytest.raises(LayoutChangedError, match="'x'"):
        draw(nuts_from(fit), 3)


# --- pictures ----------------------------------------------------------------------------------------


def test_a_panel_for_each_marginal_and_pair(tmp_path):
    comparison = compared(torch.randn(300, 3).double().numpy(), autoregressive(1, 300, 3, 0.0))
    figure = plot_comparison(comparison, ["x[0]", "x[2]"])
    assert len(figure.axes) == 3
    assert [axes.get_xlabel() for axes in figure.axes] == ["", "x[0]", "x[2]"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["NUTS", "SIVISM"]
    marginal = figure.axes[0]
    for polygon in marginal.patches:  # densities, whatever the number of draws
        points = polygon.get_path().vertices
        area = 0.5 * abs(
            np.dot(points[:, 0], np.roll(points[:, 1], 1)) - np.dot(points[:, 1], np.roll(points[:, 0], 1))
        )
        assert 0.97 < area <= 1.0 + 1e-9
    figure.savefig(tmp_path / "comparison.png")
    assert (tmp_path / "comparison.png").stat().st_size > 0
    assert len(plot_comparison(comparison).axes) == 1  # the worst element of the one site


def test_plots_of_the_unknown_or_without_matplotlib_say_what_to_do(monkeypatch):
    comparison = compared(torch.randn(300, 1).double().numpy(), autoregressive(1, 300, 1, 0.0))
    with pytest.raises(ArgumentError, match=r"'tau'.*expected at least one of.*'x\[0\]'"):
        plot_comparison(comparison, ["tau"])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r"pip install pyro-sivism\[plots\]"):
        plot_comparison(comparison)


def test_the_reference_of_a_given_kernel(fitted):
    kernel = NUTS(normal, max_tree_depth=5)
    comparison = compare_with_nuts(fitted, num_samples=30, warmup_steps=10, kernel=kernel, progress_bar=False)
    assert comparison.nuts.num_evaluations is None  # Pyro's kernel does not count them
    assert "evaluations not known" in str(comparison)
    from_fit = compare_with_nuts(fitted, num_samples=30, warmup_steps=10, kernel=nuts_from(fitted), progress_bar=False)
    assert from_fit.nuts.num_evaluations >= 40
