"""A graph replayed by TorchScript gives what the graph gives, errors and derivatives included, or is not used."""

from __future__ import annotations

import pytest
import torch
from torch.func import vmap

from pyro_sivism.target import traced
from pyro_sivism.target.batch_graph import BatchGraph
from pyro_sivism.target.graph import simplify
from pyro_sivism.target.recording import record
from pyro_sivism.target.traced import TracedReplays

pytestmark = pytest.mark.usefixtures("float64")

W = torch.linspace(-1.0, 1.0, 12, dtype=torch.float64).reshape(4, 3)
SIZES = (5, 7)


def points(size):
    return torch.sin(torch.arange(3.0 * size, dtype=torch.float64)).reshape(size, 3)


def summed(x, w):
    return (x @ w.mT).logsumexp(-1) * torch.ones(len(x), 1).expand(len(x), 4).sum(-1), x.square()


def graph_of(function, *inputs):
    with torch.no_grad():
        return BatchGraph([simplify(record(function, points(size), *inputs)) for size in SIZES], SIZES)


def replayed(replays, x, *inputs, times=traced._TRACED_AT_REPLAY):
    with torch.no_grad():
        for _ in range(times):
            result = replays(x, *inputs)
    return result


@pytest.fixture
def num_traces(monkeypatch):
    """How many traces have been made, as a list of one number."""
    count, trace = [0], torch.jit.trace

    def counted(*args, **kwargs):
        count[0] += 1
        return trace(*args, **kwargs)

    monkeypatch.setattr(torch.jit, "trace", counted)
    return count


def test_a_size_that_comes_again_and_again_is_traced_and_gives_the_same_bits(num_traces):
    graph = graph_of(summed, W)
    replays = TracedReplays(graph)
    for size in (1, 6):
        replayed(replays, points(size), W, times=traced._TRACED_AT_REPLAY - 1)
    assert num_traces == [0]
    for traces, size in enumerate((1, 6), start=1):
        x, w = points(size) + 0.5, W - 0.25
        replayed(replays, points(size), W, times=1)
        assert num_traces == [traces]
        for found, want in zip(replayed(replays, x, w, times=3), graph(x, w)):
            assert torch.equal(found, want)
    assert num_traces == [2]


def test_only_so_many_sizes_are_traced(num_traces, monkeypatch):
    monkeypatch.setattr(traced, "_MAX_TRACES", 2)
    graph = graph_of(summed, W)
    replays = TracedReplays(graph)
    for size in (1, 2, 3):
        assert torch.equal(replayed(replays, points(size), W)[0], graph(points(size), W)[0])
    assert num_traces == [2]


def test_what_is_differentiated_is_the_graph():
    replays = TracedReplays(graph_of(summed, W))
    replayed(replays, points(4), W)
    assert set(replays._traces) == {4}
    replays._traces[4] = lambda *args: pytest.fail("a trace was differentiated")
    x = points(4).requires_grad_()
    value, _ = replays(x, W)
    (found,) = torch.autograd.grad(value.sum(), x)
    (want,) = torch.autograd.grad(summed(x, W)[0].sum(), x)
    torch.testing.assert_close(found, want)


def test_a_leaf_that_is_learned_is_read_where_it_lives():
    leaf = torch.ones(3, requires_grad=True)
    replays = TracedReplays(graph_of(lambda x: x * leaf))
    replayed(replays, points(4))
    with torch.no_grad():
        leaf.mul_(2.0)
    assert torch.equal(replayed(replays, points(4), times=1), 2.0 * points(4))


def log_det(x):
    return vmap(lambda u: torch.linalg.cholesky(torch.diag(u + 2.0)).diagonal().log().sum())(x)


def asserted(x):
    torch._assert_async((x > -2.0).all(), "too low")
    return x.exp()


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [(log_det, torch.linalg.LinAlgError, "positive-definite"), (asserted, RuntimeError, "too low")],
)
def test_an_operation_that_only_raises_is_not_lost(function, error, message, num_traces):
    replays = TracedReplays(graph_of(function))
    x = points(4)
    replayed(replays, x)
    with pytest.raises(error, match=message), torch.no_grad():
        replays(x - 4.0)
    assert torch.equal(replayed(replays, x, times=1), function(x))
    assert num_traces == [1]


def test_a_bad_point_at_the_time_of_the_trace_does_not_end_tracing(num_traces):
    replays = TracedReplays(graph_of(log_det))
    x = points(4)
    replayed(replays, x, times=traced._TRACED_AT_REPLAY - 1)
    with pytest.raises(torch.linalg.LinAlgError, match="positive-definite"), torch.no_grad():
        replays(x - 4.0)
    assert num_traces == [0]
    assert torch.equal(replayed(replays, x, times=1), log_det(x))
    assert num_traces == [1]


def test_nan_is_no_difference(num_traces):
    replays = TracedReplays(graph_of(summed, W))
    x = points(4)
    x[0] = torch.nan
    assert replayed(replays, x, W)[0].isnan().tolist() == [True, False, False, False]
    assert num_traces == [1]
    assert replays._traces[4] is not None


@pytest.mark.parametrize("fault", ["fails", "differs", "is gone"])
def test_a_tracer_that_is_no_longer_right_is_not_used_and_not_asked_again(fault, monkeypatch):
    calls = []

    def trace(*args, **kwargs):
        calls.append(args)
        if fault == "fails":
            raise ValueError("unknown operation")
        return lambda x, w: ((summed(x, w)[0] + 1e-12, x.square()), ())

    if fault == "is gone":
        monkeypatch.delattr(torch.jit, "trace")
    else:
        monkeypatch.setattr(torch.jit, "trace", trace)
    graph = graph_of(summed, W)
    replays = TracedReplays(graph)
    for size in (4, 6):
        found = replayed(replays, points(size), W, times=2 * traced._TRACED_AT_REPLAY)
        assert torch.equal(found[0], graph(points(size), W)[0])
    assert len(calls) == (0 if fault == "is gone" else 1)
