"""One unconstrained vector for all the continuous latents of a Pyro model.

A model's latents have supports, shapes and plates; the algorithm sees one vector ``x`` of D
unconstrained numbers. :class:`LatentLayout` is the frozen map between the two. Each site with
support S holds the slice ``x[offset : offset + size]``, is mapped to S by ``bijection(S)`` and adds
``log |d value / d x|`` to the target's log density. A site inside a subsampling plate is held at
the plate's *full* size: the minibatch is indexed when the model runs, never when the layout is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from pyro.distributions.util import sum_rightmost
from pyro.poutine import Trace
from torch import Size, Tensor

from pyro_sivism.bijections import bijection
from pyro_sivism.errors import EmptyModelError, LayoutChangedError
from pyro_sivism.sites import (
    LatentSite,
    check_support,
    is_continuous_latent,
    log_abs_det_jacobian,
    plates_around,
    to_full_size,
)

__all__ = ["LatentLayout"]


@dataclass(frozen=True)
class LatentLayout:
    """The frozen map between a model's latent sites and one unconstrained vector ``x`` of ``dim``.

    Args:
        sites: the latent sites in the order in which the model draws them.
        dtype: the floating dtype of ``x``, the widest of the sites'.
        device: where the model's latents live.

    Example:

        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     tau = pyro.sample("tau", dist.HalfNormal(1.0))
        ...     with pyro.plate("group", 3):
        ...         pyro.sample("theta", dist.Normal(0.0, tau))
        >>> layout = LatentLayout.from_trace(pyro.poutine.trace(model).get_trace())
        >>> layout.dim, layout["theta"].dims
        (4, ('group',))
        >>> layout.constrain(torch.zeros(5, 4))["theta"].shape
        torch.Size([5, 3])
    """

    sites: tuple[LatentSite, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def from_trace(cls, trace: Trace) -> LatentLayout:
        """The layout of a prototype trace: every unobserved, continuous sample site in it.

        Discrete sites are left out: the target sums over them (see ``pyro_sivism.target``).

        Raises:
            UnsupportedSiteError: a site's support has no bijection from an unconstrained space.
            EmptyModelError: there is no continuous latent site.
        """
        sites: list[LatentSite] = []
        offset, dtype, device = 0, None, torch.device("cpu")
        for name, msg in trace.nodes.items():
            if not is_continuous_latent(msg):
                continue
            check_support(msg)
            value = to_full_size(msg["value"].detach(), msg)
            unconstrained = bijection(msg["fn"].support).inv(value)
            site = LatentSite(
                name=name,
                support=msg["fn"].support,
                shape=value.shape,
                event_dim=msg["fn"].event_dim,
                unconstrained_shape=unconstrained.shape,
                plates=plates_around(msg),
                offset=offset,
            )
            sites.append(site)
            offset += site.size
            dtype = value.dtype if dtype is None else torch.promote_types(dtype, value.dtype)
            # A model on an accelerator may draw scalars from Normal(0.0, 1.0), which is on the CPU.
            device = value.device if device.type == "cpu" else device
        if offset == 0:
            raise EmptyModelError(
                "the model has no continuous latent site, so there is no posterior to fit: expected at "
                "least one unobserved pyro.sample of a continuous distribution. If sites are hidden by "
                "poutine.block or fixed by poutine.condition, expose at least one."
            )
        assert dtype is not None
        return cls(tuple(sites), dtype, device)

    @property
    def dim(self) -> int:
        """D, the length of the unconstrained vector."""
        return sum(site.size for site in self.sites)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(site.name for site in self.sites)

    @property
    def coordinate_names(self) -> list[str]:
        """A readable name for each of the D unconstrained numbers."""
        return [name for site in self.sites for name in site.coordinate_names()]

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __getitem__(self, name: str) -> LatentSite:
        for site in self.sites:
            if site.name == name:
                return site
        raise KeyError(name)

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """Constrained values, each ``(*batch, *site.shape)`` -> the unconstrained ``x (*batch, D)``."""
        parts = []
        for site in self.sites:
            unconstrained = site.transform.inv(values[site.name])
            batch = unconstrained.shape[: unconstrained.dim() - len(site.unconstrained_shape)]
            parts.append(unconstrained.reshape(batch + (site.size,)).to(self.device, self.dtype))
        return torch.cat(parts, -1)

    def init_from_trace(self, trace: Trace) -> Tensor:
        """The unconstrained vector ``(D,)`` at a trace's values, minibatches repeated to full size."""
        nodes = trace.nodes
        return self.pack({s.name: to_full_size(nodes[s.name]["value"].detach(), nodes[s.name]) for s in self.sites})

    def split(self, x: Tensor) -> Iterator[tuple[LatentSite, Tensor]]:
        """Each site with its unconstrained value ``(*batch, *unconstrained_shape)`` from ``x (*batch, D)``."""
        for site in self.sites:
            flat = x[..., site.offset : site.offset + site.size]
            yield site, flat.reshape(x.shape[:-1] + site.unconstrained_shape)

    def split_aligned(self, x: Tensor) -> Iterator[tuple[LatentSite, Tensor]]:
        """As :meth:`split`, for ``x`` whose batch dims are those of plates around the model.

        ``x`` is ``(*outer, 1, ..., 1, D)`` with a 1 for each of the model's own plate dims; the values
        come back aligned with Pyro's batch dims, ``(*outer, *site batch, *event)``.
        """
        for site in self.sites:
            flat = x[..., site.offset : site.offset + site.size]
            shape = torch.broadcast_shapes(site.unconstrained_shape, x.shape[:-1] + (1,) * site.unconstrained_event_dim)
            yield site, flat.reshape(shape)

    def constrain(self, x: Tensor) -> dict[str, Tensor]:
        """``x (*batch, D)`` -> each site's value ``(*batch, *site.shape)`` on its own support."""
        return {site.name: site.transform(u) for site, u in self.split(x)}

    def log_abs_det_jacobian(self, x: Tensor) -> Tensor:
        """``log |d values / d x|``, shape ``(*batch,)``, of all sites together at ``x (*batch, D)``."""
        total = x.new_zeros(x.shape[:-1])
        for site, u in self.split(x):
            log_det = log_abs_det_jacobian(site, u, site.transform(u))
            total = total + sum_rightmost(log_det, log_det.dim() - total.dim())
        return total

    def first_difference(self, other: LatentLayout) -> tuple[str, Size | None, Size | None] | None:
        """The first latent in which two layouts differ, with its shape in each, or None if they have the same."""
        for name in (*self.names, *other.names):
            shape, other_shape = (layout[name].shape if name in layout else None for layout in (self, other))
            if shape != other_shape:
                return name, shape, other_shape
        return None

    def check_same(self, other: LatentLayout) -> None:
        """Raise :class:`LayoutChangedError`, naming the site, unless ``other`` holds the same latents."""
        difference = self.first_difference(other)
        if difference is None:
            return
        name, old, new = difference
        if old is None or new is None:
            when = "with the new arguments" if old is None else "before"
            raise LayoutChangedError(
                f"latent site '{name}' exists only {when}: the set of latent sites must stay the same for one fit. "
                "Make a new SIVISM for the other structure; a fit read from a file needs its own model."
            )
        raise LayoutChangedError(
            f"latent site '{name}' had shape {tuple(old)} at set-up and has {tuple(new)} with the new arguments. For "
            "minibatches use pyro.plate(name, full_size, subsample_size=...) so that latents keep their full size; "
            "for other data make a new SIVISM."
        )
