"""From a fit to ArviZ: every group that ``az.summary``, ``az.loo``, ``az.plot_ppc`` and their kin read.

This is the one module that touches ArviZ. It builds the groups as xarray datasets and hands them to what the
installed ArviZ calls its container: ``arviz.InferenceData`` up to 0.2x, ``xarray.DataTree`` from 1.0 on.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import arviz
import numpy as np
import pyro
import torch
import xarray
from torch import Tensor, nn

from pyro_sivism.errors import ArgumentError, NotSetUpError, SivismWarning
from pyro_sivism.layout import LatentLayout
from pyro_sivism.target import Target
from pyro_sivism.target.replay import Replay, ReplaySite
from pyro_sivism.version import __version__
from pyro_sivism.warn import warn

if TYPE_CHECKING:
    from pyro_sivism.sivism import SIVISM

__all__ = ["to_inference_data"]

_LP_BATCH = 1000


def to_inference_data(
    sivism: SIVISM,
    *args: Any,
    num_samples: int = 1000,
    posterior_predictive: bool = True,
    log_likelihood: bool = True,
    prior: bool | int = True,
    constant_data: Mapping[str, Any] | None = None,
    coords: Mapping[str, Sequence] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    batch_size: int | None = None,
    **kwargs: Any,
) -> Any:
    """The fit as an ArviZ ``InferenceData`` (an ``xarray.DataTree`` on ArviZ 1.x).

    =========================  ================================================================================
    ``posterior``              the latent sites and the deterministic ones, a reparametrized site among them
    ``posterior_predictive``   new values of every observed site, given each draw
    ``log_likelihood``         ``log p(y_i | draw)`` of each observation, in the observed site's batch shape
    ``sample_stats``           ``lp``: the model's log density at each draw on the unconstrained space
    ``prior``                  draws of the same sites from the model alone
    ``prior_predictive``       observed sites drawn along with them
    ``observed_data``          the observed sites' values
    ``constant_data``          the model's other tensor and array arguments, by name
    ``unconstrained_posterior``  the draws before they are mapped to the sites' supports
    =========================  ================================================================================

    Dims are named after the plates; a dim without a plate is ``site_dim_i``. The draws are one chain: they are
    independent draws of one fit, so R-hat and ESS say nothing about how good the fit is. Fits of several seeds can
    be put side by side with ``arviz.concat(..., dim="chain")``.

    The log likelihood has neither a minibatch's scale nor that of ``poutine.scale``, and an observation that is
    masked out (``poutine.mask``, ``obs_mask``) has log likelihood 0, as it has in the model: sums over observations
    are right, but ``az.loo`` counts it as a data point. ``pyro.factor`` is part of ``lp`` and no observation, and
    draws from the prior know nothing of it; so is a site whose ``obs`` depends on latents.
    Discrete latents are summed out of the log likelihood where they belong to one observation each, and are drawn
    for the predictive.

    ``lp`` is the log joint density of latents and data, as the model scales and masks it, plus the log Jacobian of
    the map from the unconstrained space; discrete latents are summed out.

    Minibatches are put together to the full data where the model indexes its data by what the plate yields. What
    cannot be had right (a site that ignores the plate's indices, the observations of a hidden Markov chain, draws
    from an improper prior) is left out with a warning that names it.

    Args:
        sivism: a fit.
        args, kwargs: the model's arguments, with the observations in their place; those of the last step if none.
        num_samples: draws, S.
        posterior_predictive, log_likelihood: whether to have the group.
        prior: whether to have ``prior`` and ``prior_predictive``, or with how many draws; S if True.
        constant_data: variables for that group in the place of the model's arguments; ``{}`` for none.
        coords: dim -> its labels. They win over the default, 0, 1, ...
        dims: variable -> names for its dims, without chain and draw. They win over the plates' names.
        batch_size: draws per run of the model; by memory if None.

    Raises:
        NotSetUpError: the fit has not been set up.
        LayoutChangedError: the arguments change the shape of a latent site.
        ArgumentError: ``dims`` or ``coords`` do not fit the model, or a count is not positive.

    Example:

        >>> import pyro.distributions as dist
        >>> from pyro_sivism import SIVISM
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("school", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> pyro.set_rng_seed(0)
        >>> sivism = SIVISM(model)
        >>> fit = sivism.run(20, torch.ones(3), progress_bar=False)
        >>> idata = to_inference_data(sivism, torch.ones(3), num_samples=50, coords={"school": ["a", "b", "c"]})
        >>> idata.log_likelihood["y"].dims, idata.log_likelihood["y"].shape
        (('chain', 'draw', 'school'), (1, 50, 3))
    """
    num_prior = num_samples if prior is True else int(prior)
    for name, count, least in (("num_samples", num_samples, 1), ("batch_size", batch_size, 1), ("prior", num_prior, 0)):
        if count is not None and count < least:
            raise ArgumentError(f"expected {name} of at least {least}, got {count}")
    layout = sivism.guide.layout
    if not args and not kwargs:
        args, kwargs = _last_arguments(sivism)
    trace = sivism.guide.trace_model(*args, **kwargs)
    layout.check_same(LatentLayout.from_trace(trace))
    replay = Replay(sivism.model, layout, trace, args, kwargs)
    for site, reason in replay.left_out.items():
        _warn_left_out(f"site '{site}'", reason)

    for site in replay.moving_sites:
        _warn_left_out(f"site '{site}'", "its observed value depends on the latents, so it is a term of lp and no data")
    constant = (
        _constant_data(sivism.model, args, kwargs, replay.observed.values()) if constant_data is None else constant_data
    )
    constants = {name: _numpy(value) for name, value in constant.items()}
    labels = _Labels(replay.sites, {name: value.ndim for name, value in constants.items()}, coords, dims)
    groups: dict[str, xarray.Dataset] = {}

    x = sivism.sample_unconstrained(num_samples)
    values = layout.constrain(x)
    posterior, likelihood = dict(values), {}
    wants_likelihood = log_likelihood and bool(replay.of_kind("observed"))
    if wants_likelihood or replay.of_kind("deterministic"):
        evaluation = replay.evaluate(values, batch_size)
        posterior |= evaluation.deterministic
        likelihood = evaluation.log_likelihood if log_likelihood else {}
        for site, reason in evaluation.left_out.items():
            if site in replay.of_kind("deterministic"):
                _warn_left_out(f"'{site}' of posterior", reason)
            elif site in replay.sites and log_likelihood:
                _warn_left_out(f"'{site}' of log_likelihood", reason)
    groups["posterior"] = labels.dataset(posterior)
    if posterior_predictive and replay.of_kind("observed"):
        simulated = _simulate(replay, "posterior_predictive", num_samples, values, batch_size)
        groups["posterior_predictive"] = labels.dataset(_of_kind(simulated, replay, "observed"))
    groups["log_likelihood"] = labels.dataset({k: v.double() for k, v in likelihood.items()}, batch_only=True)
    groups["sample_stats"] = labels.dataset(_log_density(sivism.model, layout, trace, args, kwargs, replay, x))
    if num_prior:
        drawn = _draw_prior(replay, num_prior, batch_size)
        groups["prior"] = labels.dataset(_of_kind(drawn, replay, "latent", "deterministic"))
        groups["prior_predictive"] = labels.dataset(_of_kind(drawn, replay, "observed"))
    groups["observed_data"] = labels.dataset(replay.observed, sampled=False)
    groups["constant_data"] = labels.dataset(constants, sampled=False)
    groups["unconstrained_posterior"] = labels.unconstrained({s.name: u for s, u in layout.split(x)}, layout)
    return _container(groups, _fit_attrs(sivism))


# --- what goes into the groups ----------------------------------------------------------------------


def _last_arguments(sivism: SIVISM) -> tuple[tuple, dict[str, Any]]:
    try:
        return sivism.target.args, sivism.target.kwargs
    except NotSetUpError:  # a fit read from a file has none; its model may need none
        return (), {}


def _constant_data(model: Callable, args: Sequence, kwargs: Mapping[str, Any], observed: Any) -> dict[str, Any]:
    """The tensors and arrays among the model's arguments, by name, without those that are the observations."""
    while not isinstance(model, nn.Module) and hasattr(model, "fn"):  # models wrapped by poutine.condition and its kin
        model = model.fn
    bound = inspect.signature(model.forward if isinstance(model, nn.Module) else model).bind(*args, **kwargs)
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            named |= {f"{name}_{i}": item for i, item in enumerate(value)}
        elif kind is inspect.Parameter.VAR_KEYWORD:
            named |= value
        else:
            named[name] = value
    known = [_numpy(value) for value in observed]
    arrays = {name: _numpy(value) for name, value in named.items() if isinstance(value, (Tensor, np.ndarray))}
    return {name: array for name, array in arrays.items() if not any(_equal(array, other) for other in known)}


def _simulate(replay: Replay, group: str, num_samples: int, values: Any, batch_size: int | None) -> dict[str, Tensor]:
    try:
        return replay.simulate(num_samples, values, batch_size)
    except Exception as error:  # a likelihood without a sampler, say, must not cost the user the other groups
        reason = f"drawing from the model failed with {type(error).__name__}: {_first_line(error)}"
        _warn_left_out(group, reason)
        return {}


def _draw_prior(replay: Replay, num_samples: int, batch_size: int | None) -> dict[str, Tensor]:
    if replay.flat_sites:
        flat = ", ".join(f"'{name}'" for name in replay.flat_sites)
        reason = f"the density of {flat} is masked, so the prior is not the distribution it is sampled from"
        _warn_left_out("prior and prior_predictive", reason)
        return {}
    if replay.moving_sites:
        terms = ", ".join(f"'{name}'" for name in replay.moving_sites)
        _warn_left_out(
            "prior and prior_predictive", f"{terms} changes the prior, and the model does not draw from that"
        )
        return {}
    return _simulate(replay, "prior and prior_predictive", num_samples, None, batch_size)


@torch.no_grad()
def _log_density(
    model: Callable, layout: LatentLayout, trace: Any, args: Any, kwargs: Any, replay: Replay, x: Tensor
) -> dict[str, Tensor]:
    """``lp`` on the full data: with minibatches, the mean of their scaled log densities over an even cover."""
    target = Target(model, layout, trace, args, kwargs)
    minibatches = replay.even_minibatches()
    if minibatches is None or set(target.minibatch) != set(replay.subsampled_plates):
        plates = ", ".join(f"'{name}'" for name in replay.subsampled_plates)
        reason = f"plate {plates} subsamples, and no set of its minibatches visits each element of the full data once"
        _warn_left_out("'lp' of sample_stats", reason)
        return {}
    total = x.new_zeros(len(x), dtype=torch.float64)
    for minibatch in minibatches:
        target.minibatch = dict(minibatch)
        total += torch.cat([target.log_density(part) for part in x.split(_LP_BATCH)])
    return {"lp": total / len(minibatches)}


def _of_kind(found: Mapping[str, Tensor], replay: Replay, *kinds: str) -> dict[str, Tensor]:
    return {name: value for name, value in found.items() if replay.sites[name].kind in kinds}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _warn_left_out(what: str, reason: str) -> None:
    warn(f"the InferenceData leaves out {what}: {reason}.", SivismWarning)


# --- dims and coords --------------------------------------------------------------------------------


class _Labels:
    """Names for the dims of every variable, and labels along them; the user's win."""

    def __init__(
        self,
        sites: Mapping[str, ReplaySite],
        constants: Mapping[str, int],
        coords: Mapping[str, Sequence] | None,
        dims: Mapping[str, Sequence[str]] | None,
    ) -> None:
        self._event_dims = {name: site.event_dim for name, site in sites.items()}
        # xarray takes a variable named as its own dim for a coordinate, and chain and draw are ArviZ's.
        taken = {"chain", "draw", *sites, *constants}
        self._dims: dict[str, tuple[str, ...]] = {
            **{name: tuple(f"{name}_dim_{i}" for i in range(ndim)) for name, ndim in constants.items()},
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
        known = {dim for names in self._dims.values() for dim in names}
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
        variables: dict[str, tuple] = {}
        sizes: dict[str, int] = {}
        for name, value in values.items():
            array = _numpy(value)
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


def _numpy(value: Any) -> np.ndarray:
    if not isinstance(value, Tensor):
        return np.asarray(value)
    value = value.detach().cpu()
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


# --- the container ----------------------------------------------------------------------------------


def _fit_attrs(sivism: SIVISM) -> dict[str, Any]:
    """How the posterior came about, in types that netCDF can hold."""
    seconds = sivism._seconds
    return {
        "inference_method": "semi-implicit variational inference via score matching",
        "objective": type(sivism.loss).__name__,
        "num_steps": sivism.num_steps_taken,
        "sampling_time": float(sum(seconds.values())),
        **{f"seconds_{name}": float(value) for name, value in seconds.items()},
        "seed": str(torch.initial_seed()),
        "pyro_version": pyro.__version__,
        "torch_version": str(torch.__version__),  # a subclass of str, which netCDF refuses
        "note": "independent draws of one variational fit: R-hat and ESS say nothing about its quality",
    }


def _container(groups: Mapping[str, xarray.Dataset], fit_attrs: Mapping[str, Any]) -> Any:
    """The non-empty groups in what the installed ArviZ works on."""
    attrs = {
        "created_at": datetime.now(timezone.utc).isoformat(),
        "creation_library": "pyro_sivism",
        "creation_library_version": __version__,
        "creation_library_language": "Python",
        "arviz_version": arviz.__version__,
        "inference_library": "pyro_sivism",
        "inference_library_version": __version__,
    }
    full = {name: dataset.assign_attrs(attrs) for name, dataset in groups.items() if dataset.data_vars}
    full["posterior"] = full["posterior"].assign_attrs(fit_attrs)
    if "InferenceData" in vars(arviz):  # 1.x answers getattr for it, with a warning
        return arviz.InferenceData(**full)
    return xarray.DataTree.from_dict(full)
