"""What a step and a run report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from pyro_sivism.diagnostics import Verdict
from pyro_sivism.family import GaussianFit
from pyro_sivism.stopping import Evidence

__all__ = ["FitResult", "History", "Seconds", "StepInfo", "StepReport"]

_READ_EVERY = 20


class StepReport(NamedTuple):
    """What one step did, before anybody has waited for its numbers: those of :class:`StepInfo` as scalars where they
    were computed."""

    step: int
    loss: Tensor
    critic_loss: Tensor
    num_nonfinite: Tensor


class StepInfo(NamedTuple):
    """What one step did.

    Attributes:
        step: its number, from 1.
        loss: the Fisher divergence estimate, in the whitened space; it falls towards 0,
            or towards the noise of random minibatches where the model draws them.
        critic_loss: the critic's loss at its last update.
        num_nonfinite: particles left out because their score was not finite, or the score's derivative where the
            objective needs it.
    """

    step: int
    loss: float
    critic_loss: float
    num_nonfinite: int


class History:
    """The steps of a run, in numbers.

    Args:
        read: from reports to numbers; it may have to wait for an accelerator, and may raise.
        reads_each: read each report at once, rather than twenty together.
    """

    def __init__(self, read: Callable[[Sequence[StepReport]], list[StepInfo]], *, reads_each: bool) -> None:
        self.infos: list[StepInfo] = []
        self._read, self._batch = read, 1 if reads_each else _READ_EVERY
        self._unread: list[StepReport] = []

    def add(self, report: StepReport) -> None:
        self._unread.append(report)
        if len(self._unread) == self._batch:
            self.read()

    def read(self) -> list[StepInfo]:
        """All steps so far."""
        unread, self._unread = self._unread, []
        self.infos += self._read(unread)
        return self.infos


class Seconds(dict[str, float]):
    """Wall-clock by part of a fit.

    Example:

        >>> seconds = Seconds()
        >>> with seconds.of("steps"):
        ...     pass
        >>> list(seconds)
        ['steps']
    """

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Add the seconds that pass within to those of a part, less those of parts within."""
        started, others = time.perf_counter(), sum(self.values())
        try:
            yield
        finally:
            within = sum(self.values()) - others
            self[part] = self.get(part, 0.0) + time.perf_counter() - started - within


@dataclass(frozen=True)
class FitResult:
    """What a call of :meth:`SIVISM.run` did.

    Attributes:
        num_steps: guide steps taken in this run.
        losses, critic_losses: one number per step of this run, float tensors (num_steps,).
        num_nonfinite: particles left out over all steps, as in :class:`StepInfo`.
        num_evaluations: scores of single points that this process computed since set-up, all told.
        seconds: wall-clock of ``setup`` (prototype, path choice), ``preconditioner``, ``critic_warmup``, ``steps``,
            ``compile``, ``evidence``, ``chains`` (that q followed) and ``verdict``, those that there were; of all runs
            since set-up.
        interrupted: whether Ctrl-C or a callback ended the run early.
        preconditioner: the Gaussian the family started from; None where a trained guide or a saved fit went on.
        target_path: how scores are computed, and why.
        evidence: how far q was from the posterior after each cycle of a run without a length, before the first to
            begin with; empty after a run of a given length.
        verdict: whether q can be trusted; None after a run of a given length under 100, on all ranks but the first, and
            where there could be none, which a warning says.
    """

    num_steps: int
    losses: Tensor
    critic_losses: Tensor
    num_nonfinite: int
    num_evaluations: int
    seconds: dict[str, float]
    interrupted: bool
    preconditioner: GaussianFit | None
    target_path: str
    evidence: tuple[Evidence, ...]
    verdict: Verdict | None
