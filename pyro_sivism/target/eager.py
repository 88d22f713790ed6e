"""A batch of log densities and scores by running the model, once for the batch or once for each point."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from pyro_sivism.errors import ModelError
from pyro_sivism.target.functorch import functorch_ready
from pyro_sivism.target.paths import PARTICLE_ERRORS, with_autograd
from pyro_sivism.target.runs import ModelRuns

__all__ = ["run_along"]


def run_along(runs: ModelRuns, path: str, x: Tensor, with_score: bool) -> tuple[Tensor, Tensor | None]:
    """``log p(x)`` (B,) and ``grad log p(x)`` (B, D), or None, at points (B, D), along "vmap", "plate" or "loop"."""
    if path == "vmap":
        return _vmap(runs, x, with_score)
    if path == "plate":
        return with_autograd(runs.in_plate, x, with_score)
    return _loop(runs, x, with_score)


def _vmap(runs: ModelRuns, x: Tensor, with_score: bool) -> tuple[Tensor, Tensor | None]:
    with functorch_ready():
        if not with_score:
            return vmap(runs.one)(x), None
        score, log_density = vmap(grad_and_value(runs.one))(x)
    return log_density, score


def _loop(runs: ModelRuns, x: Tensor, with_score: bool) -> tuple[Tensor, Tensor | None]:
    """One particle after the other. One that fails is NaN; that all fail is the model's error."""
    log_densities: list[Tensor] = []
    scores: list[Tensor] = []
    errors: list[Exception] = []
    for point in x:
        try:
            log_density, score = with_autograd(runs.one, point, with_score)
        except ModelError:
            raise
        except PARTICLE_ERRORS as error:
            errors.append(error)
            log_density, score = x.new_tensor(torch.nan), torch.full_like(point, torch.nan)
        log_densities.append(log_density)
        if score is not None:
            scores.append(score)
    if len(errors) == len(x) and not isinstance(errors[0], torch.linalg.LinAlgError):
        raise errors[0]
    return torch.stack(log_densities), torch.stack(scores) if with_score else None
