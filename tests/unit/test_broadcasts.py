"""Late expansions and factors carried apart: the same values and gradients, from fewer operations on large tensors."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace

import pytest
import torch
from torch import fx
from torch.distributions import Normal

from pyro_sivism.target.broadcasts import expand_late, factor_out
from pyro_sivism.target.capture import CapturedDensity
from pyro_sivism.target.graph import simplify
from pyro_sivism.target.recording import record

pytestmark = pytest.mark.usefixtures("float64")

aten = torch.ops.aten
SUB, MUL, DIV = aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor
N, BATCH = 300, 5


def waves(*shape, dtype=torch.float64):
    """Numbers of both signs, all different, none near 0."""
    values = torch.sin(torch.arange(1.0, 1.0 + torch.Size(shape).numel(), dtype=torch.float64))
    return (values + 0.5 * values.sign()).reshape(shape).to(dtype)


Y, X, OTHER = waves(N, 2), waves(BATCH, N, 2), waves(BATCH, N, 2).flip(1) - 0.2
PAIR, SCALE = waves(2), torch.tensor([0.7, 1.9], dtype=torch.float64)
EACH = waves(BATCH, 1, 1)  # a number for each particle


def late(function, *inputs):
    return expand_late(simplify(record(function, *inputs)))


def factored(function, *inputs, batch_size=BATCH):
    return simplify(factor_out(simplify(record(function, *inputs)), batch_size))


def plain(function, *inputs):
    return simplify(record(function, *inputs))


def targets(recording):
    return [node.target for node in recording.graph.nodes if node.op == "call_function"]


def large(graph, numel):
    """The operations that return at least so many numbers, other than views."""
    views = (aten.expand.default, aten.transpose.int)
    return [
        node.target
        for node in graph.nodes
        if node.op == "call_function" and node.target not in views and _numel(node) >= numel
    ]


def _numel(node):
    return node.meta["val"].shape.numel()


def check_values(recording, function, *inputs, tolerance=1e-13):
    """The graph as it is, with the views that were recorded, gives what the function gives."""
    got, want = fx.GraphModule(recording.constants, recording.graph)(*inputs), function(*inputs)
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, equal_nan=True)
    return got


# --- expansions -----------------------------------------------------------------------------------------


def normal(m, s, y):
    return Normal(m.expand(N, 2), s.expand(N, 2), validate_args=False).log_prob(y)


@pytest.mark.parametrize(
    ("function", "inputs", "want"),
    [
        (normal, (PAIR, SCALE, Y), [SUB, aten.pow.Tensor_Scalar, aten.neg.default, aten.div.Tensor, SUB, SUB]),
        (lambda s: -s.expand(N, 2).log(), (SCALE,), []),
        (lambda s: s.expand(2 * N, 1).expand(2 * N, 2).exp() * 2, (SCALE[:1],), []),
        (lambda s, t: s.expand(N, 2).exp() / t.expand(N, 2), (SCALE, PAIR[:1]), []),
        (lambda s, t: s.expand(N, 2, 3) - t.expand(N, 2, 3), (waves(3), waves(2, 1)), []),
        (lambda s, y: torch.where(s.expand(N, 2) > 0.0, y, s.expand(N, 2).exp()), (PAIR, Y), [aten.where.self]),
        (lambda s: torch.add(s.expand(N, 2), s.expand(N, 2), alpha=-3.0), (PAIR,), []),
        (lambda s: s.expand(N, 2).clone().sin(), (PAIR,), []),
    ],
    ids=["normal", "log", "twice", "quotient", "ranks", "where", "keywords", "clone"],
)
def test_elementwise_operations_are_done_before_an_expansion(function, inputs, want):
    recording = late(function, *inputs)
    check_values(recording, function, *inputs)
    assert large(recording.graph, 2 * N) == want


@pytest.mark.parametrize("softmax", [torch.softmax, torch.log_softmax])
@pytest.mark.parametrize(
    ("shape", "expanded", "dim"),
    [
        ((4,), (N, 4), -1),
        ((4,), (N, 4), 1),
        ((4, 1), (3, 4, N), 1),
        ((4, 1), (3, 4, N), -2),
        ((1, 4), (N, 4), 1),
        ((4, 1), (4, N), 0),
    ],
)
def test_a_softmax_is_taken_before_an_expansion_of_other_dims(softmax, shape, expanded, dim):
    def function(x):
        return softmax(x.expand(expanded), dim)

    recording = late(function, waves(*shape))
    assert large(recording.graph, 4 * N) == []
    assert len(targets(recording)) == 2
    check_values(recording, function, waves(*shape))


@pytest.mark.parametrize(
    ("shape", "expanded", "dim"), [((4,), (N, 4), 0), ((4,), (N, 4), -2), ((4, 1), (4, N), -1), ((1, 4), (N, 4), 0)]
)
def test_a_softmax_along_an_expanded_dim_is_left_alone(shape, expanded, dim):
    def function(x):
        return x.expand(expanded).softmax(dim)

    recording = late(function, waves(*shape))
    assert targets(recording) == [aten.expand.default, aten._softmax.default]
    check_values(recording, function, waves(*shape))


@pytest.mark.parametrize(
    "function",
    [
        lambda s, t: s.expand(N, 2) * t.expand(N, 2),
        lambda s, t: t.expand(N, 2) - s.expand(N, 2),
        lambda s, t: s.expand(N, 2).maximum(t.expand(N, 2)),
    ],
)
def test_a_result_s_type_is_as_before(function):
    """A float64 tensor without dims does not make a float32 result float64, but one with dims does."""
    number, pair = torch.tensor(0.1), waves(2, dtype=torch.float32)
    for inputs in ((number, pair), (number[None], pair), (number, pair[0]), (torch.tensor(3), pair)):
        got = check_values(late(function, *inputs), function, *inputs)
        assert got.dtype == function(*inputs).dtype
    assert late(function, number[None], pair).graph.find_nodes(op="call_function", target=aten.expand.default)
    assert large(late(function, number[None], pair).graph, 2 * N) == []
    assert len(large(late(function, number, pair).graph, 2 * N)) == 1


def test_integers_are_expanded_late_and_stay_integers():
    def function(k):
        return k.expand(N, 2) * 3 - 1

    recording = late(function, torch.tensor([5, -7]))
    assert check_values(recording, function, torch.tensor([5, -7])).dtype == torch.int64
    assert large(recording.graph, 2 * N) == []


def test_each_expanded_number_is_drawn_for_itself():
    def function(p):
        return torch.bernoulli(p.expand(N, 2)) + torch.normal(p.expand(N, 2), 1.0)

    recording = late(function, torch.full((2,), 0.5))
    assert aten.bernoulli.default in large(recording.graph, 2 * N)
    assert len(recording.compile()(torch.full((2,), 0.5)).unique(dim=0)) == N


def test_memory_that_is_read_as_it_is_laid_out_is_left_alone():
    def function(s):
        return s.expand(N, 2).exp().as_strided((2 * N,), (1,))

    def with_factors(x):
        return (torch.ones(N, 2) * x.mT).as_strided((2 * N,), (1,))

    for rewritten, f, x in ((late, function, PAIR), (factored, with_factors, waves(2, N))):
        recording = rewritten(f, x)
        assert targets(recording) == targets(plain(f, x))
        check_values(recording, f, x, tolerance=0.0)


@pytest.mark.parametrize(
    "function",
    [
        lambda s: s.expand(N, 2).reshape(-1).exp(),
        lambda s: s.expand(N, 2).exp().view(-1),
        lambda s: s.expand(N, 2).contiguous().view(-1).sin(),
        lambda s: s.expand(3, 3, N, 2).contiguous(memory_format=torch.channels_last).exp(),
    ],
    ids=["reshape", "view", "contiguous", "channels last"],
)
def test_an_expansion_may_be_seen_in_another_shape(function):
    torch.testing.assert_close(late(function, PAIR).compile()(PAIR), function(PAIR), rtol=0.0, atol=0.0)


# --- factors --------------------------------------------------------------------------------------------


def signs(x):
    return torch.ones_like(x) * -2.0


@pytest.mark.parametrize(
    ("function", "inputs", "want"),
    [
        (lambda x: (-x).sum(1), (X,), []),
        (lambda x: x.neg().neg().cos(), (X,), [aten.cos.default]),
        (lambda x, s: (x * s).sum(1), (X, PAIR), []),
        (lambda x, s: (s * x).sum(1, keepdim=True), (X, PAIR), []),
        (lambda x, s: (x / s).sum(1), (X, SCALE), []),
        (lambda x, s: (x / s.expand(BATCH, N, 2)).sum(-2, keepdim=True), (X, SCALE), []),
        (lambda x, s: (-x * s / 3).sum((1, 2)), (X, EACH), []),
        (lambda x, s: (-x * s / 3).sum((1, 2), keepdim=True), (X, EACH), []),
        (lambda x, s: (x * s).sum(1), (X, EACH * PAIR), []),
        (lambda x, s: (x * s).sum(0), (X, PAIR), []),
        (lambda x, s: (x * s).sum(-1), (X, EACH[0]), []),
        (lambda x, s, t: (x * s / t).sum(1), (X, PAIR, EACH), []),
        (lambda x, y, s: ((x * s) * (y / s.exp())).sum(1), (X, OTHER, PAIR), [MUL]),
        (lambda x, y, s: ((x / s) / (y * 3.0)).sum(1), (X, OTHER, SCALE), [DIV]),
        (lambda x, y, s: (x / (-y * s)).sum(1), (X, OTHER, SCALE), [DIV]),
        (lambda x, y: ((-x) * (-y)).sum(1), (X, OTHER), [MUL]),
        (lambda x, y, s: (x * (s * y)).sum(1), (X, OTHER, EACH), [MUL]),
        (lambda x, s: ((x * s) * (x * s)).sum(1), (X, PAIR), [MUL]),
        (lambda x, s: -(2 * x) * s / 4.0, (X, PAIR), [MUL]),
        (lambda x: (x * signs(x)).sum(1), (X,), []),
        (lambda x: (x / signs(x)).sum(1), (X,), []),
        (lambda x, s: ((signs(x) * s) * x).sum(1), (X, PAIR), []),
    ],
)
def test_factors_are_carried_past_sums_and_products(function, inputs, want):
    recording = factored(function, *inputs)
    check_values(recording, function, *inputs)
    assert large(recording.graph, X.numel()) == want
    assert len(large(plain(function, *inputs).graph, X.numel())) > len(want)


def test_factors_are_carried_out_in_the_type_of_the_tensors():
    def function(x, s):
        return (-x * s / 3).sum(1)

    inputs = X.float(), PAIR.float()
    recording = factored(function, *inputs)
    check_values(recording, function, *inputs, tolerance=1e-4)
    assert large(recording.graph, X.numel()) == []


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        (lambda x: (-x * 3).sum(1), (torch.arange(2 * N * BATCH).reshape(BATCH, N, 2),)),  # integers
        (lambda x, s: (x * s).sum(1), (X, torch.tensor([2, 3]))),
        (lambda x, s: (x * s).sum(1), (X.float(), SCALE[0])),  # float32 all the same
        (lambda x, s: (x / s).sum(1), (X.float(), SCALE)),  # float64
        (lambda x: (x * torch.full((BATCH, N, 2), 2.0)).sum(1), (X.float(),)),
        (lambda x: (x * 2.0).sum(1, dtype=torch.float64), (X.float(),)),
        (lambda x: (-x).cos().sum(1), (X,)),
        (lambda x, s: (x * s).sum(-1), (X, PAIR)),  # not the same for all terms
        (lambda x, s: (x * s).sum((1, 2)), (X, PAIR)),
        (lambda x, s: (x * s).sum(0), (X, EACH)),
        (lambda x, s: (x * s).sum(1), (X, waves(N, 1))),  # not much smaller
        (lambda x, s: (x + s).sum(1), (X, PAIR)),
        (lambda x: (-x * 3.0).sum(1), (X[:, :100],)),  # below the threshold for each particle
        (lambda x, y: (x * y).sum(1), (X, OTHER)),
        (lambda x: (x * OTHER).sum(1), (X,)),
        (lambda x, y: (x * y).sum(-1), (X, OTHER[..., :1])),
        (lambda x: (x[..., :1] * torch.full((1, N, 2), 3.0)).sum(-1), (X,)),  # not as large as the product
        (lambda x: x / 0.0, (X,)),
        (lambda x: torch.div(x, 3.0, rounding_mode="floor").sum(1), (X,)),
    ],
)
def test_what_has_no_factors_is_left_alone(function, inputs):
    recording, before = factored(function, *inputs), plain(function, *inputs)
    assert large(recording.graph, inputs[0].numel()) == large(before.graph, inputs[0].numel())
    got = check_values(recording, function, *inputs, tolerance=0.0)
    assert got.dtype == function(*inputs).dtype


def test_the_length_of_the_batch_does_not_count():
    for length, size in ((100, 7), (N, 7), (128, 1)):
        counts = set()
        for batch_size in (size, 1009):
            x = waves(batch_size, length, 2)
            recording = factored(lambda x: (-x * 3.0).sum(1), x, batch_size=batch_size)
            counts.add(len(large(recording.graph, x.numel())))
        assert counts == ({0} if length >= 128 else {2})


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: y / (x * 0.0),
        lambda x, y: (y / (x * 0.0)).sum(1),
        lambda x, y: (x / 0.0) * y,
        lambda x, y: x / 1e-310,
        lambda x, y: (x * 1e-200 / 1e200) * y,
        lambda x, y: x * 1e200 * 1e200,
        lambda x, y: x / torch.zeros_like(x),
        lambda x, y: (x * torch.inf) / y,
        lambda x, y: (x * torch.nan).sum(1),
    ],
)
def test_numbers_near_zero_or_infinity_give_what_they_gave(function):
    """0 / 1e-310 is 0, though 1 / 1e-310 is infinite."""
    x = X.clone()
    x[:, 0] = 0.0
    check_values(factored(function, x, OTHER), function, x, OTHER)


def test_learned_constants_are_not_taken_for_numbers():
    learned, scale = torch.full((BATCH, N, 2), 2.0, requires_grad=True), SCALE.clone().requires_grad_()

    def function(x):
        return (x * learned / scale).sum(1)

    recording = factored(function, X)
    assert large(recording.graph, X.numel()) == [MUL]
    for _ in range(2):
        check_values(recording, function, X)
        found = [
            torch.autograd.grad((f(X) * PAIR).sum(), (learned, scale))
            for f in (fx.GraphModule(recording.constants, recording.graph), function)
        ]
        for got, want in zip(*found):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        with torch.no_grad():
            learned.mul_(waves(BATCH, N, 2))
            scale.add_(1.0)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (torch.ones(N, 2) * x.mT).view(-1),
        lambda x: (3 * torch.full((N, 2), 2.0) * x.mT).view(-1),
        lambda x: x[:, :1].mT.expand(N, 2).neg().neg().view(-1),
    ],
)
def test_what_is_laid_out_differently_may_be_seen_in_another_shape(function):
    x = waves(2, N)
    check_values(factored(function, x), function, x)


# --- both, as a density is captured ---------------------------------------------------------------------


def captured(function, x, *inputs):
    """The density's graphs as of a model, whose run is a call of the function."""
    runs = SimpleNamespace(one=function, inputs=list(inputs), params=lambda x: None)
    return CapturedDensity(runs, x)


def check_captured(function, x, *inputs, sizes=(1, 5, 128), tolerance=1e-10):
    density = captured(function, x, *inputs)
    for size in sizes:
        points = x + 0.3 * waves(size, len(x))
        values, scores = density.evaluate("both", points, inputs)
        leaves = points.clone().requires_grad_()
        want = torch.stack([function(point, *inputs) for point in leaves])
        (gradients,) = torch.autograd.grad(want.sum(), leaves)
        for got, right in ((values, want.detach()), (scores, gradients)):
            close = tolerance * max(1.0, right.abs().max().item())
            torch.testing.assert_close(got, right, rtol=tolerance, atol=close)
    return density


def normals(x, y):
    return normal(x[:2], x[2:].exp(), y).sum()


def test_a_plate_of_normals_costs_a_difference_and_a_square():
    density = check_captured(normals, 0.3 * waves(4), Y)
    assert large(density.graph("score")._graph, 4 * N) == [SUB, aten.pow.Tensor_Scalar]
    both = large(density.graph("both")._graph, 4 * N)
    assert both == [SUB, aten.pow.Tensor_Scalar, MUL, SUB, SUB]


@pytest.mark.parametrize("unit", [1e-12, 1e12])
def test_a_score_in_large_or_small_units(unit):
    """In float32 ``1 / s^4`` is none of the numbers there are."""
    y = (Y * unit).float()
    x = torch.tensor([0.1 * unit, -0.2 * unit, math.log(unit), math.log(2 * unit)])
    _, score = captured(normals, x.float(), y).evaluate("both", x.float()[None], [y])
    (want,) = torch.autograd.grad(normals(x.requires_grad_(), Y * unit), x)
    torch.testing.assert_close(score[0].double(), want, rtol=1e-4, atol=0.0)


def test_a_reshaped_expansion_is_captured():
    def density(x, y):
        means = x[:2].expand(N, 2).reshape(-1)
        return -((means - y.view(-1)) / x[2:].exp().repeat(N)).pow(2).sum()

    check_captured(density, waves(4), Y)


def test_a_mixture_s_weights_are_normalized_once():
    def density(x, y):
        weights = x[:3].expand(N, 2, 3).log_softmax(-1)
        return (weights - (y[..., None] - x[3:]) ** 2).logsumexp(-1).sum()

    graph = check_captured(density, waves(6), Y).graph("both")._graph
    softmaxes = [node for node in graph.nodes if "_softmax" in str(node.target)]
    assert softmaxes
    assert all(_numel(node) < N for node in softmaxes)


def test_what_nearly_cancels_is_subtracted_first():
    """In float32 1e8 - 1e8 - 0.125 is -0.125, and 1e8 - (1e8 + 0.125) is 0."""
    y = torch.full((N, 2), 1e8, dtype=torch.float32)

    def density(x, y):
        residual = y - x[:2].expand(N, 2) - x[2:].expand(N, 2)
        return -(residual / 2.0).sum()

    x = torch.tensor([1e8, 1e8, 0.125, 0.25], dtype=torch.float32)
    for function in (density, lambda x, y: density(x, y * torch.ones(2))):
        value, score = captured(function, x, y).evaluate("both", x[None], [y])
        assert value.item() == N * (0.125 + 0.25) / 2.0
        assert score.tolist() == [[N / 2.0] * 4]


def composition(seed):
    """A random function of a point (4,) and a table (N, 2)."""
    draw = random.Random(seed)

    def small(x, kind):
        return {"pair": x[:2], "number": x[2], "column": x[3:]}[kind].expand(N, 2)

    def ones(t):
        return torch.full_like(t, 0.7)

    steps = {
        "neg": lambda t, x, y, kind: -t,
        "mul": lambda t, x, y, kind: t * small(x, kind),
        "mul by data": lambda t, x, y, kind: y * t,
        "mul by its own": lambda t, x, y, kind: (0.5 * t) * (-t / 3),
        "mul by a number": lambda t, x, y, kind: -1.5 * t,
        "mul by ones": lambda t, x, y, kind: ones(t) * t,
        "div": lambda t, x, y, kind: t / small(x, kind).exp(),
        "div by data": lambda t, x, y, kind: t / (-y * small(x, kind).exp()),
        "div by a number": lambda t, x, y, kind: t / 3,
        "log": lambda t, x, y, kind: (t * t + small(x, kind).exp()).log(),
        "exp": lambda t, x, y, kind: (-(t * t) / 4.0).exp(),
        "sum": lambda t, x, y, kind: t.sum(0) / N * small(x, kind),
        "sum over pairs": lambda t, x, y, kind: t - t.sum(-1, keepdim=True).expand(N, 2) / 2,
        "add": lambda t, x, y, kind: t + small(x, kind).exp(),
    }
    plan = [(draw.choice(list(steps)), draw.choice(["pair", "number", "column"])) for _ in range(draw.randint(3, 9))]
    start, end = draw.choice(["data", "pair", "column"]), draw.choice(["all", "rows", "columns", "keep"])

    def function(x, y):
        t = y - x[:2] if start == "data" else small(x, start)
        for name, kind in plan:
            t = steps[name](t, x, y, kind)
        if end == "all":
            return t.sum()
        if end == "keep":
            return (t.sum((0, 1), keepdim=True) * x[0]).sum()
        return -(t.sum(0 if end == "rows" else -1).sum() / x[2].exp())

    return function


@pytest.mark.parametrize("seed", range(24))
def test_random_compositions_have_their_values_and_gradients(seed):
    check_captured(composition(seed), 0.4 * waves(4), Y, tolerance=1e-10)


def test_a_tensor_with_two_factors_does_not_underflow():
    """1 / s^4 alone is 0 in float32, and 1 / s^2 is not."""
    x, s = torch.full((5, 300, 2), 1e24), torch.full((5, 1, 2), 1e12)

    def function(x, s):
        v = s.square().expand(5, 300, 2)
        return (x / v / v * 1e24).exp().cumsum(-1)

    recording = factor_out(simplify(record(function, x, s)), 5)
    torch.testing.assert_close(recording.compile()(x, s), function(x, s))
