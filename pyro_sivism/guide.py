"""The semi-implicit family as a Pyro autoguide."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.infer.autoguide import AutoContinuous
from pyro.infer.autoguide.initialization import init_to_median
from pyro.infer.reparam.reparam import Reparam
from pyro.poutine import Trace
from torch import Size, Tensor

from pyro_sivism.errors import ArgumentError, ModelError, NotSetUpError
from pyro_sivism.family import AffineMap, Conditional, DiagonalNormal, LogDensityEstimate, SemiImplicit
from pyro_sivism.layout import LatentLayout
from pyro_sivism.own_sites import OwnSites, auxiliary_names
from pyro_sivism.posterior import SemiImplicitPosterior, Transformed
from pyro_sivism.prototype import Prototype
from pyro_sivism.recipe import Recipe
from pyro_sivism.sites import log_abs_det_jacobian

__all__ = ["SemiImplicitGuide", "SemiImplicitPosterior"]


class SemiImplicitGuide(AutoContinuous):
    """An autoguide whose posterior is a semi-implicit mixture over the model's unconstrained latents.

        z ~ N(0, I_M),    y | z ~ q(y|z),    x = loc + scale_tril y,    values = bijection(x).

    Train it with :class:`~pyro_sivism.SIVISM`, which also fits ``loc`` and ``scale_tril``. It is used like any
    Pyro autoguide: ``Predictive(model, guide=guide, num_samples=S)``, ``guide.median()``,
    ``guide.quantiles([.05, .95])``, in an ``AutoGuideList``, under ``poutine.block``, inside outer plates.

    The mixing variable is no sample site, and the density that ``Trace_ELBO`` sees at the auxiliary site
    ``_SemiImplicitGuide_latent`` is an upper bound in expectation (the draw's own z among ``num_mixing`` draws),
    so that an ELBO computed with this guide is a lower bound on the evidence, never above it. Training with
    ``SVI`` and ``Trace_ELBO`` is the surrogate bound of Yin and Zhou (ICML 2018).

    ``loc`` and ``scale_tril`` are buffers, which Pyro's param store does not hold: keep a trained guide by
    ``torch.save`` or its ``state_dict``, not by saving the store.

    Discrete latents with finitely many values are left to the model: :class:`~pyro_sivism.SIVISM` sums over them.

    Args:
        model: a Pyro model.
        mixing_dim: M, the length of z; D, at most 256, if None.
        hidden_dims: widths of the mixing network; by D if None.
        conditional: q(y|z): a class or factory called as ``conditional(dim, mixing_dim, hidden_dims)``, e.g.
            ``LowRankNormal`` or ``functools.partial(DiagonalNormal, scale_depends_on_z=False)``, or a ready
            :class:`~pyro_sivism.family.Conditional`. A :class:`~pyro_sivism.family.DiagonalNormal` if None.
        init_loc_fn: where the latents start, one of ``pyro.infer.autoguide.initialization``.
        init_scale: sd of the unconstrained latents before any fit; 0.1 if None.
        create_plates: as in ``pyro.infer.autoguide.AutoGuide``.
        num_mixing: mixing draws behind one evaluation of the guide's density by ``Trace_ELBO``.

    Raises:
        ArgumentError: an argument is of the wrong kind or out of range.

    Example:

        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("rate", dist.Gamma(2.0, 1.0))
        >>> guide = SemiImplicitGuide(model).setup()
        >>> guide()["rate"] > 0
        tensor(True)
    """

    # Set by Pyro's base classes.
    _pyro_name: str
    _model: Prototype | None
    master: Any
    _fitted: Tensor

    def __init__(
        self,
        model: Callable,
        *,
        mixing_dim: int | None = None,
        hidden_dims: Sequence[int] | None = None,
        conditional: Conditional | Callable[..., Conditional] | None = None,
        init_loc_fn: Callable = init_to_median,
        init_scale: float | None = None,
        create_plates: Callable | None = None,
        num_mixing: int = 64,
    ) -> None:
        if not callable(model):
            raise ArgumentError(f"model is a {type(model).__name__}; expected a callable with Pyro primitives")
        if init_scale is not None and not init_scale > 0:
            raise ArgumentError(f"expected init_scale > 0, got {init_scale}")
        if num_mixing < 1:
            raise ArgumentError(f"expected num_mixing of at least 1, got {num_mixing}")
        super().__init__(model)
        self._model = Prototype.of(model, init_loc_fn)
        self.create_plates = create_plates
        self._mixing_dim = mixing_dim
        self._hidden_dims = None if hidden_dims is None else tuple(hidden_dims)
        self._conditional_factory = None if isinstance(conditional, Conditional) else conditional
        self._ready_conditional = (conditional,) if isinstance(conditional, Conditional) else None
        self._init_scale = 0.1 if init_scale is None else float(init_scale)
        self.num_mixing = num_mixing
        self._layout: LatentLayout | None = None
        self._reparams: dict[str, Reparam] = {}
        self._auxiliary: dict[str, str] = {}  # own site -> the latent it is computed from
        self._arguments: tuple[tuple, dict[str, Any]] | None = None

    # --- set-up -------------------------------------------------------------------------------------

    @property
    def is_set_up(self) -> bool:
        return self._layout is not None

    @property
    def is_fitted(self) -> bool:
        """Whether a SIVISM has fitted the Gaussian the family lives on; kept by ``state_dict``."""
        return self.is_set_up and bool(self._fitted)

    @is_fitted.setter
    def is_fitted(self, value: bool) -> None:
        self._require_set_up()
        self._fitted.fill_(value)

    @property
    def layout(self) -> LatentLayout:
        """Where each latent site lives in the unconstrained vector; of a reparametrized one its auxiliary latents.

        Raises:
            NotSetUpError: before the first call.
        """
        self._require_set_up()
        assert self._layout is not None
        return self._layout

    def _require_set_up(self) -> None:
        if not self.is_set_up:
            raise NotSetUpError(
                "this SemiImplicitGuide does not know its model's latents yet. Call guide.setup(*args, **kwargs) with "
                "the model's arguments first, or guide(*args, **kwargs), or SIVISM's setup, step or run."
            )

    def setup(self, *args: Any, **kwargs: Any) -> SemiImplicitGuide:
        """Run the model once on its arguments, lay out its latents and make the family; returns the guide.

        Raises:
            UnsupportedSiteError: a latent site's support has no bijection from the reals.
            EmptyModelError: the model has no continuous latents.
        """
        if not self.is_set_up:
            if self.master is not None and self.master().prototype_trace is None:
                self.master()._setup_prototype(*args, **kwargs)  # a guide list checks its parts against its own
            self._setup_prototype(*args, **kwargs)
        return self

    def trace_model(self, *args: Any, **kwargs: Any) -> Trace:
        """A trace of the model with its latents at their initial values (``init_loc_fn``)."""
        return self._require_model().trace(*args, **kwargs)

    def check_model(self, model: Callable, *args: Any, **kwargs: Any) -> None:
        """Raise unless ``model`` has the latents of the model that this guide was made for.

        It is run once on its arguments, unless it is that very model.

        Raises:
            ModelError: a latent site is missing on one side, or differs in shape.
        """
        own = self._require_model()
        if model is own.own_model:
            return
        other = LatentLayout.from_trace(Prototype.of(model, own.init_loc_fn, self._reparams).trace(*args, **kwargs))
        difference = self.layout.first_difference(other)
        if difference is not None:
            name, shape, other_shape = difference
            raise ModelError(
                f"the guide was made for another model: latent site '{name}' "
                f"{_has_shape(shape)} in the guide's model and {_has_shape(other_shape)} in the model given here. Make "
                "the guide by SemiImplicitGuide(model) of this very model, with all the handlers around it."
            )

    def reparametrize(self, config: Mapping[str, Reparam]) -> None:
        """Fit latents in other coordinates: those of ``poutine.reparam(model, config=config)``, whose auxiliary latents
        :attr:`layout` has from the next set-up on. Calls of the guide, medians and quantiles are of the model's own
        sites as before.
        """
        own = self._require_model()
        self._reparams = dict(config)
        self._model = Prototype.of(own.own_model, own.init_loc_fn, self._reparams)

    @property
    def init_loc_fn(self) -> Callable:
        """Where the latents start."""
        return self._require_model().init_loc_fn

    @property
    def reparams(self) -> dict[str, Reparam]:
        """What :meth:`reparametrize` was called with."""
        return self._reparams

    def reparametrized(self, model: Callable) -> Callable:
        """``model`` in the coordinates that the guide is fitted in: itself, unless :meth:`reparametrize` was called."""
        return poutine.reparam(model, config=self._reparams) if self._reparams else model

    def setup_from_trace(self, trace: Trace, recipe: Recipe | None = None) -> None:
        """As :meth:`setup`, from a trace of the model made by :meth:`trace_model`, with a recipe's defaults."""
        layout = LatentLayout.from_trace(trace)
        recipe = Recipe.for_dim(layout.dim) if recipe is None else recipe
        self.prototype_trace = _latent_trace(trace, layout)
        self._prototype_frames = {
            frame.name: frame
            for name in layout.names
            for frame in trace.nodes[name]["cond_indep_stack"]
            if frame.vectorized
        }
        if self.master is not None:
            self.master()._check_prototype(self.prototype_trace)
        self._layout = layout
        self._auxiliary = auxiliary_names(self._reparams, layout.names)
        self.latent_dim = layout.dim
        self.register_buffer("loc", layout.init_from_trace(trace))
        self.register_buffer("_fitted", torch.tensor(False))
        self.register_buffer("scale_tril", torch.full_like(self.loc, self._init_scale))
        self.register_buffer("directions", None)
        self.register_buffer("stretches", None)
        self.family = SemiImplicit(self._make_conditional(layout.dim, recipe)).to(layout.device, layout.dtype)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        self.setup_from_trace(self.trace_model(*args, **kwargs))

    def _make_conditional(self, dim: int, recipe: Recipe) -> Conditional:
        if self._ready_conditional is not None:
            conditional = self._ready_conditional[0]
            if conditional.dim != dim:
                raise ArgumentError(
                    f"the given conditional has dim {conditional.dim}, but the model has {dim} unconstrained latents; "
                    "pass a class or a factory instead to have it made at the right size"
                )
            return conditional
        mixing_dim = recipe.mixing_dim if self._mixing_dim is None else self._mixing_dim
        hidden_dims = recipe.guide_hidden_dims if self._hidden_dims is None else self._hidden_dims
        if self._conditional_factory is not None:
            return self._conditional_factory(dim, mixing_dim, hidden_dims)
        return DiagonalNormal(
            dim,
            mixing_dim,
            hidden_dims,
            scale_depends_on_z=recipe.scale_depends_on_z,
            gated=recipe.gated,
            init_scale=recipe.init_scale,
            min_scale=recipe.min_scale,
            max_scale=recipe.max_scale,
        )

    @property
    def affine(self) -> AffineMap:
        """The map from the family's whitened space to the unconstrained latents."""
        self._require_set_up()
        return AffineMap(self.loc, self.scale_tril, self.directions, self.stretches)

    @affine.setter
    def affine(self, affine: AffineMap) -> None:
        layout = self.layout
        self.loc, self.scale_tril, self.directions, self.stretches = affine.to(layout.dtype, layout.device)

    # --- the posterior ------------------------------------------------------------------------------

    @torch.no_grad()
    def sample_unconstrained(self, num_samples: int) -> Tensor:
        """Draws ``x (S, D)`` of the unconstrained latents, without a model run."""
        return self.affine.forward(self.family.rsample(num_samples).x)

    @torch.no_grad()
    def log_prob_estimate(self, x: Tensor, num_mixing: int = 1000) -> LogDensityEstimate:
        """An estimate of ``log q(x)``, too low on average, at unconstrained points ``x (*batch, D)``."""
        affine = self.affine
        estimate = self.family.log_prob_estimate(affine.inverse(x), num_mixing)
        return estimate._replace(value=estimate.value - affine.log_abs_det)

    def get_posterior(self, *args: Any, **kwargs: Any) -> SemiImplicitPosterior:
        """The distribution of the unconstrained latents."""
        affine = self.affine  # raises before set-up
        return SemiImplicitPosterior(self.family, affine, self.num_mixing)

    def get_base_dist(self) -> TorchDistribution:
        raise NotImplementedError("a semi-implicit posterior is no transformed base distribution; see get_posterior()")

    def get_transform(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("a semi-implicit posterior is no transformed base distribution; see get_posterior()")

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw every latent site, inside the model's plates: a dict of site name to value."""
        self.setup(*args, **kwargs)
        self._claim_parameter_names()
        auxiliary = set(self._auxiliary.values())
        latent = self.sample_latent(*args, **kwargs)
        plates = self._create_plates(*args, **kwargs)
        masked = poutine.get_mask() is False

        result = {}
        for site, unconstrained in self.layout.split_aligned(latent):
            value = site.transform(unconstrained)
            # Unmasked, the change of variables makes the site's density that of its constrained value.
            log_density: Tensor | float = 0.0 if masked else -log_abs_det_jacobian(site, unconstrained, value)
            with ExitStack() as stack:
                for plate in site.plates:
                    stack.enter_context(plates[plate.name])
                value = pyro.subsample(value, event_dim=site.event_dim)
                if isinstance(log_density, Tensor):
                    log_density = pyro.subsample(log_density, event_dim=0)
                delta = Transformed(value, log_density=log_density, event_dim=site.event_dim)
                infer = {"is_auxiliary": True} if site.name in auxiliary else {}
                result[site.name] = pyro.sample(site.name, delta, infer=infer)
        if not self._auxiliary:
            return result
        return self._with_own(result, self._draw_own_sites(result, plates, args, kwargs))

    def _draw_own_sites(
        self, latents: Mapping[str, Tensor], plates: Mapping[str, Any], args: tuple, kwargs: dict[str, Any]
    ) -> dict[str, Tensor]:
        """The sites that are computed from auxiliary latents, drawn there."""
        prototype = self._require_model()
        with poutine.block(), pyro.validation_enabled(False):
            fitted = poutine.trace(poutine.condition(prototype.model, data=latents)).get_trace(*args, **kwargs)
            values = {name: fitted.nodes[name]["value"] for name in self._auxiliary}
            given = {name: value for name, value in latents.items() if name in self.layout} | values
            own = poutine.trace(poutine.condition(prototype.own_model, data=given)).get_trace(*args, **kwargs)
        result = {}
        for name, value in values.items():
            fn, base, log_density = own.nodes[name]["fn"], fitted.nodes[self._auxiliary[name]], 0.0
            if _without_event(base["value"], base["fn"].event_dim) != _without_event(value, fn.event_dim):
                raise ModelError(
                    f"site '{name}' has shape {tuple(value.shape)}, computed from a latent of shape "
                    f"{tuple(base['value'].shape)}: the model is not written for batches, as vectorized particles "
                    "and outer plates ask for. Draw one at a time, or put its dims into plates."
                )
            if poutine.get_mask() is not False:
                # What both densities differ by is that of the change of variables.
                log_density = fn.log_prob(value) - base["fn"].log_prob(base["value"])
            with ExitStack() as stack:
                for frame in own.nodes[name]["cond_indep_stack"]:
                    if frame.name in plates:
                        stack.enter_context(plates[frame.name])
                delta = Transformed(value, log_density=log_density, event_dim=fn.event_dim)
                result[name] = pyro.sample(name, delta)
        return result

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The posterior median of each unconstrained coordinate, mapped to the sites' supports.

        From a fixed set of draws: the same value at every call, and no change to the random state.
        """
        x = self._reference_draws()
        own = {name: draws.median(0).values for name, draws in self._computed_draws(x, args, kwargs).items()}
        return self._with_own(self.layout.constrain(x.median(0).values), own)

    @torch.no_grad()
    def quantiles(self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Posterior quantiles of each unconstrained coordinate, mapped to the supports: ``(Q, *site shape)``.

        From a fixed set of draws: the same values at every call, and no change to the random state.
        """
        x = self._reference_draws()
        probabilities = torch.as_tensor(quantiles, dtype=x.dtype, device=x.device)
        draws = self._computed_draws(x, args, kwargs)
        own = {name: torch.quantile(values, probabilities, dim=0) for name, values in draws.items()}
        return self._with_own(self.layout.constrain(torch.quantile(x, probabilities, dim=0)), own)

    @torch.no_grad()
    def constrain(self, x: Tensor, /, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Unconstrained draws ``x (S, D)`` -> the values of the model's own latent sites, ``(S, *site shape)``.

        Args:
            args, kwargs: the model's arguments, those of the fit if none; they matter where a site is reparametrized.

        Raises:
            NotSetUpError: a site is reparametrized, and the arguments are not known, as in a guide read from a file.
        """
        return self._with_own(self.layout.constrain(x), self._computed_draws(x, args, kwargs))

    def remember_arguments(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """The model's arguments, with which reparametrized sites are computed where none are given."""
        self._arguments = args, kwargs

    def _computed_draws(self, x: Tensor, args: tuple, kwargs: dict[str, Any]) -> dict[str, Tensor]:
        """Draws of the reparametrized sites."""
        if not self._auxiliary:
            return {}
        if not args and not kwargs and self._arguments is not None:
            args, kwargs = self._arguments
        try:
            trace = self.trace_model(*args, **kwargs)
        except TypeError as error:
            if args or kwargs:
                raise
            raise NotSetUpError(
                f"the sites {sorted(self._auxiliary)} were fitted in other coordinates, and are computed by the model "
                "from its arguments, which this guide does not know. Pass them, or call sivism.setup(*args, **kwargs) "
                "first."
            ) from error
        own = OwnSites(self._require_model().model, self.layout, trace, args, kwargs)
        draws = own.all_draws(self.layout.constrain(x))
        return {name: draws[name].to(x.device) for name in self._auxiliary}

    def _with_own(self, values: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
        """The model's own sites: values of latents, but for the auxiliary ones, and of those that are computed."""
        auxiliary = set(self._auxiliary.values())
        return {name: value for name, value in values.items() if name not in auxiliary} | own

    def _reference_draws(self, num_draws: int = 4000) -> Tensor:
        self._require_set_up()
        devices = [self.loc.device] if self.loc.is_cuda else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            return self.sample_unconstrained(num_draws)

    # --- living with Pyro's param store and pickle --------------------------------------------------

    def _claim_parameter_names(self) -> None:
        """Take a name under which no other guide has put parameters into Pyro's param store.

        Two guides of one class share a default name, and the store would silently give the second the
        parameters of the first.
        """
        store, base, count = pyro.get_param_store(), type(self).__name__, 0
        name, parameter = next(iter(self._modules["family"].named_parameters()))
        while store._params.get(f"{self._pyro_name}.family$$${name}", parameter) is not parameter:
            count += 1
            self._pyro_name = f"{base}_{count}"

    @property
    def model(self) -> Callable:
        """The model, under the handlers that set its latents to their initial values.

        Raises:
            NotSetUpError: the guide was unpickled, and models are not pickled.
        """
        return self._require_model().prepared

    def _require_model(self) -> Prototype:
        if self._model is None:
            raise NotSetUpError(
                "this SemiImplicitGuide was read from a file, which does not hold its model. Call "
                "guide.attach_model(model) first."
            )
        return self._model

    def get_extra_state(self) -> list[str]:
        """The sites fitted in other coordinates, which a ``state_dict`` is of no use without."""
        return sorted(self._reparams)

    def set_extra_state(self, state: list[str]) -> None:
        """Raise unless a ``state_dict`` is of the coordinates of this guide."""
        if state != self.get_extra_state():
            raise ArgumentError(
                f"the state is of a guide whose reparametrized sites are {state}, and this guide's are "
                f"{self.get_extra_state()}. Keep the whole guide by torch.save, or fit both by SIVISM(..., "
                "decenter=False)."
            )

    def __getstate__(self) -> dict[str, Any]:
        # AutoGuide's __getstate__ drops the model from the live object too; give it back.
        model, master = self._model, self.master
        try:
            state = dict(super().__getstate__())
        finally:
            self._model, self.master = model, master
        if self.is_set_up:
            # Neither is needed any more, and either may be impossible to pickle: the prototype's distributions hold
            # the model's parameters, with the param store's weak references, and a factory may be a lambda.
            state["prototype_trace"] = state["_conditional_factory"] = None
        state["_arguments"] = None  # data do not belong into a guide's file
        return state

    def __deepcopy__(self, memo: dict) -> SemiImplicitGuide:
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        clone.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        clone._model, clone.prototype_trace = self._model, self.prototype_trace
        clone._arguments = self._arguments
        return clone

    def attach_model(self, model: Callable, init_loc_fn: Callable = init_to_median) -> None:
        """Give a guide that was unpickled its model back."""
        self._model = Prototype.of(model, init_loc_fn, self._reparams)


def _latent_trace(trace: Trace, layout: LatentLayout) -> Trace:
    """The part of a trace that holds the layout's sites, as Pyro's autoguides keep it."""
    latent = Trace()
    for name in layout.names:
        latent.add_node(name, **trace.nodes[name])
    return latent


def _without_event(value: Tensor, event_dim: int) -> Size:
    return value.shape[: value.dim() - event_dim]


def _has_shape(shape: Size | None) -> str:
    return "does not exist" if shape is None else f"has shape {tuple(shape)}"
