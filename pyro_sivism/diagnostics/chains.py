"""Hamiltonian Monte Carlo from draws of q, one chain from each, all at once.

Every trajectory leaves p invariant (Duane, Kennedy, Pendleton, Roweth, "Hybrid Monte Carlo", Physics Letters B 1987):
where the chains end is nearer to p than where they started, and the same if q = p. They run in the frame that whitens
q, and split p into the standard normal that q is there and the rest: a step of h kicks the momentum by h times the
rest's score, half before and half after it turns position and momentum by the angle h, as the normal alone would move
them, exactly (Shahbaba, Lan, Johnson, Neal, "Split Hamiltonian Monte Carlo", Statistics and Computing 2014). So steps
are as long as p is like q, in any dimension. They are smaller than q's own draws ask for, as p may be more curved where
q has none; trajectories of a time up to pi and a little more go to the other side of q and beyond.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sivism.diagnostics.moments import Frame, finite_rows
from pyro_sivism.family import TargetDensity, WhitenedTarget

__all__ = ["Chains"]

_TRAJECTORY_TIME = math.pi
_FIRST_STEP_SIZE, _MAX_STEPS = 1.0, 48
_NUM_PILOTS = 256
_SHRINK, _MAX_TRIES = 0.5**0.5, 16
# The acceptance for which steps are shortened, and the one that is enough once more steps would cut trajectories short.
_WANTED_ACCEPTANCE, _ENOUGH_ACCEPTANCE = 0.92, 0.7


class Chains:
    """One chain from each of the first draws.

    Args:
        target: the log density and score that x lives in; exact, not a random minibatch.
        x: independent draws of q, (N, D), at least 50.
        num_chains: how many of them start a chain, the first ones; all if None. Those at which p is not finite do not.

    Attributes:
        frame: that of all draws, in whose whitened space y everything is.
        starts: of the chains, (n, D).
        others: the draws that start none, (N - n, D).
        num_evaluations: log densities and scores of single points computed so far.

    Raises:
        ArgumentError: too few draws, or a coordinate does not vary.
        NonFiniteError: p is not finite at most draws.

    Example:

        >>> class Normal:
        ...     dim = 1
        ...     def score(self, x):
        ...         return -x
        ...     def log_density_and_score(self, x):
        ...         return -0.5 * x.square().sum(-1), -x
        >>> _ = torch.manual_seed(0)
        >>> chains = Chains(Normal(), 1.0 + torch.randn(1024, 1)).run(8)
        >>> x = chains.frame.affine.forward(chains.late)
        >>> x.shape, round(x.mean().item(), 1) + 0.0
        (torch.Size([4, 1024, 1]), 0.0)
    """

    def __init__(self, target: TargetDensity, x: Tensor, num_chains: int | None = None) -> None:
        starts = x[:num_chains]
        log_density, score = target.log_density_and_score(starts)
        finite = finite_rows(starts, log_density, score)
        others = x[len(starts) :]
        others = others[finite_rows(others)].double() if len(others) else others.double()
        starts = starts[finite].double()
        self.frame = Frame.of(torch.cat([starts, others]))
        affine = self.frame.affine
        self._target = WhitenedTarget(target, affine)
        self._state = _State(
            affine.inverse(starts),
            log_density[finite].double() + affine.log_abs_det,
            affine.pull_back(score[finite].double()),
        )
        self.starts, self.others = self._state.y, affine.inverse(others)
        self.num_evaluations = len(finite)
        self._ends: list[Tensor] = []
        self._acceptances: list[float] = []
        self._tune()

    @property
    def num_trajectories(self) -> int:
        """Of each chain, so far."""
        return len(self._ends)

    @property
    def acceptance(self) -> float:
        """The mean acceptance rate so far; there is none before :meth:`run`, as of the next two."""
        return sum(self._acceptances) / len(self._acceptances)

    @property
    def late(self) -> Tensor:
        """Where the chains were after each trajectory of the second half so far, (T, n, D)."""
        return torch.stack(self._ends[len(self._ends) // 2 :])

    @property
    def stuck(self) -> float:
        """The fraction of chains that are still where they started."""
        return (self._ends[-1] == self.starts).all(-1).double().mean().item()

    def run(self, num_trajectories: int) -> Chains:
        """Go on until there are so many trajectories."""
        while len(self._ends) < num_trajectories:
            self._state, accepted = self._trajectory(self._state)
            self._ends.append(self._state.y)
            self._acceptances.append(accepted.mean().item())
        return self

    def forget(self) -> Chains:
        """Count trajectories from here on, as if there had been none: what they show is by new chance, from starts that
        are nearer to p."""
        self._ends, self._acceptances = [], []
        return self

    def _tune(self) -> None:
        """A step size that nearly all draws accept, and the number of steps."""
        pilots = _State(*(values[:_NUM_PILOTS] for values in self._state))
        self._step_size = _FIRST_STEP_SIZE
        for _ in range(_MAX_TRIES):
            self._num_steps = min(_MAX_STEPS, math.ceil(_TRAJECTORY_TIME / self._step_size))
            _, accepted = self._trajectory(pilots)
            enough = _ENOUGH_ACCEPTANCE if self._num_steps == _MAX_STEPS else _WANTED_ACCEPTANCE
            if accepted.mean() >= enough:
                break
            self._step_size *= _SHRINK

    def _trajectory(self, start: _State) -> tuple[_State, Tensor]:
        """One trajectory per row with its Metropolis decision, and the acceptance probabilities (n,)."""
        # Each chain has its own step size: no period of the target is met by all, and some are small enough for necks.
        step = self._step_size * (0.2 + torch.rand_like(start.log_density))[:, None]
        cosine, sine = step.cos(), step.sin()
        momentum = torch.randn_like(start.y)
        energy = start.log_density - 0.5 * momentum.square().sum(-1)
        state, inside = start, torch.ones_like(start.log_density, dtype=torch.bool)
        for left in reversed(range(self._num_steps)):
            momentum = momentum + 0.5 * step * (state.score + state.y)
            y, momentum = cosine * state.y + sine * momentum, cosine * momentum - sine * state.y
            if left:  # the log density on the way decides nothing
                moved = state._replace(y=y, score=self._target.score(y))
            else:
                moved = _State(y, *self._target.log_density_and_score(y))
            inside &= moved.log_density.isfinite() & moved.score.isfinite().all(-1)
            state = moved.where(inside, state)  # a chain without a score stays, and is rejected below
            momentum = momentum + 0.5 * step * (state.score + state.y)
        change = state.log_density - 0.5 * momentum.square().sum(-1) - energy
        acceptance = torch.where(inside, change, -torch.inf).nan_to_num(nan=-torch.inf).clamp(max=0.0).exp()
        self.num_evaluations += self._num_steps * len(start.y)
        return state.where(torch.rand_like(acceptance) < acceptance, start), acceptance


class _State(NamedTuple):
    """Points (n, D) with their log densities (n,) and scores (n, D)."""

    y: Tensor
    log_density: Tensor
    score: Tensor

    def where(self, keep: Tensor, other: _State) -> _State:
        """Rows of self where ``keep (n,)``, of the other elsewhere."""
        return _State(
            torch.where(keep[:, None], self.y, other.y),
            torch.where(keep, self.log_density, other.log_density),
            torch.where(keep[:, None], self.score, other.score),
        )
