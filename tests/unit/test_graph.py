"""Recording a function as a graph, and making the graph smaller: the same values and derivatives, or an error."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.func import grad, vmap

from pyro_sivism.target.graph import index_rows, is_random, simplify
from pyro_sivism.target.recording import is_recording, own_detach, record

pytestmark = pytest.mark.usefixtures("float64")

aten = torch.ops.aten
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
TABLE = torch.tensor([1.0, 2.0, 0.0, 3.0], dtype=torch.float64)
X = torch.tensor([0.3, -1.2, 0.8, 2.0], dtype=torch.float64)


def targets(recording):
    return [node.target for node in recording.graph.nodes if node.op == "call_function"]


def compiled(function, *inputs, **options):
    """The function's graph, simplified, as a function."""
    return simplify(record(function, *inputs, **options)).compile()


def in_place(x):
    y = torch.zeros_like(x)
    y[0] = x[1] * x[2]
    y[1:] += x[0]
    y[-2:] *= x[:2]
    y[:-1].sub_(x[3])
    return (y**3).sum()


def copied(x):
    """Writes a number over a matrix, and reads it in another shape."""
    y = torch.empty(2, 4, dtype=x.dtype, device=x.device)
    y.copy_(x.sum())
    y[1].copy_(x)
    z = torch.empty(4, dtype=x.dtype, device=x.device)
    z.copy_(TABLE.to(x.device))
    z += x
    y[0] *= z
    return (y.reshape(-1) ** 3).sum()


def no_ops(x):
    ones, zeros = torch.ones_like(x), torch.zeros(4, dtype=x.dtype, device=x.device)
    return ((x * ones + zeros).reshape(4).clone() ** 1.0 / 1.0 + 0 * x.sum()).pow(2).sum()


def shared(x):
    return (x.exp() * x.exp()).sum() + x.exp().sum()


def factorized(x):
    return torch.linalg.cholesky(torch.diag(x**2) + 0.1 * torch.ones(4, 4, dtype=x.dtype, device=x.device)).sum()


def classified(x):
    y = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=x.dtype, device=x.device)
    return torch.nn.functional.binary_cross_entropy_with_logits(20 * x, y, reduction="none").sum()


def looped(x):
    total = x.sum()
    for i in torch.arange(3) * 2 % 4:  # a range has known values, and so has what is computed from it
        total = total + int(i) * x[i] ** 2
    return total


def saved_results(x):
    """Operations whose backward pass keeps their results."""
    return (x.exp() * x.sigmoid() + x.tanh() * x.softmax(-1)).sum()


def cast_and_broadcast(x):
    """Writing casts and broadcasts; what was allocated stays laid out in memory as it was."""
    y = torch.empty(3, 4, dtype=x.dtype, device=x.device).t()
    y.copy_(x[:, None])
    y[2] = torch.arange(3, device=x.device)
    y += x.sum()
    y[1:3, ::2] = x[:2].unsqueeze(-1)
    return (y.t().reshape(-1) ** 3).sum() + y.transpose(0, 1).view(2, 6)[0, 5]


def reshaped_in_place(x):
    y = x.clone()
    z = y.view(2, 2)
    y.unsqueeze_(0).squeeze_(0)
    z.t_()
    z[0] *= x[1]
    y[3] += z[1, 0]
    return (y**2 * z.reshape(-1)).sum()


def written_views(x):
    """Every kind of view, written into, with others of the same memory read afterwards."""
    y = x.repeat(6).clone().reshape(2, 3, 4)
    flat, rows = y.view(-1), y.permute(2, 0, 1)
    rows[1].mul_(x[0])
    y.diagonal(dim1=1, dim2=2).add_(x[2])
    y.transpose(0, 1)[0].masked_fill_(x[:4] > 0.5, 2.0)
    y[0, 0].zero_()
    y[:, torch.tensor([0, 2])] += x[3]
    return (flat**2).sum() + (rows[2] * y[..., 1]).sum()


def written_through_data(x):
    """As Pyro's ``safe_cholesky`` does: numbers of which the derivative knows nothing, in a tensor that it passes."""
    y = (x[:, None] * x + torch.eye(len(x), dtype=x.dtype, device=x.device)).clone()
    y.data.diagonal().add_(0.5 * y.data.abs().amax(-1))
    y.data[0, 1] = 0.25
    y[1:].detach().mul_(x[0])
    return torch.linalg.cholesky(y).diagonal().log().sum() + (y**3).sum()


FUNCTIONS = [
    in_place,
    copied,
    cast_and_broadcast,
    reshaped_in_place,
    written_views,
    written_through_data,
    no_ops,
    shared,
    factorized,
    classified,
    looped,
    saved_results,
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_value_gradient_and_second_derivative_are_the_function_s(function, device):
    x = X.to(device)
    one = compiled(function, x)
    batch = torch.stack([x, x.flip(0), x + 0.5])
    score = compiled(vmap(grad(one)), batch, differentiates=True)
    for point, got in zip(batch, score(batch)):
        point = point.clone().requires_grad_()
        value = function(point)
        (gradient,) = torch.autograd.grad(value, point)
        torch.testing.assert_close(one(point), value, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(got, gradient, rtol=1e-12, atol=1e-12)
    v = torch.cos(torch.arange(12.0, device=device)).reshape(3, 4)
    found = []
    for gradients in (score, lambda points: torch.stack([_gradient(function, point) for point in points])):
        points = batch.clone().requires_grad_()
        found.append(torch.autograd.grad((gradients(points) * v).sum(), points)[0])
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-11)


def _gradient(function, point):
    return torch.autograd.grad(function(point), point, create_graph=True)[0]


# --- what record takes care of ------------------------------------------------------------------------


@pytest.mark.parametrize("function", [in_place, copied, cast_and_broadcast, reshaped_in_place, written_views])
def test_a_recorded_graph_writes_into_nothing(function):
    """On operations such as ``add_`` folding and sharing would be wrong."""
    recording = record(function, X)
    assert not any(getattr(target, "_schema", None) and target._schema.is_mutable for target in targets(recording))
    torch.testing.assert_close(recording.compile()(X), function(X), rtol=1e-12, atol=1e-12)


def test_what_is_written_into_is_no_constant():
    def function(x):
        buffer = torch.zeros(2)
        before = buffer * 1.0
        buffer += 3.0
        return x[0] * buffer[0] + before[0]

    assert compiled(function, X)(X).item() == pytest.approx(function(X).item()) == pytest.approx(0.9)


def test_to_write_into_a_tensor_that_the_function_closed_over_is_an_error():
    """It would be there in the next call."""
    table = torch.zeros(4)
    for write in (lambda x: table[1:].add_(x[0]), lambda x: table.t().mul_(2.0)):
        with pytest.raises(RuntimeError, match="writes into a tensor that it closed over"):
            record(lambda x, write=write: write(x).sum() + x, X)


@pytest.mark.parametrize(
    "write",
    [
        lambda x, y: torch.add(x, 1.0, out=y),
        lambda x, y: y.resize_(8).mul_(x[0]),
        lambda x, y: y.unfold(0, 2, 1).mul_(x[0]),
        lambda x, y: torch._foreach_mul_([y], 2.0),
    ],
    ids=["out", "resize", "unfold", "foreach"],
)
def test_a_way_of_writing_that_is_not_known_is_an_error(write):
    def function(x):
        y = torch.ones(4)
        write(x, y)
        return (x * y[:4]).sum()

    with pytest.raises(RuntimeError, match=r"not known as an operation|another size|cannot be written into here"):
        record(function, X)


def test_slices_are_written_by_ends_that_vmap_takes():
    graph = simplify(record(in_place, X))
    nodes = [node for node in graph.graph.nodes if node.target is aten.slice_scatter.default]
    assert nodes
    for node in nodes:
        assert all(0 <= end <= 4 for end in node.args[3:5])
    assert aten.select_scatter.default not in targets(graph)


def test_a_select_scatter_under_vmap_has_the_right_derivative():
    def function(x):
        y = x.clone()
        y[1] = x[0] * x[2]
        return (y**3).sum()

    recording = record(function, X)
    assert aten.select_scatter.default in targets(recording)  # the hazard is there
    simplify(recording)
    assert aten.select_scatter.default not in targets(recording)
    graph = recording.compile()
    batch = torch.stack([X, X + 1])
    points = batch.clone().requires_grad_()
    (got,) = torch.autograd.grad(vmap(graph)(points).sum(), points)
    torch.testing.assert_close(got, torch.stack([_gradient(function, x.requires_grad_()) for x in batch]))


def test_the_bernoulli_log_likelihood_is_small_and_right_far_out():
    def function(z, y):
        return torch.nn.functional.binary_cross_entropy_with_logits(z, y, reduction="none")

    z = torch.tensor([-800.0, -45.0, -5.0, 0.0, 5.0, 35.0, 45.0, 800.0])
    for y in (torch.zeros(8), torch.ones(8), torch.full((8,), 0.3)):
        recording = simplify(record(function, z, y))
        assert len(targets(recording)) == 3
        torch.testing.assert_close(recording.compile()(z, y), function(z, y), rtol=1e-14, atol=1e-14)
    weighted = record(lambda z: torch.nn.functional.binary_cross_entropy_with_logits(z, y, weight=z.exp()), X.repeat(2))
    assert aten.binary_cross_entropy_with_logits.default in targets(weighted)


@pytest.mark.parametrize("order", ["contiguous", "transposed", "moved"])
def test_a_matrix_product_with_one_term_is_a_product(order):
    """Where that has the same layout in memory: what views it would fail on another."""
    arrange = {
        "contiguous": lambda column, row: (column, row),
        "transposed": lambda column, row: (column.mT.contiguous().mT, row),
        "moved": lambda column, row: (column.movedim(0, 1).contiguous().movedim(0, 1), row),
    }[order]

    def function(x):
        column, row = arrange(x.view(2, 2, 1) * torch.ones(2, 2, 1), x.view(2, 1, 2).exp())
        return torch.bmm(column, row).view(-1).sin()

    recording = simplify(record(function, X))
    assert (aten.bmm.default in targets(recording)) == (order == "moved")
    torch.testing.assert_close(recording.compile()(X), function(X), rtol=0.0, atol=0.0)
    wide = simplify(record(lambda x: torch.bmm(x.view(1, 2, 2), x.view(1, 2, 2)), X))
    assert aten.bmm.default in targets(wide)


def waves(*shape):
    """Numbers of both signs, all different."""
    return torch.sin(torch.arange(1.0, 1.0 + torch.Size(shape).numel(), dtype=torch.float64)).reshape(shape)


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (lambda x, w: torch.bmm(x, w.expand(5, 3, 2)), [(5, 4, 3), (3, 2)]),
        (lambda x, w: torch.bmm(x, w.expand(5, 3, 2)), [(5, 1, 3), (1, 3, 2)]),
        (lambda x, w: torch.bmm(x, w.expand(5, 2, 3).mT), [(5, 4, 3), (2, 3)]),
        (lambda x, w: torch.bmm(x, w.expand(5, 2, 3).transpose(2, 1)), [(5, 4, 3), (1, 2, 3)]),
        (lambda x, w: torch.bmm(x, w.expand(5, 2, 3).transpose(-2, -1)), [(5, 4, 3), (2, 3)]),
        (lambda x, w: torch.bmm(x.mT, w.expand(5, 3, 3).mT.mT), [(5, 3, 4), (3, 3)]),
        (lambda x, w: torch.bmm(w.expand(5, 4, 3), x), [(5, 3, 1), (4, 3)]),
        (lambda x, w: torch.bmm(w.expand(5, 3, 4).mT, x), [(5, 3, 1), (1, 3, 4)]),
        (lambda x, w: torch.bmm(w.expand(5, 3, 3), x), [(5, 3, 1), (3, 3)]),
        (lambda x, w: torch.bmm(w.expand(5, 4, 3), x), [(5, 3, 2), (4, 3)]),
        (lambda x, w: torch.bmm(w.expand(5, 3, 4).mT, x.mT), [(5, 2, 3), (3, 4)]),
        (lambda x, w: torch.bmm(w.expand(5, 4, 3), x.expand(5, 3, 2)), [(3, 2), (4, 3)]),
    ],
)
def test_products_with_one_matrix_are_one_product(function, shapes):
    inputs = [waves(*shape) for shape in shapes]
    recording = simplify(record(function, *inputs))
    assert aten.bmm.default not in targets(recording)
    assert targets(recording).count(aten.mm.default) == 1
    torch.testing.assert_close(recording.compile()(*inputs), function(*inputs), rtol=1e-13, atol=1e-13)
    found = []
    for f in (recording.compile(), function):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        found.append(torch.autograd.grad(f(*leaves).pow(3).sum(), leaves))
    for got, want in zip(*found):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (torch.bmm, [(5, 4, 3), (5, 3, 2)]),
        (lambda x, w: torch.bmm(x, w.expand(5, 3, 2)), [(5, 4, 3), (5, 1, 2)]),
        (lambda x, w: torch.bmm(x, w.expand(5, 3, 2)), [(5, 4, 3), (2,)]),
        (lambda x, w: torch.bmm(x, w.expand(5, 3, 2)), [(5, 4, 3), (1, 2)]),
        (lambda x, w: torch.bmm(x, w.expand(5, 3, 2)), [(5, 4, 3), (1, 3, 1)]),
        (lambda x, w: torch.bmm(x, w.expand(3, 3, 3).transpose(0, 1)), [(3, 4, 3), (3, 3)]),
        (lambda x, w: torch.bmm(x, w.expand(3, 3, 3).transpose(1, 0).mT), [(3, 4, 3), (3, 3)]),
    ],
)
def test_products_with_several_matrices_stay(function, shapes):
    inputs = [waves(*shape) for shape in shapes]
    recording = simplify(record(function, *inputs))
    assert targets(recording).count(aten.bmm.default) == 1
    torch.testing.assert_close(recording.compile()(*inputs), function(*inputs), rtol=1e-13, atol=1e-13)


def test_products_with_one_constant_matrix_are_one_product():
    matrix, x = waves(4, 3), waves(5, 3, 2)
    recording = simplify(record(lambda x: torch.bmm(matrix.expand(5, 4, 3), x), x))
    assert aten.bmm.default not in targets(recording)
    torch.testing.assert_close(recording.compile()(x), matrix @ x, rtol=1e-13, atol=1e-13)


def test_products_with_several_constant_matrices_stay():
    matrices, x = waves(5, 4, 3), waves(5, 3, 2)
    recording = simplify(record(lambda x: torch.bmm(matrices, x), x))
    assert targets(recording).count(aten.bmm.default) == 1
    torch.testing.assert_close(recording.compile()(x), matrices @ x, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("num_columns", [1, 2])
def test_a_batch_s_products_with_an_input_are_one_product(num_columns):
    """Forward, and in the gradient."""
    matrix, x = waves(4, 3), waves(5, 3 * num_columns)

    def function(x, matrix):
        return ((matrix @ x.reshape(3, num_columns).exp()) ** 3).sum()

    score = vmap(grad(function), (0, None))
    recording = record(score, x, matrix, differentiates=True)
    assert targets(recording).count(aten.bmm.default) == 2
    simplify(recording)
    assert aten.bmm.default not in targets(recording)
    torch.testing.assert_close(recording.compile()(x, matrix), score(x, matrix), rtol=1e-13, atol=1e-13)


# --- what simplify takes away, and what it leaves -----------------------------------------------------


def test_operations_that_change_nothing_are_dropped_and_equal_ones_shared():
    assert targets(simplify(record(lambda x: (x.view(4).expand(4) * 1 + 0) / 1, X))) == []
    kept = targets(simplify(record(shared, X)))
    assert kept.count(aten.exp.default) == 1


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * torch.ones(3, 1),  # another shape
        lambda x: (x + torch.zeros(4, dtype=torch.complex128)).abs(),  # another type
        lambda x: x.float() * 1.0,
        lambda x: torch.sub(0.0, x) - 1.0,
        lambda x: torch.add(x, x, alpha=0.0) + torch.add(torch.zeros(4), x, alpha=2.0),
        lambda x: 1 / x,
        lambda x: torch.ones(4) / x,
        lambda x: x.reshape(2, 2).t().contiguous().view(-1),
        lambda x: x[::2].clone(),
        lambda x: x.flip(0) * x,
        lambda x: torch.zeros_like(x[:2]).sum() + torch.ones_like(x).sum() + x,
    ],
)
def test_operations_that_only_look_neutral_stay(function):
    want = function(X)
    got = compiled(function, X)(X)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=0.0, atol=0.0)


def test_constants_are_folded_and_learned_tensors_are_not():
    data, weight = torch.linspace(0.0, 1.0, 4), torch.ones(4, requires_grad=True)
    recording = record(lambda x: (x * (data.exp() + 1.0) * (weight * 2.0)).sum(), X)
    assert {id(tensor) for tensor in recording.closed_over} == {id(data), id(weight)}
    assert aten.exp.default not in targets(simplify(recording))
    graph = recording.compile()
    assert torch.autograd.grad(graph(X), weight)[0].tolist() == pytest.approx((2 * X * (data.exp() + 1)).tolist())
    with torch.no_grad():
        weight.fill_(3.0)
    assert graph(X).item() == pytest.approx((6 * X * (data.exp() + 1)).sum().item())


def test_a_failed_factorization_still_raises():
    """Nothing reads the check's result, so that a plain removal of dead code would take it away."""
    graph = compiled(vmap(grad(compiled(factorized, X))), torch.stack([X, X]))
    assert aten._linalg_check_errors.default in targets(graph)
    with pytest.raises(torch.linalg.LinAlgError):
        graph(torch.stack([X, X * torch.nan]))
    assert graph(torch.stack([X, X])).isfinite().all()


def test_random_operations_are_found_and_never_shared():
    recording = simplify(record(lambda x: x + torch.randn(4) - torch.randn(4), X))
    assert is_random(recording)
    assert recording.compile()(X).sub(X).abs().min() > 0
    assert not is_random(record(in_place, X))
    # What nothing reads is not in the way.
    assert not is_random(simplify(record(lambda x: (torch.rand(4), x * 2)[1], X)))


def test_a_detach_of_the_functions_own_is_kept():
    graph = compiled(lambda x: (x * x.detach()).sum(), X)
    torch.testing.assert_close(grad(graph)(X), X)

    def both(x):
        x = x.detach().requires_grad_()
        return _gradient(graph, x)

    again = simplify(record(both, X.clone(), differentiates=True))
    assert targets(again).count(aten.detach.default) == 1
    points = X.clone().requires_grad_()
    torch.testing.assert_close(again.compile()(points), X)
    assert not again.compile()(points).requires_grad  # the gradient is the detached factor
    torch.testing.assert_close(own_detach(points), X)
    assert not own_detach(points).requires_grad


def test_a_detach_of_autograds_own_is_dropped():
    """It makes them where a gradient is recorded, and a derivative of that would be wrong."""

    def gradient(x):
        return _gradient(saved_results, x)

    x = X.clone().requires_grad_()
    assert aten.detach.default in targets(record(gradient, x))  # the hazard is there
    recording = simplify(record(gradient, x, differentiates=True))
    assert aten.detach.default not in targets(recording)
    found = [torch.autograd.grad(function(x).sum(), x)[0] for function in (gradient, recording.compile())]
    torch.testing.assert_close(*found)


# --- what cannot be followed --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "read",
    [
        lambda x: torch.as_tensor(x.numpy()),
        lambda x: torch.tensor(x.tolist()),
        lambda x: torch.as_tensor(np.asarray(x)),
        lambda x: torch.as_tensor(np.arange(10.0)[x.long().abs()]),
        lambda x: torch.as_tensor(np.exp(x)),
        lambda x: torch.from_numpy(np.from_dlpack(x)),
        lambda x: torch.tensor(x.untyped_storage().tolist()[:4]),
        lambda x: x + float(x.data_ptr()),
        lambda x: x if x.sum() > 0 else -x,
        lambda x: x * x[0].item(),
        lambda x: x[: int(x[3])],
        lambda x: x[x > 0].sum(),
        lambda x: x * len(x.nonzero()),
        lambda x: x * len(x.unique()),
        lambda x: x.masked_select(x > 0).sum(),
        lambda x: torch.tensor([x[0], 1.0]),
        lambda x: x.new_tensor([[x[0]], [x[1]]]),
    ],
    ids=[
        "numpy",
        "tolist",
        "asarray",
        "index an array",
        "numpy function",
        "dlpack",
        "storage",
        "address",
        "branch",
        "item",
        "size",
        "mask",
        "nonzero",
        "unique",
        "masked_select",
        "list of tensors",
        "list of lists",
    ],
)
@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning")
def test_values_that_would_be_frozen_are_an_error(read):
    """Of an input, and of what is computed from one."""
    refusal = "takes the values out of a tensor that depends on latents or arguments|the size of what .* depends on"
    with pytest.raises(RuntimeError, match=refusal):
        record(lambda x: read(x) * 1.0, X)
    with pytest.raises(RuntimeError, match=refusal):
        record(lambda x: read(x * 2.0), X)


def test_values_of_closed_over_tensors_may_be_read_and_are_known_to_be():
    data, threshold = torch.tensor([2, 0, 1]), torch.tensor([1.0, 2.0])
    recording = record(lambda x: x[: len(set(data.tolist()))].sum() * threshold.max().item(), X)
    for tensor in (data, threshold):
        assert any(tensor is other for other in recording.closed_over)
    assert recording.compile()(X).item() == pytest.approx(2 * X[:3].sum().item())


def test_values_of_what_the_program_alone_decides_may_be_asked_for_until_something_else_is_written_into_it():
    def function(x, write):
        table = torch.zeros(3)
        row = table[1:]
        assert table.sum() == 0
        write(row, x)
        return x * table.sum().item()

    assert compiled(lambda x: function(x, lambda row, x: row.add_(1.0)), X)(X).tolist() == (2 * X).tolist()
    for write in (
        lambda row, x: row.add_(x[0]),
        lambda row, x: row.copy_(x[:2]),
        lambda row, x: row.__setitem__(0, x[1]),
        lambda row, x: row.unsqueeze_(0).add_(x[0]),
        lambda row, x: row.add_(torch.rand(2)),
    ):
        with pytest.raises(RuntimeError, match="takes the values out of a tensor that depends on"):
            record(lambda x, write=write: function(x, write), X)


def test_values_of_learned_tensors_are_not_asked_for():
    weight = torch.ones(4, requires_grad=True)
    with pytest.raises(RuntimeError, match="takes the values out"):
        record(lambda x: x * weight.sum().item(), X)


def test_data_behind_a_tensors_back_are_followed_and_carry_no_gradient():
    graph = compiled(lambda x: (x * x.data).sum(), X)
    assert graph(2 * X).item() == pytest.approx(4 * (X * X).sum().item())
    torch.testing.assert_close(grad(graph)(X), X)


def test_is_recording_says_so_while_it_lasts():
    seen = []
    record(lambda x: (seen.append(is_recording()), x * 2)[1], X)
    with pytest.raises(ZeroDivisionError):
        record(lambda x: x / (1 // 0), X)
    assert [*seen, is_recording()] == [True, False]


def with_gradient(function):
    """A function's value and its gradient, as the graph of a batch has them."""

    def both(x, *inputs):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            value = function(x, *inputs)
            return value, *torch.autograd.grad(value, x, create_graph=True)

    return both


INDEX = torch.tensor([3, 0, -1, 0, 2, 2])
ROWS = {
    "of each point": lambda x, index: (x[:, index] ** 3).sum(),
    "along the last dim": lambda x, index: (x.reshape(5, 2, 2).exp()[..., index % 2] ** 2).sum(),
    "along the first dim": lambda x, index: (x[index] ** 3).sum(),
    "in the middle": lambda x, index: (x.reshape(1, 5, 4).exp()[:, index] ** 2).sum(),
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("is_input", [True, False])
def test_rows_are_selected_and_added_up(name, is_input):
    """Those counted from the end as well, and where the indices are others than in the recording."""
    x = torch.randn(5, 4)

    def function(x, index=INDEX):
        return ROWS[name](x, index)

    inputs = (INDEX,) if is_input else ()
    recording = index_rows(simplify(record(with_gradient(function), x, *inputs, differentiates=True)))
    found = targets(recording)
    assert aten.index_select.default in found
    assert aten.index_add.default in found
    assert not {aten.index.Tensor, aten.index_put.default} & set(found)
    replay = recording.compile()
    for given in [inputs, (INDEX.flip(0) - 1,)] if is_input else [()]:
        y = torch.randn(5, 4, requires_grad=True)
        want = with_gradient(function)(y, *given)
        got = replay(y, *given)
        torch.testing.assert_close(got, want)
        direction = torch.randn_like(y)
        second = [torch.autograd.grad((g * direction).sum(), y) for g in (got[1], with_curvature(function, y, *given))]
        torch.testing.assert_close(*second)


def with_curvature(function, y, *inputs):
    (gradient,) = torch.autograd.grad(function(y, *inputs), y, create_graph=True)
    return gradient


def test_an_index_out_of_range_is_an_error():
    recording = index_rows(simplify(record(with_gradient(ROWS["of each point"]), torch.randn(5, 4), INDEX)))
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        recording.compile()(torch.randn(5, 4), INDEX + 1)


OTHER_INDICES = {
    "two lists": lambda x: (x[INDEX, INDEX % 2] ** 3).sum(),
    "a mask": lambda x: (x[:, torch.tensor([True, False, True, True])] ** 3).sum(),
    "a matrix": lambda x: (x[:, INDEX.reshape(2, 3)] ** 3).sum(),
    "written": lambda x: (aten.index_put(torch.zeros(5, 4), [None, INDEX[:4]], x) * x).sum(),
    "one value for all": lambda x: (aten.index_put(torch.zeros(5, 4), [None, INDEX], x[:, :1], True) * x).sum(),
}


@pytest.mark.parametrize("name", OTHER_INDICES)
def test_other_indices_are_left_as_they_are(name):
    x, function = torch.randn(5, 4), OTHER_INDICES[name]
    recording = index_rows(simplify(record(with_gradient(function), x, differentiates=True)))
    torch.testing.assert_close(recording.compile()(x), tuple(part.detach() for part in with_gradient(function)(x)))


def test_rows_that_are_laid_out_in_another_order_are_left_as_they_are():
    """A view of them, as a plate of particles has, need not be one of rows in order."""

    def function(x):
        return (x.reshape(5, 2, 2).permute(2, 0, 1).exp()[:, INDEX].permute(1, 2, 0).reshape(-1) ** 3).sum()

    recording = index_rows(simplify(record(with_gradient(function), torch.randn(5, 4), differentiates=True)))
    assert aten.index.Tensor in targets(recording)
    assert aten.index_select.default not in targets(recording)
