"""The sliced distance in closed form: of draws that are moved, or spread, and of draws of the points' own law."""

from __future__ import annotations

import pytest
import torch

from pyro_sivism.objectives import SlicedDistance

pytestmark = pytest.mark.usefixtures("float64")

DIM = 3


@pytest.fixture
def points():
    return torch.randn(20_000, DIM) @ torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [0.0, 0.0, 3.0]])


def test_moved_points_are_half_the_squared_move_away_and_less_if_far(points):
    distance = SlicedDistance(points, torch.eye(DIM), num_draws=1000)
    y = points[torch.randint(len(points), (1000,))]
    move = torch.tensor([0.5, -4.0, 1.0])
    along = (distance.directions @ move).abs()
    want = torch.where(along < 1.0, 0.5 * along.square(), along - 0.5).sum() * DIM / (2 * DIM)
    assert (distance(y + move) - distance(y)).item() == pytest.approx(want.item(), rel=0.1)


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


LAWS = {
    "normal": torch.distributions.Normal(0.0, 1.0),
    "student_t": torch.distributions.StudentT(4.0),
    "exponential": torch.distributions.Exponential(1.0),
}


@pytest.mark.parametrize("num_draws", [16, 128])
@pytest.mark.parametrize("law", LAWS)
def test_draws_of_the_points_own_law_are_neither_moved_nor_spread(num_draws, law):
    """Order statistics alone would draw 16 normal draws together by a seventh of their spread."""
    points = LAWS[law].sample((20_000, 1)).double()
    distance = SlicedDistance(points, torch.ones(1, 1), num_draws)
    centered = points - points.mean(0)

    def pulls(width):
        found = []
        for rows in torch.randint(len(points), (1500, num_draws)):
            width_parameter, move = torch.tensor([width, 0.0]).requires_grad_()
            y = points.mean(0) + width_parameter * centered[rows] + move
            found.append(torch.stack(torch.autograd.grad(distance(y), (width_parameter, move))))
        return torch.stack(found)

    at_rest = pulls(1.0)
    assert (at_rest.mean(0).abs() < 0.02 * points.std()).all()
    assert pulls(0.9).mean(0)[0] < -0.05 * points.std()
    assert pulls(1.1).mean(0)[0] > 0.05 * points.std()


@pytest.mark.parametrize("law", LAWS)
def test_the_bulk_is_compared_with_the_bulk(law):
    """Also where a tail is heavy."""
    points = LAWS[law].sample((20_000, 1)).double()
    found = SlicedDistance(points, torch.ones(1, 1), 128).order_statistics[:, 0]
    want = points[torch.randint(len(points), (20_000, 128))].sort(1).values.mean(0)[:, 0]
    assert (found[96] - found[31]) / (want[96] - want[31]) == pytest.approx(1.025, abs=0.025)
    assert found.mean().item() == pytest.approx(points.mean().item(), abs=0.02)


def test_a_single_draw_is_taken_to_the_mean(points):
    distance = SlicedDistance(points, torch.eye(DIM), num_draws=1)
    want = distance.directions @ points.mean(0)
    torch.testing.assert_close(distance.order_statistics[0], want, atol=0.05, rtol=0.0)


def test_there_may_be_more_draws_than_points():
    points = torch.randn(100, DIM)
    assert SlicedDistance(points, torch.eye(DIM), num_draws=1000)(points[torch.randint(100, (1000,))]) < 0.1


def test_no_draws_pull_at_each_other_but_by_their_order(points):
    distance = SlicedDistance(points, torch.eye(DIM), num_draws=64)
    y = torch.randn(64, DIM)
    assert distance(y) == distance(y[torch.randperm(64)])
