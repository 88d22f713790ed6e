"""The log density of a Pyro model and its score, for a batch of unconstrained points.

For one point x the target is

    log p(x) = sum over sites of scale * log p(site | parents) + log |d values / d x|,

with discrete latents summed out, minibatches scaled, and the sites of ``mask``, ``factor`` and ``obs``
counted as the model says; the score is its gradient in x.

Users rarely write models for batches, so a batch is evaluated along one of these paths:

- ``captured``: one particle's log density, kept as a graph, under ``torch.func.vmap``, as a graph again: the model
  does not run at all. ``captured_plate``: the same of a plate of particles.
- ``vmap``: one particle's log density under ``torch.func.vmap``. The model is not asked for anything.
- ``plate``: the model under an outermost plate of particles, as ``Trace_ELBO(vectorize_particles=True)``
  does. The model must use plates and negative dims throughout.
- ``loop``: one particle after the other. Always right, and slow.

The first path that runs *and* agrees with the loop in log density and score (a captured one in the score's derivative
too) is taken; :attr:`Target.path` says which, and why the others were passed over. A captured path is checked again
against a run of the model at regular intervals, and given up with a warning where it no longer agrees.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Distribution
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_sivism.errors import ArgumentError, ModelError
from pyro_sivism.layout import LatentLayout
from pyro_sivism.target.arguments import Arguments
from pyro_sivism.target.batch_graph import BatchGraph
from pyro_sivism.target.binding import Binding
from pyro_sivism.target.minibatches import MinibatchAverage
from pyro_sivism.target.paths import PARTICLE_ERRORS, TargetPath, first_line
from pyro_sivism.target.runs import ModelRuns

__all__ = ["Target"]

UNCAPTURED_PATHS = ("vmap", "plate")
PATHS = ("captured", "captured_plate", *UNCAPTURED_PATHS)
_MAX_BINDINGS = 8
_MAX_CAPTURED_BINDINGS = 16  # of arguments whose shapes change all the time the model is run: to record takes longer
# Bytes of intermediate results in one batch of scores. On the CPU a graph is replayed on as much as stays near caches
# and is not returned to the system after each operation: 512 scores of a regression on 5,000 rows took 39 ms in one
# batch, 14 in eight. Where each batch is a run of the model, more of them cost more.
_MEMORY_BUDGET, _CPU_BUDGET = 2**30, 2**25


class Target:
    """The unconstrained log density of ``model(*args, **kwargs)`` and its score.

    Args:
        model: a Pyro model.
        layout: where its latents live in the unconstrained vector.
        trace: a prototype trace of the model on these arguments.
        args, kwargs: the model's arguments.
        paths: the paths to try, in order, before the loop.

    Attributes:
        model, layout, paths: as given.
        num_evaluations: points evaluated so far.

    Raises:
        NonDeterministicModelError: two evaluations at one point differ.
        ModelError: a site's support depends on other latents, the set of latents is not fixed, or a site cannot have
            what it observes.

    Example:

        >>> import pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("x", dist.LogNormal(0.0, 1.0))
        >>> trace = poutine.trace(model).get_trace()
        >>> target = Target(model, LatentLayout.from_trace(trace), trace)
        >>> target.score(torch.tensor([[1.0], [2.0]])).flatten().tolist()
        [-1.0, -2.0]
        >>> target.path.name
        'captured'
    """

    def __init__(
        self,
        model: Callable,
        layout: LatentLayout,
        trace: Trace,
        args: Sequence = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        paths: Sequence[str] = PATHS,
    ) -> None:
        self.model, self.layout = model, layout
        self.paths = tuple(paths)
        self.num_evaluations = 0
        self._bindings: OrderedDict[tuple, Binding] = OrderedDict()
        self._num_bindings_made = 0
        self.bind(trace, args, kwargs)

    # --- what it is bound to ------------------------------------------------------------------------

    @property
    def dim(self) -> int:
        return self.layout.dim

    @property
    def arguments(self) -> tuple[tuple, dict[str, Any]]:
        """The model's ``args`` and ``kwargs`` at the moment."""
        return self.call.rebuild(self.call.tensors)

    @property
    def call(self) -> Arguments:
        """The same, taken apart."""
        return self._binding.runs.arguments

    @property
    def path(self) -> TargetPath:
        """Which path computes the scores, and why."""
        return self._binding.path

    @property
    def is_subsampled(self) -> bool:
        """Whether the model draws random minibatches, so that the density is an unbiased estimate."""
        return bool(self.subsamples)

    @property
    def subsamples(self) -> dict[str, Distribution]:
        """Plate name -> the distribution of the indices that its random minibatch has."""
        return self._binding.runs.subsamples

    @property
    def minibatch(self) -> dict[str, Tensor]:
        """Plate name -> the indices that all densities use until others are set or drawn."""
        return self._binding.runs.minibatch

    @minibatch.setter
    def minibatch(self, indices: dict[str, Tensor]) -> None:
        self._binding.runs.minibatch = indices
        self._binding.replays.note_change()

    @property
    def inputs(self) -> list[Tensor]:
        """Every tensor that the density reads and that may change: those among the arguments, and the minibatch."""
        return self._binding.runs.inputs

    @property
    def closed_over(self) -> object:
        """The graph of a captured path and what the tensors that it closes over are now: another value where either
        has changed. None of other paths."""
        return self._binding.replays.state(self.path.name)

    @contextmanager
    def inputs_replaced(self, inputs: Sequence[Tensor]) -> Iterator[None]:
        """Read these tensors in the place of :attr:`inputs` inside this context."""
        replays = self._binding.replays
        replays.inputs = inputs
        try:
            yield
        finally:
            replays.inputs = None

    def captured_graph(self, what: str) -> BatchGraph | None:
        """The graph that a batch is evaluated by, for the arguments at hand; None where there is none."""
        return self._binding.replays.graph(self.path.name, what)

    def check_soon(self) -> None:
        """Compare the next evaluation of a captured path with a run of the model."""
        self._binding.replays.is_check_due = True

    def resample_minibatch(self) -> None:
        """Draw new indices for every random minibatch; all densities use them until the next call."""
        self._binding.runs.resample_minibatch()
        self._binding.replays.note_change()

    def bind(self, trace: Trace, args: Sequence = (), kwargs: Mapping[str, Any] | None = None) -> None:
        """Point the target at other arguments, whose prototype trace is ``trace``, and check it there."""
        arguments = Arguments(args, kwargs)
        runs = ModelRuns(self.model, self.layout, arguments, trace)
        paths = self.paths
        if self._num_bindings_made >= _MAX_CAPTURED_BINDINGS:
            paths = tuple(path for path in paths if not path.startswith("captured"))
        self._num_bindings_made += 1
        self._binding = Binding(runs, self.layout.init_from_trace(trace), paths)
        self._bindings[arguments.signature] = self._binding
        if len(self._bindings) > _MAX_BINDINGS:
            self._bindings.popitem(last=False)

    def rebind(self, args: Sequence = (), kwargs: Mapping[str, Any] | None = None) -> bool:
        """Point the target at arguments of a signature that it has been bound to before; False if it has not.

        Checked is only that no support moved with them, and now and then that sites can have what they observe.
        """
        arguments = Arguments(args, kwargs)
        binding = self._bindings.get(arguments.signature)
        if binding is None:
            return False
        self._bindings.move_to_end(arguments.signature)
        changed = not arguments.same_objects(binding.runs.arguments)
        self._binding, binding.runs.arguments = binding, arguments
        if changed:
            binding.note_change()
        binding.replays.is_check_due |= arguments.has_opaque
        if changed and any(vars(site.support) for site in self.layout.sites):
            binding.check_supports()
        return True

    def over_minibatches(self, max_minibatches: int = 16) -> MinibatchAverage | Target:
        """The target averaged over several minibatches at a time: itself where there are none.

        The minibatches are a random partition of the plates, so that every latent inside a subsampled plate has a
        proper density. Where no latent is inside one, at most ``max_minibatches`` of them are taken.
        """
        if not self.subsamples:
            return self
        count = max(-(-fn.size // fn.subsample_size) for fn in self.subsamples.values())
        has_local_latents = any(site.subsampled_plates for site in self.layout.sites)
        return MinibatchAverage(self, count if has_local_latents else min(count, max_minibatches))

    def params(self) -> dict[str, Tensor]:
        """The unconstrained leaf tensors behind the model's ``pyro.param`` and module parameters, by name."""
        return self._binding.runs.params(self._binding.init)

    # --- densities and scores -----------------------------------------------------------------------

    def log_density(self, x: Tensor) -> Tensor:
        """``log p(x)``, shape (B,), at points (B, D); differentiable in x and in the model's params."""
        log_density, _ = self._evaluate("log_density", x)
        assert log_density is not None
        return log_density

    def score(self, x: Tensor) -> Tensor:
        """``grad log p(x)``, shape (B, D); differentiable in x where x requires a gradient."""
        _, score = self._evaluate("score", x)
        assert score is not None
        return score

    def log_density_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``log p(x)`` (B,) and ``grad log p(x)`` (B, D) from one evaluation."""
        log_density, score = self._evaluate("both", x)
        assert log_density is not None
        assert score is not None
        return log_density, score

    def nonfinite_sites(self, x: Tensor) -> list[str]:
        """The sites whose log probability is NaN or infinite, or cannot be computed, at one point ``x (D,)``."""
        bad = []
        with torch.no_grad(), poutine.block(), pyro.validation_enabled(False):
            try:
                trace = self._binding.runs.trace(x.to(self.layout.dtype))
            except PARTICLE_ERRORS as error:
                return [f"none, but the model itself: {first_line(error)}"]
            for name, msg in trace.nodes.items():
                if msg["type"] == "sample" and not site_is_subsample(msg):
                    try:
                        log_prob = msg["fn"].log_prob(msg["value"], *msg["args"], **msg["kwargs"])
                        finite = bool(torch.isfinite(log_prob).all())
                    except PARTICLE_ERRORS:
                        finite = False
                    if not finite:
                        bad.append(name)
        return bad

    def _evaluate(self, what: str, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if x.dim() != 2 or x.shape[0] == 0 or x.shape[1] != self.dim:
            raise ArgumentError(f"expected points of shape (B, {self.dim}) with B > 0, got {tuple(x.shape)}")
        self.num_evaluations += x.shape[0]
        num_chunks = -(-len(x) * self._binding.bytes_per_particle // _budget(x.device, self.path))
        if num_chunks > 1:
            parts = [self._evaluate_chunk(what, chunk) for chunk in x.chunk(min(num_chunks, len(x)))]
            log_densities, scores = zip(*parts)
            return _concatenate(log_densities), _concatenate(scores)
        return self._evaluate_chunk(what, x)

    def _evaluate_chunk(self, what: str, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        try:
            return self._evaluate_along(self.path.name, x, what)
        except ModelError:
            raise
        except PARTICLE_ERRORS:
            # Some particle failed, e.g. its matrix was not positive definite: find which, and call it non-finite.
            return self._evaluate_along("loop", x, what)

    def _evaluate_along(self, path: str, x: Tensor, what: str = "both") -> tuple[Tensor | None, Tensor | None]:
        return self._binding.evaluate_along(path, x, what)


def _budget(device: torch.device, path: TargetPath) -> int:
    return _CPU_BUDGET if device.type == "cpu" and path.name.startswith("captured") else _MEMORY_BUDGET


def _concatenate(parts: Sequence[Tensor | None]) -> Tensor | None:
    tensors = [part for part in parts if part is not None]
    return torch.cat(tensors) if tensors else None
