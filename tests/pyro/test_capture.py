"""The captured path: right answers or a clear refusal, whatever the model does and whatever changes between calls.

Every test compares with the loop over particles, which runs the model as its author does, or with a value by hand.
"""

from __future__ import annotations

import copy
import random
import warnings
from contextlib import nullcontext

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger, init_to_median

from pyro_sivism import SIVISM, FisherDivergence, FixedGaussian
from pyro_sivism.errors import NonDeterministicModelError, TargetPathWarning
from pyro_sivism.layout import LatentLayout
from pyro_sivism.target import Target, binding, capture, density, replays
from pyro_sivism.target.arguments import Arguments
from pyro_sivism.target.capture import CapturedDensity, CaptureError
from pyro_sivism.target.minibatches import draw_indices
from pyro_sivism.target.paths import TargetPath, agree, nudged, rounding_slack, tolerance

pytestmark = pytest.mark.usefixtures("float64")

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def make_target(model, *args, paths=density.PATHS, **kwargs):
    with torch.random.fork_rng():
        trace = poutine.trace(InitMessenger(init_to_median)(model)).get_trace(*args, **kwargs)
    return Target(model, LatentLayout.from_trace(trace), trace, args, kwargs, paths=paths)


def points(target, count=4):
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, target.dim, generator=generator, dtype=torch.float64)
    return x.to(target.layout.device, target.layout.dtype)


def hvp(target, path, x, v):
    x = x.clone().requires_grad_()
    _, score = target._evaluate_along(path, x, "score")
    return torch.autograd.grad((score * v).sum(), x, materialize_grads=True)[0]


def assert_as_the_loop(target, x=None, uses=2):
    """Log densities, scores and Hessian-vector products are the loop's, at the first use of each graph and later."""
    x = points(target) if x is None else x
    want = target._evaluate_along("loop", x)
    v = torch.cos(torch.arange(x.numel(), dtype=x.dtype, device=x.device)).reshape(x.shape)
    want_hvp = hvp(target, "loop", x, v)
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if x.dtype is torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    for _ in range(uses):
        for got, wanted in zip(target.log_density_and_score(x), want):
            torch.testing.assert_close(got, wanted, **tolerance)
        torch.testing.assert_close(target.score(x), want[1], **tolerance)
        torch.testing.assert_close(hvp(target, target.path.name, x, v), want_hvp, **tolerance)


def observe(mean, y):
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def location(y):
    observe(pyro.sample("a", dist.Normal(0.0, 1.0)), y)


Y = torch.tensor([0.3, -1.2, 0.8], dtype=torch.float64)


@pytest.fixture
def no_checks(monkeypatch):
    """Without the checks at intervals, so that a test sees what holds without them."""
    monkeypatch.setattr(replays.Replays, "find_fault", lambda *_: None)


@pytest.fixture
def recordings(monkeypatch):
    """Counts the runs of the model that are recorded."""
    counts = {"models": 0}
    record_model = CapturedDensity._record_model

    def counting_models(self, *args):
        counts["models"] += 1
        return record_model(self, *args)

    monkeypatch.setattr(CapturedDensity, "_record_model", counting_models)
    return counts


# --- what torch gets wrong on the way -----------------------------------------------------------------


def curved():
    """Second derivatives that differ wherever a detach is left behind."""
    a = pyro.sample("a", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.factor("f", -(a.exp() * a.sigmoid()).sum() - (a.tanh() * a.softmax(-1)).sum())


def ordered_outcomes():
    """``select_scatter`` under ``vmap`` has a wrong derivative, ``slice_scatter`` with a negative end fails."""
    cuts = pyro.sample(
        "cuts",
        dist.TransformedDistribution(
            dist.Normal(torch.zeros(3), 1.0).to_event(1), [dist.transforms.OrderedTransform()]
        ),
    )
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 4):
        pyro.sample("y", dist.OrderedLogistic(slope * torch.arange(4.0), cuts), obs=torch.tensor([0, 1, 3, 2]))


def written_slices():
    b = pyro.sample("b", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    mean = torch.zeros(4)
    mean[0] = b[1] * b[2]
    mean[:-1] += b[1:]
    mean[-2:] *= b[0]
    pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=torch.ones(4))


def copied_over():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    mean = torch.empty(2, 3)
    mean.copy_(a**2)
    mean[0].copy_(a)
    pyro.sample("y", dist.Normal(mean.reshape(-1), 1.0).to_event(1), obs=torch.ones(6))


def lkj():
    tril = pyro.sample("tril", dist.LKJCholesky(3, 1.5))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(3), scale_tril=tril), obs=torch.ones(3))


def own_detach():
    """A gradient that the model itself stops is part of the model."""
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    observe(a * a.detach(), Y)


def ranged():
    a = pyro.sample("a", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    total = 0.0
    for i in torch.arange(3):
        total = total + int(i) * a[i] ** 2
    observe(total, Y)


CAPTURED = [curved, ordered_outcomes, written_slices, copied_over, lkj, own_detach, ranged]


@pytest.mark.parametrize("model", CAPTURED)
def test_models_that_torch_gets_wrong_on_the_way_are_captured_and_right(model, no_checks):
    target = make_target(model)
    assert target.path.name == "captured", target.path
    assert_as_the_loop(target)


def test_validation_is_off_while_capturing_and_on_again_afterwards(no_checks):
    """Validation asks for values, which a recording does not have."""
    with pyro.validation_enabled(True):
        target = make_target(location, Y)
        assert target.path.name == "captured"
        assert_as_the_loop(target)
        CapturedDensity(target._binding.runs, target._binding.init)  # which turns it off by itself
        assert torch.distributions.Distribution._validate_args is True


class Reversed(torch.autograd.Function):
    """Whose backward pass a recording drops."""

    @staticmethod
    def forward(ctx, x):
        return x * 1.0

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


class Steep(torch.autograd.Function):
    """A right gradient, and a wrong derivative of it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * 2 * x.detach()


@pytest.mark.parametrize(
    ("function", "what"), [(Reversed.apply, "score"), (Steep.apply, "score's derivative")], ids=["first", "second"]
)
def test_a_backward_pass_of_the_users_own_is_seen_to_be_dropped(function, what):
    def model():
        observe(function(pyro.sample("a", dist.Normal(0.0, 1.0))), Y)

    target = make_target(model)
    assert target.path.name not in ("captured", "captured_plate")
    assert f"captured: disagrees with the loop in the {what};" in target.path.reason
    assert_as_the_loop(target, uses=1)


@pytest.mark.parametrize("stop", ["reverse", "no_grad"])
def test_a_parameters_gradient_that_a_recording_loses_is_seen(stop):
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        kept, p = pyro.param("kept", torch.tensor(0.2)), pyro.param("p", torch.tensor(0.5))
        if stop == "reverse":
            p = Reversed.apply(p)
        else:
            with torch.no_grad():
                p = 2 * p
        observe(a * p + kept, Y)

    target = make_target(model)
    assert "captured: disagrees with the loop in the derivative in the model's parameters" in target.path.reason
    assert_params_learn_as_in_the_loop(target)


# --- parameters ---------------------------------------------------------------------------------------


def assert_params_learn_as_in_the_loop(target):
    x = points(target)
    for _ in range(2):
        params = target.params()
        found = []
        for log_density in (target.log_density(x), target._evaluate_along("loop", x, "log_density")[0]):
            found.append(torch.autograd.grad(log_density.sum(), list(params.values()), materialize_grads=True))
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)
        with torch.no_grad():
            for param in params.values():
                param.add_(0.3)
    assert_as_the_loop(target, uses=1)


def learned(y):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    p = pyro.param("p", torch.tensor(0.5))
    scale = pyro.param("scale", torch.tensor(0.7), constraint=dist.constraints.positive)
    stopped = pyro.param("stopped", torch.tensor(0.4))
    mean = torch.zeros(3)  # written into, so that the graph is recorded twice
    mean += a * p + stopped.detach()
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, scale), obs=y)


def test_parameters_are_read_anew_and_have_the_loops_gradients(no_checks, recordings):
    target = make_target(learned, Y)
    assert target.path.name == "captured"
    assert_params_learn_as_in_the_loop(target)
    assert recordings["models"] == 1


@pytest.mark.parametrize("how", ["cleared", "replaced", "loaded", "frozen"])
def test_parameters_replaced_in_the_store_are_those_that_count(how, no_checks):
    target = make_target(learned, Y)
    store = pyro.get_param_store()
    saved = copy.deepcopy(store.get_state())
    with torch.no_grad():
        for param in target.params().values():
            param.add_(1.0)
    assert_as_the_loop(target)  # by graphs of this batch size
    if how == "cleared":
        store.clear()
    elif how == "replaced":
        store["p"] = torch.tensor(3.0)
    elif how == "loaded":
        store.set_state(saved)
    else:
        target.params()["p"].requires_grad_(False)
        assert_as_the_loop(target)
        store._params["p"].requires_grad_(True)
    target.score(points(target))  # before anything else runs the model and makes its parameters
    assert target.path.name == "captured"
    assert_as_the_loop(target, uses=1)
    assert_params_learn_as_in_the_loop(target)
    assert target.path.name == "captured"


def test_variational_em_through_the_graph_finds_the_maximum():
    """Marginally y ~ N(p, 1.25) with one latent a row, so that the maximum is the mean, here to a tenth of its se."""

    def model(y):
        p = pyro.param("p", torch.tensor(2.0))
        with pyro.plate("data", len(y)):
            a = pyro.sample("a", dist.Normal(0.0, 0.5))
            pyro.sample("y", dist.Normal(a + p, 1.0), obs=y)

    gaussian = FixedGaussian(torch.zeros(3), torch.full((3,), 0.45))
    sivism = SIVISM(model, optim=lambda p: torch.optim.Adam(p, lr=0.03), preconditioner=gaussian, num_particles=32)
    values = []
    for _ in range(200):
        sivism.step(torch.tensor([2.0, 3.0, 2.5]))
        values.append(pyro.param("p").item())
    assert sivism.target.path.name == "captured"
    assert abs(np.mean(values[100:]) - 2.5) < 0.1 * (1.25 / 3) ** 0.5


# --- data that change between calls -------------------------------------------------------------------


def with_options(y, *, options):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with poutine.scale(scale=options["beta"]):
        observe(a * options["nested"][0], torch.as_tensor(y))


class Config:
    def __init__(self, shift):
        self.shift = shift


def configured(y, config):
    observe(pyro.sample("a", dist.Normal(0.0, 1.0)) + config.shift, y)


def test_tensors_arrays_and_numbers_in_nested_arguments_follow_the_call(no_checks):
    """Tensors are inputs; numbers and arrays have a graph for each of their values."""
    target = None
    for step in range(4):
        for y in (Y + step, (Y + step).numpy(), (Y + step).tolist()):
            options = {"beta": 1.0 + step // 2, "nested": (torch.tensor(0.5 * step), "name", None)}
            if target is None:
                target = make_target(with_options, y, options=options)
            elif not target.rebind((y,), {"options": options}):
                assert step == 0
                trace = poutine.trace(with_options).get_trace(y, options=options)
                target.bind(trace, (y,), {"options": options})
            assert target.path.name == "captured"
            assert_as_the_loop(target, uses=1)


def test_data_changed_in_place_are_seen(no_checks, recordings):
    """As arguments, tensors or arrays, and where the model closes over them."""
    closed_over, tensor, array = torch.ones(3), torch.zeros(3), np.zeros(3)

    def model(y, z):
        observe(pyro.sample("a", dist.Normal(0.0, 1.0)), y + torch.as_tensor(z) + 2.0 * closed_over.exp())

    target = make_target(model, tensor, array)
    assert_as_the_loop(target)
    for change in (lambda: tensor.add_(1.0), lambda: array.__iadd__(1.0), lambda: closed_over.mul_(0.5)):
        change()
        assert target.rebind((tensor, array))
        assert_as_the_loop(target)
        assert target.path.name == "captured"
    assert recordings["models"] == 3  # at first, for other contents of the array, and for the folded constant


def test_an_argument_that_the_model_also_closes_over_is_two_things(no_checks):
    """One is replaced by the next call's, the other stays."""

    def model(y):
        observe(pyro.sample("a", dist.Normal(0.0, 1.0)) + Y.sum(), y)

    target = make_target(model, Y)
    assert target.rebind((Y + 1.0,))
    assert_as_the_loop(target)
    assert target.path.name == "captured"


def test_an_objects_contents_may_change_between_calls():
    config = Config(0.0)
    target = make_target(configured, Y, config)
    assert_as_the_loop(target)
    assert target.rebind((Y, config))
    assert_as_the_loop(target)
    assert target.path.name == "captured"
    config.shift = 2.0
    assert target.rebind((Y, config))
    with pytest.warns(TargetPathWarning, match=r"no longer agrees .* at one draw is .*, the model's .*'vmap'"):
        target.score(points(target))
    assert_as_the_loop(target)
    # Another object is another problem: it may have anything in it.
    assert not target.rebind((Y, Config(1.0)))


@pytest.mark.parametrize(
    "make",
    [np.float32, np.int64, np.bool_, lambda n: np.array([n, None])[:1], lambda n: np.ma.array([n], mask=[n > 1])],
    ids=["float32", "int64", "bool", "objects", "masked"],
)
def test_what_numpy_brings_is_not_frozen(make):
    def model(y, n):
        value = n.filled(7.0)[0] if isinstance(n, np.ma.MaskedArray) else n[0] if isinstance(n, np.ndarray) else n
        observe(pyro.sample("a", dist.Normal(0.0, 1.0)) + float(value), Y)

    target = make_target(model, Y, make(1))
    for value in (1, 0, 2, 1, 0, 2):
        args = (Y, make(value))
        if not target.rebind(args):
            target.bind(poutine.trace(model).get_trace(*args), args)
        assert_as_the_loop(target, uses=1)


def test_equal_values_have_one_signature_and_different_problems_two():
    def signature(*args, **kwargs):
        return Arguments(args, kwargs).signature

    same = [
        ((Y, 1.0, "a"), (Y + 1, 2.0, "a")),
        ((np.zeros(3), np.float32(1)), (np.ones(3), np.float32(2))),
        ((np.int64(3), torch.device("cpu")), (np.int64(3), torch.device("cpu"))),
        (({"k": [Y, 2]},), ({"k": [Y * 2, 2]},)),
    ]
    for a, b in same:
        assert signature(*a) == signature(*b)
    different = [
        ((Y,), (Y[:2],)),
        ((Y,), (Y.float(),)),
        ((1,), (2,)),
        ((1,), (True,)),
        ((np.int64(1),), (np.int64(2),)),
        (("a",), ("b",)),
        ((np.zeros(3),), (np.zeros(3, dtype=np.float32),)),
        (([Y],), ((Y,),)),
        (({"k": 1},), ({"l": 1},)),
        ((object(),), (object(),)),
    ]
    for a, b in different:
        assert signature(*a) != signature(*b)
    assert signature(Y) != signature(y=Y)
    assert not Arguments((Y, np.zeros(2), 1.0, 2, "a", None, torch.float64, np.float32(1))).has_opaque
    for opaque in (object(), np.array([None]), np.ma.zeros(3), len):
        assert Arguments((opaque,)).has_opaque
    # Arrays of one kind are told apart by what is in them, whatever it is.
    days = np.array(["2020-01-01", "2021-01-01"], dtype="datetime64[D]")
    assert Arguments((days,)).frozen != Arguments((days[::-1],)).frozen
    assert Arguments((days,)).frozen == Arguments((days.copy(),)).frozen


def test_a_number_annealed_in_every_step_ends_the_captures(no_checks, recordings):
    def annealed(y, *, beta):
        with poutine.scale(scale=beta):
            location(y)

    target = make_target(annealed, Y, beta=0.01)
    for step in range(1, 12):
        assert target.rebind((Y,), {"beta": step / 12})
        assert_as_the_loop(target, uses=1)
    assert target.path.name == "vmap"
    assert "captured: CaptureError: numbers or arrays that the graph holds keep changing" in target.path.reason
    assert recordings["models"] <= replays._MAX_RECORDINGS


def test_a_ragged_last_minibatch_is_captured_once(no_checks, recordings):
    target = make_target(location, torch.arange(4.0))
    for epoch in range(4):
        for batch in torch.arange(10.0).split(4):
            if not target.rebind((batch,)):
                assert epoch == 0
                target.bind(poutine.trace(location).get_trace(batch), (batch,))
            assert target.path.name == "captured"
            assert_as_the_loop(target, uses=1)
    assert recordings["models"] == 2


def test_arguments_of_ever_other_shapes_are_not_recorded_for_ever(recordings):
    target = make_target(location, torch.ones(1))
    for size in range(2, density._MAX_CAPTURED_BINDINGS + 4):
        args = (torch.arange(float(size)),)
        target.bind(poutine.trace(location).get_trace(*args), args)
    assert target.path.name == "vmap"
    assert_as_the_loop(target, uses=1)
    assert recordings["models"] == density._MAX_CAPTURED_BINDINGS


# --- minibatches --------------------------------------------------------------------------------------

ROWS = torch.linspace(-1.0, 2.0, 10, dtype=torch.float64)


def subsampled():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 10, subsample_size=3) as i:
        pyro.sample("y", dist.Normal(a, 1.0), obs=ROWS[i])


def subsampled_in_numpy():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 10, subsample_size=3) as i:
        pyro.sample("y", dist.Normal(a, 1.0), obs=torch.as_tensor(ROWS.numpy()[i.numpy()]))


@pytest.mark.parametrize(("model", "path"), [(subsampled, "captured"), (subsampled_in_numpy, "plate")])
def test_a_minibatch_is_never_frozen(model, path, no_checks):
    target = make_target(model)
    assert target.path.name == path, target.path
    for _ in range(5):
        target.resample_minibatch()
        (indices,) = target.minibatch.values()
        x = points(target)
        want = dist.Normal(0.0, 1.0).log_prob(x[:, 0]) + 10 / 3 * dist.Normal(x, 1.0).log_prob(ROWS[indices]).sum(-1)
        torch.testing.assert_close(target.log_density(x), want)
        assert_as_the_loop(target, uses=1)


def test_indices_are_uniform_and_distinct():
    """The count of each index in ``draws`` independent choices is binomial: 5 standard errors fail once in 2e6."""
    draws = 2000
    for size, count in ((40, 3), (40, 35)):  # by rejection, and by a permutation
        first, counts = torch.zeros(size), torch.zeros(size)
        for _ in range(draws):
            indices = draw_indices(size, count)
            assert len(set(indices.tolist())) == count
            counts[indices] += 1
            first[indices[0]] += 1
        for seen, p in ((counts, count / size), (first, 1 / size)):
            assert (seen - draws * p).abs().max() < 5 * (draws * p * (1 - p)) ** 0.5 + 1e-9
    assert sorted(draw_indices(7, 7).tolist()) == list(range(7))


def test_few_indices_of_many_cost_no_memory_of_the_many():
    """A permutation of 10^13 rows could not be made at all."""
    indices = draw_indices(10**13, 100)
    assert len(set(indices.tolist())) == 100
    assert 0 <= indices.min() <= indices.max() < 10**13


# --- what cannot be captured --------------------------------------------------------------------------


def branch_on_data(y):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    observe(a if y.sum() > 0 else -2 * a, y)


def data_by_numpy(y):
    observe(pyro.sample("a", dist.Normal(0.0, 1.0)), torch.as_tensor(np.exp(y.numpy())))


def data_by_list(y):
    observe(pyro.sample("a", dist.Normal(0.0, 1.0)), torch.tensor(y.tolist()))


def branch_on_a_latent(y):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    observe(a if a > 0 else -2 * a, y)


def item_of_a_latent(y):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    observe(a * a.item(), y)


@pytest.mark.parametrize("model", [branch_on_data, data_by_numpy, data_by_list, branch_on_a_latent, item_of_a_latent])
def test_a_model_that_asks_for_values_is_run_and_right(model, no_checks):
    target = make_target(model, Y)
    assert target.path.name in ("vmap", "plate", "loop")
    assert target.path.reason.startswith("captured: RuntimeError: ")
    assert_as_the_loop(target, uses=1)
    assert target.rebind((Y + 3.0,))
    assert_as_the_loop(target, uses=1)


def random_tensor():
    return torch.randn(())


def random_python():
    return float(random.random() < 0.1)


def random_numpy():
    return float(np.random.random() < 0.1)


@pytest.mark.parametrize("draw", [random_tensor, random_python, random_numpy])
@pytest.mark.parametrize("seed", range(5))
def test_a_model_that_draws_its_own_random_numbers_is_refused(draw, seed):
    """However rarely: two runs that agree by chance are not taken for the same."""
    random.seed(seed)
    np.random.seed(seed)

    def model():
        observe(pyro.sample("a", dist.Normal(0.0, 1.0)) + draw(), Y)

    with pytest.raises(NonDeterministicModelError, match="differed between two runs"):
        make_target(model)


def test_a_graph_that_draws_random_numbers_is_refused():
    """Which does no harm here, so that the runs that are compared do not tell."""

    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        observe(a + 1e-30 * torch.rand(()), Y)

    target = make_target(model)
    assert target.path.reason.startswith("captured: CaptureError: the model draws random numbers outside")
    with pytest.raises(CaptureError):
        CapturedDensity(target._binding.runs, target._binding.init)


SHIFT = 0.0


def reads_a_global(y):
    observe(pyro.sample("a", dist.Normal(0.0, 1.0)) + SHIFT, y)


def test_a_global_that_is_rebound_is_noticed_at_the_next_check(monkeypatch):
    target = make_target(reads_a_global, Y)
    x = points(target)
    assert_as_the_loop(target)
    monkeypatch.setitem(globals(), "SHIFT", 5.0)
    with pytest.warns(TargetPathWarning) as record:
        scores = [target.score(x) for _ in range(replays._CHECK_EVERY)]
    torch.testing.assert_close(scores[-1], target._evaluate_along("loop", x)[1])
    assert len(record) == 1
    message = str(record[0].message)
    assert "the score at one draw is of norm" in message
    assert "the model's of norm" in message
    assert "such as a global; make it an argument of the model" in message
    assert target.path.name == "vmap"
    assert "captured: no longer agreed with a run of the model: the score" in target.path.reason
    assert_as_the_loop(target)


def test_a_gaussian_hmm_that_writes_through_data_is_captured():
    def model(y):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
        drift = pyro.sample("drift", dist.Beta(4.0, 2.0))
        hidden = dist.MultivariateNormal(torch.zeros(2), scale_tril=torch.eye(2))
        noise = dist.Normal(0.0, scale).expand([1]).to_event(1)
        hmm = dist.GaussianHMM(hidden, drift * torch.eye(2), hidden, torch.ones(2, 1), noise, duration=len(y))
        pyro.sample("y", hmm, obs=y)

    target = make_target(model, Y[:6, None])
    assert target.path.name == "captured"
    x = points(target)
    for got, want in zip(target.log_density_and_score(x), target._evaluate_along("loop", x)):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("error", "is_fault"), [(1e-12, False), (1e-6, True)])
def test_a_replay_is_compared_by_the_size_of_typical_scores(monkeypatch, error, is_fault):
    """At one draw a sum may be zero whose terms, and their roundings, are not."""
    target = make_target(reads_a_global, 1e3 * Y)
    x = points(target)
    log_density, score = target.log_density_and_score(x)
    score = torch.cat([torch.zeros_like(score[:1]), score[1:]])
    model_s = {"log density": log_density[0], "score": error * score[1:].abs().median(0).values}
    monkeypatch.setattr(replays.Replays, "_model_at", lambda *_: model_s)
    fault = target._binding.replays._compare(x, log_density, score, row=0)
    assert (fault is not None) == is_fault


@pytest.mark.parametrize(
    ("got", "want", "is_fault"),
    [(torch.inf, torch.nan, False), (1e200, -torch.inf, False), (torch.inf, 1e6, True), (1e200, 1e190, True)],
)
def test_a_draw_that_does_not_count_for_the_model_either_is_no_fault(monkeypatch, got, want, is_fault):
    """Beyond the range of a dtype one way to compute a score may overflow earlier than another."""
    target = make_target(reads_a_global, Y)
    x = points(target)
    log_density, score = target.log_density_and_score(x)
    score[0] = got
    model_s = {"log density": log_density[0], "score": torch.full_like(score[0], want)}
    monkeypatch.setattr(replays.Replays, "_model_at", lambda *_: model_s)
    fault = target._binding.replays._compare(x, log_density, score, row=0)
    assert (fault is not None) == is_fault


@pytest.mark.parametrize(
    ("select", "path"),
    [
        (lambda y: y[y > 0], "captured"),
        (lambda y: y.unique(), "captured"),
        (lambda y: torch.tensor([v for v in y if v > 0]), "vmap"),
    ],
    ids=["mask", "unique", "list"],
)
def test_how_many_data_are_selected_is_never_frozen(select, path):
    """A count that stays as it was when the data change for the first time, and no more when they change again. Where
    the graph holds the data it is recorded anew."""

    def model(y):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(a * len(select(y)), 1.0), obs=y)

    y = torch.tensor([0.3, -1.2, 0.8, 2.0])
    target = make_target(model, y)
    for other in (y + 0.01, torch.tensor([1.0, 2.0, 3.0, 4.0]), -y):
        assert target.rebind((other,))
        assert_as_the_loop(target)
        assert target.path.name == path
    other.mul_(-1.0)  # in place
    assert_as_the_loop(target)


def test_the_same_data_in_another_tensor_are_not_recorded_anew():
    def model(y):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(a, 1.0).expand([int((y > 0).sum())]).to_event(1), obs=y[y > 0])

    def selects(y):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        kept = y[y > 0]
        with pyro.plate("data", len(kept)):
            pyro.sample("y", dist.Normal(a, 1.0), obs=kept)

    y = torch.tensor([0.3, -1.2, 0.8, 2.0])
    assert make_target(model, y).path.name == "vmap"  # it asks for a value as well
    target = make_target(selects, y)
    graph = target.captured_graph("score")
    for _ in range(20):
        assert target.rebind((y.clone(),))
        target.score(points(target))
    assert target.captured_graph("score") is graph
    for shift in torch.arange(1.0, 12.0):  # others are, but not for ever
        assert target.rebind((y - 0.1 * shift,))
        assert_as_the_loop(target)
    assert "keep changing" in target.path.reason


@pytest.mark.parametrize(
    "change",
    [
        lambda target: setattr(target, "minibatch", {"data": torch.tensor([7, 4, 2])}),
        Target.resample_minibatch,
        Target.check_soon,
    ],
    ids=["minibatch set", "minibatch drawn", "check asked for"],
)
def test_a_replay_is_compared_without_waiting_for_its_turn(change, monkeypatch):
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 10, subsample_size=3) as i:
            pyro.sample("y", dist.Normal(a + SHIFT, 1.0), obs=ROWS[i])

    target = make_target(model)
    x = points(target)
    assert_as_the_loop(target)
    monkeypatch.setitem(globals(), "SHIFT", 5.0)
    target.score(x)  # not its turn
    assert target.path.name == "captured"
    change(target)
    with pytest.warns(TargetPathWarning, match="no longer agrees"):
        target.score(x)
    assert_as_the_loop(target)


def test_what_depends_on_the_data_behind_the_recordings_back_is_noticed_at_their_first_change():
    """A cache by identity: nothing that a recording or the arguments could show."""
    cache = {}

    def model(y):
        size = cache.setdefault(id(y) if y.requires_grad else "first", float(len(cache)))
        observe(pyro.sample("a", dist.Normal(0.0, 1.0)) + size, y)

    target = make_target(model, Y)
    x = points(target)
    target.score(x)
    cache["first"] = 3.0
    assert target.rebind((Y + 1.0,))
    with pytest.warns(TargetPathWarning, match="no longer agrees"):
        target.score(x)
    assert_as_the_loop(target, uses=1)


def test_a_wrong_derivative_is_noticed_at_its_first_use(monkeypatch):
    """A graph is compared again when it is first differentiated, however often it was used before."""
    target = make_target(own_detach)
    x = points(target)
    target.score(x)
    graph = target.captured_graph("score")
    captured = target._binding.replays._capture("captured")
    for _ in range(3):
        target.score(x)
    assert target.path.name == "captured"
    monkeypatch.setitem(captured._replays, "score", lambda x, *inputs: graph(x, *inputs) + x - x.detach())
    with pytest.warns(TargetPathWarning, match="the score's derivative at one draw is"):
        got = hvp(target, "captured", x, torch.ones_like(x))
    torch.testing.assert_close(got, hvp(target, "loop", x, torch.ones_like(x)))


@pytest.mark.parametrize(
    ("factor", "where", "fault"),
    [
        (1.0 + 6.0 * tolerance(torch.float64), "far out", False),
        (1.0 + 6.0 * tolerance(torch.float64), "everywhere", True),
        (1.0 + 6.0 * tolerance(torch.float64), "not to be had near the initial point", True),
        (1.1, "far out", True),
    ],
)
@pytest.mark.parametrize("differentiable", [False, True])
def test_a_small_difference_far_out_is_a_fault_if_there_is_one_near_the_initial_point(
    factor, where, fault, differentiable, monkeypatch
):
    """A single draw may be worse conditioned than its neighbours tell."""

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    target = make_target(model, Y)
    x = (points(target) + 20.0).requires_grad_(differentiable)
    target.score(x)
    replays = target._binding.replays
    right = replays._model_at

    def off(point, differentiable):
        is_far = bool((point > 10.0).any())
        if where.startswith("not") and not is_far:
            return None
        by = factor if is_far or where == "everywhere" else 1.0
        of = right(point, differentiable)
        return of | {name: by * of[name] for name in ("log density", "score")}

    monkeypatch.setattr(replays, "_model_at", off)
    target.check_soon()
    with pytest.warns(TargetPathWarning, match="no longer agrees") if fault else nullcontext():
        target.score(x)
    assert target.path.name == ("vmap" if fault else "captured")
    assert fault or replays.num_unchecked == 1, "it has not been found right either"


def test_a_check_passes_on_an_ill_conditioned_density():
    """Cancellation makes the rounding of float32 far larger than the agreement that is asked for elsewhere."""

    def model():
        a = pyro.sample("a", dist.Normal(torch.zeros((), dtype=torch.float32), 1.0))
        pyro.factor("f", -((((a + 3e3) ** 2 - a**2 - 9e6) / 6e3 - a) ** 2))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        target = make_target(model)
        for _ in range(2 * replays._CHECK_EVERY):
            target.score(torch.randn(4, 1, dtype=torch.float32))
    assert target.path.name in ("captured", "vmap")


# --- particles that fail ------------------------------------------------------------------------------


def covariance():
    a = pyro.sample("a", dist.Normal(1.0, 1.0))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), a * torch.eye(2)), obs=torch.ones(2))


def test_a_failed_cholesky_of_one_particle_is_nan_and_never_garbage(no_checks):
    target = make_target(covariance)
    assert target.path.name == "captured"
    good, bad = torch.tensor([[1.0], [2.0], [0.5]]), torch.tensor([[1.0], [-1.0], [0.5]])
    for _ in range(2):
        assert_as_the_loop(target, good, uses=1)
        log_density, score = target.log_density_and_score(bad)
        assert log_density.isnan().tolist() == score[:, 0].isnan().tolist() == [False, True, False]
        torch.testing.assert_close(score[[0, 2]], target.score(good)[[0, 2]])
    assert target.path.name == "captured"


# --- sizes, types and devices -------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_types_and_devices(dtype, device, no_checks):
    def model(x, y):
        scale = pyro.sample("scale", dist.HalfNormal(torch.ones((), dtype=dtype, device=device)))
        w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=dtype, device=device), scale).to_event(1))
        with pyro.plate("data", len(y), subsample_size=4, device=torch.device(device)) as i:
            pyro.sample("y", dist.Bernoulli(logits=x[i] @ w), obs=y[i])

    x = torch.linspace(-1.0, 1.0, 12).reshape(6, 2).to(device, dtype)
    y = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 1.0]).to(device, dtype)
    target = make_target(model, x, y)
    assert target.path.name == "captured", target.path
    log_density, score = target.log_density_and_score(points(target))
    assert log_density.dtype is score.dtype is target.layout.dtype is dtype
    assert score.device.type == device
    assert_as_the_loop(target)
    target.resample_minibatch()
    assert_as_the_loop(target)


@pytest.mark.parametrize("model", [curved, lkj, ordered_outcomes])
def test_one_recording_serves_batches_of_every_size(model, no_checks, recordings):
    target = make_target(model)
    for size in (1, 2, 3, 5, 7, 8, 100):
        assert_as_the_loop(target, points(target, size), uses=1)
    assert recordings == {"models": 1}
    assert target.captured_graph("score") is target.captured_graph("score") is not None


def multinomial():
    p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
    pyro.sample("y", dist.Multinomial(6, p), obs=torch.tensor([1.0, 2.0, 3.0]))


@pytest.mark.parametrize(
    ("device", "path", "is_small"),
    [("cpu", "captured", True), ("cpu", "captured_plate", True), ("cpu", "vmap", False), ("cuda", "captured", False)],
)
def test_batches_are_small_where_a_graph_is_replayed_near_a_cache(device, path, is_small):
    budget = density._budget(torch.device(device), TargetPath(path, ""))
    assert budget == (density._CPU_BUDGET if is_small else density._MEMORY_BUDGET)


@pytest.mark.parametrize(("model", "num_chunks"), [(curved, 2), (curved, 1000), (multinomial, 2)])
def test_chunks_past_the_memory_budget_give_the_same(model, num_chunks, monkeypatch, no_checks):
    target = make_target(model)
    assert target.path.name == ("captured_plate" if model is multinomial else "captured")
    x = points(target, 7)
    v = torch.cos(torch.arange(float(x.numel()))).reshape(x.shape)
    want = *target.log_density_and_score(x), hvp(target, "loop", x, v)
    monkeypatch.setattr(density, "_CPU_BUDGET", target._binding.bytes_per_particle * 7 // num_chunks)
    sizes = []
    evaluate_along = binding.Binding.evaluate_along
    monkeypatch.setattr(
        binding.Binding,
        "evaluate_along",
        lambda self, path, x, *a: sizes.append(len(x)) or evaluate_along(self, path, x, *a),
    )
    for _ in range(2):
        sizes.clear()
        torch.testing.assert_close(target.score(x), want[1])
        assert len(sizes) == min(num_chunks, 7)
        assert sum(sizes) == 7
        point = x.clone().requires_grad_()
        (got,) = torch.autograd.grad((target.score(point) * v).sum(), point)
        torch.testing.assert_close(got, want[2])
    for got, wanted in zip((*target.log_density_and_score(x), target.log_density(x)), (*want[:2], want[0])):
        torch.testing.assert_close(got, wanted)


def test_memory_is_counted_by_what_a_particle_needs():
    def model(rows):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(a * rows.exp(), 1.0).to_event(1), obs=rows)

    small, large = (make_target(model, torch.zeros(n))._binding.bytes_per_particle for n in (1000, 100_000))
    assert large > 8 * 100_000
    assert 90 < large / small < 110


# --- a fit --------------------------------------------------------------------------------------------


def subsampled_latents():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 10, subsample_size=3) as i:
        t = pyro.sample("t", dist.Normal(a, 1.0))
        pyro.sample("y", dist.Normal(t, 1.0), obs=ROWS[i])


@pytest.mark.parametrize(("model", "dim", "loss"), [(subsampled_latents, 11, None), (curved, 3, FisherDivergence())])
def test_the_same_draws_for_the_same_seed_captured_or_not(model, dim, loss):
    """A difference of rounding is not made larger than 1e-5 in twenty steps.

    Both fits read the same minibatches. Without latents inside the plate a captured fit would take their noise out,
    and be another one.
    """
    draws = []
    for captured in (True, False):
        pyro.set_rng_seed(3)
        gaussian = FixedGaussian(torch.zeros(dim), torch.ones(dim))
        sivism = SIVISM(model, loss=loss, num_particles=16, capture=captured, preconditioner=gaussian)
        for _ in range(20):
            sivism.step()
        assert sivism.target.path.name == ("captured" if captured else "vmap")
        draws.append(sivism.sample(50)["a"])
    torch.testing.assert_close(*draws, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("num_rows", [50, 5000])
def test_a_path_is_not_refused_for_the_roundings_of_raw_units(num_rows):
    """In float32, with coefficients of 1e4 and 1e5."""
    X = torch.randn(num_rows, 24, generator=torch.Generator().manual_seed(0)).float()

    def regression(X):
        b = pyro.sample("b", dist.Normal(X.new_full((24,), 1e5), 1.0).to_event(1))
        with pyro.plate("data", len(X)):
            pyro.sample("y", dist.Normal(X @ b, 1.0), obs=X.sum(1) * 1e5)

    assert make_target(regression, X).path.name == "captured"


@pytest.mark.filterwarnings("error::pyro_sivism.errors.TargetPathWarning")
def test_roundings_of_long_sums_are_no_disagreement():
    """In float32 at the maximum of 5,000 terms, where their sum in another order has another score.

    One nudge of all coordinates alike allows too little at some of these points. That the default dtype is another
    than the model's changes nothing.
    """
    torch.manual_seed(0)
    X = torch.randn(5000, 24)
    X[:, 12:] = X[:, :12] + 0.05 * X[:, 12:]
    y = 8.0 + 20.0 * (X[:, :12] - X[:, 12:]).sum(1) + 0.1 * torch.randn(5000)  # of terms that nearly cancel
    X, y = X.float(), y.float()

    def regression(X, y):
        intercept = pyro.sample("intercept", dist.Normal(X.new_tensor(0.0), 1e4))
        b = pyro.sample("b", dist.Normal(X.new_zeros(24), 1e4).to_event(1))
        sigma = pyro.sample("sigma", dist.HalfNormal(X.new_tensor(1.0)))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(intercept + X @ b, sigma), obs=y)

    design = torch.cat([X.new_ones(5000, 1), X], 1).double()
    best = torch.linalg.lstsq(design, y.double()[:, None]).solution[:, 0]
    log_sd = (y.double() - design @ best).square().mean().log() / 2
    target = make_target(regression, X, y)
    assert target.layout.dtype is torch.float32
    near = 1.0 + 1e-7 * torch.randn(40, 8, 26)
    for batch in near * torch.cat([best, log_sd[None]]):
        target.check_soon()
        target.score(batch.float())
    assert target.path.name == "captured"


def test_roundings_of_a_batch_and_of_its_parts_are_no_disagreement():
    """In float32, with means that are sums of terms of 1e4 and a noise of 0.1."""
    torch.manual_seed(0)
    X = torch.randn(50, 24).float()
    y = 1e4 * X.sum(1) + 0.1 * torch.randn(50).float()

    def regression(X, y):
        b = pyro.sample("b", dist.Normal(X.new_full((24,), 1e4), 1.0).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(X @ b, 0.1), obs=y)

    target = make_target(regression, X, y, paths=("loop",))
    assert target.layout.dtype is torch.float32
    CapturedDensity(target._binding.runs, target._binding.init)


@pytest.mark.parametrize("unit", [1e-13, 1e-8, 1e8, 1e13, 1e18])
@pytest.mark.parametrize("seed", range(4))
def test_extreme_units_are_captured_in_float32(unit, seed):
    """Products of small factors leave float32's range there, and terms of a second derivative cancel."""
    torch.manual_seed(seed)
    X, y = torch.randn(400, 3).float(), unit * torch.randn(400).float()

    def regression(X, y):
        with pyro.plate("columns", 3):
            b = pyro.sample("b", dist.Normal(X.new_zeros(()), 10.0 * unit))
        sigma = pyro.sample("sigma", dist.HalfCauchy(X.new_tensor(unit)))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(X @ b, sigma), obs=y)

    trace = poutine.trace(regression).get_trace(X, y)
    target = Target(regression, LatentLayout.from_trace(trace), trace, (X, y))
    assert target.layout.dtype is torch.float32
    assert target.path.name == "captured", target.path


def test_a_graph_that_is_wrong_for_other_sizes_of_batches_is_refused():
    def by_size(x):
        return (x.sum(-1) / len(x), x / len(x))

    with pytest.raises(CaptureError, match="graphs of its parts"):
        capture._check_sizes(by_size, torch.rand(12, 3), [])


def test_every_graph_is_asked_whether_it_is_right_for_other_sizes_of_batches(monkeypatch):
    class BySize(capture.BatchGraph):
        def __call__(self, x, *inputs):
            return tuple(result / len(x) for result in super().__call__(x, *inputs))

    monkeypatch.setattr(capture, "BatchGraph", BySize)
    reason = make_target(curved).path.reason
    assert reason.startswith("captured: CaptureError: a batch's graph does not give what the graphs of its parts give")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_nudges_are_of_the_size_of_roundings_of_the_points(dtype, default):
    torch.set_default_dtype(default)  # which the fixture sets back
    x = torch.linspace(0.5, 7.0, 26, dtype=dtype)
    steps = torch.stack([near - x for near in nudged(x)]) / (x * torch.finfo(dtype).eps)
    assert steps.dtype is dtype
    assert ((steps.abs() > 6.0) & (steps.abs() < 10.0)).all()
    assert len(steps.sign().unique(dim=0)) == len(steps) == 8


def test_an_infinite_density_has_no_slack():
    want = torch.tensor([-torch.inf, 1.0, torch.nan])
    slack = rounding_slack(want, [want, want + 0.25])
    assert slack.tolist() == [0.0, 2.5, torch.inf]
    assert not agree(torch.zeros(3), want, slack)
    assert agree(want, want, slack)


def test_missing_values_that_are_left_out_are_the_same_in_a_copy():
    """A NaN equals none, but data of the same numbers and NaNs are no others."""

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0).expand([3]).to_event(1), obs=y[~y.isnan()])

    y = torch.tensor([1.0, torch.nan, 2.0, 3.0])
    target = make_target(model, y)
    for _ in range(10):
        assert target.rebind((y.clone(),))
        assert target.score(torch.zeros(1, 1)).item() == 6.0
    assert target.path.name == "captured"
    target.rebind((y.nan_to_num(5.0) * torch.tensor([1.0, 1.0, 1.0, torch.nan]),))
    assert target.score(torch.zeros(1, 1)).item() == 8.0
