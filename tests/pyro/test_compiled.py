"""Compiled steps are the steps, and give way where they cannot be.

The compiler is a stand-in that gives the graph back as it is, but in the one slow test: what is tested is what is
recorded, what it reads anew in each step, and what is done about a compiler that fails.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_sivism import SIVISM, FisherDivergence
from pyro_sivism.errors import CompileWarning
from pyro_sivism.objectives import SlicedDistance
from pyro_sivism.stopping import Evidence

X = torch.linspace(-1.0, 1.0, 40)[:, None].pow(torch.arange(3))
Y = X @ torch.tensor([1.0, -1.0, 0.5]) + 0.3 * torch.sin(17.0 * torch.arange(40.0))
STEPS = 80  # compiled are those after the fiftieth


def regression(X, y, subsample_size=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([X.shape[1]]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("rows", len(X), subsample_size=subsample_size) as rows:
        pyro.sample("y", dist.Normal(X[rows] @ w, sigma), obs=y[rows])


def learned_scale(X, y):
    scale = pyro.param("scale", torch.tensor(0.5), constraint=dist.constraints.positive)
    w = pyro.sample("w", dist.Normal(0.0, scale).expand([X.shape[1]]).to_event(1))
    with pyro.plate("rows", len(X)):
        pyro.sample("y", dist.Normal(X @ w, 0.3), obs=y)


def fit(*args, model=regression, compile, **settings):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    sivism = SIVISM(model, compile=compile, **settings)
    return sivism, sivism.run(STEPS, *args, progress_bar=False).losses


@pytest.fixture
def compiler(monkeypatch):
    """Stands in for ``torch.compile``; calling it with a function replaces what it does with graphs."""
    done = {"graphs": 0, "make": lambda graph: graph}

    def compile(graph, **options):
        done["graphs"] += 1
        return done["make"](graph)

    monkeypatch.setattr(torch, "compile", compile)
    return done


@pytest.mark.parametrize(
    "case",
    {
        "regression": ((X, Y), {}),
        "minibatches": ((X, Y, 10), {}),
        "learned parameter": ((X, Y), {"model": learned_scale}),
        "second derivatives": ((X, Y), {"loss": FisherDivergence()}),
    }.items(),
    ids=lambda case: case[0],
)
def test_compiled_steps_are_the_steps(compiler, case):
    args, settings = case[1]
    _, want = fit(*args, compile=False, **settings)
    sivism, got = fit(*args, compile=True, **settings)
    assert compiler["graphs"] == 2
    assert sivism._training.is_compiled
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::pyro_sivism.errors.FitWarning")
def test_compiled_steps_follow_new_chains_and_are_compiled_anew_when_there_are_none(compiler, monkeypatch):
    found = {0: (0.3, 3.0), 320: (0.01, 0.1)}
    monkeypatch.setattr("pyro_sivism.stopping._FIRST_CYCLE", 320)
    monkeypatch.setattr(
        "pyro_sivism.cycles.gather_evidence", lambda *args: (Evidence(args[-2], *found[args[-2]]), None)
    )
    losses = []
    for compile in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        sivism = SIVISM(regression, compile=compile)
        losses.append(sivism.run(None, X, Y, progress_bar=False).losses)
    assert compiler["graphs"] == 2
    assert torch.allclose(*losses, rtol=1e-3, atol=1e-4)
    assert not sivism._training.is_compiled, "no step to come follows what these do"
    sivism.step(X, Y)
    assert compiler["graphs"] == 4


def test_who_leaves_compiling_to_a_run_has_no_single_step_compiled(compiler, monkeypatch):
    sivism = SIVISM(regression).setup(X, Y)
    training = sivism._training
    monkeypatch.setattr("pyro_sivism.training._COMPILE_SECONDS", 0.0)
    training.follow(SlicedDistance(torch.randn(100, 4), torch.eye(4), training.num_own_particles))
    sivism.run(STEPS, X, Y, progress_bar=False)
    assert training.is_compiled
    training.follow(None)
    sivism.step(X, Y)
    assert not training.is_compiled


def test_compiled_steps_read_new_data(compiler):
    got, want = (fit(X, Y, compile=compile)[0] for compile in (True, False))
    losses = []
    for sivism in (got, want):
        pyro.set_rng_seed(1)
        losses.append([sivism.step(X, Y + 3.0) for _ in range(3)])
    assert got._training.is_compiled
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][0] > 10.0  # of the new data


def raising(graph):
    raise RuntimeError("no compiler here")


def wrong(graph):
    return lambda *inputs: [None if t is None else 1.1 * t for t in graph(*inputs)]


@pytest.mark.parametrize(("make", "message"), [(raising, "no compiler here"), (wrong, "other gradients")])
def test_a_compiler_that_fails_leaves_the_steps_as_they_are(compiler, make, message):
    _, want = fit(X, Y, compile=False)
    compiler["make"] = make
    with pytest.warns(CompileWarning, match=message):
        sivism, got = fit(X, Y, compile=True)
    assert not sivism._training.is_compiled
    assert torch.equal(got, want)


def test_compiled_steps_that_fail_later_are_taken_as_before(compiler):
    _, want = fit(X, Y, compile=False)
    calls = []

    def failing(graph):
        def run(*inputs):
            calls.append(graph)
            if len(calls) > 4:  # two to see that both are right, then the first steps
                raise RuntimeError("out of memory")
            return graph(*inputs)

        return run

    compiler["make"] = failing
    with pytest.warns(CompileWarning, match="compiled steps failed, and go on as they were: .*out of memory"):
        sivism, got = fit(X, Y, compile=True)
    assert not sivism._training.is_compiled
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_inductor_compiles_the_steps():
    _, want = fit(X, Y, compile=False)
    sivism, got = fit(X, Y, compile=True)
    assert sivism._training.is_compiled
    assert torch.allclose(got, want, rtol=1e-3, atol=1e-4)
