"""What every objective must do with every conditional. To add an objective, add a row to ``OBJECTIVES``."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyro_sivism import FisherDivergence, PathGradientKL
from pyro_sivism.errors import ArgumentError, NonFiniteError
from pyro_sivism.family import DiagonalNormal, LowRankNormal, SemiImplicit
from pyro_sivism.objectives import Objective
from pyro_sivism.objectives.base import finite_scores
from pyro_sivism.recipe import Recipe

DIM, MIXING_DIM, NUM_PARTICLES = 3, 2, 64

OBJECTIVES = {
    "path": PathGradientKL,
    "fisher": lambda: FisherDivergence(path_weight=0.0),
    "fisher_no_residual": lambda: FisherDivergence(path_weight=0.0, target_residual=False),
    "fisher_annealed": lambda: FisherDivergence(path_weight=0.0, annealing_steps=50),
    "fisher_and_path": FisherDivergence,
    "fisher_and_path_no_residual": lambda: FisherDivergence(target_residual=False, annealing_steps=50),
}

CONDITIONALS = {
    "diagonal": lambda: DiagonalNormal(DIM, MIXING_DIM, (8,)),
    "diagonal_constant": lambda: DiagonalNormal(DIM, MIXING_DIM, (8,), scale_depends_on_z=False),
    "low_rank": lambda: LowRankNormal(DIM, MIXING_DIM, (8,), rank=2),
}


class QuarticTarget:
    """``-sum (x - shift)^4 / 4``: no Gaussian, with a Hessian that varies. Rows where ``bad(x)`` are spoilt."""

    dim = DIM

    def __init__(self, spoil: str = "nothing", shift: float = 1.0) -> None:
        self.spoil, self.shift = spoil, shift

    def bad(self, x: Tensor) -> Tensor:
        everywhere = torch.ones(len(x), dtype=torch.bool)
        return {"nothing": ~everywhere, "everything": everywhere}.get(self.spoil, x[:, 0] < 0)

    def score(self, x: Tensor) -> Tensor:
        score = -(x - self.shift).pow(3)
        bad = self.bad(x)[:, None]
        if self.spoil == "hessian":  # finite, but the square root's slope at 0 is not
            return score + (x.square() * ~bad).sqrt() * 0.0
        return torch.where(bad, score.new_tensor(torch.inf if self.spoil == "infinite" else torch.nan), score)

    def log_density(self, x: Tensor) -> Tensor:
        return -(x - self.shift).pow(4).sum(-1) / 4

    def log_density_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.log_density(x), self.score(x)


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request):
    return request.param


@pytest.fixture(params=CONDITIONALS)
def family(request, dtype):
    family = SemiImplicit(CONDITIONALS[request.param]()).to(dtype)
    with torch.no_grad():  # away from the start, where hidden layers have no gradient yet
        for parameter in family.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return family


@pytest.fixture(params=OBJECTIVES)
def objective(request):
    return OBJECTIVES[request.param]()


def set_up(objective: Objective, family: SemiImplicit, target: QuarticTarget | None = None) -> list[Tensor]:
    """Connect the three; returns the critic's parameters, away from zero."""
    dtype = next(family.parameters()).dtype
    critic = objective.make_critic(DIM, (8,)).to(dtype)
    parameters = list(critic.parameters())
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1 * torch.randn_like(parameter))
    objective.setup(family, QuarticTarget() if target is None else target, critic)
    return parameters


def draw(family: SemiImplicit):
    with torch.no_grad():
        return family.rsample(NUM_PARTICLES)


def test_shapes_dtypes_and_finite_gradients(objective, family, dtype):
    critic_parameters = set_up(objective, family)
    critic_loss = objective.critic_loss(draw(family), 0)
    losses = objective.guide_loss(family.rsample(NUM_PARTICLES), 0)
    for value in (critic_loss, losses.loss, losses.fisher_divergence):
        assert value.shape == ()
        assert value.dtype == dtype
        assert value.isfinite()
    assert not losses.fisher_divergence.requires_grad
    assert losses.num_nonfinite.item() == 0
    for loss, parameters in [(critic_loss, critic_parameters), (losses.loss, list(family.parameters()))]:
        for gradient in torch.autograd.grad(loss, parameters):
            assert gradient.isfinite().all()
            assert gradient.abs().max() > 0
    assert objective.critic_value(torch.zeros(5, DIM, dtype=dtype), torch.zeros(5, DIM, dtype=dtype)).shape == (5, DIM)


def test_guide_loss_can_be_evaluated_without_gradients(objective, family):
    set_up(objective, family)
    with torch.no_grad():
        torch.manual_seed(1)
        evaluated = objective.guide_loss(family.rsample(NUM_PARTICLES), 0)
    torch.manual_seed(1)
    trained = objective.guide_loss(family.rsample(NUM_PARTICLES), 0)
    assert not evaluated.loss.requires_grad
    torch.testing.assert_close(evaluated.fisher_divergence, trained.fisher_divergence)


def test_losses_change_nothing(objective, family):
    """Both are functions of their arguments: the networks, and the second call, are as before."""
    set_up(objective, family)
    modules = (family, objective.critic)
    before = [{name: value.clone() for name, value in module.state_dict().items()} for module in modules]
    sample = draw(family)
    first = objective.critic_loss(sample, 0), objective.guide_loss(sample, 0).loss
    second = objective.critic_loss(sample, 0), objective.guide_loss(sample, 0).loss
    assert first == second
    for module, state in zip(modules, before):
        assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("spoil", ["nan", "infinite"])
def test_non_finite_rows_are_left_out_and_counted(objective, family, spoil):
    """Loss and gradients are those of the finite rows alone."""
    critic_parameters = set_up(objective, family, QuarticTarget(spoil))
    z = family.sample_mixing(NUM_PARTICLES)
    torch.manual_seed(1)
    sample = family.rsample(NUM_PARTICLES, z)
    bad = objective.target.bad(sample.x.detach())
    assert 0 < bad.sum() < NUM_PARTICLES

    losses = objective.guide_loss(sample, 0)
    gradients = torch.autograd.grad(losses.loss, list(family.parameters()))
    torch.manual_seed(1)
    kept = type(sample)(*(values[~bad] for values in family.rsample(NUM_PARTICLES, z)))
    want = objective.guide_loss(kept, 0)
    assert losses.num_nonfinite == bad.sum()
    torch.testing.assert_close(losses.loss, want.loss)
    torch.testing.assert_close(losses.fisher_divergence, want.fisher_divergence)
    for got, expected in zip(gradients, torch.autograd.grad(want.loss, list(family.parameters()))):
        torch.testing.assert_close(got, expected)

    critic_loss = objective.critic_loss(draw(family), 0)
    assert all(g.isfinite().all() for g in torch.autograd.grad(critic_loss, critic_parameters))


def test_non_finite_hessian_rows_do_not_spoil_the_gradient(objective, family):
    set_up(objective, family, QuarticTarget("hessian"))
    sample = family.rsample(NUM_PARTICLES)
    losses = objective.guide_loss(sample, 0)
    gradients = torch.autograd.grad(losses.loss, list(family.parameters()))
    bad = objective.target.bad(sample.x).sum()
    assert 0 < bad < NUM_PARTICLES
    assert losses.num_nonfinite == (bad if isinstance(objective, FisherDivergence) else 0)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.abs().max() > 0 for gradient in gradients)


def test_no_finite_hessian_is_an_error():
    """Rather than a fit that never moves."""
    objective, family = FisherDivergence(), SemiImplicit(DiagonalNormal(DIM, MIXING_DIM))
    target = QuarticTarget("hessian")
    target.bad = lambda x: torch.ones(len(x), dtype=torch.bool)
    set_up(objective, family, target)
    losses = objective.guide_loss(family.rsample(NUM_PARTICLES), 0)
    with pytest.raises(NonFiniteError, match="second derivative"):
        torch.autograd.grad(losses.loss, list(family.parameters()))


def test_no_finite_row_is_an_error(objective, family):
    set_up(objective, family, QuarticTarget("everything"))
    with pytest.raises(NonFiniteError, match=f"any of {NUM_PARTICLES} particles"):
        objective.guide_loss(family.rsample(NUM_PARTICLES), 0)


@pytest.mark.parametrize("conditional", CONDITIONALS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_training_moves_towards_the_target(name, conditional, float64):
    """From q = N(0, I) to a target centred at (1, 1, 1): the mean goes at least 60% of the way.

    The score, a cube, all but vanishes around the centre, which makes the Fisher divergence's end of the way slow.
    """
    objective, family = OBJECTIVES[name](), SemiImplicit(CONDITIONALS[conditional]())
    critic_parameters = set_up(objective, family)
    optimizers = [
        torch.optim.Adam(parameters, lr=2e-2, betas=(0.9, 0.99), foreach=True)
        for parameters in (critic_parameters, list(family.parameters()))
    ]

    def distance() -> float:
        return (draw(family).x - 1.0).mean().item()

    def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        parameters = optimizer.param_groups[0]["params"]
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
            parameter.grad = gradient
        optimizer.step()

    before, history = [distance() for _ in range(20)], []
    for t in range(-50, 180):
        for _ in range(2):
            sample = draw(family)
            objective.critic.update_moments(sample.x)
            step(optimizers[0], objective.critic_loss(sample, max(t, 0)))
        if t >= 0:
            losses = objective.guide_loss(family.rsample(NUM_PARTICLES), t)
            step(optimizers[1], losses.loss)
            history.append(distance())
    assert abs(sum(before) / 20) > 0.9
    assert abs(sum(history[-20:]) / 20) < 0.4


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("dim", [1, 12, 32, 33, 500])
def test_recipe_is_one_that_the_conditional_takes(name, dim):
    recipe = OBJECTIVES[name]().adapt_recipe(Recipe.for_dim(dim))
    assert recipe.critic_steps >= 1
    assert 0 <= recipe.min_scale < recipe.init_scale < recipe.max_scale
    assert 0 < recipe.input_lr_factor <= 1
    if "fisher" in name:
        assert recipe.critic_steps >= 3
        assert recipe.min_scale >= 0.3


def test_fisher_divergence_has_a_path_term_unless_its_weight_is_zero(family):
    """The default weight is 3, and the gradient is linear in the weight."""
    gradients = []
    objectives = [FisherDivergence(path_weight=0.0), FisherDivergence(path_weight=1.0), FisherDivergence()]
    for objective in objectives:
        torch.manual_seed(1)
        set_up(objective, family)
        loss = objective.guide_loss(family.rsample(NUM_PARTICLES), 0).loss
        gradients.append(torch.autograd.grad(loss, list(family.parameters())))
    for none, one, default in zip(*gradients):
        scale = one.abs().max()
        assert (default - none).abs().max() > 1e-3 * scale
        torch.testing.assert_close(default - none, 3.0 * (one - none), rtol=1e-3, atol=1e-4 * scale.item())


@pytest.mark.parametrize(
    "settings",
    [
        {"annealing_steps": -1},
        {"annealing_start": 0.0},
        {"annealing_start": 1.5},
        {"path_weight": -1e-9},
        {"path_weight": float("-inf")},
        {"path_weight": float("nan")},
        {"path_weight": float("inf")},
    ],
    ids=str,
)
def test_fisher_divergence_refuses_settings_out_of_range(settings):
    with pytest.raises(ArgumentError, match="expected"):
        FisherDivergence(**settings)


def test_only_rows_that_are_not_finite_are_masked():
    """Rows whose sum alone overflows are finite, and where all are there is nothing to mask."""
    large = torch.full((4, DIM), 3e38)
    assert finite_scores(torch.ones(4, DIM)) is None
    assert finite_scores(large).tolist() == [True] * 4
    large[1, 0], large[2, 1] = torch.inf, torch.nan
    assert finite_scores(large).tolist() == [True, False, False, True]


def test_base_class_asks_for_a_guide_loss():
    with pytest.raises(NotImplementedError):
        Objective().guide_loss(draw(SemiImplicit(DiagonalNormal(2, 2))), 0)
