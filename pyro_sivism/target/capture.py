"""A model's log density run once, kept as a graph, and replayed: no Pyro in a step.

1. One particle's log density is recorded as a graph of tensor operations (``graph.record``), with the point, the
   model's tensor arguments and the minibatch's indices as inputs. The model need not be written for batches.
2. The graph is put through ``vmap``, differentiated, and recorded again, for two sizes of batches, from which a graph
   for all sizes follows (``batch_graph``): one from ``x (B, D)`` to log densities and scores, and the parts of it that
   are needed for one of them.
3. A model that ``vmap`` cannot take (Multinomial) is recorded inside a plate of particles instead.
4. Where no derivatives are asked for, the graph is replayed by TorchScript (``traced``), on the CPU.

``pyro.param``s and parameters of modules stay references to their leaves, so that they may be learned. What a graph
cannot follow is refused while it is recorded, with the operation's own error (a branch on a latent, ``.item()``), or
by :class:`CaptureError` (random numbers). What it cannot notice, such as a global that the model reads and a user
rebinds, is left to the checks of :class:`pyro_sivism.target.Target` against runs of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.func import vmap

from pyro_sivism.target.arguments import version_of
from pyro_sivism.target.batch_graph import BatchGraph, sizes_in, unused_size
from pyro_sivism.target.broadcasts import expand_late, factor_out
from pyro_sivism.target.functorch import functorch_ready
from pyro_sivism.target.graph import index_rows, is_random, simplify
from pyro_sivism.target.memory_layout import lay_long_dims_innermost
from pyro_sivism.target.paths import agree, direction, nudged, rounding_slack
from pyro_sivism.target.recording import Recording, record
from pyro_sivism.target.runs import ModelRuns
from pyro_sivism.target.traced import TracedReplays

__all__ = ["CaptureError", "CapturedDensity"]


Function = Callable[..., Any]


class CaptureError(RuntimeError):
    """The model was recorded, but a replay would not be the model."""


class CapturedDensity:
    """``log p`` and its score at batches of points, from graphs of the model.

    Args:
        runs: the model, bound to its arguments.
        x: a point ``(D,)``, for shape and dtype.
        in_plate: record the model in a plate of particles, rather than with one particle under ``vmap``.
        factors_out: carry small factors apart, which is faster, and in float32 may over- or underflow elsewhere.
        holds_arguments: record the model's tensor arguments as constants, not as inputs, so that it may select some of
            their rows by a mask, as those without a missing value.

    Raises:
        CaptureError: the graph draws random numbers, or arguments cannot be held as minibatches change.
        DynamicSizeError: how many numbers there are depends on the values of an input.
        Exception: whatever the model raises when it asks for the value of a latent while it is recorded.
    """

    def __init__(
        self,
        runs: ModelRuns,
        x: Tensor,
        *,
        in_plate: bool = False,
        factors_out: bool = True,
        holds_arguments: bool = False,
    ) -> None:
        if holds_arguments and runs.subsamples:
            raise CaptureError("arguments are selected by their values, and minibatches are drawn")
        self._runs, self._in_plate, self._factors_out = runs, in_plate, factors_out
        self._held = list(runs.arguments.tensors) if holds_arguments else None
        self._versions: list[tuple[Tensor, int | None]] = []
        self._closed_over: list[Tensor] = []
        self._stored_params: dict[str, Tensor] = {}
        runs.params(x)  # one that the store does not have yet is made by this run, and is not part of the graph
        self._graphs = {"both": self._record_batches(x)}
        self._replays: dict[str, TracedReplays] = {}
        self._used: set[tuple[str, bool]] = set()

    @property
    def is_stale(self) -> bool:
        """Whether a tensor that the model closed over has been changed in place, or a param replaced in the store.

        A change through ``.data`` leaves no trace on a tensor; the checks of replays find it.
        """
        if self._held is not None:
            tensors = self._runs.arguments.tensors
            if not all(tensor is held or _equal(tensor, held) for tensor, held in zip(tensors, self._held)):
                return True
            self._held = list(tensors)  # the same objects need not be compared again
        stored = dict(pyro.get_param_store().named_parameters()) if self._stored_params else {}
        return any(version_of(tensor) != version for tensor, version in self._versions) or any(
            stored.get(name) is not leaf for name, leaf in self._stored_params.items()
        )

    @property
    def versions(self) -> list[int | None]:
        """Of all tensors that the model closed over, those that are learned included, whose values the graph reads."""
        return [version_of(tensor) for tensor in self._closed_over]

    def graph(self, what: str) -> BatchGraph:
        """The graph that evaluates "log_density", "score" or "both" of a batch."""
        if what not in self._graphs:
            self._graphs[what] = self._graphs["both"].part(0 if what == "log_density" else 1)
        return self._graphs[what]

    def is_first_use(self, what: str, differentiable: bool) -> bool:
        """Whether this was not asked before."""
        is_first = (what, differentiable) not in self._used
        self._used.add((what, differentiable))
        return is_first

    def evaluate(self, what: str, x: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """``log p(x)`` (B,) and ``grad log p(x)`` (B, D) at points (B, D), or one of them and None.

        Args:
            what: "log_density", "score" or "both".
            x: the points.
            inputs: tensors in the place of :attr:`ModelRuns.inputs`.
        """
        if what not in self._replays:
            self._replays[what] = TracedReplays(self.graph(what))
        result = self._replays[what](x, *(inputs if self._held is None else ()))
        if what == "both":
            return result
        return (result, None) if what == "log_density" else (None, result)

    # --- recording ----------------------------------------------------------------------------------

    def _record_batches(self, x: Tensor) -> BatchGraph:
        """The graph from a batch to its log densities and scores."""
        inputs = self._own_inputs()
        used = {len(x), *(size for tensor in inputs for size in tensor.shape)}
        if not self._in_plate:
            one = self._record_model(self._runs.one, x)
            used |= sizes_in(one)
            log_densities: Function = vmap(one.compile(), (0, *(None for _ in inputs)))
        sizes, recordings = [], []
        for _ in range(2):
            sizes.append(unused_size(used))
            points = _points_near(x, sizes[-1])
            if self._in_plate:
                log_densities = self._record_model(self._runs.in_plate, points).compile()
            with torch.no_grad():
                recording = record(_with_score(log_densities), points, *inputs, differentiates=True)
            recording = index_rows(simplify(recording))
            recording = simplify(factor_out(recording, sizes[-1])) if self._factors_out else recording
            recordings.append(lay_long_dims_innermost(recording, sizes[-1]))
            used |= sizes_in(recording)
        graph = BatchGraph(recordings, sizes)
        _check_sizes(graph, _points_near(x, sum(sizes)), inputs)
        return graph

    def _record_model(self, function: Function, x: Tensor) -> Recording:
        """The graph of one run of the model."""
        with pyro.validation_enabled(False), poutine.block(), functorch_ready(), torch.no_grad():
            # Pyro's validation asks for values, which a recording does not have.
            recording = record(function, x, *self._own_inputs())
        if is_random(recording):
            raise CaptureError("the model draws random numbers outside of its sample sites")
        held = recording.closed_over
        self._closed_over += held
        self._versions += [(tensor, version_of(tensor)) for tensor in held if not tensor.requires_grad]
        stored = pyro.get_param_store().named_parameters()
        self._stored_params |= {name: leaf for name, leaf in stored if any(leaf is tensor for tensor in held)}
        return expand_late(simplify(recording))

    def _own_inputs(self) -> list[Tensor]:
        """The inputs as objects of their own: a model that also closes over one of its arguments reads two different
        things, which a later call with other arguments tells apart."""
        return [tensor.detach() for tensor in self._runs.inputs] if self._held is None else []


def _equal(a: Tensor, b: Tensor) -> bool:
    """As ``torch.equal``, a missing value being equal to another."""
    same_kind = a.shape == b.shape and a.dtype == b.dtype
    return same_kind and bool(((a == b) | ((a != a) & (b != b))).all())


def _with_score(log_densities: Function) -> Function:
    """The same function, of whose sum the gradient is returned too."""

    def both(x: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            points = x.detach().requires_grad_()
            log_density = log_densities(points, *inputs)
            if not log_density.requires_grad:
                return log_density, torch.zeros_like(x)
            # Without create_graph some backward passes, as the log determinant's, take ways that have no derivatives.
            (score,) = torch.autograd.grad(log_density.sum(), points, create_graph=True, materialize_grads=True)
        return log_density, score

    return both


def _points_near(x: Tensor, count: int) -> Tensor:
    steps = torch.linspace(-0.01, 0.01, count, dtype=x.dtype, device=x.device)
    return x + steps[:, None] * direction(x)


def _check_sizes(graph: BatchGraph, x: Tensor, inputs: Sequence[Tensor]) -> None:
    """Raise unless a batch gives the same as its parts, a single point among them."""
    with torch.no_grad():
        whole = graph(x, *inputs)
        parts = [torch.cat(part) for part in zip(*(graph(part, *inputs) for part in x.split([1, 4, len(x) - 5])))]
        if all(map(agree, parts, whole)):
            return
        slacks = map(rounding_slack, whole, zip(*(graph(near, *inputs) for near in nudged(x))))
    if not all(map(agree, parts, whole, slacks)):
        raise CaptureError("a batch's graph does not give what the graphs of its parts give")
