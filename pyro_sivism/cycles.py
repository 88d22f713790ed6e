"""A run: steps in cycles, and where their number is not given, evidence between them that says when to end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from pyro_sivism.assessment import can_follow_chains, distance_to_chains, gather_evidence
from pyro_sivism.diagnostics import Chains
from pyro_sivism.distributed import Ranks
from pyro_sivism.family import AffineMap
from pyro_sivism.results import History, Seconds
from pyro_sivism.stopping import Evidence, StoppingRule
from pyro_sivism.target import Target
from pyro_sivism.target.anchored import AnchoredTarget
from pyro_sivism.training import STEPS_BEFORE_COMPILING, Training

__all__ = ["Cycles"]

_STEPS_TO_FOLLOW = 150  # the same chains


@dataclass
class Cycles:
    """The cycles of one run.

    Attributes:
        training: what takes the steps.
        target: the model's density that q is fitted to.
        affine: x from the whitened y, in which q draws.
        history: the steps taken.
        on_step: called after each step; whether to end.
        on_cycle: called before each cycle with its length.
        ranks: the processes that share the fit.
        seconds: of each part.
        evidence: gathered before the first cycle and after each, where the number of steps is not given.
        chains: from draws of the q that is kept, if any have run.
    """

    training: Training
    target: Target | AnchoredTarget
    affine: AffineMap
    history: History
    on_step: Callable[[], bool]
    on_cycle: Callable[[int], None]
    ranks: Ranks
    seconds: Seconds
    evidence: list[Evidence] = field(default_factory=list)
    chains: Chains | None = None

    def take(self, number: int) -> bool:
        """One cycle of so many steps; whether it was cut short."""
        self._begin(number)
        return self._advance(number, number)

    def _take_following(self, number: int, chains: Chains | None) -> bool:
        """One cycle in which q follows these chains from its draws, or new ones, and new ones every 150 steps.

        Where chains are slow they are not far ahead of q, and old ones would hold it back.
        """
        self._begin(number)
        for left in range(number, 0, -_STEPS_TO_FOLLOW):
            self.ranks.together(self._follow, chains)
            self.ranks.together(self.ranks.broadcast_, [torch.zeros(())])  # waits for those whose chains take longer
            if self._advance(min(left, _STEPS_TO_FOLLOW), left):
                return True
            chains = None
        return False

    def _begin(self, number: int) -> None:
        self.on_cycle(number)
        self.training.plan(number)

    def _advance(self, number: int, left: int) -> bool:
        """So many steps of those that are left of a cycle; whether they were cut short."""
        with self.seconds.of("steps"):
            started = time.perf_counter()
            for taken in range(1, number + 1):
                self.history.add(self.ranks.together(self.training.advance))
                if taken == STEPS_BEFORE_COMPILING:
                    self.training.compile_if_repaid(left - taken, (time.perf_counter() - started) / taken)
                if self.ranks.together(self.ranks.any, self.on_step()):
                    return True
            self.history.read()
        return False

    def take_until_settled(self, *, goes_on: bool) -> bool:
        """Cycles until the evidence says that it is enough; the best q is kept. Whether they were cut short.

        Args:
            goes_on: whether q is not the Gaussian that it starts from, or the critic does not know that one, so that a
                cycle is wanted in any case.
        """
        # In the noise of random minibatches no error is sure, which is no evidence that there is none.
        is_noisy = self.target.is_subsampled and not isinstance(self.target, AnchoredTarget)
        rule = StoppingRule(self.target.dim, self.training.recipe.max_steps, goes_on=goes_on or is_noisy)
        # Chains of parameters of the model that are learned would hold q where these were.
        may_follow = self.training.objective.follows_chains and not self.training.learns_model
        may_follow &= can_follow_chains(self.target)
        if goes_on:  # the divergence is by the critic, which need not know this q yet
            self.ranks.together(self.training.warm_up)
        try:
            while True:
                found, chains = self._gather_evidence(rule)
                self.evidence.append(found)
                length = rule.next_cycle(found, is_moving=is_noisy or bool(self.training.drifting_model_params()))
                if rule.last_is_best:
                    best = self.training.snapshot()
                if self.ranks.together(self.ranks.any, length == 0):
                    break
                follows = may_follow and not rule.is_settled(found)
                if self._take_following(length, chains) if follows else self.take(length):
                    return True
        finally:
            self.training.follow(None)
        if rule.last_is_best:
            self.chains = chains
        else:
            self.training.restore(best)
        return False

    def _follow(self, chains: Chains | None) -> None:
        """Let the next steps follow these chains from q's draws, or new ones."""
        training = self.training
        with self.seconds.of("chains"):
            training.follow(
                distance_to_chains(self.target, self.affine, training.averaged, training.num_own_particles, chains)
            )

    def _gather_evidence(self, rule: StoppingRule) -> tuple[Evidence, Chains | None]:
        """Where the fit stands, the same on all ranks, and the chains that say so, if any have run."""
        training = self.training
        with self.seconds.of("evidence"), self.ranks.same_random_numbers():
            found, chains = gather_evidence(
                self.target, self.affine, training.averaged, training.objective, training.num_steps, rule
            )
        numbers = [found.moment_error, found.divergence, float(found.by_chains), float(found.is_ruled_out)]
        shared = torch.tensor(numbers, dtype=torch.double)
        self.ranks.together(self.ranks.broadcast_, [shared])
        moment_error, divergence, by_chains, is_ruled_out = shared.tolist()
        return Evidence(found.num_steps, moment_error, divergence, bool(by_chains), bool(is_ruled_out)), chains
