"""When a run without a length has gone on long enough.

Such a run is a sequence of *cycles*, each as long as all before it: 150 steps, 150, 300, 600, ... Where q is not
settled before one, it follows chains from its own draws, too (:func:`~pyro_sivism.assessment.distance_to_chains`), but
for models with random minibatches, more than 256 dimensions or parameters to be learned, and for the paper's game. In
each cycle the learning rate falls to nearly zero (Loshchilov and Hutter, "SGDR: stochastic gradient descent with warm
restarts", ICLR 2017), so that q is at its best at the end, and no schedule needs to know the length of the run. There q
is judged on fresh draws and the scores there, never by the losses of the steps, and the run ends when q

- has *settled*: no moment is off and the Fisher divergence is small; or
- is right *by chains*: the divergence is not small, as where p has walls, but chains from q's draws rule out that it
  matters; or
- has *stalled*: both are tolerable, and the last cycle, half of all steps, made neither smaller by a quarter, nor did
  the last two together where a moment is off by half of what the verdict minds; or
- has had as many steps as the recipe allows.

The last q is kept, unless one before was clearly better. Where the Gaussian that q starts from is the posterior
already, no step is taken.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = ["Evidence", "StoppingRule"]

# After half as many steps from a Gaussian that was nearly right the sliced Wasserstein distance of a regression in four
# collinear dimensions was 1.2 times its noise, the median of five seeds; after these, .9.
_FIRST_CYCLE = 150
_SMALL_DIVERGENCE, _SMALL_PER_DIM = 0.2, 0.02  # whichever is more: spread over many dimensions it shows in none
_SMALL_MOMENT_ERROR = 0.05  # sds, or log2 of an sd
# Beyond, the verdict is not good, and errors may yet come down late: times what is small, and a divergence of the
# verdict's own threshold, 1, or D / 32 beyond 32 dimensions.
_TOLERABLE = 3.5
# Of a Gaussian whose means are all off by the standard error of 1,000 draws, or one of them by a tenth of an sd.
_MATCHED_PER_DIM, _MAX_MATCHED = 1e-3, 0.01
_GAIN = 0.25
# From here on one cycle without a gain may be chance: chains know the largest of hundreds of errors to about .05. A
# two-parameter response model of 144 dimensions was at .1 after 300 steps, 600 and 1,200, and its worst sd at .26,
# .20 and .15; after 2,400 at .15 to .24.
_DOUBTFUL_MOMENT_ERROR = 0.085


@dataclass(frozen=True)
class Evidence:
    """How far q is from the posterior, as far as its draws and the model's scores tell.

    Attributes:
        num_steps: steps taken when it was gathered, in all runs.
        moment_error: the largest error of a mean in posterior sds, or of an sd in log2, by a far end too, beyond what
            chance makes the largest of so many.
        divergence: the Fisher divergence in the whitened space, by the trained critic, but for the draws furthest off
            (:attr:`~pyro_sivism.diagnostics.FisherStatistics.bulk`).
        by_chains: whether the error of moments is by chains, too, which see more.
        is_ruled_out: whether chains rule out that a moment or a distribution function is off.
    """

    num_steps: int
    moment_error: float
    divergence: float
    by_chains: bool = False
    is_ruled_out: bool = False


class StoppingRule:
    """The lengths of a run's cycles, from the evidence after each.

    Args:
        dim: D.
        max_steps: of the run.
        goes_on: whether q has been trained before, so that at least one cycle is wanted.

    Example:

        >>> rule = StoppingRule(dim=10, max_steps=2400)
        >>> rule.next_cycle(Evidence(0, moment_error=0.3, divergence=2.0))
        150
        >>> rule.next_cycle(Evidence(150, moment_error=0.1, divergence=0.5))
        150
        >>> rule.next_cycle(Evidence(300, moment_error=0.0, divergence=0.1))
        0
    """

    def __init__(self, dim: int, max_steps: int, *, goes_on: bool = False) -> None:
        self.max_steps, self._goes_on = max_steps, goes_on
        self._small_divergence = max(_SMALL_DIVERGENCE, _SMALL_PER_DIM * dim)
        self._tolerable_divergence = min(_TOLERABLE * self._small_divergence, max(1.0, dim / 32.0))
        self._dim, self._num_steps, self._num_cycles = dim, 0, 0
        self._best: Evidence | None = None
        self._last: Evidence | None = None
        self._before_last: Evidence | None = None

    @property
    def last_is_best(self) -> bool:
        """Whether the q of the last evidence is the one to keep so far: unless one before was clearly better."""
        return self._best is self._last

    def may_end(self, evidence: Evidence) -> bool:
        """Whether this evidence would be enough, whatever the error of moments."""
        return any(self._is_enough(replace(evidence, moment_error=error)) for error in (0.0, evidence.moment_error))

    def wants_proof(self, evidence: Evidence) -> bool:
        """Whether long chains are to decide: the run would go on though moments are tolerable, and these may show that
        nothing matters; or it would end as settled by a q that was not so before, whose scores may agree with the
        model's where it has draws, and which may still lack the ends of a ridge.
        """
        if self._last is None or self._num_steps >= self.max_steps:
            return False
        is_tolerable = evidence.moment_error <= _TOLERABLE * _SMALL_MOMENT_ERROR
        has_just_settled = self.is_settled(evidence) and not self.is_settled(self._last)
        return has_just_settled or (is_tolerable and not self.may_end(evidence))

    def is_settled(self, evidence: Evidence) -> bool:
        """Whether no moment is off and the Fisher divergence is small, so that the objective alone takes q on best."""
        return _is_settled(evidence, self._small_divergence)

    def next_cycle(self, evidence: Evidence, *, is_moving: bool = False) -> int:
        """How many steps to go on for after this evidence; 0 to end.

        Args:
            evidence: before the first cycle, then after each.
            is_moving: whether the posterior itself is still changing, as the model's own parameters are learned, or
                scores are too noisy to say that anything is enough.
        """
        if self._is_enough(evidence) and (self._last is None or not is_moving):
            length = 0
        elif self._last is None:
            length = _FIRST_CYCLE
        else:
            length = self._num_steps
        if is_moving or self._best is None or not self._is_clearly_worse(evidence, self._best):
            self._best = evidence
        self._before_last, self._last = self._last, evidence
        length = min(length, self.max_steps - self._num_steps)
        self._num_steps += length
        self._num_cycles += 1
        return length

    def _is_enough(self, evidence: Evidence) -> bool:
        if self._last is None:
            matched = min(_MATCHED_PER_DIM * self._dim, _MAX_MATCHED)
            return not self._goes_on and _is_settled(evidence, matched)
        return evidence.is_ruled_out or self.is_settled(evidence) or self._has_stalled(evidence)

    def _is_clearly_worse(self, evidence: Evidence, best: Evidence) -> bool:
        """By more than separates one good q from the next. What chains alone have seen in one of them does not count.

        In a hundred dimensions the largest error of a moment is known to about .1, and the divergence from a posterior
        with thin tails doubles and halves. In the necks of a horseshoe scores are huge, and a Gaussian that has hardly
        a draw there has a divergence of 15 where a far better q has 90: a divergence alone says nothing against moments
        that have gained.
        """
        moment_error = max(best.moment_error, _TOLERABLE * _SMALL_MOMENT_ERROR)
        divergence = max(best.divergence, self._tolerable_divergence)
        is_further_off = evidence.by_chains == best.by_chains and evidence.moment_error > 1.5 * moment_error
        has_gained = evidence.by_chains == best.by_chains and best.moment_error > _SMALL_MOMENT_ERROR
        has_gained &= evidence.moment_error <= (1.0 - _GAIN) * best.moment_error
        return is_further_off or (evidence.divergence > 3.0 * divergence and not has_gained)

    def _has_stalled(self, evidence: Evidence) -> bool:
        """The first cycle may well end with larger errors than the Gaussian's, which the next ones make good."""
        if self._last is None or self._num_cycles == 1:
            return False
        is_moment_tolerable = evidence.moment_error <= _TOLERABLE * _SMALL_MOMENT_ERROR
        is_tolerable = is_moment_tolerable and evidence.divergence <= self._tolerable_divergence
        is_doubtful = evidence.moment_error > _DOUBTFUL_MOMENT_ERROR
        since = self._before_last if is_doubtful and self._before_last is not None else self._last
        return is_tolerable and not self._gains(evidence, self._last) and not self._gains(evidence, since)

    def _gains(self, evidence: Evidence, last: Evidence) -> bool:
        """Whether a cycle has brought something: smaller errors of moments, or a smaller divergence, that matter."""
        error, last_error = (max(each.moment_error, _SMALL_MOMENT_ERROR) for each in (evidence, last))
        divergence, last_divergence = (max(each.divergence, self._small_divergence) for each in (evidence, last))
        return error <= (1.0 - _GAIN) * last_error or divergence <= (1.0 - _GAIN) * last_divergence


def _is_settled(evidence: Evidence, small_divergence: float) -> bool:
    return evidence.moment_error <= _SMALL_MOMENT_ERROR and evidence.divergence <= small_divergence
