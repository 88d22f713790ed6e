"""What a posterior of the zoo is, and the list of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["POSTERIORS", "Draws", "Posterior", "generator", "posterior"]

Draws = dict[str, Tensor]


@dataclass(frozen=True)
class Posterior:
    """A model and its data.

    Attributes:
        name: as in ``POSTERIORS``.
        model, args: ``model(*args)`` is an ordinary Pyro program for one draw of its latents.
        exact: independent draws of the posterior in float64, (S, *site shape) by site, where there is a closed form
            or a quadrature in at most two dimensions; None where a reference takes long chains.
        log_sites: positive sites with tails so heavy that a mean or an sd says nothing: errors are of their logarithm.
    """

    name: str
    model: Callable
    args: tuple[Any, ...]
    exact: Callable[[int], Draws] | None = None
    log_sites: tuple[str, ...] = ()


POSTERIORS: dict[str, Callable[[], Posterior]] = {}


def posterior(
    *, log_sites: tuple[str, ...] = ()
) -> Callable[[Callable[[], tuple[Callable, tuple, Any]]], Callable[[], Posterior]]:
    """Register a function without arguments that returns ``(model, args, exact or None)``, under its own name.

    Data are made in float32 and then take torch's default dtype, so that a fit in one precision and a reference in
    another are of the same posterior.
    """

    def register(make: Callable[[], tuple[Callable, tuple, Any]]) -> Callable[[], Posterior]:
        def made() -> Posterior:
            dtype = torch.get_default_dtype()
            try:
                torch.set_default_dtype(torch.float32)
                model, args, exact = make()
            finally:
                torch.set_default_dtype(dtype)
            args = tuple(arg.to(dtype) if torch.is_tensor(arg) and arg.is_floating_point() else arg for arg in args)
            return Posterior(make.__name__, model, args, exact, log_sites)

        POSTERIORS[make.__name__] = made
        return made

    return register


def generator(seed: int) -> torch.Generator:
    """The random numbers that a posterior's data are made of."""
    return torch.Generator().manual_seed(seed)
