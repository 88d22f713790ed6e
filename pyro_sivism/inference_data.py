"""From a fit to ArviZ: every group that ``az.summary``, ``az.loo``, ``az.plot_ppc`` and their kin read.

This is the one module that touches ArviZ. It builds the groups as xarray datasets and hands them to what the
installed ArviZ calls its container: ``arviz.InferenceData`` up to 0.2x, ``xarray.DataTree`` from 1.0 on. It imports it
where it first needs it: ArviZ and xarray take three seconds, more than many a fit.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import torch
from torch import Tensor, nn

from pyro_sivism.errors import ArgumentError, NotSetUpError, SivismWarning
from pyro_sivism.labels import Labels, as_numpy
from pyro_sivism.layout import LatentLayout
from pyro_sivism.own_sites import own_sites_first
from pyro_sivism.target import Target
from pyro_sivism.target.paths import first_line
from pyro_sivism.target.replay import Replay
from pyro_sivism.version import __version__
from pyro_sivism.warn import warn

if TYPE_CHECKING:
    import xarray

    from pyro_sivism.sivism import SIVISM

__all__ = ["effective_sample_size", "split_keywords", "to_inference_data"]

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
    ``posterior``              the latent sites and the deterministic ones; of a reparametrized site, that site itself
                               and last, as ``theta_decentered``, what is drawn in its place
    ``posterior_predictive``   new values of every observed site, given each draw
    ``log_likelihood``         ``log p(y_i | draw)`` of each observation, in the observed site's batch shape
    ``sample_stats``           ``lp``: the model's log density at each draw on the unconstrained space
    ``prior``                  draws of the same sites from the model alone
    ``prior_predictive``       observed sites drawn along with them
    ``observed_data``          the observed sites' values
    ``constant_data``          the model's other tensor and array arguments, by name
    ``unconstrained_posterior``  the draws before they are mapped to the sites' supports
    =========================  ================================================================================

    Dims are named after the plates; a dim without a plate is ``site_dim_i``, so also the dim of size 1 that a site
    has where it is inside another of two crossed plates. Sites have the shapes that the model gives them, as they
    have in ``arviz.from_pyro``. The draws are one chain: they are independent draws of one fit, so R-hat and ESS say
    nothing about how good the fit is. Fits of several seeds can be put side by side with
    ``arviz.concat(..., dim="chain")``.

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
    left_out = _LeftOut()
    for site, reason in replay.left_out.items():
        left_out.add(reason, name=site)
    for site in replay.moving_sites:
        left_out.add("an observed value that depends on the latents is a term of lp and no data", name=site)
    constant = (
        _constant_data(sivism.model, args, kwargs, replay.observed.values()) if constant_data is None else constant_data
    )
    constants = {name: as_numpy(value) for name, value in constant.items()}
    labels = Labels(replay.sites, {name: value.shape for name, value in constants.items()}, coords, dims)
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
                left_out.add(reason, "posterior", site)
            elif site in replay.sites and log_likelihood:
                left_out.add(reason, "log_likelihood", site)
    groups["posterior"] = labels.dataset(own_sites_first(posterior, trace))
    if posterior_predictive and replay.of_kind("observed"):
        simulated = _simulate(replay, left_out, "posterior_predictive", num_samples, values, batch_size)
        groups["posterior_predictive"] = labels.dataset(_of_kind(simulated, replay, "observed"))
    groups["log_likelihood"] = labels.dataset({k: v.double() for k, v in likelihood.items()}, batch_only=True)
    groups["sample_stats"] = labels.dataset(
        _log_density(Target(sivism.model, layout, trace, args, kwargs, paths=sivism.paths), replay, left_out, x)
    )
    if num_prior:
        drawn = _draw_prior(replay, left_out, num_prior, batch_size)
        groups["prior"] = labels.dataset(own_sites_first(_of_kind(drawn, replay, "latent", "deterministic"), trace))
        groups["prior_predictive"] = labels.dataset(_of_kind(drawn, replay, "observed"))
    groups["observed_data"] = labels.dataset(replay.observed, sampled=False)
    groups["constant_data"] = labels.constants(constants)
    groups["unconstrained_posterior"] = labels.unconstrained({s.name: u for s, u in layout.split(x)}, layout)
    left_out.warn()
    return _container(groups, _fit_attrs(sivism))


def split_keywords(model: Callable, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keywords for the model, and those of :func:`to_inference_data`.

    Raises:
        ArgumentError: the model takes a keyword of the same name, so that whose it is cannot be told.
    """
    options = {name: value for name, value in kwargs.items() if name in _OPTIONS}
    try:
        clash = sorted(options.keys() & inspect.signature(_function(model)).parameters.keys())
    except (TypeError, ValueError):  # a callable without a signature
        clash = []
    if clash:
        raise ArgumentError(
            f"{', '.join(clash)}: the model and the conversion both have a keyword of this name. Pass the model's "
            "arguments by position, or none at all to take those of the last step."
        )
    return {name: value for name, value in kwargs.items() if name not in options}, options


_OPTIONS = frozenset(
    name
    for name, parameter in inspect.signature(to_inference_data).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
)


def effective_sample_size(chains: np.ndarray) -> np.ndarray:
    """How many independent draws would estimate the means of K quantities as well as ``chains (C, S, K)`` do: (K,)."""
    import arviz
    import xarray

    dataset = xarray.Dataset({"quantity": (("chain", "draw", "k"), chains)})
    return arviz.ess(dataset, method="mean")["quantity"].values


# --- what goes into the groups ----------------------------------------------------------------------


def _last_arguments(sivism: SIVISM) -> tuple[tuple, dict[str, Any]]:
    try:
        return sivism.target.arguments
    except NotSetUpError:  # a fit read from a file has none; its model may need none
        return (), {}


def _function(model: Callable) -> Callable:
    """What its author wrote, without ``poutine.condition``, ``poutine.reparam`` and their kin around it."""
    while not isinstance(model, nn.Module) and hasattr(model, "fn"):
        model = model.fn
    return model.forward if isinstance(model, nn.Module) else model


def _constant_data(model: Callable, args: Sequence, kwargs: Mapping[str, Any], observed: Any) -> dict[str, Any]:
    """The tensors and arrays among the model's arguments, by name, without those that are the observations."""
    bound = inspect.signature(_function(model)).bind(*args, **kwargs)
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            named |= {f"{name}_{i}": item for i, item in enumerate(value)}
        elif kind is inspect.Parameter.VAR_KEYWORD:
            named |= value
        else:
            named[name] = value
    known = [as_numpy(value) for value in observed]
    arrays = {name: as_numpy(value) for name, value in named.items() if isinstance(value, (Tensor, np.ndarray))}
    return {name: array for name, array in arrays.items() if not any(_equal(array, other) for other in known)}


def _simulate(
    replay: Replay, left_out: _LeftOut, group: str, num_samples: int, values: Any, batch_size: int | None
) -> dict[str, Tensor]:
    try:
        return replay.simulate(num_samples, values, batch_size)
    except Exception as error:  # a likelihood without a sampler, say, must not cost the user the other groups
        left_out.add(f"drawing from the model failed with {first_line(error)}", group)
        return {}


def _draw_prior(replay: Replay, left_out: _LeftOut, num_samples: int, batch_size: int | None) -> dict[str, Tensor]:
    group = "prior and prior_predictive"
    if replay.flat_sites:
        flat = _quoted(replay.flat_sites)
        left_out.add(f"the density of {flat} is masked, so the prior is not the distribution it is sampled from", group)
        return {}
    if replay.moving_sites:
        terms = _quoted(replay.moving_sites)
        left_out.add(f"{terms} changes the prior, and the model does not draw from that", group)
        return {}
    return _simulate(replay, left_out, group, num_samples, None, batch_size)


@torch.no_grad()
def _log_density(target: Target, replay: Replay, left_out: _LeftOut, x: Tensor) -> dict[str, Tensor]:
    """``lp`` on the full data: with minibatches, the mean of their scaled log densities over an even cover."""
    minibatches = replay.even_minibatches()
    if minibatches is None or set(target.minibatch) != set(replay.subsampled_plates):
        plates = _quoted(replay.subsampled_plates)
        reason = f"plate {plates} subsamples, and no set of its minibatches visits each element of the full data once"
        left_out.add(reason, "sample_stats", "lp")
        return {}
    total = x.new_zeros(len(x), dtype=torch.float64)
    for minibatch in minibatches:
        target.minibatch = dict(minibatch)
        total += torch.cat([target.log_density(part) for part in x.split(_LP_BATCH)])
    return {"lp": total / len(minibatches)}


def _of_kind(found: Mapping[str, Tensor], replay: Replay, *kinds: str) -> dict[str, Tensor]:
    return {name: value for name, value in found.items() if replay.sites[name].kind in kinds}


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


# --- what is left out -------------------------------------------------------------------------------


class _LeftOut:
    """What the InferenceData does without, told in one warning for each reason."""

    def __init__(self) -> None:
        self._names: dict[tuple[str, str], list[str]] = {}

    def add(self, reason: str, group: str = "", name: str = "") -> None:
        """A variable of a group, a whole group, or a site wherever it would appear."""
        self._names.setdefault((group, reason), []).append(name)

    def warn(self) -> None:
        for (group, reason), names in self._names.items():
            if not group:
                what = f"site{'s' * (len(names) > 1)} {_quoted(names)}"
            else:
                what = f"{_quoted(names)} of {group}" if names[0] else group
            warn(f"the InferenceData leaves out {what}: {reason}.", SivismWarning)


def _quoted(names: Sequence[str], most: int = 6) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f"'{name}'" for name in names[:most]) + rest


# --- the container ----------------------------------------------------------------------------------


def _fit_attrs(sivism: SIVISM) -> dict[str, Any]:
    """How the posterior came about, in types that netCDF can hold."""
    seconds = sivism._seconds
    return {
        "inference_method": "semi-implicit variational inference via score matching",
        "objective": type(sivism.loss).__name__,
        "num_steps": sivism.num_steps_taken,
        "sampling_time": float(sum(seconds.values())),
        **({} if sivism._verdict is None else sivism._verdict.as_dict()),
        **{f"seconds_{name}": float(value) for name, value in seconds.items()},
        "seed": str(torch.initial_seed()),
        "pyro_version": pyro.__version__,
        "torch_version": str(torch.__version__),  # a subclass of str, which netCDF refuses
        "note": "independent draws of one variational fit: R-hat and ESS say nothing about its quality",
    }


def _container(groups: Mapping[str, xarray.Dataset], fit_attrs: Mapping[str, Any]) -> Any:
    """The non-empty groups in what the installed ArviZ works on."""
    import arviz
    import xarray

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
