"""Runs of a model at given latents: one point at a time, in a plate of particles, or kept as a trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import pyro
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_sivism.layout import LatentLayout
from pyro_sivism.sites import is_enumerable
from pyro_sivism.target.arguments import Arguments
from pyro_sivism.target.functorch import exact_logs
from pyro_sivism.target.handlers import Enumerate, LogJoint, SubstituteLatents, enumerated_log_joint
from pyro_sivism.target.minibatches import draw_indices

__all__ = ["ModelRuns"]

PARTICLE_PLATE = "_pyro_sivism_particles"


class ModelRuns:
    """``model(*args, **kwargs)`` as a function of the unconstrained latents and of every tensor that may change.

    Args:
        model: a Pyro model.
        layout: where its latents live in the unconstrained vector.
        arguments: what it is called with.
        trace: a prototype trace of the model on these arguments.

    Attributes:
        minibatch: plate name -> the indices to use wherever the model would draw them.
        subsamples: plate name -> the distribution of these indices.
    """

    def __init__(self, model: Callable, layout: LatentLayout, arguments: Arguments, trace: Trace) -> None:
        self.model, self.layout, self.arguments = model, layout, arguments
        self._sites = {site.name: site for site in layout.sites}
        nodes = [msg for msg in trace.nodes.values() if msg["type"] == "sample"]
        dims = [f.dim for msg in nodes for f in msg["cond_indep_stack"] if f.vectorized]
        self._max_plate_nesting = -min(dims, default=0)
        self.enumerates = any(
            is_enumerable(msg) and not msg["is_observed"] and not site_is_subsample(msg) for msg in nodes
        )
        self.subsamples = {
            msg["name"]: msg["fn"]
            for msg in nodes
            if site_is_subsample(msg) and msg["fn"].subsample_size is not None
            if msg["fn"].subsample_size < msg["fn"].size
        }
        self._plate_sizes = {name: fn.size for name, fn in self.subsamples.items()}
        self.resample_minibatch()

    def resample_minibatch(self) -> None:
        """Draw new indices for every random minibatch."""
        self.minibatch = {
            name: draw_indices(fn.size, fn.subsample_size, fn.device) for name, fn in self.subsamples.items()
        }

    @property
    def inputs(self) -> list[Tensor]:
        """Every tensor that a run reads and that may change: those among the arguments, and the minibatch."""
        return [*self.arguments.tensors, *self.minibatch.values()]

    def one(self, x: Tensor, *inputs: Tensor) -> Tensor:
        """``log p(x)`` of one point ``(D,)``, by one run of the model."""
        with exact_logs():
            if self.enumerates:
                log_joint: Tensor | float = enumerated_log_joint(self.trace(x, *inputs))
            else:
                args, kwargs, minibatch = self._unpack(inputs)
                handler = LogJoint(self._sites, self.layout.constrain(x), minibatch, self._plate_sizes)
                with handler:
                    self.model(*args, **kwargs)
                log_joint = handler.log_joint
        return log_joint + self.layout.log_abs_det_jacobian(x)

    def in_plate(self, x: Tensor, *inputs: Tensor) -> Tensor:
        """``log p(x)`` of B points, by one run of the model inside a plate of B particles."""
        if self.enumerates:
            raise NotImplementedError("enumerated sites and a plate of particles are not combined")
        args, kwargs, minibatch = self._unpack(inputs)
        num_particles, nesting = x.shape[0], self._max_plate_nesting
        aligned = x.reshape((num_particles,) + (1,) * nesting + (self.layout.dim,))
        values = {site.name: site.transform(u) for site, u in self.layout.split_aligned(aligned)}
        handler = LogJoint(self._sites, values, minibatch, self._plate_sizes, particle_dim=-1 - nesting)
        with exact_logs(), handler, pyro.plate(PARTICLE_PLATE, num_particles, dim=-1 - nesting):
            self.model(*args, **kwargs)
        return handler.log_joint + self.layout.log_abs_det_jacobian(x)

    def trace(self, x: Tensor, *inputs: Tensor) -> Trace:
        """One run of the model at one point ``(D,)``, discrete latents enumerated."""
        args, kwargs, minibatch = self._unpack(inputs)
        model, capture = self.model, poutine.trace()
        substitute = SubstituteLatents(self._sites, self.layout.constrain(x), minibatch, self._plate_sizes)
        with capture, substitute, ExitStack() as stack:
            if self.enumerates:
                stack.enter_context(Enumerate(first_available_dim=-1 - self._max_plate_nesting))
                model = config_enumerate(model, default="parallel")
            model(*args, **kwargs)
        return capture.trace

    def params(self, x: Tensor) -> dict[str, Tensor]:
        """The unconstrained leaf tensors behind the ``pyro.param`` and module parameters that require gradients."""
        with torch.no_grad(), poutine.block(), poutine.trace(param_only=True) as capture:
            self.trace(x)  # the latents held, as a prior need not be one to draw from
        leaves = {
            name: (msg["value"].unconstrained() if hasattr(msg["value"], "unconstrained") else msg["value"])
            for name, msg in capture.trace.nodes.items()
            if msg["type"] == "param"
        }
        return {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}

    def _unpack(self, inputs: Sequence[Tensor]) -> tuple[tuple, dict, dict[str, Tensor]]:
        """``args``, ``kwargs`` and minibatch from :attr:`inputs`, or from tensors in their place."""
        if not inputs:
            return *self.arguments.rebuild(self.arguments.tensors), self.minibatch
        count = len(self.arguments.tensors)
        return *self.arguments.rebuild(inputs[:count]), dict(zip(self.minibatch, inputs[count:]))
