"""Estimates against the exact answers of the Gaussian case; see ``oracle.py``."""

from __future__ import annotations

import math

import pytest
import torch
from torch.func import functional_call

from pyro_sivism import FisherDivergence, PathGradientKL
from pyro_sivism.family import MLP, ScoreNetwork, SemiImplicit

from . import oracle
from .oracle import NUM_STANDARD_ERRORS, ExactDifference, ExactScore, GaussianQ, GaussianTarget, linear_family

pytestmark = pytest.mark.usefixtures("float64")

KINDS = ["diagonal", "low_rank"]
OBJECTIVES = {
    "path": PathGradientKL,
    "fisher": lambda: FisherDivergence(path_weight=0.0),
    "fisher_no_residual": lambda: FisherDivergence(path_weight=0.0, target_residual=False),
    "fisher_annealed": lambda: FisherDivergence(path_weight=0.0, annealing_steps=10, annealing_start=0.2),
    "fisher_annealed_no_residual": lambda: FisherDivergence(
        path_weight=0.0, target_residual=False, annealing_steps=10, annealing_start=0.2
    ),
    "both": FisherDivergence,
    "both_no_residual": lambda: FisherDivergence(target_residual=False),
    "both_annealed": lambda: FisherDivergence(annealing_steps=10, annealing_start=0.2),
    "both_annealed_no_residual": lambda: FisherDivergence(
        target_residual=False, annealing_steps=10, annealing_start=0.2
    ),
    "both_by_half": lambda: FisherDivergence(path_weight=0.5),
    "both_by_half_no_residual": lambda: FisherDivergence(path_weight=0.5, target_residual=False),
    "both_by_half_annealed": lambda: FisherDivergence(path_weight=0.5, annealing_steps=10, annealing_start=0.2),
    "both_by_half_annealed_no_residual": lambda: FisherDivergence(
        path_weight=0.5, target_residual=False, annealing_steps=10, annealing_start=0.2
    ),
}
STEP = 5  # of ten annealing steps: the target's score is tempered by .2 + .8 x 5/10 = .6


def tempering(name: str) -> float:
    return 0.6 if "annealed" in name else 1.0


def exact_gradients(name: str, q: GaussianQ, p: GaussianTarget) -> tuple[torch.Tensor, torch.Tensor]:
    """What the objective goes down: KL, Fisher, or Fisher plus a weight times KL, to the tempered target."""
    p = tempered(p, tempering(name))
    if name == "path":
        return oracle.kl_gradients(q, p)
    weight = 0.5 if "by_half" in name else 3.0 if name.startswith("both") else 0.0
    pairs = zip(oracle.fisher_gradients(q, p), oracle.kl_gradients(q, p))
    loc, covariance = (fisher + weight * kl for fisher, kl in pairs)
    return loc, covariance


def problem(kind: str, dim: int = 3) -> tuple[SemiImplicit, GaussianTarget]:
    family = linear_family(kind, dim)
    return family, GaussianTarget(torch.randn(dim), oracle.random_covariance(dim))


def tempered(p: GaussianTarget, factor: float) -> GaussianTarget:
    """The Gaussian whose score is ``factor`` times that of p."""
    return GaussianTarget(p.loc, p.covariance / factor)


def with_exact_critic(name: str, family: SemiImplicit, p: GaussianTarget):
    objective = OBJECTIVES[name]()
    q = GaussianQ.of(family)
    critic = ExactDifference(q, p, tempering(name)) if "no_residual" in name else ExactScore(q)
    objective.setup(family, p, critic)
    return objective


def gradient_by_batches(objective, family: SemiImplicit, num_batches: int, batch_size: int):
    """Mean and standard error of the loss's gradient over independent batches, by parameter."""
    parameters = dict(family.named_parameters())
    draws = {name: [] for name in parameters}
    for _ in range(num_batches):
        loss = objective.guide_loss(family.rsample(batch_size), STEP).loss
        for name, gradient in zip(parameters, torch.autograd.grad(loss, list(parameters.values()))):
            draws[name].append(gradient)
    stacked = {name: torch.stack(gradients) for name, gradients in draws.items()}
    return {name: (g.mean(0), g.std(0) / math.sqrt(num_batches)) for name, g in stacked.items()}


# --- the oracle itself -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("divergence", ["kl", "fisher"])
def test_oracle_gradients_agree_with_autograd_of_the_divergence(kind, divergence):
    family, p = problem(kind)
    value = {"kl": oracle.kl_divergence, "fisher": oracle.fisher_divergence}[divergence](GaussianQ.of(family), p)
    gradients = {"kl": oracle.kl_gradients, "fisher": oracle.fisher_gradients}[divergence](GaussianQ.of(family), p)
    want = oracle.parameter_gradients(family, *gradients)
    for name, parameter in family.named_parameters():
        (got,) = torch.autograd.grad(value, parameter, retain_graph=True)
        torch.testing.assert_close(got, want[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_oracle_marginal_agrees_with_draws(kind):
    family, p = problem(kind)
    q, n = GaussianQ.of(family), 200_000
    with torch.no_grad():
        x = family.rsample(n).x
    standardized = torch.linalg.solve_triangular(torch.linalg.cholesky(q.covariance), (x - q.loc).mT, upper=False).mT
    # The mean of n standard normals has se 1/sqrt(n); entries of the covariance have se sqrt((1 + [i = j]) / n).
    bound = NUM_STANDARD_ERRORS / math.sqrt(n)
    assert standardized.mean(0).abs().max() < bound
    assert (standardized.T @ standardized / n - torch.eye(3)).abs().max() < math.sqrt(2) * bound
    # and the closed forms of the divergences with Monte Carlo over the same draws
    for exact, draws in [
        (oracle.kl_divergence(q, p), q.log_prob(x) - p.log_density(x)),
        (oracle.fisher_divergence(q, p), (p.score(x) - q.score(x)).square().sum(-1)),
    ]:
        assert (draws.mean() - exact).abs() < NUM_STANDARD_ERRORS * draws.std() / math.sqrt(n)


# --- (a) the critic --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_linear_critic_by_least_squares_is_the_exact_score(kind):
    """The critic's loss is a regression; over linear critics its minimum is the exact score, at any q."""
    family, p = problem(kind)
    q, n = GaussianQ.of(family), 200_000
    objective = PathGradientKL()
    critic = MLP(3, 3, ())
    objective.setup(family, p, critic)
    with torch.no_grad():
        sample = family.rsample(n)
        inputs = torch.cat([sample.x, torch.ones(n, 1)], 1)
        solution = torch.linalg.lstsq(inputs, sample.conditional_score).solution
        critic[0].weight.copy_(solution[:3].T)
        critic[0].bias.copy_(solution[3])
        residual = sample.conditional_score - critic(sample.x)
    gradients = torch.autograd.grad(objective.critic_loss(sample, 0), list(critic.parameters()))
    assert max(g.abs().max() for g in gradients) < 1e-9  # the minimum of critic_loss, to rounding

    # Least squares with noise that is independent of x, as it is here: covariance var(residual) (X'X)^-1.
    se = torch.outer(torch.linalg.inv(inputs.T @ inputs).diagonal().sqrt(), residual.std(0))
    precision = torch.linalg.inv(q.covariance)
    exact = torch.cat([-precision, (precision @ q.loc)[None]]).detach()
    assert ((solution - exact).abs() / se).max() < NUM_STANDARD_ERRORS


def train_critic(objective, family, critic, num_steps, batch_size, lr=2e-2):
    optimizer = torch.optim.Adam(critic.parameters(), lr=lr, betas=(0.9, 0.99), foreach=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps, eta_min=1e-2 * lr)
    for step in range(num_steps):
        with torch.no_grad():
            sample = family.rsample(batch_size)
            critic.update_moments(sample.x)
        optimizer.zero_grad()
        objective.critic_loss(sample, step).backward()
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("name", ["path", "fisher", "fisher_no_residual"])
def test_trained_network_agrees_with_the_exact_critic(name):
    """A network with hidden layers, trained by the objective's own loss, to 5% of the critic's size in rms.

    The bound is not a rounding: a network of W weights after N draws errs by about sqrt(W sigma^2 / N). Here that is
    sqrt(115 x 3 / (600 x 512)) = .03 in units where the score is about 1.5 in size. Untrained it errs by over 30%.
    """
    family, p = problem("diagonal")
    objective = OBJECTIVES[name]()
    critic = objective.make_critic(3, (16,))
    objective.setup(family, p, critic)
    with torch.no_grad():
        x = family.rsample(20_000).x
        exact = p.score(x) - GaussianQ.of(family).score(x)

        def relative_error():
            return ((objective.critic_value(x, p.score(x)) - exact).square().mean() / exact.square().mean()).sqrt()

        before = relative_error()
    train_critic(objective, family, critic, num_steps=600, batch_size=512)
    with torch.no_grad():
        after = relative_error()
    assert before > 0.3
    assert after < 0.05


# --- (b) the Fisher divergence ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_fisher_divergence_estimate_has_the_exact_mean(name, kind):
    family, p = problem(kind)
    exact = oracle.fisher_divergence(GaussianQ.of(family), p)  # of the target itself, tempered or not
    objective = with_exact_critic(name, family, p)
    with torch.no_grad():
        estimates = torch.stack(
            [objective.guide_loss(family.rsample(1000), STEP).fisher_divergence for _ in range(200)]
        )
    se = estimates.std() / math.sqrt(len(estimates))
    assert (estimates.mean() - exact).abs() < NUM_STANDARD_ERRORS * se
    assert se < 0.02 * exact  # the test has the power to see a wrong factor


def test_fisher_divergence_estimate_is_below_the_truth_for_a_wrong_critic():
    """E[2 f.(s_p - c) - f^2] = F - E|f - f*|^2, here with f = s_p - .8 grad log q."""
    family, p = problem("diagonal")
    q = GaussianQ.of(family)
    objective = PathGradientKL()
    exact_score = ExactScore(q)
    objective.setup(family, p, _Scaled(exact_score, 0.8))
    # f - f* = .2 grad log q, and E_q |grad log q|^2 = tr C^-1
    want = oracle.fisher_divergence(q, p) - 0.2**2 * torch.linalg.inv(q.covariance).trace()
    with torch.no_grad():
        estimates = torch.stack([objective.guide_loss(family.rsample(1000), 0).fisher_divergence for _ in range(200)])
    se = estimates.std() / math.sqrt(len(estimates))
    assert (estimates.mean() - want).abs() < NUM_STANDARD_ERRORS * se


class _Scaled(torch.nn.Module):
    def __init__(self, module, factor):
        super().__init__()
        self.module, self.factor = module, factor

    def forward(self, x):
        return self.factor * self.module(x)


# --- (c), (d) the gradients ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradient_with_the_exact_critic_is_that_of_the_divergence(name, kind):
    """PathGradientKL that of KL; FisherDivergence, by the envelope theorem, that of the tempered Fisher divergence and
    its weight times that of KL to the tempered target.
    """
    family, p = problem(kind)
    want = oracle.parameter_gradients(family, *exact_gradients(name, GaussianQ.of(family), p))
    got = gradient_by_batches(with_exact_critic(name, family, p), family, num_batches=200, batch_size=1000)
    assert got.keys() == want.keys()
    for parameter, (mean, se) in got.items():
        assert ((mean - want[parameter]).abs() / se).max() < NUM_STANDARD_ERRORS, parameter
        # The test has the power to see a flipped sign or a lost term: the gradient is many standard errors long.
        assert want[parameter].norm() > 3 * NUM_STANDARD_ERRORS * se.norm(), parameter


def test_path_gradient_has_no_variance_where_q_is_the_target():
    family = linear_family("diagonal")
    q = GaussianQ.of(family)
    p = GaussianTarget(q.loc.detach().clone(), q.covariance.detach().clone())
    objective = with_exact_critic("path", family, p)
    for gradient in torch.autograd.grad(objective.guide_loss(family.rsample(100), 0).loss, list(family.parameters())):
        assert gradient.abs().max() < 1e-12


# --- (e) training ends at the target ---------------------------------------------------------------


AVERAGING = 0.02  # weight of a step in the running average of the family's weights


def train(objective, family, p, num_steps, critic_steps, batch_size, lr):
    critic = objective.make_critic(p.dim, ())  # a linear map: as much as a Gaussian's score needs
    objective.setup(family, p, critic)
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=2 * lr, betas=(0.9, 0.99), foreach=True)
    guide_optimizer = torch.optim.Adam(family.parameters(), lr=lr, betas=(0.9, 0.99), foreach=True)
    schedules = [
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps, eta_min=1e-3 * lr)
        for optimizer in (critic_optimizer, guide_optimizer)
    ]
    averaged = [parameter.detach().clone() for parameter in family.parameters()]
    for step in range(num_steps):
        for _ in range(critic_steps):
            with torch.no_grad():
                sample = family.rsample(batch_size)
                critic.update_moments(sample.x)
            critic_optimizer.zero_grad()
            objective.critic_loss(sample, step).backward()
            critic_optimizer.step()
        guide_optimizer.zero_grad()
        objective.guide_loss(family.rsample(batch_size), step).loss.backward()
        guide_optimizer.step()
        for schedule in schedules:
            schedule.step()
        torch._foreach_lerp_(averaged, [parameter.detach() for parameter in family.parameters()], AVERAGING)
    torch.nn.utils.vector_to_parameters(torch.cat([value.flatten() for value in averaged]), family.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("path", {"num_steps": 500, "critic_steps": 2, "lr": 0.02}),
        # Its curvature in the mean is the square of the precision: slow directions are slower still.
        ("fisher", {"num_steps": 400, "critic_steps": 3, "lr": 0.05}),
        ("both", {"num_steps": 400, "critic_steps": 3, "lr": 0.05}),
        ("both_by_half_no_residual", {"num_steps": 400, "critic_steps": 3, "lr": 0.05}),
    ],
)
def test_training_ends_at_the_target(name, settings, kind):
    """The exact answer in mean and in every direction's sd, up to the noise of the draws that the end averages over.

    The weights are averaged over about fifty steps, each of one batch: in units of the target's sds the standard error
    is 1 / sqrt(50 x 256) = .009 for a mean and sqrt(2) less for an sd. With these settings, six to eight other seeds
    ended within .016 and .015. The start is far: KL above .3.
    """
    dim, batch_size = 3, 256
    family = linear_family(kind, dim, mixing_dim=dim)
    loc = torch.tensor([0.8, -0.6, 0.3])
    p = GaussianTarget(loc, torch.tensor([[1.4, 0.6, 0.0], [0.6, 1.0, -0.3], [0.0, -0.3, 0.8]]))
    before = oracle.kl_divergence(GaussianQ.of(family), p)
    train(OBJECTIVES[name](), family, p, batch_size=batch_size, **settings)
    q = GaussianQ.of(family)
    root = torch.linalg.cholesky(p.covariance)
    shift = torch.linalg.solve_triangular(root, (q.loc - p.loc)[:, None], upper=False).norm()
    relative = torch.linalg.solve_triangular(root, torch.linalg.cholesky(q.covariance), upper=False)
    sds = torch.linalg.svdvals(relative)
    se = 1.0 / math.sqrt(batch_size / AVERAGING)
    assert before > 0.3
    assert shift < NUM_STANDARD_ERRORS * se
    assert (sds - 1).abs().max() < NUM_STANDARD_ERRORS * se / math.sqrt(2)


# --- (f) what the gradient goes through ------------------------------------------------------------


def gradients_of(loss, *inputs):
    return torch.autograd.grad(loss, inputs, allow_unused=True)


class _Spy(torch.nn.Module):
    """A critic that remembers whether its inputs carried a gradient."""

    def __init__(self, module):
        super().__init__()
        self.module, self.saw_gradient = module, []

    def forward(self, x):
        self.saw_gradient.append(x.requires_grad)
        return self.module(x)


def test_path_gradient_goes_through_x_alone():
    family, p = problem("diagonal")
    target = GaussianTarget(p.loc, p.covariance, once_differentiable=True)
    critic = _Spy(ScoreNetwork(3, (8,)))
    objective = PathGradientKL()
    objective.setup(family, target, critic)
    sample = family.rsample(50)
    loss = objective.guide_loss(sample, 0).loss
    assert critic.saw_gradient == [False]
    by_x, by_conditional_score, *by_critic = gradients_of(
        loss, sample.x, sample.conditional_score, *critic.parameters()
    )
    assert by_conditional_score is None
    assert by_critic == [None] * len(by_critic)
    direction = objective.critic_value(sample.x.detach(), p.score(sample.x.detach()))
    torch.testing.assert_close(by_x, -direction / 50)


@pytest.mark.parametrize("residual", [True, False])
def test_fisher_divergence_goes_through_all_three(residual):
    """Through s_p, the critic's input and the conditional score: the product rule, term by term."""
    family, p = problem("diagonal")
    objective = FisherDivergence(target_residual=residual, path_weight=0.0)
    critic = objective.make_critic(3, (8,))
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    objective.setup(family, p, critic)
    sample = family.rsample(50)
    loss = objective.guide_loss(sample, 0).loss
    by_x, by_conditional_score = gradients_of(loss, sample.x, sample.conditional_score)

    x, c = sample.x.detach(), sample.conditional_score.detach()
    state = dict(critic.named_parameters())
    slope = torch.func.vmap(torch.func.jacrev(lambda point: functional_call(critic, state, (point[None],))[0]))(x)
    f = objective.critic_value(x, p.score(x)).detach()
    f_slope = (-p.precision - slope if residual else slope).detach()
    by_f = torch.einsum("bi,bij->bj", 2 * (p.score(x) - c - f), f_slope)
    by_target = -2 * f @ p.precision
    torch.testing.assert_close(by_x, (by_f + by_target) / 50)
    torch.testing.assert_close(by_conditional_score, -2 * f / 50)


@pytest.mark.parametrize("step", [STEP, 10])  # tempered by .6, and not
@pytest.mark.parametrize("weight", [3.0, 0.5])
@pytest.mark.parametrize("residual", [True, False])
def test_the_path_term_goes_through_x_alone(residual, weight, step):
    """For any critic: ``- weight f`` in x, f that of the tempered target; no slope of f, and nothing in the rest."""
    family, p = problem("diagonal")
    settings = {"target_residual": residual, "annealing_steps": 10, "annealing_start": 0.2}
    alone, both = FisherDivergence(path_weight=0.0, **settings), FisherDivergence(path_weight=weight, **settings)
    critic = alone.make_critic(3, (8,))
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    sample = family.rsample(50)
    inputs, gradients, divergences = (sample.x, sample.conditional_score, *critic.parameters()), [], []
    for objective in (alone, both):
        objective.setup(family, p, critic)
        losses = objective.guide_loss(sample, step)
        divergences.append(losses.fisher_divergence)
        gradients.append(torch.autograd.grad(losses.loss, inputs, retain_graph=True, materialize_grads=True))
    by_x, *by_the_rest = (after - before for before, after in zip(*gradients))

    x = sample.x.detach()
    factor = 0.6 if step == STEP else 1.0
    f = factor * p.score(x) - critic(x) if residual else critic(x)
    torch.testing.assert_close(by_x, -weight * f.detach() / 50)
    assert all(difference.abs().max() == 0 for difference in by_the_rest)
    assert divergences[0] == divergences[1]  # what is reported is the same


@pytest.mark.parametrize("name", OBJECTIVES)
def test_critic_loss_does_not_touch_the_family(name):
    family, p = problem("low_rank")
    objective = OBJECTIVES[name]()
    critic = objective.make_critic(3, (8,))
    target = GaussianTarget(p.loc, p.covariance, once_differentiable=True)
    objective.setup(family, target, critic)
    with torch.no_grad():
        sample = family.rsample(50)
    loss = objective.critic_loss(sample, STEP)
    *by_family, last_bias = gradients_of(loss, *family.parameters(), list(critic.parameters())[-1])
    assert by_family == [None] * len(by_family)
    assert last_bias.abs().max() > 0
    assert target.num_evaluations == (50 if "no_residual" in name else 0)


def test_critic_loss_values():
    """``|s - c|^2`` with the target residual; without it minus the game's value, lower by ``|s_p - c|^2``."""
    family, p = problem("diagonal")
    with torch.no_grad():
        sample = family.rsample(50)
        for name in ("path", "fisher"):
            objective = with_exact_critic(name, family, p)
            want = (objective.critic(sample.x) - sample.conditional_score).square().sum(-1).mean()
            torch.testing.assert_close(objective.critic_loss(sample, 0), want)
        objective = with_exact_critic("fisher_no_residual", family, p)
        goal = p.score(sample.x) - sample.conditional_score
        want = ((objective.critic(sample.x) - goal).square() - goal.square()).sum(-1).mean()
        torch.testing.assert_close(objective.critic_loss(sample, 0), want)


def test_annealing_rises_linearly_to_one():
    objective = FisherDivergence(annealing_steps=10, annealing_start=0.2)
    for step, factor in [(0, 0.2), (5, 0.6), (9, 0.92), (10, 1.0), (1000, 1.0)]:
        assert objective._tempering(step) == pytest.approx(factor)
