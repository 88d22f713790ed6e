"""The captured graphs for arguments of one signature, and the checks of their replays against the model.

A graph knows nothing of what the model reads beside its inputs, and a recording may miss what a model does in Python.
So a replay is compared with a run of the model at one of its points: at the first use of every graph, with and without
derivatives; when the arguments or the minibatch have changed for the first time; whenever arguments whose contents
nobody can compare are passed again; and after every hundred replays. A draw far out may be worse conditioned than a
look at its neighbours tells: a small difference there is none if the two agree near the initial point.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_sivism.errors import ModelError
from pyro_sivism.target.batch_graph import BatchGraph
from pyro_sivism.target.capture import CapturedDensity, CaptureError
from pyro_sivism.target.paths import (
    PARTICLE_ERRORS,
    agree,
    direction,
    nudged,
    rounding_slack,
    tolerance,
    values_at,
)
from pyro_sivism.target.recording import DynamicSizeError
from pyro_sivism.target.runs import ModelRuns

__all__ = ["Replays"]

_MAX_RECORDINGS = 8  # of one signature, for different values of what a graph holds as constants
_CHECK_EVERY = 100
_DOUBTFUL = 10.0  # times what roundings are allowed for: beyond, a difference is a fault wherever it is


class Replays:
    """Captures of a model along the captured paths, made when they are needed.

    Args:
        runs: the model, bound to its arguments, which may be replaced by others of the same signature.
        init: a point ``(D,)``, for shape and dtype.

    Attributes:
        inputs: tensors to read in the place of ``runs.inputs``, or None.
        is_check_due: whether the next replay is to be compared with the model.
        num_unchecked: replays since one was last compared, itself included.
    """

    def __init__(self, runs: ModelRuns, init: Tensor) -> None:
        self._runs, self._init = runs, init
        self._captures: dict[Any, CapturedDensity] = {}
        self._num_recordings = 0
        self._factors_out = True
        self._num_replays: Counter[bool] = Counter()
        self._has_seen_change = False
        self.inputs: Sequence[Tensor] | None = None
        self.is_check_due = False
        self.num_unchecked = 0

    def __getstate__(self) -> dict[str, Any]:
        """Without graphs, which cannot be pickled: a process that is spawned records them anew."""
        return {**self.__dict__, "_captures": {}, "_num_recordings": 0}

    def evaluate(self, path: str, what: str, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Log densities and scores, as :meth:`CapturedDensity.evaluate`, by the graphs for the arguments at hand.

        Raises:
            CaptureError: no graph can be had.
            Exception: what the model raises while it is recorded, or at a point where it cannot be evaluated.
        """
        captured = self._capture(path)
        return captured.evaluate(what, x, self._runs.inputs if self.inputs is None else self.inputs)

    def graph(self, path: str, what: str) -> BatchGraph | None:
        """The graph that evaluates a batch; None where there is none."""
        captured = self._captures.get((path, self._runs.arguments.frozen))
        return None if captured is None or captured.is_stale else captured.graph(what)

    def state(self, path: str) -> tuple[CapturedDensity, list[int | None]] | None:
        """The capture at hand, and the versions of the tensors that it closes over; None where there is none."""
        captured = self._captures.get((path, self._runs.arguments.frozen))
        return None if captured is None else (captured, captured.versions)

    def clear(self) -> None:
        """Forget all graphs."""
        self._captures.clear()

    def give_up_factors(self, path: str) -> bool:
        """Record without :func:`~pyro_sivism.target.broadcasts.factor_out` from now on; whether that is any different.

        In float32 and extreme units, as 1e13, a product of factors that are carried apart may over- or underflow where
        the model's own operations do not.
        """
        changes = self._factors_out and (path, self._runs.arguments.frozen) in self._captures
        if changes:
            self._factors_out = False
            self.clear()
        return changes

    def note_change(self) -> None:
        """Other arguments or another minibatch are evaluated from now on."""
        if not self._has_seen_change:
            self._has_seen_change = self.is_check_due = True

    def _capture(self, path: str) -> CapturedDensity:
        key = path, self._runs.arguments.frozen
        captured = self._captures.get(key)
        if captured is None or captured.is_stale:
            if self._num_recordings >= _MAX_RECORDINGS:
                raise CaptureError("numbers or arrays that the graph holds keep changing")
            self._num_recordings += 1
            captured = self._captures[key] = self._record(path)
        return captured

    def _record(self, path: str) -> CapturedDensity:
        how = {"in_plate": path == "captured_plate", "factors_out": self._factors_out}
        try:
            return CapturedDensity(self._runs, self._init, **how)
        except DynamicSizeError:
            return CapturedDensity(self._runs, self._init, **how, holds_arguments=True)

    # --- checks -------------------------------------------------------------------------------------

    def find_fault(
        self, path: str, what: str, x: Tensor, log_density: Tensor | None, score: Tensor | None
    ) -> str | None:
        """What is wrong with a replay, in words; None if nothing, or if it was not its turn to be looked at."""
        differentiable = score is not None and score.requires_grad
        self._num_replays[differentiable] += 1
        self.num_unchecked += 1
        is_new = self._capture(path).is_first_use(what, differentiable)
        if not (is_new or self.is_check_due or self._num_replays[differentiable] % _CHECK_EVERY == 0):
            return None
        self.is_check_due = False
        row = self._num_replays.total() % len(x)
        fault = self._compare(x, log_density, score, row)
        if fault is None:
            self.num_unchecked = 0
        elif self._compare(x, log_density, score, row, allowance=_DOUBTFUL) is None:
            fault = None if self._agrees_near_start(path, what, differentiable) else fault
        return fault

    def _agrees_near_start(self, path: str, what: str, differentiable: bool) -> bool:
        """Whether a replay near the initial point gives what the model gives there, if that can be told."""
        point = self._init + 0.1 * direction(self._init)
        try:
            with torch.set_grad_enabled(differentiable):
                near = point[None].requires_grad_(differentiable)
                found = self.evaluate(path, what, near)
        except PARTICLE_ERRORS:
            return False
        return self._model_at(point, differentiable) is not None and self._compare(near, *found, row=0) is None

    def _compare(
        self, x: Tensor, log_density: Tensor | None, score: Tensor | None, row: int, allowance: float = 1.0
    ) -> str | None:
        """What is wrong with the values found at one point of a batch, by so many times what is usually allowed for."""
        point = x[row].detach()
        differentiable = score is not None and score.requires_grad
        want = self._model_at(point, differentiable)
        if want is None:
            return None
        got = {"log density": log_density, "score": score}
        slacks = {name: _roundings(values.detach()) for name, values in got.items() if values is not None}
        if score is not None and score.requires_grad:
            along = score[row] @ direction(point)
            (got["score's derivative"],) = torch.autograd.grad(along, x, retain_graph=True, materialize_grads=True)
        found = {name: values[row].detach() for name, values in got.items() if values is not None}
        suspects = [name for name, values in found.items() if not _agree(values, want[name], slacks.get(name, 0.0))]
        at_nudged = [self._model_at(near, differentiable) for near in nudged(point)] if suspects else []
        for name in suspects:
            slack = rounding_slack(want[name], [values[name] for values in at_nudged if values is not None])
            if not agree(found[name], want[name], allowance * (slack + slacks.get(name, 0.0))):
                return f"the {name} at one draw is {_number(found[name])}, the model's {_number(want[name])}"
        return None

    def _model_at(self, point: Tensor, differentiable: bool) -> dict[str, Tensor] | None:
        """What a run of the model gives at a point; None where it fails there as it may at single points."""
        try:
            return values_at(self._runs.one, point, differentiable)
        except ModelError:
            raise
        except PARTICLE_ERRORS:
            return None


def _agree(found: Tensor, want: Tensor, slack: Tensor | float) -> bool:
    """Whether they agree, or are of a draw so far off that it does not count: overflow may come earlier one way."""
    near = torch.finfo(want.dtype).max ** 0.4  # 3e15 in float32
    is_far = all(bool(((values.abs() > near) | values.isnan()).any()) for values in (found, want))
    overflows = not (found.isfinite().all() and want.isfinite().all())
    return agree(found, want, slack) or (is_far and overflows)


def _roundings(values: Tensor) -> Tensor:
    """Of sums at a batch of draws: one may be small at one draw where its terms, and their roundings, are not."""
    return tolerance(values.dtype) * values.abs().nanmedian(0).values.nan_to_num(posinf=0.0)


def _number(value: Tensor) -> str:
    """A scalar, or the norm of a vector, for a message."""
    return f"{value.item():.6g}" if value.dim() == 0 else f"of norm {value.norm().item():.6g}"
