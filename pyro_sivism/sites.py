"""The sites of a Pyro model: their shapes at full plate size, the plates around them, and what kind they are.

Everything here is read off one message of a trace. A site inside a subsampling plate is held at the plate's *full*
size: the minibatch is indexed when the model runs, never when its sites are described.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import Delta, Unit
from pyro.distributions.util import sum_rightmost
from pyro.ops.tensor_utils import periodic_repeat
from pyro.poutine.util import site_is_subsample
from torch import Size, Tensor
from torch.distributions import Transform, constraints

from pyro_sivism.bijections import bijection
from pyro_sivism.errors import ModelError, UnsupportedSiteError

__all__ = [
    "LatentSite",
    "PlateDim",
    "Site",
    "check_support",
    "is_continuous_latent",
    "is_enumerable",
    "is_factor",
    "is_masked_out",
    "is_reparametrized",
    "layers",
    "log_abs_det_jacobian",
    "plates_around",
    "site_kind",
    "to_full_size",
]


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
class Site:
    """A site at full plate size.

    Attributes:
        name: its name.
        shape: of its value, ``batch_shape + event_shape``.
        event_dim: how many dims on the right belong to one event.
        plates: the vectorized plates around it, outermost first.
    """

    name: str
    shape: Size
    event_dim: int
    plates: tuple[PlateDim, ...]

    @property
    def batch_shape(self) -> Size:
        return self.shape[: len(self.shape) - self.event_dim]

    @property
    def subsampled_plates(self) -> tuple[PlateDim, ...]:
        return tuple(plate for plate in self.plates if plate.is_subsampled)

    @property
    def dims(self) -> tuple[str, ...]:
        """A name for each dim of the value: the plate's where there is one, else ``site_dim_i``."""
        names = {plate.dim + len(self.batch_shape): plate.name for plate in self.plates}
        return tuple(names.get(i, f"{self.name}_dim_{i}") for i in range(len(self.shape)))


@dataclass(frozen=True)
class LatentSite(Site):
    """Where one latent site lives in the unconstrained vector.

    Attributes:
        support: of the site's distribution.
        unconstrained_shape: of the unconstrained value, at full plate size. It differs from ``shape`` where the
            support changes the event's shape (a simplex of 3 has 2 unconstrained numbers).
        offset: where the site starts in the vector.
    """

    support: constraints.Constraint
    unconstrained_shape: Size
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

    def coordinate_names(self) -> list[str]:
        """A name for each unconstrained number: ``tau``, ``theta[3]``, ``w[1,0]``."""
        if not self.unconstrained_shape:
            return [self.name]
        ranges = [range(n) for n in self.unconstrained_shape]
        index = torch.cartesian_prod(*map(torch.tensor, ranges)).reshape(self.size, -1).tolist()
        return [f"{self.name}[{','.join(map(str, i))}]" for i in index]


def log_abs_det_jacobian(site: LatentSite, unconstrained: Tensor, value: Tensor) -> Tensor:
    """``log |d value / d unconstrained|`` of one site, one number for each batch element.

    Elementwise maps give one number per element and event maps one per event; both are summed over what is
    left of the event here.
    """
    log_det = site.transform.log_abs_det_jacobian(unconstrained, value)
    return sum_rightmost(log_det, log_det.dim() - value.dim() + site.event_dim)


# --- kinds of sites ---------------------------------------------------------------------------------


def check_support(msg: dict) -> None:
    """Raise :class:`UnsupportedSiteError` unless a sample site's support has a bijection."""
    name, fn = msg["name"], msg["fn"]
    if isinstance(innermost(fn), Delta):
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
    elif fn.support.is_discrete and fn.event_dim > 0:
        cure = (
            "discrete latents are summed over one by one, when each has finitely many values: put them into a "
            f"pyro.plate in the place of .to_event, or condition on them (poutine.condition(model, {{'{name}': ...}}))"
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


def site_kind(msg: dict) -> str:
    """What a sample site is to a fit: "latent", "discrete", "observed" or "deterministic"."""
    if msg["infer"].get("_deterministic") or is_reparametrized(msg):
        return "deterministic"
    if msg["is_observed"]:
        return "observed"
    return "discrete" if is_enumerable(msg) else "latent"


def is_reparametrized(msg: dict) -> bool:
    """Whether ``poutine.reparam`` has made a latent a function of others that are drawn in its place."""
    is_delta = msg["is_observed"] and isinstance(innermost(msg["fn"]), Delta)
    return is_delta and not msg["infer"].get("_deterministic")


def is_enumerable(msg: dict) -> bool:
    """Whether an unobserved site is a discrete latent with finitely many values to sum over."""
    return bool(getattr(msg["fn"], "has_enumerate_support", False))


def is_continuous_latent(msg: dict) -> bool:
    return msg["type"] == "sample" and not msg["is_observed"] and not site_is_subsample(msg) and not is_enumerable(msg)


def is_factor(msg: dict) -> bool:
    """Whether a site is a ``pyro.factor``: a density, and no observation."""
    return isinstance(innermost(msg["fn"]), Unit)


def is_masked_out(msg: dict) -> bool:
    """Whether a latent's own density is masked away, so that drawing from it is not drawing from its prior."""
    masks = [msg["mask"], *(getattr(fn, "_mask", None) for fn in layers(msg["fn"]))]
    return any(mask is not None and not bool(torch.as_tensor(mask).any()) for mask in masks)


def innermost(fn: Any) -> Any:
    """The distribution inside ``Independent``, ``MaskedDistribution`` and their kin."""
    *_, last = layers(fn)
    return last


def layers(fn: Any) -> Iterator[Any]:
    """A distribution and those inside it, one in the other."""
    yield fn
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
        yield fn


# --- shapes -----------------------------------------------------------------------------------------


def plates_around(msg: dict) -> tuple[PlateDim, ...]:
    """The vectorized plates around a site, outermost first; sequential plates leave no dim."""
    return tuple(
        PlateDim(frame.name, frame.dim, int(frame.full_size or frame.size), int(frame.size))
        for frame in sorted(msg["cond_indep_stack"], key=lambda frame: frame.dim or 0)
        if frame.vectorized
    )


def to_full_size(value: Tensor, msg: dict) -> Tensor:
    """The value at its site's shape, minibatches repeated along their plates until they have full size."""
    shape = msg["fn"].shape()
    try:
        value = value.expand(shape)  # a given initial value may be one number for all
    except RuntimeError:
        raise ModelError(
            f"latent site '{msg['name']}' has an initial value of shape {tuple(value.shape)}; expected {tuple(shape)}, "
            "or a shape that broadcasts to it. Mend init_loc_fn's value, or the site's plates and to_event."
        ) from None
    for plate in plates_around(msg):
        dim = plate.dim - msg["fn"].event_dim
        if plate.is_subsampled and value.shape[dim] == plate.subsample_size:
            value = periodic_repeat(value, plate.size, dim).contiguous()
    return value
