"""A model's log density run once, kept as a graph, and replayed: no Pyro in a step.

1. One particle's log density is recorded as a graph of tensor operations (``graph.record``), with the point, the
   model's tensor arguments and the minibatch's indices as inputs. The model need not be written for batches.
2. The graph is put through ``vmap(grad_and_value(...))`` and recorded again, for each batch size that comes up often:
   one flat graph from ``x (B, D)`` to log densities and scores, and a smaller one to scores only.
3. A model that ``vmap`` cannot take (Multinomial) is recorded inside a plate of particles instead, for each batch size.

``pyro.param``s and parameters of modules stay references to their leaves, so that they may be learned. What a graph
cannot follow is refused while it is recorded, with the operation's own error (a branch on a latent, ``.item()``), or
by :class:`CaptureError` (random numbers). What it cannot notice, such as a global that the model reads and a user
rebinds, is left to the checks of :class:`pyro_sivism.target.Target` against runs of the model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, fx
from torch.func import grad, grad_and_value, vjp, vmap

from pyro_sivism.target.functorch import functorch_ready
from pyro_sivism.target.graph import closed_over, has_detach, is_random, record, simplify
from pyro_sivism.target.runs import ModelRuns

__all__ = ["CaptureError", "CapturedDensity"]

# Recording a batch's graph costs as much as a few dozen evaluations, so the first few of a batch size go without.
_MIN_USES = 3
_MAX_BATCH_GRAPHS = 32  # past it, batches of other sizes go without, as when a few particles are left out each time

Function = Callable[..., "Tensor | tuple[Tensor, Tensor]"]


class CaptureError(RuntimeError):
    """The model was recorded, but a replay would not be the model."""


class CapturedDensity:
    """``log p`` and its score at batches of points, from graphs of the model.

    Args:
        runs: the model, bound to its arguments.
        x: a point ``(D,)``, for shape and dtype.
        in_plate: record the model in a plate of particles, rather than with one particle under ``vmap``.

    Raises:
        CaptureError: the graph draws random numbers.
        Exception: whatever the model raises when it asks for the value of a latent while it is recorded.
    """

    def __init__(self, runs: ModelRuns, x: Tensor, *, in_plate: bool = False) -> None:
        self._runs, self._in_plate = runs, in_plate
        self._versions: list[tuple[Tensor, int]] = []
        self._has_detach = False
        self._stored_params: dict[str, Tensor] = {}
        self._batch_graphs: dict[tuple, fx.GraphModule] = {}
        self._uses: Counter[tuple] = Counter()
        self._unused: set[tuple] = set()
        self._plates: dict[int, fx.GraphModule] = {}
        runs.params(x)  # one that the store does not have yet is made by this run, and is not part of the graph
        if not in_plate:
            self._one = self._record_model(runs.one, x)

    @property
    def is_stale(self) -> bool:
        """Whether a tensor that the model closed over has been changed in place, or a param replaced in the store."""
        stored = dict(pyro.get_param_store().named_parameters()) if self._stored_params else {}
        return any(tensor._version != version for tensor, version in self._versions) or any(
            stored.get(name) is not leaf for name, leaf in self._stored_params.items()
        )

    def graph(self, what: str, num_particles: int) -> fx.GraphModule | None:
        """The graph that evaluates such a batch, if it has been recorded."""
        return self._batch_graphs.get((what, num_particles))

    def is_first_use(self, what: str, num_particles: int, differentiable: bool) -> bool:
        """Whether the graph for such a batch is there, and this was not asked before."""
        use = what, num_particles, differentiable
        is_first = use in self._unused
        self._unused.discard(use)
        return is_first

    def evaluate(self, what: str, x: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """``log p(x)`` (B,) and ``grad log p(x)`` (B, D) at points (B, D), or one of them and None.

        Args:
            what: "log_density", "score" or "both".
            x: the points.
            inputs: tensors in the place of :attr:`ModelRuns.inputs`.
        """
        result: Any = self._graph_or_function(what, x, inputs)(x, *inputs)
        if what == "both":
            score, log_density = result
            return log_density, score
        return (result, None) if what == "log_density" else (None, result)

    # --- recording ----------------------------------------------------------------------------------

    def _graph_or_function(self, what: str, x: Tensor, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        key = what, len(x)
        if key not in self._batch_graphs:
            function = self._batch_function(what, x)
            self._uses[key] += 1
            if self._uses[key] < _MIN_USES or len(self._batch_graphs) >= _MAX_BATCH_GRAPHS:
                return function
            with _recording():
                graph = record(function, x.detach(), *inputs)
            self._batch_graphs[key] = simplify(graph, keep_detach=self._has_detach)
            self._unused |= {(*key, differentiable) for differentiable in (False, True)}
        return self._batch_graphs[key]

    def _batch_function(self, what: str, x: Tensor) -> Function:
        """The function of ``x`` and the inputs whose graph is wanted."""
        if self._in_plate:
            return self._plate_function(what, x)
        in_dims = (0, *(None for _ in self._runs.inputs))
        transform = {"log_density": lambda f: f, "score": grad, "both": grad_and_value}[what]
        return vmap(transform(self._one), in_dims)

    def _plate_function(self, what: str, x: Tensor) -> Function:
        if len(x) not in self._plates:
            self._plates[len(x)] = self._record_model(self._runs.in_plate, x.detach())
        log_densities = self._plates[len(x)]
        if what == "log_density":
            return log_densities

        def with_score(x: Tensor, *inputs: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            log_density, pull_back, *_ = vjp(lambda u: log_densities(u, *inputs), x)
            (score,) = pull_back(torch.ones_like(log_density))
            return score if what == "score" else (score, log_density)

        return with_score

    def _record_model(self, function: Callable, x: Tensor) -> fx.GraphModule:
        """The graph of one run of the model.

        The inputs are made into objects of their own: a model that also closes over one of its arguments reads two
        different things, which a later call with other arguments tells apart.
        """
        with _recording():
            graph = record(function, x, *(tensor.detach() for tensor in self._runs.inputs))
        if is_random(graph):
            raise CaptureError("the model draws random numbers outside of its sample sites")
        held = closed_over(graph)
        self._versions += [(tensor, tensor._version) for tensor in held if not tensor.requires_grad]
        stored = pyro.get_param_store().named_parameters()
        self._stored_params |= {name: leaf for name, leaf in stored if any(leaf is tensor for tensor in held)}
        simplify(graph, keep_detach=True)
        self._has_detach |= has_detach(graph)
        return graph


@contextmanager
def _recording() -> Iterator[None]:
    """Pyro's validation asks for values, which a recording does not have."""
    with pyro.validation_enabled(False), poutine.block(), functorch_ready(), torch.no_grad():
        yield
