"""The unconstrained vector: its order, shapes, names, round trips and Jacobians."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints

from pyro_sivism.bijections import bijection, same_support
from pyro_sivism.errors import LayoutChangedError
from pyro_sivism.layout import LatentLayout
from pyro_sivism.sites import PlateDim

pytestmark = pytest.mark.usefixtures("float64")


def structured(rows=3):
    pyro.sample("scale", dist.Gamma(2.0, 1.0))
    with pyro.plate("rows", rows, dim=-2):
        pyro.sample("weights", dist.Dirichlet(torch.ones(4)))
        with pyro.plate("cols", 2, dim=-1):
            pyro.sample("theta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("corr", dist.LKJCholesky(3, 1.0))
    pyro.sample("k", dist.Bernoulli(0.3))
    pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(0.3))


def layout_of(model, *args):
    return LatentLayout.from_trace(poutine.trace(model).get_trace(*args))


def test_sites_keep_their_order_shapes_and_slices():
    layout = layout_of(structured)
    assert layout.names == ("scale", "weights", "theta", "corr")
    assert [site.shape for site in layout.sites] == [(), (3, 1, 4), (3, 2, 2), (3, 3)]
    assert [site.unconstrained_shape for site in layout.sites] == [(), (3, 1, 3), (3, 2, 2), (3,)]
    assert [site.offset for site in layout.sites] == [0, 1, 10, 22]
    assert layout.dim == 25
    assert "theta" in layout
    assert "y" not in layout
    with pytest.raises(KeyError):
        layout["k"]


def test_plates_and_names():
    layout = layout_of(structured)
    assert layout["theta"].plates == (PlateDim("rows", -2, 3, 3), PlateDim("cols", -1, 2, 2))
    assert layout["theta"].dims == ("rows", "cols", "theta_dim_2")
    assert layout["weights"].dims == ("rows", "weights_dim_1", "weights_dim_2")
    assert layout["scale"].dims == ()
    names = layout.coordinate_names
    assert len(names) == len(set(names)) == layout.dim
    assert names[:3] == ["scale", "weights[0,0,0]", "weights[0,0,1]"]
    assert names[-1] == "corr[2]"


@pytest.mark.parametrize("batch", [(), (5,), (2, 5)])
def test_constrain_and_pack_are_inverse(batch):
    layout = layout_of(structured)
    x = torch.randn(*batch, layout.dim)
    values = layout.constrain(x)
    assert {name: value.shape for name, value in values.items()} == {s.name: batch + s.shape for s in layout.sites}
    for site in layout.sites:
        assert site.support.check(values[site.name]).all()
    torch.testing.assert_close(layout.pack(values), x)


def test_the_jacobian_of_a_batch_is_that_of_each_row():
    layout = layout_of(structured)
    x = torch.randn(2, 5, layout.dim)
    whole = layout.log_abs_det_jacobian(x)
    assert whole.shape == (2, 5)
    rows = torch.stack([layout.log_abs_det_jacobian(row) for row in x.reshape(10, -1)]).reshape(2, 5)
    torch.testing.assert_close(whole, rows)


def test_values_aligned_with_plates_are_the_rows():
    layout, nesting = layout_of(structured), 2
    x = torch.randn(6, layout.dim)
    for site, aligned in layout.split_aligned(x.reshape((6,) + (1,) * nesting + (layout.dim,))):
        assert aligned.dim() == 1 + nesting + site.unconstrained_event_dim
        assert torch.equal(aligned.reshape(6, -1), x[:, site.offset : site.offset + site.size])


def lower_triangle(value):
    return value[tuple(torch.tril_indices(*value.shape))]


def strict_lower_triangle(value):
    return value[tuple(torch.tril_indices(*value.shape, -1))]


# support, unconstrained size, free coordinates of the constrained value
JACOBIANS = [
    (constraints.positive, 1, lambda v: v),
    (constraints.unit_interval, 1, lambda v: v),
    (constraints.interval(-1.0, 3.0), 1, lambda v: v),
    (constraints.greater_than(2.0), 1, lambda v: v),
    (constraints.less_than(2.0), 1, lambda v: v),
    (constraints.simplex, 3, lambda v: v[:-1]),
    (constraints.ordered_vector, 3, lambda v: v),
    (constraints.positive_ordered_vector, 3, lambda v: v),
    (constraints.corr_cholesky, 3, strict_lower_triangle),
    (constraints.corr_matrix, 3, strict_lower_triangle),
    (constraints.lower_cholesky, 6, lower_triangle),
    (constraints.positive_definite, 6, lower_triangle),
]


@pytest.mark.parametrize(("support", "size", "free"), JACOBIANS, ids=[str(row[0]) for row in JACOBIANS])
def test_every_jacobian_is_the_determinant_of_the_map_to_free_coordinates(support, size, free):
    transform = bijection(support)
    for _ in range(3):
        u = torch.randn(size)
        value = transform(u)
        assert support.check(value).all()
        torch.testing.assert_close(transform.inv(value), u)
        jacobian = torch.autograd.functional.jacobian(lambda p: free(transform(p)), u)
        want = torch.linalg.slogdet(jacobian).logabsdet
        torch.testing.assert_close(transform.log_abs_det_jacobian(u, value).sum(), want)


@pytest.mark.parametrize("support", [constraints.lower_cholesky, constraints.positive_definite])
def test_matrix_bijections_know_their_shapes_and_batches(support):
    transform = bijection(constraints.independent(support, 1))
    u = torch.randn(5, 2, 6)
    value = transform(u)
    assert value.shape == transform.forward_shape(u.shape) == (5, 2, 3, 3)
    assert transform.inverse_shape(value.shape) == u.shape
    assert transform.log_abs_det_jacobian(u, value).shape == (5,)
    assert bijection(support) == bijection(support)


def test_supports_are_compared_by_type_and_bounds():
    assert same_support(constraints.interval(0.0, torch.tensor(1.0)), constraints.interval(torch.tensor(0.0), 1.0))
    assert not same_support(constraints.interval(0.0, 1.0), constraints.interval(0.0, 2.0))
    assert not same_support(constraints.positive, constraints.real)
    assert same_support(constraints.independent(constraints.real, 1), constraints.independent(constraints.real, 1))
    assert not same_support(constraints.independent(constraints.real, 1), constraints.independent(constraints.real, 2))


def test_minibatch_values_are_held_at_full_size():
    def model():
        with pyro.plate("data", 7, subsample_size=3):
            pyro.sample("w", dist.Dirichlet(torch.ones(2)))

    trace = poutine.trace(model).get_trace()
    layout = LatentLayout.from_trace(trace)
    assert layout["w"].shape == (7, 2)
    assert layout["w"].subsampled_plates == (PlateDim("data", -1, 7, 3),)
    start = layout.constrain(layout.init_from_trace(trace))["w"]
    torch.testing.assert_close(start, trace.nodes["w"]["value"][[0, 1, 2, 0, 1, 2, 0]])


def test_the_dtype_is_the_widest_of_the_sites():
    def model():
        pyro.sample("a", dist.Normal(torch.tensor(0.0, dtype=torch.float32), 1.0))
        pyro.sample("b", dist.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0))

    assert layout_of(model).dtype is torch.float64


def test_a_changed_structure_is_named():
    layout = layout_of(structured)
    layout.check_same(layout_of(structured))
    with pytest.raises(LayoutChangedError, match=r"'weights' had shape \(3, 1, 4\) at set-up and has \(5, 1, 4\)"):
        layout.check_same(layout_of(structured, 5))
    with pytest.raises(LayoutChangedError, match="'scale' exists only before"):
        layout.check_same(layout_of(poutine.block(structured, hide=["scale"])))
    with pytest.raises(LayoutChangedError, match="'extra' exists only with the new arguments"):
        layout.check_same(layout_of(lambda: (structured(), pyro.sample("extra", dist.Normal(0.0, 1.0)))))
