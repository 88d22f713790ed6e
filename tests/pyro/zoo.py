"""A zoo of Pyro models, one for every support, handler and modelling habit that the target must get right.

Each :class:`Animal` is a record: a name, what it covers, a factory of ``(model, args, kwargs)``, and which of the
batched paths (``vmap``, ``plate``) can run it. Factories make their tensors when called, in the default dtype.

To add one: write a function decorated with ``@animal(covers, paths=...)`` that returns the model and its arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.reparam import LocScaleReparam, TransformReparam
from pyro.nn import PyroModule, PyroSample

__all__ = ["ZOO", "Animal"]

BOTH = ("captured", "captured_plate", "vmap", "plate")
ONLY_VMAP, ONLY_PLATE, ONLY_LOOP = ("captured", "vmap"), ("captured_plate", "plate"), ()


@dataclass(frozen=True)
class Animal:
    """One model: ``make()`` returns ``(model, args, kwargs)``; ``paths`` lists the batched paths that run it."""

    name: str
    covers: str
    make: Callable
    paths: tuple[str, ...]
    own_bijection: bool = False  # torch has no bijection to its support, so the oracle borrows ours

    def __str__(self) -> str:
        return self.name


ZOO: list[Animal] = []


def animal(covers: str, paths: tuple[str, ...] = BOTH, own_bijection: bool = False) -> Callable:
    def register(make: Callable) -> Callable:
        def made() -> tuple[Callable, tuple, dict]:
            model, *args = make()
            kwargs = args.pop() if args and isinstance(args[-1], dict) else {}
            return model, tuple(args), kwargs

        ZOO.append(Animal(make.__name__, covers, made, paths, own_bijection))
        return make

    return register


def fixed(*shape: int, scale: float = 1.0) -> torch.Tensor:
    """Data without randomness: a quasi-periodic sequence in (-scale, scale)."""
    n = int(torch.Size(shape).numel())
    return scale * torch.sin(1.7 * torch.arange(1.0, n + 1) + 0.3).reshape(shape)


# --- supports -----------------------------------------------------------------------------------------


@animal("real scalar latents, observed data")
def normal_mean():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(1.0, 2.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.StudentT(4.0, mu, 0.5), obs=y)

    return model, fixed(5)


@animal("positive: HalfCauchy, Gamma, LogNormal, HalfNormal, Exponential")
def positive():
    def model(y):
        a = pyro.sample("a", dist.HalfCauchy(2.0))
        b = pyro.sample("b", dist.Gamma(2.0, 3.0))
        c = pyro.sample("c", dist.LogNormal(0.5, 0.7))
        d = pyro.sample("d", dist.HalfNormal(1.5))
        e = pyro.sample("e", dist.Exponential(0.5))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(a - b, c + d + e), obs=y)

    return model, fixed(4)


@animal("unit interval and interval, the bounds moved by data")
def intervals():
    def model(y):
        p = pyro.sample("p", dist.Beta(2.0, 3.0))
        u = pyro.sample("u", dist.Uniform(-1.0, 3.0))
        v = pyro.sample("v", dist.Uniform(y.min(), y.max()))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(p * u, 1.0 + v**2), obs=y)

    return model, fixed(4)


@animal("greater_than and less_than")
def half_lines():
    def model(y):
        a = pyro.sample("a", dist.Pareto(1.5, 2.0))
        b = pyro.sample(
            "b", dist.TransformedDistribution(dist.Exponential(1.0), [dist.transforms.AffineTransform(2.0, -1.0)])
        )
        pyro.sample("y", dist.Normal(a + b, 1.0), obs=y)

    return model, torch.tensor(2.5)


@animal("circular support")
def circular():
    def model(y):
        angle = pyro.sample("angle", dist.VonMises(0.3, 2.0))
        pyro.sample("y", dist.Normal(angle.sin(), 0.5), obs=y)

    return model, torch.tensor(0.4)


@animal("simplex, in a plate; Multinomial, which vmap refuses", ONLY_PLATE)
def simplex():
    def model(counts):
        with pyro.plate("rows", 2):
            p = pyro.sample("p", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
            pyro.sample("n", dist.Multinomial(probs=p, validate_args=False), obs=counts)

    return model, torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.0, 2.0]])


@animal("ordered; OrderedLogistic, which vmap refuses unless captured", ("captured", *ONLY_PLATE))
def ordered():
    def model(y):
        base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
        cuts = pyro.sample("cuts", dist.TransformedDistribution(base, [dist.transforms.OrderedTransform()]))
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.OrderedLogistic(slope * fixed(len(y)), cuts), obs=y)

    return model, torch.tensor([0.0, 1.0, 3.0, 2.0, 1.0])


@animal("positive_ordered")
def positive_ordered():
    def model(y):
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("rows", 2):
            pyro.sample("gaps", _PositiveOrdered(3))
        pyro.sample("y", dist.Normal(scale, 1.0), obs=y)

    return model, torch.tensor(0.7)


class _PositiveOrdered(dist.TorchDistribution):
    """An improper density exp(-sum x) on increasing positive vectors, for its support."""

    arg_constraints: dict = {}  # noqa: RUF012 -- the type torch.distributions expects
    support = constraints.positive_ordered_vector

    def __init__(self, size, batch_shape=()):
        super().__init__(torch.Size(batch_shape), torch.Size([size]), validate_args=False)

    def expand(self, batch_shape, _instance=None):
        return _PositiveOrdered(self.event_shape[0], batch_shape)

    def rsample(self, sample_shape=()):
        return torch.rand(self._extended_shape(torch.Size(sample_shape))).cumsum(-1) + 0.1

    def log_prob(self, value):
        return -value.sum(-1).expand(torch.broadcast_shapes(self.batch_shape, value.shape[:-1]))


@animal("corr_cholesky: LKJCholesky, and a positive scale vector")
def lkj():
    def model(y):
        sd = pyro.sample("sd", dist.LogNormal(torch.zeros(3), 0.5).to_event(1))
        corr = pyro.sample("corr", dist.LKJCholesky(3, 2.0))
        scale_tril = sd.diag_embed() @ corr
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.MultivariateNormal(torch.zeros(3), scale_tril=scale_tril), obs=y)

    return model, fixed(4, 3)


@animal("corr_cholesky of two, whose transform has tensors without elements; correlated slopes")
def lkj_of_two():
    def model(y):
        corr = pyro.sample("corr", dist.LKJCholesky(2, 2.0))
        scale = pyro.sample("scale", dist.Exponential(1.0).expand([2]).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), scale_tril=scale.unsqueeze(-1) * corr), obs=y)

    return model, fixed(5, 2)


@animal("corr_matrix: LKJ", ONLY_VMAP)
def correlation_matrix():
    def model(y):
        corr = pyro.sample("corr", dist.LKJ(3, 2.0))
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(3), corr + torch.eye(3)), obs=y)

    return model, fixed(3)


class _OnMatrices(dist.TorchDistribution):
    """A density on matrices, exp(-|X|^2 / 2), improper, for its support."""

    arg_constraints: dict = {}  # noqa: RUF012 -- the type torch.distributions expects

    def __init__(self, support, size, batch_shape=()):
        self._support, self._size = support, size
        super().__init__(torch.Size(batch_shape), torch.Size([size, size]), validate_args=False)

    @constraints.dependent_property(is_discrete=False, event_dim=2)
    def support(self):
        return self._support

    def expand(self, batch_shape, _instance=None):
        return _OnMatrices(self._support, self._size, batch_shape)

    def rsample(self, sample_shape=()):
        shape = self._extended_shape(torch.Size(sample_shape))
        return torch.eye(self._size).expand(shape) + 0.0

    def log_prob(self, value):
        log_prob = -0.5 * value.square().sum((-1, -2))
        return log_prob.expand(torch.broadcast_shapes(self.batch_shape, log_prob.shape))


@animal("lower_cholesky", own_bijection=True)
def lower_cholesky():
    def model(y):
        tril = pyro.sample("tril", _OnMatrices(constraints.lower_cholesky, 3))
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(3), scale_tril=tril), obs=y)

    return model, fixed(3)


@animal("positive_definite", own_bijection=True)
def positive_definite():
    def model(y):
        cov = pyro.sample("cov", dist.Wishart(torch.tensor(4.0), torch.eye(2)))
        with pyro.plate("rows", 3):
            pyro.sample("precision", _OnMatrices(constraints.positive_definite, 2))
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), cov), obs=y)

    return model, fixed(2)


@animal("to_event: vectors and matrices of one site")
def to_event():
    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(3, 2), 1.0).to_event(2))
        b = pyro.sample("b", dist.Laplace(torch.zeros(2), 2.0).to_event(1))
        with pyro.plate("data", len(y)):
            mean = (x.unsqueeze(-1) * w).sum(-2) + b
            pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=y)

    return model, fixed(5, 3), fixed(5, 2)


@animal("multivariate latents: MultivariateNormal, LowRankMultivariateNormal")
def multivariate():
    def model(y):
        a = pyro.sample("a", dist.MultivariateNormal(torch.ones(2), torch.tensor([[2.0, 0.5], [0.5, 1.0]])))
        b = pyro.sample("b", dist.LowRankMultivariateNormal(torch.zeros(2), fixed(2, 1), torch.ones(2)))
        pyro.sample("y", dist.Normal(a * b, 1.0).to_event(1), obs=y)

    return model, fixed(2)


# --- plates -------------------------------------------------------------------------------------------


@animal("hierarchy in a plate, non-centred by hand (eight schools)")
def eight_schools():
    def model(sigma, y):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("school", len(y)):
            eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
            theta = pyro.deterministic("theta", mu + tau * eta)
            pyro.sample("y", dist.Normal(theta, sigma), obs=y)

    return model, 10.0 + fixed(8, scale=3.0), fixed(8, scale=20.0)


@animal("nested plates")
def nested_plates():
    def model(y):
        top = pyro.sample("top", dist.Normal(0.0, 1.0))
        with pyro.plate("outer", 3, dim=-2):
            a = pyro.sample("a", dist.Normal(top, 1.0))
            with pyro.plate("inner", 4, dim=-1):
                b = pyro.sample("b", dist.Normal(a, 0.5))
                pyro.sample("y", dist.Normal(b, 1.0), obs=y)

    return model, fixed(3, 4)


@animal("two crossing plates and a latent in their product")
def crossing_plates():
    def model(y):
        rows, cols = pyro.plate("rows", 3, dim=-1), pyro.plate("cols", 2, dim=-2)
        with rows:
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with cols:
            b = pyro.sample("b", dist.Gamma(2.0, 1.0))
        with rows, cols:
            c = pyro.sample("c", dist.Normal(a * b, 1.0))
            pyro.sample("y", dist.Normal(c, 1.0), obs=y)

    return model, fixed(2, 3)


@animal("sequential plate")
def sequential_plate():
    def model(y):
        state = pyro.sample("start", dist.Normal(0.0, 1.0))
        for t in pyro.plate("time", len(y)):
            pyro.sample(f"e_{t}", dist.Normal(state, 1.0))
            pyro.sample(f"y_{t}", dist.Normal(state, 0.5), obs=y[t])

    return model, fixed(3)


@animal("a time series by pyro.markov without enumeration")
def random_walk():
    def model(y):
        x = pyro.sample("x_init", dist.Normal(0.0, 1.0))
        for t in pyro.markov(range(len(y))):
            x = pyro.sample(f"x_{t}", dist.Normal(0.9 * x, 0.3))
            pyro.sample(f"y_{t}", dist.Normal(x, 0.5), obs=y[t])

    return model, fixed(4)


@animal("a latent whose parameters make it independent across the plate")
def broadcast_in_plate():
    def model(y):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", 4):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))  # batch shape () broadcast to (4,) by the plate
            pyro.sample("y", dist.Normal(theta, scale), obs=y)
        pyro.sample("apart", dist.Normal(0.0, 1.0), obs=torch.tensor(0.3))  # depends on no latent at all

    return model, fixed(4)


# --- handlers -----------------------------------------------------------------------------------------


@animal("poutine.scale by a number and by a tensor, nested")
def scaled():
    def model(y):
        with poutine.scale(scale=0.5):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3), poutine.scale(scale=torch.tensor([1.0, 2.0, 0.25])):
            b = pyro.sample("b", dist.Gamma(2.0, 1.0))
            with poutine.scale(scale=3.0):
                pyro.sample("y", dist.Normal(a, b), obs=y)

    return model, fixed(3)


@animal("poutine.mask, .mask(tensor) and .mask(False)")
def masked():
    def model(y):
        mask = torch.tensor([True, False, True, True])
        a = pyro.sample("a", dist.Normal(0.0, 1.0).mask(False))
        with pyro.plate("data", 4):
            b = pyro.sample("b", dist.Gamma(2.0, 1.0))
            with poutine.mask(mask=mask):
                pyro.sample("y", dist.Normal(a, b), obs=y)
            pyro.sample("z", dist.Normal(b, 1.0).mask(mask), obs=y + 1)

    return model, fixed(4)


@animal("NaN in masked-out data replaced before the density, as users do")
def missing_data():
    def model(y):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(y)), poutine.mask(mask=~y.isnan()):
            pyro.sample("y", dist.Normal(a, s), obs=y.nan_to_num())

    return model, torch.tensor([0.5, torch.nan, -1.0])


@animal("pyro.factor, in and out of plates, and pyro.deterministic")
def factors():
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 2.0))
        with pyro.plate("data", 3):
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
            pyro.factor("banana", -((a - b**2) ** 2))
        pyro.deterministic("c", a + 1)
        pyro.factor("tilt", 0.3 * a)

    return (model,)


@animal("poutine.condition")
def conditioned():
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        s = pyro.sample("s", dist.Gamma(2.0, 2.0))
        pyro.sample("b", dist.Normal(a, s))

    return (poutine.condition(model, data={"b": torch.tensor(0.8)}),)


@animal("poutine.do")
def intervened():
    def model(y):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(a, 1.0))
        pyro.sample("y", dist.Normal(a * b, 1.0), obs=y)

    return poutine.do(model, data={"b": torch.tensor(1.3)}), torch.tensor(0.2)


@animal("poutine.block of an observed site")
def blocked():
    def model(y):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("hidden", dist.Normal(a, 0.1), obs=y)
        pyro.sample("seen", dist.Normal(a, 1.0), obs=y)

    return poutine.block(model, hide=["hidden"]), torch.tensor(0.2)


@animal("LocScaleReparam and TransformReparam")
def reparametrized():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        with pyro.plate("group", 4):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            base, scaled = dist.Normal(0.0, 1.0), dist.transforms.AffineTransform(mu, tau)
            phi = pyro.sample("phi", dist.TransformedDistribution(base, [scaled, dist.transforms.ExpTransform()]))
            pyro.sample("y", dist.Normal(theta, phi), obs=y)

    config = {"theta": LocScaleReparam(0.4), "phi": TransformReparam()}
    return poutine.reparam(model, config=config), fixed(4)


@animal("PyroModule with PyroSample weights", ONLY_VMAP)
def pyro_module():
    class Regression(PyroModule):
        def __init__(self):
            super().__init__()
            self.linear = PyroModule[torch.nn.Linear](3, 1)
            self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
            self.linear.bias = PyroSample(dist.Normal(0.0, 2.0).expand([1]).to_event(1))
            self.noise = PyroSample(dist.Gamma(2.0, 2.0))

        def forward(self, x, y):
            mean, noise = self.linear(x).squeeze(-1), self.noise
            with pyro.plate("data", len(y)):
                return pyro.sample("y", dist.Normal(mean, noise), obs=y)

    return Regression(), fixed(5, 3), fixed(5)


@animal("keyword arguments of the model")
def keyword_arguments():
    def model(y, *, sd=1.0, prior=None):
        a = pyro.sample("a", prior)
        pyro.sample("y", dist.Normal(a, sd), obs=y)

    return model, torch.tensor(0.2), {"sd": 0.7, "prior": dist.Gamma(3.0, 1.0)}


# --- not written for batches --------------------------------------------------------------------------


@animal("X @ w and alpha[group]: fails under a plate", ONLY_VMAP)
def linear_algebra():
    def model(x, group, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("groups", 3):
            alpha = pyro.sample("alpha", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=x @ w + alpha[group]), obs=y)

    return model, fixed(6, 2), torch.tensor([0, 1, 2, 0, 1, 1]), torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0])


@animal("torch.where on a latent")
def where():
    def model(y):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(torch.where(a > 0.1, a**2, -a), 1.0), obs=y)

    return model, fixed(3)


@animal("a Python branch on a latent", ONLY_LOOP)
def python_branch():
    def model(y):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        scale = 1.0 if a > 0 else 2.0
        pyro.sample("y", dist.Normal(a, scale), obs=y)

    return model, torch.tensor(0.4)


@animal("a Gaussian process with its hyperparameters: Cholesky in the model", ONLY_VMAP)
def gaussian_process():
    def model(x, y):
        length = pyro.sample("length", dist.LogNormal(0.0, 0.5))
        noise = pyro.sample("noise", dist.HalfNormal(1.0))
        gram = torch.exp(-0.5 * ((x[:, None] - x) / length) ** 2) + (0.1 + noise**2) * torch.eye(len(x))
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), gram), obs=y)

    return model, torch.linspace(0.0, 2.0, 5), fixed(5)


@animal("tensors changed in place", ONLY_VMAP)
def in_place():
    def model(y):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        mean = b.clone()
        mean += a
        mean[1] = a * b[0]
        pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=y)

    return model, fixed(3)


# --- discrete latents, summed out ---------------------------------------------------------------------


@animal("enumerated mixture", ONLY_VMAP)
def mixture():
    def model(y):
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("components", 3):
            locs = pyro.sample("locs", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(y)):
            k = pyro.sample("k", dist.Categorical(weights))
            pyro.sample("y", dist.Normal(locs[k], 0.7), obs=y)

    return model, fixed(5, scale=2.0)


@animal("two enumerated sites, one global, Bernoulli", ONLY_VMAP)
def spike_and_slab():
    def model(y):
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        wide = pyro.sample("wide", dist.Bernoulli(p))
        with pyro.plate("data", len(y)):
            on = pyro.sample("on", dist.Bernoulli(0.3))
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(theta * on, 1.0 + wide), obs=y)

    return model, fixed(4)


@animal("enumerated HMM with pyro.markov", ONLY_VMAP)
def hidden_markov():
    def model(y):
        with pyro.plate("states", 2):
            transition = pyro.sample("transition", dist.Dirichlet(torch.tensor([2.0, 1.0])))
            locs = pyro.sample("locs", dist.Normal(0.0, 2.0))
        state = torch.tensor(0)
        for t in pyro.markov(range(len(y))):
            state = pyro.sample(f"state_{t}", dist.Categorical(transition[state]))
            pyro.sample(f"y_{t}", dist.Normal(locs[state], 1.0), obs=y[t])

    return model, fixed(4, scale=2.0)


@animal("sites enumerated sequentially by the user's own mark", ONLY_VMAP)
def sequential_mark():
    def model(y):
        locs = pyro.sample("locs", dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).to_event(1))
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(locs[k], 1.0), obs=y)

    return model, torch.tensor(0.3)


@animal("MixtureSameFamily")
def mixture_same_family():
    def model(y):
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
        locs = pyro.sample("locs", dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).to_event(1))
        with pyro.plate("data", len(y)):
            parts = dist.Normal(locs, 0.7)
            pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(weights), parts), obs=y)

    return model, fixed(5, scale=2.0)


@animal("DiscreteHMM", ONLY_VMAP)
def discrete_hmm():
    def model(y):
        init = pyro.sample("init", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        trans = pyro.sample("trans", dist.Normal(torch.eye(2), 1.0).to_event(2))
        loc = pyro.sample("loc", dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).to_event(1))
        hmm = dist.DiscreteHMM(init.log_softmax(-1), trans.log_softmax(-1), dist.Normal(loc, 1.0), duration=len(y))
        pyro.sample("y", hmm, obs=y)

    return model, fixed(5)


@animal("GaussianHMM", ONLY_VMAP)
def gaussian_hmm():
    def model(y):
        drift = pyro.sample("drift", dist.Normal(0.0, 1.0))
        noise = pyro.sample("noise", dist.LogNormal(0.0, 0.5))
        one = torch.eye(1)
        start = dist.Normal(torch.zeros(1), 1.0).to_event(1)
        step = dist.Normal(drift * torch.ones(1), 0.5).to_event(1)
        seen = dist.Normal(torch.zeros(1), noise).to_event(1)
        pyro.sample("y", dist.GaussianHMM(start, one, step, one, seen, duration=len(y)), obs=y)

    return model, fixed(4, 1)


@animal("a mask around enumerated sites: a padded sequence", ONLY_VMAP)
def padded_sequence():
    def model(y, length):
        locs = pyro.sample("locs", dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).to_event(1))
        stay = pyro.sample("stay", dist.Beta(2.0, 1.0))
        state = torch.tensor(0.0)
        for t in pyro.markov(range(len(y))):
            with poutine.mask(mask=torch.tensor(t < length)):
                state = pyro.sample(f"state_{t}", dist.Bernoulli(torch.where(state > 0, stay, 1 - stay)))
                mean = torch.where(state > 0, locs[1], locs[0])
                pyro.sample(f"y_{t}", dist.Normal(mean, 1.0), obs=y[t])

    return model, fixed(4), 2
