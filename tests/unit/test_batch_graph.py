"""One graph for batches of every size: the function's values at each, or a refusal."""

from __future__ import annotations

import pytest
import torch
from torch.func import vmap

from pyro_sivism.target import batch_graph
from pyro_sivism.target.batch_graph import BatchGraph, NotOneGraphError, sizes_in, unused_size
from pyro_sivism.target.graph import simplify
from pyro_sivism.target.recording import record

pytestmark = pytest.mark.usefixtures("float64")

W = torch.linspace(-1.0, 1.0, 12, dtype=torch.float64).reshape(4, 3)
SIZES = (5, 7)


def points(size):
    return torch.sin(torch.arange(3.0 * size, dtype=torch.float64)).reshape(size, 3)


def generalized(function, *inputs):
    recordings = [simplify(record(function, points(size), *inputs)) for size in SIZES]
    return BatchGraph(recordings, SIZES)


def summed(x, w):
    return (x @ w.mT).logsumexp(-1)


def with_constants(x, w):
    """Constants with one row for each point: expanded, stored in full, transposed, a part, and of several rows each."""
    size = len(x)
    one_number = torch.ones(size, 1).expand(size, 4) * 2.0
    full = torch.arange(4.0).repeat(size, 1)
    transposed = torch.arange(3.0)[:, None].repeat(1, size)
    part = torch.arange(6.0).repeat(size, 1)[:, 1:5]
    flat = torch.arange(4.0).repeat(size)
    first = (x @ w.mT * full + one_number + part).cumsum(-1).reshape(-1) * flat
    return first.view(size, 4) + (x.mT * transposed).sum(0)[:, None]


def flattened(x, w):
    """Sizes such as 4 B."""
    flat = torch.cat([x.reshape(-1), torch.zeros(1)])
    return flat[: 3 * len(x)].view(-1, 3) @ w.mT + flat.new_zeros(4 * len(x)).view(len(x), 4)


def under_vmap(x, w):
    return vmap(lambda u: (torch.outer(u, w[0]).tril().sum(-1), (w @ u).softmax(-1)[1:]))(x)[1]


@pytest.mark.parametrize("function", [summed, with_constants, flattened, under_vmap])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 12, 101])
def test_a_batch_of_any_size_gives_what_the_function_gives(function, size):
    graph = generalized(function, W)
    for w in (W, W + 1.0):
        torch.testing.assert_close(graph(points(size), w), function(points(size), w), rtol=1e-13, atol=1e-13)


def test_a_part_gives_one_of_the_results_and_computes_no_more():
    graph = generalized(lambda x: (x.exp().sum(-1), (x * torch.ones(len(x), 3).cumsum(-1)).sum(-1)))
    x = points(4)
    whole = graph(x)
    for index in (0, 1):
        torch.testing.assert_close(graph.part(index)(x), whole[index])
    assert torch.ops.aten.exp.default not in {node.target for node in graph.part(1)._graph.nodes}


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * torch.arange(float(len(x)))[:, None],  # other rows
        lambda x: x * float(len(x)),
        lambda x: x.exp() if len(x) > 5 else x.sin(),
        lambda x: x.exp().sin() if len(x) > 5 else x.exp(),
        lambda x: x[: 8 - len(x)],  # falls with B
        lambda x: x[: len(x) ** 2 // 10],
        lambda x: x * torch.ones(len(x), len(x)).sum(),
        lambda x: x.reshape(-1)[: len(x)] if len(x) > 5 else x.sum(-1)[: len(x)],
    ],
)
def test_what_depends_on_the_size_in_another_way_is_refused(function):
    with pytest.raises(NotOneGraphError):
        generalized(function)


def test_sizes_are_chosen_apart_from_those_of_other_things():
    recording = record(lambda x: (x[:, None] * torch.ones(11) + torch.zeros(4, 1, 1)).sum(), points(5)[:, 0])
    assert sizes_in(recording) >= {5, 11, 4}
    assert unused_size(sizes_in(recording)) == 7
    assert unused_size({5, 7, 11}) == 13
    assert unused_size(set(range(100))) == 97


def test_constants_of_many_sizes_are_not_kept_for_ever(monkeypatch):
    graph = generalized(with_constants, W)
    for size in range(1, batch_graph._MAX_CACHED_SIZES + 10):
        graph(points(size), W)
    assert len(graph._cache) == batch_graph._MAX_CACHED_SIZES
    monkeypatch.setattr(batch_graph, "_MAX_CACHED_NUMBERS", 100)
    graph(points(1000), W)
    assert 1000 not in graph._cache
