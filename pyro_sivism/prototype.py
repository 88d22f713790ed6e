"""The first run of a model, from which a guide learns its latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger, init_to_feasible, init_to_median
from pyro.infer.reparam.reparam import Reparam
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample

from pyro_sivism.bijections import bijection
from pyro_sivism.errors import ModelError
from pyro_sivism.sites import check_support, is_enumerable
from pyro_sivism.target.sampling import without_sampler_warnings

__all__ = ["Prototype"]


class _CheckSupports(Messenger):
    """Refuse latent sites without a bijection by our own error, and draw discrete ones without an init function.

    It is the innermost handler, so that it sees each site before the ``InitMessenger``.
    """

    def _pyro_sample(self, msg: dict) -> None:
        if msg["is_observed"] or msg["value"] is not None or site_is_subsample(msg):
            return
        if is_enumerable(msg):
            msg["value"] = msg["fn"].sample()
        else:
            check_support(msg)


class _Initialize(InitMessenger):
    """Give latent sites their initial values, also where the distribution cannot be sampled.

    Pyro's init functions all look at a prior draw first, which an ``ImproperUniform`` does not have; such a site
    starts where its unconstrained value is 0.
    """

    def _pyro_sample(self, msg: dict) -> None:
        try:
            super()._pyro_sample(msg)
        except NotImplementedError:
            fn = msg["fn"]
            transform = bijection(fn.support)
            msg["value"] = transform(torch.zeros(transform.inverse_shape(fn.shape())))


class Prototype(NamedTuple):
    """A model as a guide first runs it.

    Attributes:
        prepared: the model with its supports checked and its latents at their initial values.
        model: the model as it is fitted: as it was given, or reparametrized.
        own_model: the model as it was given.
        init_loc_fn: where its latents start.
    """

    prepared: Callable
    model: Callable
    own_model: Callable
    init_loc_fn: Callable

    @classmethod
    def of(cls, model: Callable, init_loc_fn: Callable, config: Mapping[str, Reparam] | None = None) -> Prototype:
        """Of a model, under ``poutine.reparam`` with this ``config`` if there is any."""
        fitted = poutine.reparam(model, config=dict(config)) if config else model
        return cls(_prepare(fitted, init_loc_fn), fitted, model, init_loc_fn)

    def trace(self, *args: Any, **kwargs: Any) -> Trace:
        """A run of the prepared model that nothing outside it sees."""
        with without_sampler_warnings():
            try:
                return _trace(self.prepared, args, kwargs)
            except ValueError as error:
                if self.init_loc_fn is not init_to_median or isinstance(error, ModelError):
                    raise
                try:  # the median of draws from a wide prior may be where the model overflows
                    return _trace(_prepare(self.model, init_to_feasible), args, kwargs)
                except ValueError:
                    raise error from None


def _prepare(model: Callable, init_loc_fn: Callable) -> Callable:
    return _Initialize(init_loc_fn)(_CheckSupports()(model))


def _trace(model: Callable, args: tuple, kwargs: dict[str, Any]) -> Trace:
    return poutine.block(poutine.trace(model).get_trace)(*args, **kwargs)
