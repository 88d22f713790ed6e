"""The target's log density, score and Hessian-vector product against independent answers.

The oracle of most models is the potential that Pyro's NUTS runs on, with its gradient by autograd. It refuses
subsampling, and puts a scale inside the sum over an enumerated variable, so those have densities written by hand.
"""

from __future__ import annotations

import itertools
import math
from functools import cache

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger, init_to_median
from pyro.infer.mcmc.util import initialize_model
from torch.distributions import biject_to
from zoo import ZOO

from pyro_sivism.errors import ModelError
from pyro_sivism.layout import LatentLayout
from pyro_sivism.target import Target

pytestmark = [
    pytest.mark.usefixtures("float64"),
    # torch's Wishart sampler warns at every draw of a regular matrix.
    pytest.mark.filterwarnings("ignore:Singular sample detected:UserWarning"),
]

PATHS = ("loop", "captured", "captured_plate", "vmap", "plate")
PAIRS = [pytest.param(a, path, id=f"{a.name}-{path}") for a in ZOO for path in ("loop", *a.paths)]


def make_target(model, *args, **kwargs):
    with torch.random.fork_rng():
        trace = poutine.trace(InitMessenger(init_to_median)(model)).get_trace(*args, **kwargs)
    return Target(model, LatentLayout.from_trace(trace), trace, args, kwargs)


def along(target, path, x):
    """Log density and score along one path, chosen or not."""
    return target._evaluate_along(path, x)


@cache
def prepared(animal):
    """The animal's target, four points, and the oracle's log density and score there."""
    model, args, kwargs = animal.make()
    target = make_target(model, *args, **kwargs)
    layout = target.layout
    transforms = {site.name: site.transform.inv for site in layout.sites} if animal.own_bijection else None
    start = dict.fromkeys(layout.names)  # spares the search for initial values
    _, potential, _, _ = initialize_model(model, args, kwargs, transforms=transforms, initial_params=start)
    generator = torch.Generator().manual_seed(20230810)
    x = torch.randn(4, layout.dim, generator=generator)
    log_densities, scores = [], []
    for row in x:
        point = row.clone().requires_grad_()
        log_density = -potential({site.name: value for site, value in layout.split(point)})
        log_densities.append(log_density.detach())
        scores.append(torch.autograd.grad(log_density, point)[0])
    return target, x, torch.stack(log_densities), torch.stack(scores)


@pytest.mark.parametrize(("animal", "path"), PAIRS)
def test_log_density_and_score_are_those_of_nuts(animal, path):
    target, x, log_density, score = prepared(animal)
    got_log_density, got_score = along(target, path, x)
    torch.testing.assert_close(got_log_density, log_density, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got_score, score, rtol=1e-9, atol=1e-9)
    # One point alone, and the log density without the score, take other branches.
    torch.testing.assert_close(along(target, path, x[:1])[1], score[:1], rtol=1e-9, atol=1e-9)
    alone, _ = target._evaluate_along(path, x, "log_density")
    torch.testing.assert_close(alone, log_density, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("animal", "path"), PAIRS)
def test_hessian_vector_product_is_the_score_s_finite_difference(animal, path):
    target, x, _, score = prepared(animal)
    v = torch.cos(torch.arange(1.0, x.numel() + 1)).reshape(x.shape)
    point = x.clone().requires_grad_()
    log_density, differentiable_score = along(target, path, point)
    (hvp,) = torch.autograd.grad((differentiable_score * v).sum(), point, retain_graph=True, materialize_grads=True)
    # Central differences: error h^2 |third derivative| + eps |score| / h, about 1e-9 at this step.
    h = 1e-5
    difference = (along(target, path, x + h * v)[1] - along(target, path, x - h * v)[1]) / (2 * h)
    size = 1.0 + difference.abs().max().item() + score.abs().max().item()
    torch.testing.assert_close(hvp, difference, rtol=0.0, atol=1e-7 * size)
    # The log density stays differentiable as well, as the objectives that need it assume.
    (gradient,) = torch.autograd.grad(log_density.sum(), point)
    torch.testing.assert_close(gradient, score, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("animal", ZOO, ids=str)
def test_the_first_right_path_is_chosen(animal):
    target, x, _, score = prepared(animal)
    assert target.path.name == (*animal.paths, "loop")[0], target.path
    torch.testing.assert_close(target.score(x), score, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("animal", [a for a in ZOO if len(a.paths) < 4], ids=str)
def test_paths_that_cannot_run_a_model_are_refused_with_a_reason(animal):
    target, *_ = prepared(animal)
    model, args, kwargs = animal.make()
    for path in {*PATHS[1:]} - set(animal.paths):
        trace = poutine.trace(InitMessenger(init_to_median)(model)).get_trace(*args, **kwargs)
        refused = Target(model, target.layout, trace, args, kwargs, paths=(path,)).path
        assert refused.name == "loop"
        assert refused.reason.startswith(f"{path}: ")


def test_the_zoo_is_large_enough():
    assert len(ZOO) >= 25
    assert len({a.name for a in ZOO}) == len(ZOO)


# --- minibatches --------------------------------------------------------------------------------------

N, M = 5, 2
Y = torch.tensor([0.3, -1.2, 0.8, 2.0, -0.4], dtype=torch.float64)


def local_latents(y):
    """A global and a local latent; densities by hand below."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("data", N, subsample_size=M) as i:
        s = pyro.sample("s", dist.LogNormal(mu, 0.5))
        pyro.sample("y", dist.Normal(mu, s), obs=y[i])


def local_latents_by_hand(x, y, indices):
    mu, u = x[0], x[1:]
    local = dist.Normal(mu, 0.5).log_prob(u) - u + dist.Normal(mu, u.exp()).log_prob(y)  # LogNormal: -u is its Jacobian
    scaled = N / len(indices) * local[list(indices)].sum()
    return dist.Normal(0.0, 2.0).log_prob(mu) + scaled + u.sum()  # + u: the map from u to s, for every s held


def with_grad(fn, x):
    point = x.clone().requires_grad_()
    value = fn(point)
    return value.detach(), torch.autograd.grad(value, point)[0]


def assert_rows_match(got, fn, x):
    want = [with_grad(fn, row) for row in x]
    torch.testing.assert_close(got[0], torch.stack([w[0] for w in want]), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got[1], torch.stack([w[1] for w in want]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", PATHS)
def test_minibatch_scales_and_indexes_full_size_latents(path):
    target = make_target(local_latents, Y)
    assert target.is_subsampled
    assert target.layout["s"].shape == (N,)
    x = torch.randn(3, target.dim)
    for indices in itertools.combinations(range(N), M):
        target.minibatch = {"data": torch.tensor(indices)}
        assert_rows_match(along(target, path, x), lambda p, i=indices: local_latents_by_hand(p, Y, i), x)


@pytest.mark.parametrize("path", PATHS)
def test_minibatch_scores_average_to_the_full_score(path):
    def observed_only(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        sd = pyro.sample("sd", dist.HalfNormal(1.0))
        with pyro.plate("data", N, subsample_size=M) as i:
            pyro.sample("y", dist.Normal(mu, sd), obs=y[i])

    def observed_only_by_hand(x):
        mu, sd = x[0], x[1].exp()
        prior = dist.Normal(0.0, 2.0).log_prob(mu) + dist.HalfNormal(1.0).log_prob(sd)
        return prior + dist.Normal(mu, sd).log_prob(Y).sum() + x[1]

    def local_latents_in_full(x):
        return local_latents_by_hand(x, Y, range(N))

    for model, full_density in ((observed_only, observed_only_by_hand), (local_latents, local_latents_in_full)):
        target = make_target(model, Y)
        x = torch.randn(3, target.dim)
        subsets = [torch.tensor(i) for i in itertools.combinations(range(N), M)]
        log_density, score = torch.zeros(3), torch.zeros_like(x)
        for subset in subsets:
            target.minibatch = {"data": subset}
            one = along(target, path, x)
            log_density, score = log_density + one[0] / len(subsets), score + one[1] / len(subsets)
        target.minibatch = {"data": torch.arange(N)[:M]}
        assert_rows_match((log_density, score), full_density, x)


def test_minibatches_are_drawn_uniformly_and_held_until_the_next_call():
    target = make_target(local_latents, Y)
    x = torch.randn(2, target.dim)
    assert torch.equal(target.score(x), target.score(x))
    seen = set()
    # Each of the 10 subsets is missed in 120 draws with probability 0.9^120 = 3e-6.
    for _ in range(120):
        target.resample_minibatch()
        seen.add(frozenset(target.minibatch["data"].tolist()))
    assert seen == set(map(frozenset, itertools.combinations(range(N), M)))


@pytest.mark.parametrize("indices", [torch.tensor([3, 1]), [3, 1]], ids=["tensor", "list"])
@pytest.mark.parametrize("path", PATHS)
def test_explicit_indices_are_used_as_given(path, indices):
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("data", N, subsample=indices):
            s = pyro.sample("s", dist.LogNormal(mu, 0.5))
            pyro.sample("y", dist.Normal(mu, s), obs=y[indices])

    target = make_target(model, Y)
    assert target.layout["s"].shape == (N,)
    assert not target.is_subsampled
    x = torch.randn(3, target.dim)
    assert_rows_match(along(target, path, x), lambda p: local_latents_by_hand(p, Y, (3, 1)), x)


@pytest.mark.parametrize("path", PATHS)
def test_nested_subsampled_plates(path):
    y = torch.linspace(-1.0, 2.0, 12).reshape(3, 4)

    def model():
        with pyro.plate("rows", 3, subsample_size=2, dim=-2) as i:
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            with pyro.plate("cols", 4, subsample_size=3, dim=-1) as j:
                w = pyro.sample("w", dist.Dirichlet(torch.ones(2)))
                pyro.sample("y", dist.Normal(a + w[..., 0], 1.0), obs=y[i][:, j])

    def by_hand(x, i, j):
        a, u = x[:3].reshape(3, 1), x[3:].reshape(3, 4, 1)
        simplex = biject_to(dist.constraints.simplex)
        w = simplex(u)
        log_a = dist.Normal(0.0, 1.0).log_prob(a)[i].sum() * 3 / 2
        local = dist.Dirichlet(torch.ones(2)).log_prob(w) + dist.Normal(a + w[..., 0], 1.0).log_prob(y)
        jacobian = simplex.log_abs_det_jacobian(u, w).sum()
        return log_a + local[i][:, j].sum() * (3 / 2) * (4 / 3) + jacobian

    target = make_target(model)
    assert target.layout["a"].shape == (3, 1)
    assert target.layout["w"].shape == (3, 4, 2)
    assert target.layout["w"].dims == ("rows", "cols", "w_dim_2")
    target.minibatch = {"rows": torch.tensor([2, 0]), "cols": torch.tensor([1, 3, 0])}
    x = torch.randn(3, target.dim)
    assert_rows_match(along(target, path, x), lambda p: by_hand(p, [2, 0], [1, 3, 0]), x)


# --- enumeration with scales and masks ----------------------------------------------------------------


def log_mixture(loc, y):
    """``log (0.3 Normal(y | -loc, 1) + 0.7 Normal(y | loc, 1))`` for each y."""
    weights = torch.tensor([0.3, 0.7]).log()
    return (
        torch.stack([dist.Normal(sign * loc, 1.0).log_prob(y) for sign in (-1.0, 1.0)], -1).add(weights).logsumexp(-1)
    )


def mixture(y, plate):
    loc = pyro.sample("loc", dist.Normal(1.0, 1.0))
    with plate() as i:
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])))
        pyro.sample("y", dist.Normal((2.0 * k - 1.0) * loc, 1.0), obs=y[i])


@pytest.mark.parametrize("path", ["loop", "captured", "vmap"])
def test_the_scale_of_a_minibatch_is_outside_the_sum_over_an_enumerated_site(path):
    target = make_target(mixture, Y, lambda: pyro.plate("data", N, subsample_size=M))
    target.minibatch = {"data": torch.tensor([4, 1])}
    x = torch.randn(3, 1)

    def by_hand(p):
        return dist.Normal(1.0, 1.0).log_prob(p[0]) + N / M * log_mixture(p[0], Y[[4, 1]]).sum()

    assert_rows_match(along(target, path, x), by_hand, x)


@pytest.mark.parametrize("path", ["loop", "captured", "vmap"])
def test_a_scale_for_each_row_weights_the_marginal_of_each_row(path):
    weights = torch.tensor([1.0, 0.1, 2.0, 0.5, 3.0])

    def model(y):
        loc = pyro.sample("loc", dist.Normal(1.0, 1.0))
        with pyro.plate("data", N), poutine.scale(scale=weights):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])))
            pyro.sample("y", dist.Normal((2.0 * k - 1.0) * loc, 1.0), obs=y)

    target = make_target(model, Y)
    x = torch.randn(3, 1)

    def by_hand(p):
        return dist.Normal(1.0, 1.0).log_prob(p[0]) + (weights * log_mixture(p[0], Y)).sum()

    assert_rows_match(along(target, path, x), by_hand, x)


@pytest.mark.parametrize("path", ["loop", "captured", "vmap"])
def test_separate_sums_may_have_separate_scales(path):
    def model(y):
        mixture(y, lambda: pyro.plate("data", N))
        loc = pyro.sample("other_loc", dist.Normal(0.0, 1.0))
        with pyro.plate("other", N, subsample_size=M) as i:
            k = pyro.sample("other_k", dist.Categorical(torch.tensor([0.3, 0.7])))
            pyro.sample("other_y", dist.Normal((2.0 * k - 1.0) * loc, 1.0), obs=y[i])

    target = make_target(model, Y)
    target.minibatch = {"other": torch.tensor([0, 3])}
    x = torch.randn(3, 2)

    def by_hand(p):
        first = dist.Normal(1.0, 1.0).log_prob(p[0]) + log_mixture(p[0], Y).sum()
        return first + dist.Normal(0.0, 1.0).log_prob(p[1]) + N / M * log_mixture(p[1], Y[[0, 3]]).sum()

    assert_rows_match(along(target, path, x), by_hand, x)


@pytest.mark.parametrize("path", ["loop", "captured", "vmap"])
def test_a_mask_is_inside_the_sum_over_an_enumerated_site(path):
    mask = torch.tensor([True, False, True, True, False])

    def model(y):
        loc = pyro.sample("loc", dist.Normal(1.0, 1.0))
        with pyro.plate("data", N):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])))
            with poutine.mask(mask=mask):
                pyro.sample("y", dist.Normal((2.0 * k - 1.0) * loc, 1.0), obs=y)

    target = make_target(model, Y)
    x = torch.randn(3, 1)

    def by_hand(p):
        return dist.Normal(1.0, 1.0).log_prob(p[0]) + log_mixture(p[0], Y[mask]).sum()

    assert_rows_match(along(target, path, x), by_hand, x)


# --- learnable parameters -----------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_gradients_reach_constrained_params_and_module_weights(path):
    linear = torch.nn.Linear(1, 1).double()

    def model(y):
        pyro.module("linear", linear)
        sd = pyro.param("sd", torch.tensor(0.7), constraint=dist.constraints.positive)
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", N):
            pyro.sample("y", dist.Normal(mu + linear(y[:, None])[:, 0], sd), obs=y)

    target = make_target(model, Y)
    params = target.params()
    assert set(params) == {"sd", "linear$$$weight", "linear$$$bias"}
    x = torch.randn(3, 1)
    log_density, _ = target._evaluate_along(path, x, "log_density")
    got = torch.autograd.grad(log_density.sum(), list(params.values()))

    log_sd = torch.tensor(math.log(0.7), requires_grad=True)
    mean = x + linear(Y[:, None])[:, 0]
    want = dist.Normal(0.0, 1.0).log_prob(x).sum() + dist.Normal(mean, log_sd.exp()).log_prob(Y).sum()
    by_name = dict(zip(("sd", "linear$$$weight", "linear$$$bias"), (log_sd, linear.weight, linear.bias)))
    for name, gradient in zip(params, got):
        torch.testing.assert_close(gradient, torch.autograd.grad(want, by_name[name], retain_graph=True)[0])


def test_dtypes_are_the_layout_s_inside_and_the_caller_s_outside():
    def model():
        pyro.sample("a", dist.Normal(torch.tensor(0.0, dtype=torch.float32), torch.tensor(1.0, dtype=torch.float32)))

    target = make_target(model)
    assert target.layout.dtype is torch.float32
    log_density, score = target.log_density_and_score(torch.ones(2, 1, dtype=torch.float64))
    assert log_density.dtype is score.dtype is torch.float64


def test_the_number_of_evaluations_counts_points():
    target = make_target(local_latents, Y)
    target.score(torch.zeros(7, target.dim))
    target.log_density(torch.zeros(2, target.dim))
    assert target.num_evaluations == 9


def test_obs_mask_leaves_no_flat_direction(float64):
    """The entries that are observed keep their prior, so that every latent has a proper posterior."""

    def partly_observed(y, seen):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 0.5), obs=y, obs_mask=seen)

    def by_hand(y, seen):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y_unobserved", dist.Normal(mu, 0.5))
            pyro.sample("y_observed", dist.Normal(mu, 0.5).mask(seen), obs=y)

    args = torch.tensor([0.3, 1.0, -0.4]), torch.tensor([True, False, True])
    x = torch.randn(5, 4)
    targets = []
    for model in (partly_observed, by_hand):
        trace = poutine.trace(model).get_trace(*args)
        targets.append(Target(model, LatentLayout.from_trace(trace), trace, args))
    masked, plain = targets
    assert masked.layout.names == plain.layout.names == ("mu", "y_unobserved")
    torch.testing.assert_close(masked.log_density(x), plain.log_density(x))
    torch.testing.assert_close(masked.score(x), plain.score(x))


def test_obs_mask_inside_a_mask_leaves_out_what_the_model_leaves_out(float64):
    own_mask, seen = torch.tensor([False, True, True]), torch.tensor([False, True, False])
    y = torch.tensor([0.3, 1.0, -0.4])

    def partly_observed():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3), poutine.mask(mask=own_mask):
            value = pyro.sample("y", dist.Normal(mu, 0.5), obs=y, obs_mask=seen)
        pyro.sample("next", dist.Normal(value[0], 1.0), obs=torch.tensor(3.0))

    x = torch.randn(5, 4, requires_grad=True)  # mu, and all of y
    of_rows = dist.Normal(x[:, :1], 0.5)
    terms = torch.where(own_mask, of_rows.log_prob(x[:, 1:]), 0.0) + torch.where(
        own_mask & seen, of_rows.log_prob(y), 0.0
    )
    want = (
        dist.Normal(0.0, 1.0).log_prob(x[:, 0]) + terms.sum(-1) + dist.Normal(x[:, 1], 1.0).log_prob(torch.tensor(3.0))
    )
    (want_score,) = torch.autograd.grad(want.sum(), x)
    target = make_target(partly_observed)
    assert target.layout.names == ("mu", "y_unobserved")
    torch.testing.assert_close(target.log_density(x), want)
    torch.testing.assert_close(target.score(x.detach()), want_score)


def test_obs_mask_under_a_scale_is_refused():
    def model(y, seen):
        sd = pyro.sample("sd", dist.HalfNormal(1.0))
        with poutine.scale(scale=10.0), pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(0.0, sd), obs=y, obs_mask=seen)

    args = torch.zeros(2), torch.tensor([True, False])
    trace = poutine.trace(model).get_trace(*args)
    with pytest.raises(ModelError, match=r"'y_unobserved' comes from obs_mask under poutine\.scale"):
        Target(model, LatentLayout.from_trace(trace), trace, args)


def test_a_latent_named_unobserved_keeps_its_mask():
    def model():
        with poutine.mask(mask=False):
            pyro.sample("n_unobserved", dist.Normal(0.0, 1.0))

    trace = poutine.trace(model).get_trace()
    target = Target(model, LatentLayout.from_trace(trace), trace)
    torch.testing.assert_close(target.score(torch.ones(1, 1)), torch.zeros(1, 1))


def test_minibatches_together_are_the_full_data(float64):
    """Where the minibatch divides the plate, one partition's average is the density of all rows."""
    y = torch.linspace(-1.0, 2.0, 6)

    def model(subsample_size):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("n", 6, subsample_size=subsample_size) as rows:
            t = pyro.sample("t", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(t, 1.0), obs=y[rows])

    targets = []
    for subsample_size in (2, 6):
        trace = poutine.trace(model).get_trace(subsample_size)
        targets.append(Target(model, LatentLayout.from_trace(trace), trace, (subsample_size,)))
    part, full = targets
    assert full.over_minibatches() is full
    x = torch.randn(3, 7)
    held = part.minibatch
    average = part.over_minibatches()
    for got, want in zip(average.log_density_and_score(x), full.log_density_and_score(x)):
        torch.testing.assert_close(got, want)
    assert part.minibatch is held


# --- logarithms of probabilities that are nearly none -------------------------------------------------


@pytest.mark.parametrize("path", ["captured", "vmap", "loop"])
def test_observations_that_contradict_each_other_have_their_whole_score(float64, path):
    """Pyro's ``safe_log`` has the derivative 1 / max(x, eps), which where both values of a latent are unlikely is none
    of the logarithm's: its scores were off by their whole size here."""
    first, second = torch.tensor([-1.0, -1.1, -0.9]), torch.tensor([1.0, 1.2, 0.8])

    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("rows", 3):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))
            pyro.sample("first", dist.Normal(mu[z], 0.2), obs=first)
            pyro.sample("second", dist.Normal(mu[z], 0.2), obs=second)

    target = make_target(model)
    x = torch.tensor([[-1.0, 1.0], [-1.2, 0.7]], requires_grad=True)
    terms = sum(dist.Normal(x, 0.2).log_prob(y[:, None, None]) for y in (first, second))
    want = dist.Normal(0.0, 1.0).log_prob(x).sum(-1) + (terms - math.log(2.0)).logsumexp(-1).sum(0)
    (want_score,) = torch.autograd.grad(want.sum(), x)
    assert want_score.norm() > 50.0
    assert target.path.name == "captured"
    log_density, score = target._binding.evaluate_along(path, x.detach())
    torch.testing.assert_close(log_density, want.detach())
    torch.testing.assert_close(score, want_score)


def test_a_chain_that_cannot_go_back_is_captured(float64):
    """Transitions of probability 0, whose logarithm has no derivative, depend on no latent."""
    y = torch.tensor([0.1, -0.2, 1.1, 0.9])
    transitions = torch.tensor([[0.7, 0.3], [0.0, 1.0]])

    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        z = 0
        for t in pyro.markov(range(4)):
            z = pyro.sample(f"z_{t}", dist.Categorical(transitions[z]))
            pyro.sample(f"y_{t}", dist.Normal(mu[z], 0.5), obs=y[t])

    target = make_target(model)
    assert target.path.name == "captured"
    x = torch.tensor([[0.0, 1.0]], requires_grad=True)
    steps = torch.tensor([[[(t >= k) for t in range(4)] for k in range(5)]]).int()[0]  # goes over at time k, or never
    chances = torch.tensor([0.3, 0.7 * 0.3, 0.7**2 * 0.3, 0.7**3 * 0.3, 0.7**4])
    joint = chances.log() + dist.Normal(x[0][steps], 0.5).log_prob(y).sum(-1)
    want = dist.Normal(0.0, 1.0).log_prob(x).sum() + joint.logsumexp(0)
    (want_score,) = torch.autograd.grad(want, x)
    log_density, score = target.log_density_and_score(x.detach())
    torch.testing.assert_close(log_density[0], want.detach())
    torch.testing.assert_close(score, want_score)
