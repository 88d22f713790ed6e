"""Centered sites, whose scale depends on other latents, and the reparametrization that frees them of it.

A hierarchical prior ``theta ~ Normal(mu, tau)`` with ``tau`` latent makes a funnel where the data say little: the
smaller tau is, the narrower is theta's range, down to nothing, and no family of one width fits all of it. The
*decentered* model draws

    theta_decentered ~ Normal(0, 1),    theta = mu + tau * theta_decentered,

which is the same model in coordinates whose prior has one width. Where the data inform every theta well the funnel is
cut off, and the centered way is the better one; the verdict on a fit tells.

A site is centered in this sense if the derivative of its scale by a latent is not zero, which one run of the model
tells. Only sites are taken for which the decentered model is the same one: a latent that is masked, or scaled by more
than its plates, is not the same once its density is that of another variable.

Source: Papaspiliopoulos, Roberts and Sköld, A general framework for the parametrization of hierarchical models,
Statistical Science 22 (2007); Gorinova, Moore and Hoffman, Automatic reparameterisation of probabilistic programs, ICML
2020, for doing it by effect handlers, which ``pyro.infer.reparam`` does.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.infer.autoguide.initialization import init_to_median
from pyro.infer.reparam import LocScaleReparam, TransformReparam
from pyro.infer.reparam.reparam import Reparam
from torch import Tensor
from torch.distributions import AffineTransform, ComposeTransform, Independent, Transform, constraints

from pyro_sivism.layout import LatentLayout
from pyro_sivism.prototype import Prototype
from pyro_sivism.sites import plates_around
from pyro_sivism.target import Target
from pyro_sivism.target.arguments import Arguments
from pyro_sivism.target.paths import PARTICLE_ERRORS, direction
from pyro_sivism.target.runs import ModelRuns

__all__ = [
    "CenteredSite",
    "MultivariateNormalReparam",
    "centered_sites",
    "decenter",
    "decentered_target",
    "decentering",
    "loose_sites",
    "suggestion",
]

_MIN_SLOPE = 1e-4  # of log scale by an unconstrained coordinate; rounding of tau / tau, float32, gives about 1e-7
_LOOSE_VARIANCE = 0.5  # of a decentered value, whose prior has 1
_MAX_DIM_OF_ALL, _NUM_LOOKED_AT = 64, 64  # beyond the one, the other of draws tell which sites are loose
_MAX_NAMES = 3


class CenteredSite(NamedTuple):
    """A latent site whose scale depends on other latents.

    Attributes:
        name: its name.
        scale_depends_on: the names of these latents.
        config: for ``poutine.reparam``: what decenters the site, and the sites that this makes.
    """

    name: str
    scale_depends_on: tuple[str, ...]
    config: dict[str, Reparam]


def decenter(model: Callable, *args: Any, **kwargs: Any) -> Callable:
    """The same model with every latent whose scale depends on other latents drawn at a fixed scale.

    Each such ``theta`` is drawn as ``theta_decentered``, with location 0 and scale 1, and computed from it, by
    ``poutine.reparam``; the model's code stays as it is. Of a transformed distribution the base is treated so: the
    logarithm of a ``LogNormal`` as ``theta_base_decentered``. A ``MultivariateNormal`` is whitened.

    In what is fitted to it, ``theta_decentered`` is a latent and ``theta`` a deterministic site: the InferenceData has
    both, theta first, with its own plates' dims; ``Predictive(model, guide=guide, num_samples=S)`` gives both; and
    ``sivism.sample`` gives the latents.

    Args:
        model: a Pyro model.
        args, kwargs: its arguments. It is run twice on them to find the sites; random states and the parameter store
            stay as they are.

    Returns:
        the model under ``poutine.reparam``, or the model itself if there is nothing to decenter.

    Raises:
        ModelError: the model cannot be fitted; the message names the site and the cure.

    Example:

        >>> import pyro, pyro.distributions as dist
        >>> def model(y):
        ...     tau = pyro.sample("tau", dist.HalfNormal(5.0))
        ...     with pyro.plate("school", len(y)):
        ...         theta = pyro.sample("theta", dist.Normal(0.0, tau))
        ...         pyro.sample("y", dist.Normal(theta, 10.0), obs=y)
        >>> y = torch.tensor([28.0, 8.0, -3.0])
        >>> trace = pyro.poutine.trace(decenter(model, y)).get_trace(y)
        >>> [name for name in trace.stochastic_nodes if name != "school"]
        ['tau', 'theta_decentered']
    """
    config = decentering(centered_sites(model, *args, **kwargs))
    return poutine.reparam(model, config=config) if config else model


def decentering(sites: Iterable[CenteredSite]) -> dict[str, Reparam]:
    """What to give ``poutine.reparam`` to decenter these sites."""
    return {name: reparam for site in sites for name, reparam in site.config.items()}


def loose_sites(
    model: Callable,
    sites: Sequence[CenteredSite],
    draws: Mapping[str, Tensor],
    args: Sequence = (),
    kwargs: Mapping[str, Any] | None = None,
) -> tuple[CenteredSite, ...]:
    """The centered sites about which the data say little: those whose decentered values vary nearly as much in the
    posterior as in the prior, with sd 1.

    If theta ~ N(mu, tau^2) is observed with error e, ``(theta - mu) / tau`` has posterior variance
    ``1 / (1 + tau^2 / e^2)``, and the decentered coordinates are the better ones where that exceeds 1/2
    (Papaspiliopoulos, Roberts and Sköld, 2007).

    Args:
        sites: of :func:`centered_sites`.
        draws: of the posterior, or near it: latent site -> (S, *site shape).
    """
    names = {site.name: [f"{list(site.config)[-1]}_{suffix}" for suffix in ("decentered", "base")] for site in sites}
    runs = _decentered_values(model, decentering(sites), itertools.chain(*names.values()), draws, args, kwargs or {})
    loose = []
    for site in sites:
        found = [next(values[name] for name in names[site.name] if name in values) for values in runs]
        if found and torch.stack(found).var(0).mean() > _LOOSE_VARIANCE:
            loose.append(site)
    return tuple(loose)


def decentered_target(target: Target, x: Tensor) -> tuple[Target, Tensor] | None:
    """The density of the same model with its centered sites decentered, and where draws ``x (S, D)`` of its latents are
    there, without those at which the model fails; None if there is no such site. In more than 64 dimensions, where it
    is dear, only sites about which the data say little where the draws are.

    Raises:
        ModelError: the model cannot be fitted so.
    """
    args, kwargs = target.arguments
    centered = centered_sites(target.model, *args, **kwargs)
    if not centered:
        return None
    draws = target.layout.constrain(x)
    if target.dim > _MAX_DIM_OF_ALL:
        few = {name: values[:_NUM_LOOKED_AT] for name, values in draws.items()}
        centered = loose_sites(target.model, centered, few, args, kwargs)
    config = decentering(centered)
    if not config:
        return None
    with _leaving_no_trace():
        prototype = Prototype.of(target.model, init_to_median, config)
        trace = prototype.trace(*args, **kwargs)
    layout = LatentLayout.from_trace(trace)
    runs = _decentered_values(target.model, config, layout.names, draws, args, kwargs)
    points = layout.pack({name: torch.stack([values[name] for values in runs]) for name in layout.names})
    return Target(prototype.model, layout, trace, args, kwargs, paths=target.paths), points


def _decentered_values(
    model: Callable,
    config: dict[str, Reparam],
    names: Iterable[str],
    draws: Mapping[str, Tensor],
    args: Sequence,
    kwargs: Mapping[str, Any],
) -> list[dict[str, Tensor]]:
    """What some sites of the decentered model are at each of the draws ``(S, *shape)`` of the centered one's latents,
    but those at which the model fails, as where a matrix is not positive definite."""
    wanted, found = set(names), []
    with _leaving_no_trace(), torch.no_grad(), pyro.validation_enabled(False), poutine.block():
        for i in range(len(next(iter(draws.values())))):
            given = poutine.condition(model, data={name: values[i] for name, values in draws.items()})
            try:
                nodes = poutine.trace(poutine.reparam(given, config=config)).get_trace(*args, **kwargs).nodes
            except PARTICLE_ERRORS:
                continue
            found.append({name: nodes[name]["value"] for name in wanted if name in nodes})
    return found


def centered_sites(model: Callable, *args: Any, **kwargs: Any) -> tuple[CenteredSite, ...]:
    """The latent sites of ``model(*args, **kwargs)`` whose scale depends on other latents, and that can be decentered.

    These are sites of real location-scale families, of transforms of such, and multivariate Normals. One whose location
    alone depends on latents is none of them, nor one whose scale is learned by ``pyro.param``. A positive site such as
    ``HalfNormal(tau)`` is none either: tau moves its logarithm, by which it is fitted, and does not stretch it.

    Raises:
        ModelError: the model cannot be fitted; the message names the site and the cure.

    Example:

        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     tau = pyro.sample("tau", dist.HalfNormal(1.0))
        ...     pyro.sample("theta", dist.Normal(0.0, tau))
        >>> [site[:2] for site in centered_sites(model)]
        [('theta', ('tau',))]
    """
    with _leaving_no_trace():
        prototype = Prototype.of(model, init_to_median).trace(*args, **kwargs)
        layout = LatentLayout.from_trace(prototype)
        runs = ModelRuns(model, layout, Arguments(args, kwargs), prototype)
        init = layout.init_from_trace(prototype)
        # Off the initial values, where a derivative may happen to be zero.
        x = (init + 0.1 * direction(init)).requires_grad_()
        with torch.enable_grad(), pyro.validation_enabled(False), poutine.block():
            nodes = runs.trace(x).nodes
            owners = [site.name for site in layout.sites for _ in range(site.size)]
            found = [
                _as_centered(site.name, nodes[site.name]["fn"], x, owners)
                for site in layout.sites
                if _can_be_redrawn(prototype.nodes[site.name], nodes[site.name])
            ]
    return tuple(site for site in found if site is not None)


def suggestion(target: Target) -> str | None:
    """A sentence that names the centered sites of a fit's model and the cure, or None if there are none.

    It never raises, and leaves the target, random states and the parameter store as they are.
    """
    args, kwargs = target.arguments
    try:
        sites = centered_sites(target.model, *args, **kwargs)
    except Exception:  # advice on a fit must not cost the fit
        return None
    if not sites:
        return None
    names = _listed([site.name for site in sites])
    parents = _listed(list(dict.fromkeys(name for site in sites for name in site.scale_depends_on)))
    subject = f"the scale of {names} depends" if len(sites) == 1 else f"the scales of {names} depend"
    return (
        f"In this model {subject} on {parents}, which makes a funnel where the data say little: try the same model "
        "decentered, SIVISM(pyro_sivism.decenter(model, *args)).run(None, *args)."
    )


class MultivariateNormalReparam(Reparam):
    """Whitens a latent ``x ~ MultivariateNormal(loc, L L')``: ``x_decentered ~ N(0, I)``, ``x = loc + L x_decentered``.

    For ``poutine.reparam``, which has no such reparametrization of its own.

    Example:

        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     return pyro.sample("x", dist.MultivariateNormal(torch.zeros(2), 4.0 * torch.eye(2)))
        >>> whitened = poutine.reparam(model, config={"x": MultivariateNormalReparam()})
        >>> trace = poutine.trace(whitened).get_trace()
        >>> bool((trace.nodes["x"]["value"] == 2.0 * trace.nodes["x_decentered"]["value"]).all())
        True
    """

    def apply(self, msg: Any) -> Any:
        name, value, is_observed = msg["name"], msg["value"], msg["is_observed"]
        fn, event_dim = self._unwrap(msg["fn"])
        white = None
        if value is not None:  # given by an initialization, say
            white = torch.linalg.solve_triangular(fn.scale_tril, (value - fn.loc)[..., None], upper=False)[..., 0]
        normal = dist.Normal(torch.zeros_like(fn.loc), torch.ones_like(fn.loc))
        white = pyro.sample(
            f"{name}_decentered", self._wrap(normal, event_dim), obs=white, infer={"is_observed": is_observed}
        )
        if value is None:
            value = fn.loc + (fn.scale_tril @ white[..., None])[..., 0]
        return {"fn": dist.Delta(value, event_dim=event_dim).mask(False), "value": value, "is_observed": True}


# --- one site ---------------------------------------------------------------------------------------


def _can_be_redrawn(prototype: dict, msg: dict) -> bool:
    """Whether the density of another variable in the site's place gives the same model.

    It does not where the density is masked, or raised to a power other than its plates'. Where the distribution depends
    on a discrete latent that is summed over, the site would have no one value.
    """
    mask, scale = prototype["mask"], math.prod(plate.size / plate.subsample_size for plate in plates_around(prototype))
    return (
        (mask is None or bool(torch.as_tensor(mask).all()))
        and bool(((torch.as_tensor(prototype["scale"]) - scale).abs() <= 1e-6 * scale).all())
        and msg["fn"].batch_shape == prototype["fn"].batch_shape
    )


def _as_centered(name: str, fn: Any, x: Tensor, owners: Sequence[str]) -> CenteredSite | None:
    """The site with what its scales depend on, or None if on nothing.

    ``fn`` is a function of ``x (D,)``, whose coordinates belong to the sites ``owners``.
    """
    depends = torch.zeros_like(x, dtype=torch.bool)
    config: dict[str, Reparam] = {}
    for scale, reparams in _scales(name, fn):
        moves = _moves(scale, x)
        if moves.any():
            depends |= moves
            config |= reparams
    if not config:
        return None
    return CenteredSite(name, tuple(dict.fromkeys(itertools.compress(owners, depends.tolist()))), config)


def _scales(name: str, fn: Any) -> Iterator[tuple[Tensor, dict[str, Reparam]]]:
    """Every scale of a site, relative to its own value, with the reparametrizations that free the site of it."""
    while isinstance(fn, Independent):
        fn = fn.base_dist
    if isinstance(fn, torch.distributions.MultivariateNormal):
        sd = torch.linalg.vector_norm(fn.scale_tril, dim=-1, keepdim=True)
        yield fn.scale_tril / sd.detach(), {name: MultivariateNormalReparam()}
    elif {"loc", "scale"} <= set(fn.arg_constraints) and _is_real(fn.support):
        yield fn.scale / fn.scale.detach(), {name: LocScaleReparam(0.0)}
    elif isinstance(fn, torch.distributions.TransformedDistribution):
        transforms = list(_flattened(fn.transforms))
        is_redrawn = isinstance(fn.base_dist, TorchDistributionMixin)  # torch wraps some bases in classes of its own
        if is_redrawn and _is_real(fn.base_dist.support) and all(transform.bijective for transform in transforms):
            # An affine map of a base on the real line; one that comes after another kind of map may be a shift of the
            # unconstrained value, as that after an exponential is.
            for transform in transforms:
                if not isinstance(transform, AffineTransform):
                    break
                scale = torch.as_tensor(transform.scale)
                yield scale / scale.detach(), {name: TransformReparam()}
            for scale, config in _scales(f"{name}_base", fn.base_dist):
                yield scale, {name: TransformReparam(), **config}


def _flattened(transforms: Sequence[Transform]) -> Iterator[Transform]:
    for transform in transforms:
        if isinstance(transform, ComposeTransform):
            yield from _flattened(transform.parts)
        else:
            yield transform


def _is_real(support: Any) -> bool:
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return isinstance(support, type(constraints.real))


def _moves(scale: Tensor, x: Tensor) -> Tensor:
    """Which of the coordinates of ``x (D,)`` a relative scale depends on, (D,)."""
    if not scale.requires_grad:
        return torch.zeros_like(x, dtype=torch.bool)
    # Unequal weights, so that no sum over elements is constant where the elements are not.
    weights = 1.0 + 0.5 * direction(scale.detach().reshape(-1)).reshape(scale.shape)
    (slope,) = torch.autograd.grad((weights * scale).sum(), x, retain_graph=True, materialize_grads=True)
    return slope.isfinite() & (slope.abs() > _MIN_SLOPE)


# --- around it --------------------------------------------------------------------------------------


@contextmanager
def _leaving_no_trace() -> Iterator[None]:
    """Put the random states back, and take parameters that were made out of the store again."""
    store, state = pyro.get_param_store(), pyro.util.get_rng_state()
    of_devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    names = set(store.keys())
    try:
        yield
    finally:
        pyro.util.set_rng_state(state)
        if of_devices:
            torch.cuda.set_rng_state_all(of_devices)
        for name in set(store.keys()) - names:
            del store[name]


def _listed(names: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b, c and 4 more``."""
    shown = [*names[:_MAX_NAMES], *([f"{len(names) - _MAX_NAMES} more"] if len(names) > _MAX_NAMES else [])]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
