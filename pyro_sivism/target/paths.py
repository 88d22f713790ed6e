"""What the ways of computing a batch of scores share: their name, autograd, and the test of agreement."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = [
    "PARTICLE_ERRORS",
    "Allocations",
    "TargetPath",
    "agree",
    "direction",
    "first_line",
    "nudged",
    "rounding_slack",
    "values_at",
    "with_autograd",
]

# What a distribution or a factorization raises at a bad point: ValueError from validation that the user switched on
# for one distribution, LinAlgError (a RuntimeError), or torch.func refusing to word either of them.
PARTICLE_ERRORS = (RuntimeError, ValueError)

_NUM_NUDGES = 8


@dataclass(frozen=True)
class TargetPath:
    """How a batch of scores is computed: ``name`` is captured, captured_plate, vmap, plate or loop; ``reason``
    says why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def with_autograd(fn: Callable[[Tensor], Tensor], x: Tensor, with_score: bool) -> tuple[Tensor, Tensor | None]:
    """``fn(x)`` and the gradient of its sum; the gradient is differentiable where x requires one."""
    if not with_score:
        return fn(x), None
    differentiable = torch.is_grad_enabled() and x.requires_grad
    with torch.enable_grad():
        point = x if differentiable else x.detach().requires_grad_()
        log_density = fn(point)
        if not log_density.requires_grad:  # a density that does not depend on the latents at all
            return log_density, torch.zeros_like(point)
        (score,) = torch.autograd.grad(log_density.sum(), point, create_graph=differentiable, materialize_grads=True)
    return (log_density, score) if differentiable else (log_density.detach(), score)


def values_at(log_density: Callable[[Tensor], Tensor], point: Tensor, differentiable: bool) -> dict[str, Tensor]:
    """The log density of one point, its score, and where wanted the score's derivative along :func:`direction`."""
    with torch.enable_grad():
        x = point.clone().requires_grad_(differentiable)
        with torch.set_grad_enabled(differentiable):
            value, score = with_autograd(log_density, x, True)
        assert score is not None
        found = {"log density": value.detach(), "score": score.detach()}
        if differentiable:
            (product,) = torch.autograd.grad(score @ direction(point), x, materialize_grads=True)
            found["score's derivative"] = product
    return found


def direction(point: Tensor) -> Tensor:
    """A fixed direction without zeros, of the shape of a point (D,)."""
    return torch.cos(torch.arange(len(point), dtype=point.dtype, device=point.device))


def agree(got: Tensor | None, want: Tensor | None, slack: Tensor | float = 0.0) -> bool:
    """Equal up to the rounding of sums taken in another order, and ``slack`` on top; NaN equals NaN, and integers are
    exact."""
    assert got is not None
    assert want is not None
    if got.shape != want.shape or got.dtype != want.dtype:
        return False
    if not want.is_floating_point():
        return torch.equal(got, want)
    scale = want[want.isfinite()].abs().max().item() if want.isfinite().any() else 0.0
    allowed = tolerance(want.dtype) * (1.0 + scale + want.abs().nan_to_num(posinf=0.0)) + slack
    return bool(((got - want).abs() <= allowed).logical_or(got == want).logical_or(got.isnan() & want.isnan()).all())


def tolerance(dtype: torch.dtype) -> float:
    """What two right ways to compute a sum may be apart, relative to its terms: 3e-4 in float32, 9e-11 in float64."""
    return 50 * torch.finfo(dtype).eps ** 0.75


def nudged(points: Tensor) -> Iterator[Tensor]:
    """Points (..., D) with every coordinate eight roundings up or down, in eight fixed patterns."""
    size = 8 * torch.finfo(points.dtype).eps
    coordinates = torch.arange(1, points.shape[-1] + 1, dtype=points.dtype, device=points.device)
    for i in range(1, _NUM_NUDGES + 1):
        yield points * (1 + size * torch.cos(i * coordinates).sign())


def rounding_slack(want: Tensor, at_nudged: Iterable[Tensor]) -> Tensor | float:
    """How far two right ways to compute ``want`` may be apart, given its values at :func:`nudged` points.

    Where a density is ill-conditioned they differ by about as much as either differs from itself at points a few
    roundings away: ten times that is allowed. Infinite where no value at such a point can be had.
    """
    changes = [(near - want).abs().masked_fill(near == want, 0.0) for near in at_nudged]
    return 10 * torch.stack(changes).nan_to_num(nan=torch.inf).amax(0) if changes else torch.inf


def first_line(error: Exception) -> str:
    """An error in one line, for a reason that a user reads."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"


class Allocations(TorchDispatchMode):
    """Counts the bytes of every tensor made inside this context: what a run needs if nothing is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Whether torch keeps its compiler out of this mode, for which it would import that, in more than a second."""
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.num_bytes += sum(t.numel() * t.element_size() for t in tree_leaves(result) if isinstance(t, Tensor))
        return result
