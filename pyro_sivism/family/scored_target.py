"""A target as the preconditioner sees it: in float64, counted, in chunks, with NaN where it is undefined."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_sivism.family.affine import TargetDensity

__all__ = ["ScoredTarget"]


class ScoredTarget:
    """Log densities and scores of ``target``, undefined rows NaN.

    Attributes:
        num_evaluations: points scored.
        num_nonfinite: those with a NaN or an infinity among them.
        eps: the rounding unit of the target's arithmetic, float64's until :meth:`measure_eps` has looked.
    """

    max_chunk = 1024

    def __init__(self, target: TargetDensity) -> None:
        self._target = target
        self.num_evaluations = 0
        self.num_nonfinite = 0
        self.eps = torch.finfo(torch.float64).eps

    @property
    def dim(self) -> int:
        return self._target.dim

    @property
    def noise(self) -> float:
        """The relative rounding error to expect of log densities and scores, which are sums of rounded terms."""
        return 8.0 * self.eps

    def measure_eps(self, x: Tensor) -> None:
        """See whether the target computes in float32: it cannot tell two points apart then that differ by less."""
        x = x.float().double()
        x = x.where(x != 0, 1e-3)
        coarse, fine = self(x), self(x * (1.0 + 1e-11))
        same = all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(coarse, fine))
        self.eps = torch.finfo(torch.float32 if same else torch.float64).eps

    def resample_minibatch(self) -> None:
        """Let a target with random minibatches draw the next; the average over updates is then unbiased."""
        getattr(self._target, "resample_minibatch", lambda: None)()

    def anchor(self, x: Tensor) -> None:
        """Let a target with random minibatches have no noise at ``x (D,)``, and little around it, from now on."""
        anchored_at = getattr(self._target, "anchored_at", None)
        if anchored_at is not None:
            self._target = anchored_at(x)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        parts = [self._evaluate(chunk) for chunk in x.split(self.max_chunk)]
        return torch.cat([log_density for log_density, _ in parts]), torch.cat([score for _, score in parts])

    def _evaluate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_density, score = self._target.log_density_and_score(x)
        finite = log_density.isfinite() & score.isfinite().all(-1)
        self.num_evaluations += x.shape[0]
        self.num_nonfinite += int((~finite).sum())
        return (
            log_density.detach().double().where(finite, torch.nan),
            score.detach().double().where(finite[:, None], torch.nan),
        )
