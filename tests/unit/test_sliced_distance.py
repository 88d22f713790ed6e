"""The sliced distance in closed form: of draws that are moved, or spread, and of draws of the points' own law."""

from __future__ import annotations

import pytest
import torch

from pyro_sivism.objectives import SlicedDistance

pytestmark = pytest.mark.usefixtures("float64")

DIM = 3


def gradient(distance, make):
    """Of the distance of ``make(theta)`` in theta, at 0."""
    theta = torch.zeros(DIM, requires_grad=True)
    (found,) = torch.autograd.grad(distance(make(theta)), theta)
    return found


@pytest.fixture
def points():
    return torch.randn(20_000, DIM) @ torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [0.0, 0.0, 3.0]])


def test_moved_points_are_half_the_squared_move_away(points):
    directions = torch.eye(DIM)
    distance = SlicedDistance(points, directions, num_draws=len(points))
    assert distance(points) < 1e-3
    move = torch.tensor([1.0, -2.0, 0.5])
    along = distance.directions @ move
    want = 0.5 * DIM / (2 * DIM) * along.square().sum()
    assert distance(points + move).item() == pytest.approx(want.item(), rel=1e-2)


def test_directions_are_those_given_and_as_many_random_unit_vectors(points):
    directions = torch.eye(DIM)[[2, 0, 1]]
    distance = SlicedDistance(points, directions, num_draws=10)
    assert torch.equal(distance.directions[:DIM], directions)
    torch.testing.assert_close(distance.directions.norm(dim=-1), torch.ones(2 * DIM))
    assert distance.directions.shape == (2 * DIM, DIM)
    assert not torch.equal(distance.directions, SlicedDistance(points, directions, num_draws=10).directions)


def test_its_gradient_takes_draws_back_by_about_as_much_as_they_are_moved():
    """As that of a KL divergence does where p is N(0, I): on average over the random directions."""
    dim, move = 50, 0.3
    distance = SlicedDistance(torch.randn(20_000, dim), torch.eye(dim), num_draws=512)
    y = (torch.randn(512, dim) + move).requires_grad_()
    (found,) = torch.autograd.grad(distance(y), y)
    assert found.sum(0).mean().item() == pytest.approx(move, abs=0.05)


@pytest.mark.parametrize("num_draws", [16, 128])
def test_draws_of_the_points_own_law_are_neither_moved_nor_spread(points, num_draws):
    """However few they are: bare quantiles would draw 16 draws together by a tenth of their spread."""
    distance = SlicedDistance(points, torch.eye(DIM), num_draws)
    batches = [points[torch.randint(len(points), (num_draws,))] for _ in range(4000)]
    moves = torch.stack([gradient(distance, lambda theta, y=y: y + theta) for y in batches])
    spreads = torch.stack([gradient(distance, lambda theta, y=y: y * theta.exp()) for y in batches])
    for values in (moves, spreads):
        se = values.std(0) / len(values) ** 0.5
        assert (values.mean(0).abs() < 5 * se + 0.005 * points.var(0)).all()
    narrow = torch.stack([gradient(distance, lambda theta, y=y: 0.8 * y * theta.exp()) for y in batches[:500]]).mean(0)
    assert (narrow < 0).all(), "narrower draws are spread"


def test_no_draws_pull_at_each_other_but_by_their_order(points):
    distance = SlicedDistance(points, torch.eye(DIM), num_draws=64)
    y = torch.randn(64, DIM)
    assert distance(y) == distance(y[torch.randperm(64)])
