"""A run: steps in cycles, and where their number is not given, evidence between them that says when to end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from pyro_sivism.assessment import gather_evidence
from pyro_sivism.distributed import Ranks
from pyro_sivism.family import AffineMap
from pyro_sivism.results import History, Seconds
from pyro_sivism.stopping import Evidence, StoppingRule
from pyro_sivism.target import Target
from pyro_sivism.target.anchored import AnchoredTarget
from pyro_sivism.training import STEPS_BEFORE_COMPILING, Training

__all__ = ["Cycles"]


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

    def take(self, number: int) -> bool:
        """One cycle of so many steps; whether it was cut short."""
        self.on_cycle(number)
        self.training.plan(number)
        with self.seconds.of("steps"):
            started = time.perf_counter()
            for taken in range(1, number + 1):
                self.history.add(self.ranks.together(self.training.advance))
                if taken == STEPS_BEFORE_COMPILING:
                    self.training.compile_if_repaid(number - taken, (time.perf_counter() - started) / taken)
                if self.ranks.together(self.ranks.any, self.on_step()):
                    return True
            self.history.read()
        return False

    def take_until_settled(self, *, goes_on: bool) -> bool:
        """Cycles until the evidence says that it is enough; the best q is kept. Whether they were cut short.

        Args:
            goes_on: whether q is not the Gaussian that it starts from, so that a cycle is wanted in any case.
        """
        # In the noise of random minibatches no error is sure, which is no evidence that there is none.
        is_noisy = self.target.is_subsampled and not isinstance(self.target, AnchoredTarget)
        rule = StoppingRule(self.target.dim, self.training.recipe.max_steps, goes_on=goes_on or is_noisy)
        while True:
            found = self._gather_evidence(rule)
            self.evidence.append(found)
            length = rule.next_cycle(found, is_moving=is_noisy or bool(self.training.drifting_model_params()))
            if rule.last_is_best:
                best = self.training.snapshot()
            if self.ranks.together(self.ranks.any, length == 0):
                break
            if self.take(length):
                return True
        if not rule.last_is_best:
            self.training.restore(best)
        return False

    def _gather_evidence(self, rule: StoppingRule) -> Evidence:
        """Where the fit stands; the same on all ranks."""
        training = self.training
        with self.seconds.of("evidence"), self.ranks.same_random_numbers():
            found = gather_evidence(
                self.target, self.affine, training.averaged, training.objective, training.num_steps, rule
            )
        numbers = torch.tensor([found.moment_error, found.divergence], dtype=torch.double)
        self.ranks.together(self.ranks.broadcast_, [numbers])
        moment_error, divergence = numbers.tolist()
        return replace(found, moment_error=moment_error, divergence=divergence)
