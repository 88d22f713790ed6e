"""What Pyro needs to run under ``torch.func``, and to have the right derivatives.

Pyro's enumeration and HMMs take logs by a ``torch.autograd.Function`` written before functorch: it has no
``setup_context``, so ``vmap`` refuses it. Its derivative is ``1 / max(x, eps)``, which is none of the log's where
probabilities add up to less than 1e-7, as where two observations of one discrete latent contradict each other: scores
came out nearly zero that were in the hundreds. :func:`exact_logs` swaps in plain operations for the time of one
evaluation. Outside it Pyro is as it was. So does :func:`functorch_ready` with the validation of values, too, which
a distribution made while validation was on goes on with, and which asks a batched or recorded tensor whether it is
right.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pyro.ops.special
import torch
from torch import Tensor
from torch.distributions import Distribution

__all__ = ["exact_logs", "functorch_ready"]


class _ExactLog:
    """``log x``, with derivative ``1 / x``, and 0 where x is: what no latent makes possible depends on none."""

    @staticmethod
    def apply(x: Tensor) -> Tensor:
        is_positive = x > 0
        return torch.where(is_positive, torch.where(is_positive, x, 1.0).log(), -torch.inf)


@contextmanager
def exact_logs() -> Iterator[None]:
    """Let Pyro's ``safe_log`` be the logarithm inside this context."""
    with patch.object(pyro.ops.special, "_SafeLog", _ExactLog):
        yield


@contextmanager
def functorch_ready() -> Iterator[None]:
    """Let ``torch.func`` transforms pass through Pyro's ``safe_log`` and past validation inside this context."""
    with exact_logs(), patch.object(Distribution, "_validate_sample", lambda distribution, value: None):
        yield
