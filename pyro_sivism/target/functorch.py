"""What Pyro needs to run under ``torch.func``.

Pyro's enumeration and HMMs take logs by a ``torch.autograd.Function`` written before functorch: it has no
``setup_context``, so ``vmap`` refuses it. :func:`functorch_ready` swaps in the same function in the new
style for the time of one evaluation. Outside it Pyro is as it was. So it does with the validation of values, which
a distribution made while validation was on goes on with, and which asks a batched or recorded tensor whether it is
right.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pyro.ops.special
import torch
from torch import Tensor
from torch.distributions import Distribution

__all__ = ["functorch_ready"]


class _SafeLog(torch.autograd.Function):
    """``log x`` whose gradient at 0 is bounded: ``1 / max(x, eps)``, as ``pyro.ops.special.safe_log``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.log()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad / x.clamp(min=torch.finfo(x.dtype).eps)


@contextmanager
def functorch_ready() -> Iterator[None]:
    """Let ``torch.func`` transforms pass through Pyro's ``safe_log`` and past validation inside this context."""
    with (
        patch.object(pyro.ops.special, "_SafeLog", _SafeLog),
        patch.object(Distribution, "_validate_sample", lambda distribution, value: None),
    ):
        yield
