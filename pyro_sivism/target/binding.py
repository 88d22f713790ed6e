"""What is known of a model at arguments of one signature: its runs, and the path that its scores are computed along.

The first path that runs *and* agrees with the loop over particles is taken. The loop runs the model as its author
does, so that it is right wherever the model is; but for Pyro's logarithm of small probabilities, see ``functorch.py``.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_sivism.bijections import same_support
from pyro_sivism.errors import ModelError, NonDeterministicModelError, TargetPathWarning
from pyro_sivism.target.eager import run_along
from pyro_sivism.target.observations import check_observations
from pyro_sivism.target.paths import (
    PARTICLE_ERRORS,
    Allocations,
    TargetPath,
    agree,
    direction,
    first_line,
    nudged,
    rounding_slack,
    with_autograd,
)
from pyro_sivism.target.replays import Replays
from pyro_sivism.target.runs import ModelRuns
from pyro_sivism.warn import warn

__all__ = ["Binding"]

_CHECK_EVERY = 100  # other arguments: their observations


class Binding:
    """A model bound to arguments, and checked there.

    Args:
        runs: the model, bound to its arguments.
        init: a point ``(D,)``.
        paths: the paths to try, in order, before the loop.

    Attributes:
        path: the path that was chosen, and why.
        bytes_per_particle: what one particle's score computes on the way.
        replays: the graphs of the captured paths.

    Raises:
        NonDeterministicModelError: two evaluations at one point differ.
        ModelError: a site's support depends on other latents, the set of latents is not fixed, or a site cannot have
            what it observes.
    """

    def __init__(self, runs: ModelRuns, init: Tensor, paths: Sequence[str]) -> None:
        self.runs, self.init, self._paths = runs, init, paths
        self.replays = Replays(runs, init)
        self.path = TargetPath("loop", "not chosen yet")
        self.bytes_per_particle = 1
        steps = torch.tensor([-1.0, -0.1, 0.1, 1.0], dtype=init.dtype, device=init.device)
        self._probes = init + steps[:, None] * direction(init)
        self._num_changes = 0
        self.check_observations()
        self.path = self._choose_path(paths)

    # --- evaluation ---------------------------------------------------------------------------------

    def evaluate_along(self, path: str, x: Tensor, what: str = "both") -> tuple[Tensor | None, Tensor | None]:
        """``log p(x)`` (B,) and its score (B, D) along any path, or for ``what`` "log_density" or "score" one of them
        at least."""
        dtype, x = x.dtype, x.to(self.runs.layout.dtype)
        with pyro.validation_enabled(False), poutine.block(), ExitStack() as stack:
            if what != "log_density" and not (torch.is_grad_enabled() and x.requires_grad):
                stack.enter_context(torch.no_grad())
            if path.startswith("captured"):
                log_density, score = self._replay(path, x, what)
            else:
                log_density, score = run_along(self.runs, path, x, what != "log_density")
        return (None if log_density is None else log_density.to(dtype)), None if score is None else score.to(dtype)

    def _replay(self, path: str, x: Tensor, what: str) -> tuple[Tensor | None, Tensor | None]:
        """Evaluate along a captured path, and leave it for an eager one where it fails or is found at fault."""
        if path != self.path.name or self.replays.inputs is not None:  # being chosen, or being recorded itself
            return self.replays.evaluate(path, what, x)
        try:
            log_density, score = self.replays.evaluate(path, what, x)
        except torch.linalg.LinAlgError:  # a particle's
            raise
        except Exception as error:  # while it was recorded anew, whatever the model may raise
            self._leave_captured(first_line(error))
            return self.evaluate_along(self.path.name, x, what)
        fault = self.replays.find_fault(path, what, x, log_density, score)
        if fault is None:
            return log_density, score
        self._leave_captured(f"no longer agreed with a run of the model: {fault}")
        warn(
            f"a graph captured from the model no longer agrees with the model: {fault}. Scores of the last "
            f"{self.replays.num_unchecked} evaluations may be wrong. Probably the model reads something that has "
            "changed since, such as a global; make it an argument of the model. From now on scores are computed along "
            f"'{self.path.name}', which runs the model each time.",
            TargetPathWarning,
        )
        return self.evaluate_along(self.path.name, x, what)

    def _leave_captured(self, reason: str) -> None:
        left = self.path.name
        chosen = self._choose_path([name for name in self._paths if not name.startswith("captured")])
        self.path = TargetPath(chosen.name, f"{left}: {reason}; {chosen.reason}")
        self.replays.clear()

    # --- choosing the path --------------------------------------------------------------------------

    def _choose_path(self, names: Sequence[str]) -> TargetPath:
        """The first path that runs and agrees with the loop at points near the initial one and further away.

        The far points are there for models such as ``if (theta > 0).all()``, which are right under a plate only
        while all particles are on one side.
        """
        self.check_supports(self._probes[[0, -1]])
        points = self._probes
        log_density, score = self._reference(points)
        finite = log_density.isfinite() & score.isfinite().all(-1)
        if finite.any():
            points, log_density, score = points[finite], log_density[finite], score[finite]
        self.bytes_per_particle = self._measure_memory(points[0])
        reasons: list[str] = []
        for name in names:
            fault = self._find_fault(name, points, (log_density, score))
            if fault is not None and name.startswith("captured") and self.replays.give_up_factors(name):
                fault = self._find_fault(name, points, (log_density, score))
            if fault is None:
                return TargetPath(name, "; ".join([*reasons, "agrees with the loop in log density and score"]))
            reasons.append(f"{name}: {fault}")
        return TargetPath("loop", "; ".join(reasons) or "no other path allowed")

    def _find_fault(self, path: str, points: Tensor, want: tuple[Tensor, Tensor]) -> str | None:
        """Why a path cannot be taken, in words; None if it runs and agrees with the loop."""
        try:
            checks = self._agreements(self.evaluate_along(path, points), want, points)
            if path.startswith("captured"):
                checks["score's derivative"] = self._derivative_agrees(path, points[:1])
                checks["derivative in the model's parameters"] = self._param_gradients_agree(path, points[:1])
        except Exception as error:  # any failure of the user's model under a batch means "not this path"
            return first_line(error)
        wrong = [what for what, is_right in checks.items() if not is_right]
        return f"disagrees with the loop in the {wrong[0]}" if wrong else None

    def _agreements(
        self, got: tuple[Tensor | None, Tensor | None], want: tuple[Tensor, Tensor], points: Tensor
    ) -> dict[str, bool]:
        """Whether the log densities and scores found along a path are the loop's, up to what roundings make of them."""
        checks = [agree(g, w) for g, w in zip(got, want)]
        if not all(checks):
            near = zip(*(self.evaluate_along("loop", x) for x in nudged(points)))
            slacks = [rounding_slack(w, [n for n in values if n is not None]) for w, values in zip(want, near)]
            checks = [agree(g, w, slack) for g, w, slack in zip(got, want, slacks)]
        return dict(zip(("log density", "score"), checks))

    def _reference(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Log densities and scores by the loop, run again to see whether they are always the same."""
        random_state = _random_state(points.device)
        log_density, score = self.evaluate_along("loop", points)
        assert log_density is not None
        assert score is not None
        # A model that drew random numbers may give the same value twice by chance, e.g. from a hidden Bernoulli.
        drew = random_state != _random_state(points.device)
        for _ in range(16 if drew else 1):
            again, _ = self.evaluate_along("loop", points, "log_density")
            assert again is not None
            if not agree(again, log_density):
                raise NonDeterministicModelError(
                    "the model's log density differed between two runs at the same latents and minibatch: "
                    f"{log_density.tolist()}, then {again.tolist()}. Expected a deterministic model: draw random "
                    "numbers by pyro.sample, do not hide latent sites by poutine.block (discrete ones are summed "
                    "over), and put modules with dropout into eval()."
                )
        return log_density, score

    def _derivative_agrees(self, path: str, points: Tensor) -> bool:
        """Whether the score's derivative along one direction is the loop's, where the loop has one, up to roundings."""
        try:
            want = self._derivative("loop", points)
        except PARTICLE_ERRORS:
            return True
        got = self._derivative(path, points)
        return agree(got, want) or agree(
            got, want, rounding_slack(want, [self._derivative("loop", near) for near in nudged(points)])
        )

    def _derivative(self, path: str, points: Tensor) -> Tensor:
        """The score's derivative along one direction."""
        x = points.detach().requires_grad_()
        with torch.enable_grad():
            _, score = self.evaluate_along(path, x)
            assert score is not None
            (product,) = torch.autograd.grad((score * direction(points[0])).sum(), x, materialize_grads=True)
        return product

    def _param_gradients_agree(self, path: str, points: Tensor) -> bool:
        """Whether the log density's gradients in the model's parameters are the loop's."""
        params = list(self.runs.params(points[0]).values())
        found = []
        for name in ("loop", path):
            with torch.enable_grad():
                log_density, _ = self.evaluate_along(name, points, "log_density")
                assert log_density is not None
                if params and log_density.requires_grad:
                    found.append(torch.autograd.grad(log_density.sum(), params, materialize_grads=True))
                else:
                    found.append(tuple(torch.zeros_like(param) for param in params))
        return all(agree(got, want) for want, got in zip(*found))

    def _measure_memory(self, point: Tensor) -> int:
        """Bytes of what one particle's score computes on the way."""
        with Allocations() as allocations, pyro.validation_enabled(False), poutine.block():
            with_autograd(self.runs.one, point, True)
        return max(1, allocations.num_bytes)

    def check_supports(self, points: Tensor | None = None) -> None:
        """Refuse a support that moves with the latents or the data: the layout's fixed transform would be wrong."""
        for point in self._probes[:1] if points is None else points:
            with torch.no_grad(), poutine.block(), pyro.validation_enabled(False):
                try:
                    trace = self.runs.trace(point)
                except ModelError:
                    raise
                except PARTICLE_ERRORS:  # a far point may be infeasible; the loop tells if all are
                    continue
            for site in self.runs.layout.sites:
                if not same_support(trace.nodes[site.name]["fn"].support, site.support):
                    raise ModelError(
                        f"the support of latent site '{site.name}' depends on other latents or on the data (at set-up "
                        f"it was {site.support}); expected a fixed support. Draw it on a fixed one and transform it, "
                        "e.g. u = pyro.sample('u', Uniform(0, 1)); x = low + (high - low) * u."
                    )

    def note_change(self) -> None:
        """Other arguments of the same signature are evaluated from now on."""
        self.replays.note_change()
        if self._num_changes % _CHECK_EVERY == 0:
            self.check_observations()
        self._num_changes += 1

    def check_observations(self) -> None:
        """Refuse data that a site cannot have, as Pyro does where validation is on."""
        try:
            with torch.no_grad(), poutine.block():
                traces = [self.runs.trace(point) for point in (self.init, self._probes[0])]
        except ModelError:
            raise
        except PARTICLE_ERRORS:  # a point may be infeasible; the loop tells if all are
            return
        check_observations(*traces)


def _random_state(device: torch.device) -> tuple:
    """The state of every generator that a model may draw from behind Pyro's back."""
    state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    _, numpy_keys, *numpy_rest = np.random.get_state()
    return state.numpy().tobytes(), random.getstate(), np.asarray(numpy_keys).tobytes(), numpy_rest
