"""One unconstrained vector for all the continuous latents of a Pyro model.

A model's latents have supports, shapes and plates; the algorithm sees one vector ``x`` of D
unconstrained numbers. :class:`LatentLayout` is the frozen map between the two. Each site with
support S holds the slice ``x[offset : offset + size]``, is mapped to S by ``bijection(S)`` and adds
``log |d value / d x|`` to the target's log density. A site inside a subsampling plate is held at
the plate's *full* size: the minibatch is indexed when the model runs, never when the layout is made.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import Delta
from pyro.distributions.util import sum_rightmost
from pyro.ops.tensor_utils import periodic_repeat
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Size, Tensor
from torch.distributions import Transform, constraints

from pyro_sivism.bijections import bijection
from pyro_sivism.errors import EmptyModelError, LayoutChangedError, ModelError, UnsupportedSiteError

__all__ = ["LatentLayout", "LatentSite", "PlateDim"]


@dataclass(frozen=True)
class PlateDim:
    """A plate around a site: its name, its batch ``dim`` (negative), full size and minibatch size."""

    name: str
    dim: int
    size: int
    subsample_size: int

    @property
    def is_subsampled(self) -> bool:
        return self.subsample_size < self.size


@dataclass(frozen=True)
class LatentSite:
    """Where one latent site lives in the unconstrained vector.

    ``shape`` and ``unconstrained_shape`` are at full plate size; the two differ where the support
    changes the event shape (a simplex of 3 has 2 unconstrained numbers).
    """

    name: str
    support: constraints.Constraint
    shape: Size
    event_dim: int
    unconstrained_shape: Size
    plates: tuple[PlateDim, ...]
    offset: int

    @property
    def size(self) -> int:
        """How many unconstrained numbers the site takes."""
        return math.prod(self.unconstrained_shape)

    @property
    def unconstrained_event_dim(self) -> int:
        return self.event_dim + len(self.unconstrained_shape) - len(self.shape)

    @property
    def transform(self) -> Transform:
        """The bijection from the unconstrained space to the support."""
        return bijection(self.support)

    @property
    def subsampled_plates(self) -> tuple[PlateDim, ...]:
        return tuple(plate for plate in self.plates if plate.is_subsampled)

    @property
    def dims(self) -> tuple[str, ...]:
        """A name for each dim of the value: the plate's where there is one, else ``site_dim_i``."""
        batch_dim = len(self.shape) - self.event_dim
        names = {plate.dim + batch_dim: plate.name for plate in self.plates}
        return tuple(names.get(i, f"{self.name}_dim_{i}") for i in range(len(self.shape)))

    def coordinate_names(self) -> list[str]:
        """A name for each unconstrained number: ``tau``, ``theta[3]``, ``w[1,0]``."""
        if not self.unconstrained_shape:
            return [self.name]
        ranges = [range(n) for n in self.unconstrained_shape]
        index = torch.cartesian_prod(*map(torch.tensor, ranges)).reshape(self.size, -1).tolist()
        return [f"{self.name}[{','.join(map(str, i))}]" for i in index]


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
            if not _is_continuous_latent(msg):
                continue
            check_support(msg)
            value = _to_full_size(msg["value"].detach(), msg)
            unconstrained = bijection(msg["fn"].support).inv(value)
            site = LatentSite(
                name=name,
                support=msg["fn"].support,
                shape=value.shape,
                event_dim=msg["fn"].event_dim,
                unconstrained_shape=unconstrained.shape,
                plates=_plates(msg),
                offset=offset,
            )
            sites.append(site)
            offset += site.size
            dtype = value.dtype if dtype is None else torch.promote_types(dtype, value.dtype)
            device = value.device
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
            parts.append(unconstrained.reshape(batch + (site.size,)).to(self.dtype))
        return torch.cat(parts, -1)

    def init_from_trace(self, trace: Trace) -> Tensor:
        """The unconstrained vector ``(D,)`` at a trace's values, minibatches repeated to full size."""
        nodes = trace.nodes
        return self.pack({s.name: _to_full_size(nodes[s.name]["value"].detach(), nodes[s.name]) for s in self.sites})

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

    def check_same(self, other: LatentLayout) -> None:
        """Raise :class:`LayoutChangedError`, naming the site, unless ``other`` holds the same latents."""
        for name in (*self.names, *other.names):
            if name not in self or name not in other:
                when = "before" if name in self else "with the new arguments"
                raise LayoutChangedError(
                    f"latent site '{name}' exists only {when}: the set of latent sites must stay the same "
                    "for one fit. Make a new SIVISM for the other structure."
                )
            old, new = self[name].shape, other[name].shape
            if old != new:
                raise LayoutChangedError(
                    f"latent site '{name}' had shape {tuple(old)} at set-up and has {tuple(new)} with the new "
                    "arguments. For minibatches use pyro.plate(name, full_size, subsample_size=...) so that "
                    "latents keep their full size; for other data make a new SIVISM."
                )


def log_abs_det_jacobian(site: LatentSite, unconstrained: Tensor, value: Tensor) -> Tensor:
    """``log |d value / d unconstrained|`` of one site, one number for each batch element.

    Elementwise maps give one number per element and event maps one per event; both are summed over what is
    left of the event here.
    """
    log_det = site.transform.log_abs_det_jacobian(unconstrained, value)
    return sum_rightmost(log_det, log_det.dim() - value.dim() + site.event_dim)


def check_support(msg: dict) -> None:
    """Raise :class:`UnsupportedSiteError` unless a sample site's support has a bijection."""
    name, fn = msg["name"], msg["fn"]
    if _is_delta(fn):
        raise UnsupportedSiteError(
            f"latent site '{name}' is a Delta, which has no density; expected a continuous distribution. Cure: "
            f"pyro.deterministic('{name}', value)."
        )
    if _is_learned(fn.support):
        raise UnsupportedSiteError(
            f"latent site '{name}' ({type(fn).__name__}) has a support whose bounds are learned parameters; expected a "
            "fixed support. Draw it on a fixed one and transform it, e.g. u = pyro.sample('u', Uniform(0, 1)); "
            "x = low + (high - low) * u."
        )
    try:
        bijection(fn.support)
    except NotImplementedError:
        pass
    else:
        return
    if "sphere" in repr(fn.support).lower():
        cure = (
            "use a ProjectedNormal with "
            f"poutine.reparam(model, config={{'{name}': pyro.infer.reparam.ProjectedNormalReparam()}})"
        )
    elif fn.support.is_discrete:
        cure = (
            "discrete latents are summed over when they have finitely many values; truncate this one to a "
            f"Categorical, marginalize it by hand, or condition on it (poutine.condition(model, {{'{name}': ...}}))"
        )
    else:
        cure = "reparametrize it onto a support that has a bijection from the reals, or condition on it"
    raise UnsupportedSiteError(
        f"latent site '{name}' ({type(fn).__name__}) has support {fn.support}, which has no bijection from an "
        f"unconstrained space; expected a continuous support known to torch.distributions.biject_to. Cure: {cure}."
    )


def _is_learned(support: Any) -> bool:
    """Whether a constraint, or one inside it, has a bound with a gradient."""
    if isinstance(support, Tensor):
        return support.requires_grad
    parts = vars(support).values() if isinstance(support, constraints.Constraint) else support
    return isinstance(parts, Iterable) and not isinstance(parts, str) and any(map(_is_learned, parts))


def _is_delta(fn: Any) -> bool:
    while not isinstance(fn, Delta) and hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, Delta)


def is_enumerable(msg: dict) -> bool:
    """Whether an unobserved site is a discrete latent with finitely many values to sum over."""
    return bool(getattr(msg["fn"], "has_enumerate_support", False))


def _is_continuous_latent(msg: dict) -> bool:
    return msg["type"] == "sample" and not msg["is_observed"] and not site_is_subsample(msg) and not is_enumerable(msg)


def _plates(msg: dict) -> tuple[PlateDim, ...]:
    """The vectorized plates around a site, outermost first; sequential plates leave no dim."""
    return tuple(
        PlateDim(frame.name, frame.dim, int(frame.full_size or frame.size), int(frame.size))
        for frame in sorted(msg["cond_indep_stack"], key=lambda frame: frame.dim or 0)
        if frame.vectorized
    )


def _to_full_size(value: Tensor, msg: dict) -> Tensor:
    """The value at its site's shape, minibatches repeated along their plates until they have full size."""
    shape = msg["fn"].shape()
    try:
        value = value.expand(shape)  # a given initial value may be one number for all
    except RuntimeError:
        raise ModelError(
            f"latent site '{msg['name']}' has an initial value of shape {tuple(value.shape)}; expected {tuple(shape)}, "
            "or a shape that broadcasts to it. Mend init_loc_fn's value, or the site's plates and to_event."
        ) from None
    for plate in _plates(msg):
        dim = plate.dim - msg["fn"].event_dim
        if plate.is_subsampled and value.shape[dim] == plate.subsample_size:
            value = periodic_repeat(value, plate.size, dim).contiguous()
    return value
