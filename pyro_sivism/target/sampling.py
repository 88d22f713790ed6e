"""Drawing from distributions under ``torch.func.vmap``.

Many samplers fill a fresh tensor in place, ``torch.empty(shape).normal_()``, which ``vmap`` refuses: the tensor has
no batch dim to hold different numbers for different draws. Inside :func:`functional_sampling` such a call gives a
new tensor from an out-of-place sampler, which ``vmap`` makes different for each draw; and the Dirichlet, whose
sampler is a ``torch.autograd.Function`` that ``vmap`` refuses too, is drawn without its gradient.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributions.dirichlet
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["functional_sampling", "without_sampler_warnings"]


@contextmanager
def functional_sampling() -> Iterator[None]:
    """Let samplers run under ``vmap(..., randomness="different")``; draws carry no gradients."""
    original = torch.distributions.dirichlet._Dirichlet
    torch.distributions.dirichlet._Dirichlet = _Dirichlet  # type: ignore[misc, assignment]  # has apply, all it needs
    try:
        with _OutOfPlace():
            yield
    finally:
        torch.distributions.dirichlet._Dirichlet = original  # type: ignore[misc]  # as above


@contextmanager
def without_sampler_warnings() -> Iterator[None]:
    """Leave out two warnings of torch that tell a user nothing about the model.

    ``Wishart`` takes its valid draws for singular ones, says so, and draws them again. ``vmap`` says which operators
    it runs in a loop for want of a batched form: right, only slower.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Singular sample detected", UserWarning)
        warnings.filterwarnings("ignore", ".*we have not yet implemented the batching rule", UserWarning)
        yield


class _Dirichlet:
    @staticmethod
    def apply(concentration: Tensor) -> Tensor:
        return torch._sample_dirichlet(concentration)


class _OutOfPlace(TorchFunctionMode):
    """``tensor.normal_()`` and its kin *return* the random tensor and leave ``tensor`` as it was.

    Right for samplers, which use what the call returns.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _SAMPLERS.get(func, func)(*args, **(kwargs or {}))


def _normal(like: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    return mean + std * torch.randn(like.shape, dtype=like.dtype, device=like.device)


def _uniform(like: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    return low + (high - low) * torch.rand(like.shape, dtype=like.dtype, device=like.device)


def _exponential(like: Tensor, rate: float = 1.0) -> Tensor:
    return -torch.log1p(-_uniform(like)) / rate


def _cauchy(like: Tensor, median: float = 0.0, scale: float = 1.0) -> Tensor:
    return median + scale * torch.tan(math.pi * (_uniform(like) - 0.5))


_SAMPLERS: dict[Any, Callable[..., Tensor]] = {
    Tensor.normal_: _normal,
    Tensor.uniform_: _uniform,
    Tensor.exponential_: _exponential,
    Tensor.cauchy_: _cauchy,
}
