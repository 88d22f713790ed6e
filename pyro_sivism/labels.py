"""Datasets whose dims are named after the model's plates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_sivism.errors import ArgumentError
from pyro_sivism.layout import LatentLayout
from pyro_sivism.sites import Site

if TYPE_CHECKING:
    import xarray

__all__ = ["Labels", "as_numpy"]


class Labels:
    """Names for the dims of every variable, and labels along them; the user's win."""

    def __init__(
        self,
        sites: Mapping[str, Site],
        constants: Mapping[str, tuple[int, ...]],
        coords: Mapping[str, Sequence] | None,
        dims: Mapping[str, Sequence[str]] | None,
    ) -> None:
        self._event_dims = {name: site.event_dim for name, site in sites.items()}
        # xarray takes a variable named as its own dim for a coordinate, and chain and draw are ArviZ's.
        taken = {"chain", "draw", *sites, *constants}
        shapes = {**{name: tuple(site.shape) for name, site in sites.items()}, "lp": ()}
        # A constant named like a site has the site's dims only where it has its shape: what is observed may be a part
        # of the argument.
        self._dims_of_other_shape = {
            name: tuple(f"{name}_argument_dim_{i}" for i in range(len(shape)))
            for name, shape in constants.items()
            if name in shapes and shape != shapes[name]
        }
        self._dims: dict[str, tuple[str, ...]] = {
            **{name: tuple(f"{name}_dim_{i}" for i in range(len(shape))) for name, shape in constants.items()},
            **{name: tuple(f"{d}_dim" if d in taken else d for d in site.dims) for name, site in sites.items()},
            "lp": (),
        }
        for name, given in (dims or {}).items():
            if name not in self._dims:
                raise ArgumentError(f"dims names the variable '{name}'; expected one of {sorted(self._dims)}")
            if isinstance(given, str) or len(given) != len(self._dims[name]):
                raise ArgumentError(
                    f"dims gives '{name}' {given!r}; expected {len(self._dims[name])} names in a list, in the place of "
                    f"{list(self._dims[name])} (chain and draw are not to be named)"
                )
            self._dims[name] = tuple(given)
        self._coords = dict(coords or {})
        known = {dim for names in (*self._dims.values(), *self._dims_of_other_shape.values()) for dim in names}
        for dim in self._coords:
            if dim not in known:
                raise ArgumentError(f"coords labels the dim '{dim}'; expected one of {sorted(known)}")

    def dataset(
        self, values: Mapping[str, Tensor | np.ndarray], sampled: bool = True, batch_only: bool = False
    ) -> xarray.Dataset:
        """Variables with their dims; ``batch_only`` for values without the sites' event dims."""
        dims = {}
        for name in values:
            names = self._dims[name]
            dims[name] = names[: len(names) - self._event_dims[name]] if batch_only else names
        return self._build(values, dims, sampled)

    def constants(self, values: Mapping[str, np.ndarray]) -> xarray.Dataset:
        """What is not of the model: its arguments, or what the user gives."""
        return self._build(
            values, {name: self._dims_of_other_shape.get(name, self._dims[name]) for name in values}, False
        )

    def unconstrained(self, values: Mapping[str, Tensor], layout: LatentLayout) -> xarray.Dataset:
        """As :meth:`dataset`; an event whose shape differs from the constrained one has dims of its own."""
        dims = {}
        for site in layout.sites:
            names = self._dims[site.name]
            if site.unconstrained_shape != site.shape:
                count = range(site.unconstrained_event_dim)
                event = tuple(f"{site.name}_unconstrained_dim_{i}" for i in count)
                names = names[: len(site.shape) - site.event_dim] + event
            dims[site.name] = names
        return self._build(values, dims, sampled=True)

    def _build(
        self, values: Mapping[str, Tensor | np.ndarray], dims: Mapping[str, tuple[str, ...]], sampled: bool
    ) -> xarray.Dataset:
        import xarray  # not with the package, which most fits would wait for

        variables: dict[str, tuple] = {}
        sizes: dict[str, int] = {}
        for name, value in values.items():
            array = as_numpy(value)
            names = ("chain", "draw", *dims[name]) if sampled else dims[name]
            array = array[None] if sampled else array
            for dim, size in zip(names, array.shape):
                if sizes.setdefault(dim, size) != size:
                    raise ArgumentError(
                        f"dim '{dim}' has size {sizes[dim]} elsewhere and {size} in '{name}', of shape {array.shape}; "
                        "give it another name by dims"
                    )
            variables[name] = (names, array)
        labels = {}
        for dim, size in sizes.items():
            labels[dim] = np.asarray(self._coords.get(dim, np.arange(size)))
            if len(labels[dim]) != size:
                raise ArgumentError(f"coords gives {len(labels[dim])} labels for dim '{dim}', which has size {size}")
        return xarray.Dataset(variables, coords=labels)


def as_numpy(value: Any) -> np.ndarray:
    if not isinstance(value, Tensor):
        return np.asarray(value)
    value = value.detach().cpu()
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
