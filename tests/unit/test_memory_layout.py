"""Layouts in memory: where long dims go innermost, and that nothing else changes."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_sivism import SIVISM
from pyro_sivism.target.graph import simplify
from pyro_sivism.target.memory_layout import lay_long_dims_innermost
from pyro_sivism.target.recording import record

aten = torch.ops.aten
N, K, B = 70, 3, 5
Y = torch.randn(N, generator=torch.Generator().manual_seed(1), dtype=torch.double)
DATA = torch.randn(N, K, generator=torch.Generator().manual_seed(2), dtype=torch.double)


def mixture(x, y=Y):
    """Of K normals, with weights."""
    terms = x.log_softmax(-1)[:, None] - (y[:, None] - x[:, None]) ** 2 * x.exp()[:, None]
    return terms.logsumexp(-1).sum()


def of_data(x, data=DATA):
    return ((data - x[:, None]) ** 2).sum(-1).sqrt().sum()


def with_weights(x):
    """A vector among the arguments, and sums over the long dim that are reshaped."""
    scaled = (Y[:, None] - x[:, None]).exp() * torch.arange(1.0, K + 1.0)
    return (scaled.sum(1).reshape(-1) ** 2).sum() + scaled.amax(-1).sum()


def with_blocks(x):
    """Two dims before the long one, whose sums are laid out as one."""
    blocks = (Y[:, None] - torch.stack([x, 2.0 * x], 1)[:, :, None]).square()
    return (blocks.sum(2).view(len(x), 2 * K) ** 3).sum()


FUNCTIONS = [mixture, of_data, with_weights, with_blocks]


def with_gradient(function):
    def both(x, *inputs):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            value = function(x, *inputs)
            (gradient,) = torch.autograd.grad(value, x, create_graph=True)
        return value, gradient

    return both


def targets(recording):
    return [node.target for node in recording.graph.nodes if node.op == "call_function"]


class StridesOf(TorchDispatchMode):
    """Remembers the last two strides of results whose shape ends so, and that are not views."""

    def __init__(self, *shape):
        super().__init__()
        self.shape, self.found = shape, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if torch.Tag.pointwise in function.tags and result.shape[-len(self.shape) :] == self.shape:
            self.found.append(result.stride()[-2:])
        return result


def layouts(recording, *arguments):
    with StridesOf(N, K) as strides:
        recording.compile()(*arguments)
    return strides.found


def check_values(plain, laid_out, *arguments):
    """As batches are replayed, where views stay views."""
    laid_out, plain = (fx.GraphModule(each.constants, each.graph) for each in (laid_out, plain))
    with torch.no_grad():
        torch.testing.assert_close(laid_out(*arguments), plain(*arguments), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_long_dims_are_innermost_and_values_are_the_same(function):
    x = torch.randn(B, K, dtype=torch.double)
    plain, laid_out = (simplify(record(with_gradient(function), x, differentiates=True)) for _ in range(2))
    assert set(layouts(plain, x)) == {(K, 1)}
    lay_long_dims_innermost(laid_out, B)
    laid_out.graph.lint()
    assert set(layouts(laid_out, x)) == {(1, N)}
    check_values(plain, laid_out, torch.randn(B, K, dtype=torch.double))


@pytest.mark.parametrize("batch_size", [N, K])
def test_the_batch_is_no_long_or_short_dim(batch_size):
    """Of another size it would be none, and there would be no one graph for both."""
    recording = simplify(record(mixture, torch.randn(B, K, dtype=torch.double)))
    before = targets(recording)
    assert targets(lay_long_dims_innermost(recording, batch_size)) == before


def test_data_that_are_read_several_times_are_turned_once():
    def function(x, data):
        return ((data - x[:, None]).exp().sum(1) * (data * x[:, None]).exp().sum(1)).sum()

    x = torch.randn(B, K, dtype=torch.double)
    plain, laid_out = (simplify(record(function, x, DATA)) for _ in range(2))
    lay_long_dims_innermost(laid_out, B)
    assert targets(laid_out).count(aten.clone.default) == 1
    check_values(plain, laid_out, x, DATA)


def test_a_captured_mixture_is_laid_out():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(K), 1.0).to_event(1))
        with pyro.plate("data", len(y)):
            components = dist.Normal(mu, 1.0)
            pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(torch.ones(K)), components), obs=y)

    sivism = SIVISM(model).setup(Y.float())
    assert sivism.target.path.name == "captured"
    x = torch.randn(6, K)
    with torch.no_grad():
        sivism.target.score(x)  # and looks at the model
        with StridesOf(6, N, K) as strides:
            sivism.target.score(x)
    assert set(strides.found) == {(1, N)}


@pytest.mark.parametrize(("function", "data"), [(mixture, Y), (of_data, DATA)])
def test_data_may_be_an_input(function, data):
    x, other = torch.randn(B, K, dtype=torch.double), torch.randn_like(data)
    plain, laid_out = (simplify(record(with_gradient(function), x, data, differentiates=True)) for _ in range(2))
    lay_long_dims_innermost(laid_out, B)
    assert set(layouts(laid_out, x, other)) == {(1, N)}
    check_values(plain, laid_out, x, other)


def test_curvature_goes_through():
    x = torch.randn(B, K, dtype=torch.double, requires_grad=True)
    laid_out = lay_long_dims_innermost(simplify(record(with_gradient(mixture), x, differentiates=True)), B)
    direction = torch.randn_like(x)
    curvatures = [
        torch.autograd.grad((function(x)[1] * direction).sum(), x)[0]
        for function in (laid_out.compile(), lambda x: (None, torch.autograd.grad(mixture(x), x, create_graph=True)[0]))
    ]
    torch.testing.assert_close(*curvatures)


def in_a_product(x):
    return ((Y[:, None] - x[:, None]).exp() @ x.mT.new_ones(K, 4)).square().sum()


def in_a_softmax(x):
    return ((Y[:, None] - x[:, None]).log_softmax(-1)[..., 0]).square().sum()


def in_a_view(x):
    return ((Y[:, None] - x[:, None]).exp().view(B, -1) ** 2).sum()


def of_few(x):
    return (Y[:20, None] - x[:, None]).exp().square().sum()


def in_a_part(x):
    return ((Y[:, None] - x[:, None]).exp()[:, 1:] @ x.new_ones(K, 4)).square().sum()


def in_strides(x):
    """Of a sum over the batch, which would lie as (K, N)."""
    return (Y[:, None] - x[:, None]).exp().sum(0).as_strided((N * K // 2,), (2,)).square().sum()


@pytest.mark.parametrize("function", [in_a_product, in_a_softmax, in_a_view, in_a_part, of_few, in_strides])
def test_what_would_not_gain_is_left_as_it_is(function):
    """Where another operation wants K innermost, and would copy, or read other numbers."""
    recording = simplify(record(function, torch.randn(B, K, dtype=torch.double)))
    before = targets(recording)
    assert targets(lay_long_dims_innermost(recording, B)) == before


def test_an_expanded_constant_takes_no_memory():
    rows = torch.arange(1.0, N + 1.0, dtype=torch.double)[:, None].expand(N, K)

    def function(x):
        return (rows * x[:, None]).square().sum()

    x = torch.randn(B, K, dtype=torch.double)
    plain, laid_out = (simplify(record(function, x)) for _ in range(2))
    lay_long_dims_innermost(laid_out, B)
    assert set(layouts(laid_out, x)) == {(1, N)}
    assert all(
        constant.untyped_storage().nbytes() <= rows.untyped_storage().nbytes()
        for constant in laid_out.constants.values()
    )
    check_values(plain, laid_out, x)


def test_a_constant_that_is_learned_is_read_anew():
    scales = torch.randn(N, K, dtype=torch.double, requires_grad=True)

    def function(x):
        return (scales * x[:, None]).exp().sum()

    x = torch.randn(B, K, dtype=torch.double)
    recording = lay_long_dims_innermost(simplify(record(function, x)), B)
    assert set(layouts(recording, x)) == {(1, N)}
    with torch.no_grad():
        scales.add_(1.0)
        torch.testing.assert_close(recording.compile()(x), function(x))
