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
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Distribution
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor, fx
from torch.func import grad_and_value, vmap

from pyro_sivism.bijections import same_support
from pyro_sivism.errors import ArgumentError, ModelError, NonDeterministicModelError, TargetPathWarning
from pyro_sivism.layout import LatentLayout
from pyro_sivism.target.arguments import Arguments
from pyro_sivism.target.capture import CapturedDensity
from pyro_sivism.target.functorch import functorch_ready
from pyro_sivism.target.minibatches import MinibatchAverage
from pyro_sivism.target.paths import Allocations, TargetPath, agree, first_line, with_autograd
from pyro_sivism.target.runs import ModelRuns
from pyro_sivism.warn import warn

__all__ = ["Target"]

# What a distribution or a factorization raises at a bad point: ValueError from validation that the user switched on
# for one distribution, LinAlgError (a RuntimeError), or torch.func refusing to word either of them.
_PARTICLE_ERRORS = (RuntimeError, ValueError)

PATHS = ("captured", "captured_plate", "vmap", "plate")
_MAX_CAPTURES = 4  # of one signature, for different values of what a graph holds as constants
_MAX_BINDINGS = 8
_CHECK_EVERY = 100
_MEMORY_BUDGET = 2**30  # bytes of intermediate results in one batch of scores


@dataclass
class _Binding:
    """What the target knows about arguments of one signature."""

    runs: ModelRuns
    init: Tensor
    probes: Tensor = field(init=False)
    path: TargetPath = field(default_factory=lambda: TargetPath("loop", "not chosen yet"))
    bytes_per_particle: int = 1
    captures: dict[Any, CapturedDensity] = field(default_factory=dict)
    num_captures: int = 0
    num_replays: int = 0
    last_agreement: int = 0
    is_check_due: bool = False  # as arguments whose contents cannot be compared were passed again


class Target:
    """The unconstrained log density of ``model(*args, **kwargs)`` and its score.

    Args:
        model: a Pyro model.
        layout: where its latents live in the unconstrained vector.
        trace: a prototype trace of the model on these arguments.
        args, kwargs: the model's arguments.
        paths: the paths to try, in order, before the loop.

    Raises:
        NonDeterministicModelError: two evaluations at one point differ.
        ModelError: a site's support depends on other latents, or the set of latents is not fixed.

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
        self._try_paths = tuple(paths)
        self.num_evaluations = 0
        self._replaced_inputs: Sequence[Tensor] | None = None
        self._bindings: OrderedDict[tuple, _Binding] = OrderedDict()
        self.bind(trace, args, kwargs)

    # --- what it is bound to ------------------------------------------------------------------------

    @property
    def dim(self) -> int:
        return self.layout.dim

    @property
    def arguments(self) -> tuple[tuple, dict[str, Any]]:
        """The model's ``args`` and ``kwargs`` at the moment."""
        arguments = self._binding.runs.arguments
        return arguments.rebuild(arguments.tensors)

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

    @property
    def inputs(self) -> list[Tensor]:
        """Every tensor that the density reads and that may change: those among the arguments, and the minibatch."""
        return self._binding.runs.inputs

    @contextmanager
    def inputs_replaced(self, inputs: Sequence[Tensor]) -> Iterator[None]:
        """Read these tensors in the place of :attr:`inputs` inside this context."""
        self._replaced_inputs = inputs
        try:
            yield
        finally:
            self._replaced_inputs = None

    def captured_graph(self, what: str, num_particles: int) -> fx.GraphModule | None:
        """The graph that such a batch is evaluated by, for the arguments at hand; None where there is none."""
        runs = self._binding.runs
        captured = self._binding.captures.get((self.path.name, runs.arguments.frozen))
        if captured is None or captured.is_stale:
            return None
        return captured.graph(what, num_particles)

    def check_soon(self) -> None:
        """Compare the next evaluation of a captured path with a run of the model."""
        self._binding.is_check_due = True

    def resample_minibatch(self) -> None:
        """Draw new indices for every random minibatch; all densities use them until the next call."""
        self._binding.runs.resample_minibatch()

    def bind(self, trace: Trace, args: Sequence = (), kwargs: Mapping[str, Any] | None = None) -> None:
        """Point the target at other arguments, whose prototype trace is ``trace``, and check it there."""
        arguments = Arguments(args, kwargs)
        runs = ModelRuns(self.model, self.layout, arguments, trace)
        self._binding = _Binding(runs, self.layout.init_from_trace(trace))
        self._binding.path = self._choose_path(self._try_paths)
        self._bindings[arguments.signature] = self._binding
        if len(self._bindings) > _MAX_BINDINGS:
            self._bindings.popitem(last=False)

    def rebind(self, args: Sequence = (), kwargs: Mapping[str, Any] | None = None) -> bool:
        """Point the target at arguments of a signature that it has been bound to before; False if it has not.

        Checked is only that no support moved with them.
        """
        arguments = Arguments(args, kwargs)
        binding = self._bindings.get(arguments.signature)
        if binding is None:
            return False
        self._bindings.move_to_end(arguments.signature)
        changed = not arguments.same_objects(binding.runs.arguments)
        self._binding, binding.runs.arguments = binding, arguments
        binding.is_check_due = arguments.has_opaque
        if changed and any(vars(site.support) for site in self.layout.sites):
            self._check_supports(binding.probes[:1])
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
            except _PARTICLE_ERRORS as error:
                return [f"none, but the model itself: {first_line(error)}"]
            for name, msg in trace.nodes.items():
                if msg["type"] == "sample" and not site_is_subsample(msg):
                    try:
                        log_prob = msg["fn"].log_prob(msg["value"], *msg["args"], **msg["kwargs"])
                        finite = bool(torch.isfinite(log_prob).all())
                    except _PARTICLE_ERRORS:
                        finite = False
                    if not finite:
                        bad.append(name)
        return bad

    def _evaluate(self, what: str, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if x.dim() != 2 or x.shape[0] == 0 or x.shape[1] != self.dim:
            raise ArgumentError(f"expected points of shape (B, {self.dim}) with B > 0, got {tuple(x.shape)}")
        self.num_evaluations += x.shape[0]
        num_chunks = -(-len(x) * self._binding.bytes_per_particle // _MEMORY_BUDGET)
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
        except _PARTICLE_ERRORS:
            # Some particle failed, e.g. its matrix was not positive definite: find which, and call it non-finite.
            return self._evaluate_along("loop", x, what)

    def _evaluate_along(self, path: str, x: Tensor, what: str = "both") -> tuple[Tensor | None, Tensor | None]:
        dtype, x = x.dtype, x.to(self.layout.dtype)
        evaluate = {"vmap": self._vmap, "plate": self._plate, "loop": self._loop}.get(path)
        with pyro.validation_enabled(False), poutine.block(), ExitStack() as stack:
            if what != "log_density" and not (torch.is_grad_enabled() and x.requires_grad):
                stack.enter_context(torch.no_grad())
            if evaluate is None:
                log_density, score = self._replay(path, x, what)
            else:
                log_density, score = evaluate(x, what != "log_density")
        return (None if log_density is None else log_density.to(dtype)), None if score is None else score.to(dtype)

    def _vmap(self, x: Tensor, with_score: bool) -> tuple[Tensor, Tensor | None]:
        run_one = self._binding.runs.one
        with functorch_ready():
            if not with_score:
                return vmap(run_one)(x), None
            score, log_density = vmap(grad_and_value(run_one))(x)
        return log_density, score

    def _plate(self, x: Tensor, with_score: bool) -> tuple[Tensor, Tensor | None]:
        return with_autograd(self._binding.runs.in_plate, x, with_score)

    def _loop(self, x: Tensor, with_score: bool) -> tuple[Tensor, Tensor | None]:
        """One particle after the other. One that fails is NaN; that all fail is the model's error."""
        log_densities, scores, errors = [], [], []
        for point in x:
            try:
                log_density, score = with_autograd(self._binding.runs.one, point, with_score)
            except ModelError:
                raise
            except _PARTICLE_ERRORS as error:
                errors.append(error)
                log_density, score = x.new_tensor(torch.nan), torch.full_like(point, torch.nan)
            log_densities.append(log_density)
            scores.append(score)
        if len(errors) == len(x) and not isinstance(errors[0], torch.linalg.LinAlgError):
            raise errors[0]
        return torch.stack(log_densities), torch.stack(scores) if with_score else None  # type: ignore[arg-type]

    # --- captured paths -----------------------------------------------------------------------------

    def _replay(self, path: str, x: Tensor, what: str) -> tuple[Tensor | None, Tensor | None]:
        """Evaluate by the captured graphs, and check them against the model now and then."""
        binding = self._binding
        captured = self._capture(path)
        if captured is None:
            return self._evaluate_along(self.path.name, x, what)
        num_graphs = captured.num_graphs
        if self._replaced_inputs is not None:  # this evaluation is being recorded
            return captured.evaluate(what, x, self._replaced_inputs)
        log_density, score = captured.evaluate(what, x, binding.runs.inputs)
        binding.num_replays += 1
        is_due = binding.num_replays % _CHECK_EVERY == 0 or captured.num_graphs > num_graphs or binding.is_check_due
        binding.is_check_due = False
        if is_due and self.path.name == path:
            fault = self._find_fault(x, log_density, score)
            if fault is not None:
                self._leave_captured(path, f"no longer agreed with a run of the model: {fault}")
                warn(
                    f"a graph captured from the model no longer agrees with the model: {fault}. Scores of the last "
                    f"{binding.num_replays - binding.last_agreement} evaluations may be wrong. Probably the model "
                    "reads something that has changed since, such as a global; make it an argument of the model. From "
                    f"now on scores are computed along '{self.path.name}', which runs the model each time.",
                    TargetPathWarning,
                )
                return self._evaluate_along(self.path.name, x, what)
            binding.last_agreement = binding.num_replays
        return log_density, score

    def _capture(self, path: str) -> CapturedDensity | None:
        """The graphs for the arguments at hand, recorded if need be; None after too many recordings."""
        binding = self._binding
        key = path, binding.runs.arguments.frozen
        captured = binding.captures.get(key)
        if captured is None or captured.is_stale:
            if binding.num_captures >= _MAX_CAPTURES + len(PATHS):
                self._leave_captured(path, "numbers or arrays that the graph holds keep changing")
                return None
            binding.num_captures += 1
            captured = CapturedDensity(binding.runs, binding.init, in_plate=path == "captured_plate")
            binding.captures[key] = captured
        return captured

    def _leave_captured(self, path: str, reason: str) -> None:
        rest = [name for name in self._try_paths if not name.startswith("captured")]
        chosen = self._choose_path(rest)
        self._binding.path = TargetPath(chosen.name, f"{path}: {reason}; {chosen.reason}")
        self._binding.captures.clear()

    def _find_fault(self, x: Tensor, log_density: Tensor | None, score: Tensor | None) -> str | None:
        """What is wrong with the values found at one point of a batch, in words; None if nothing.

        Where the density is ill-conditioned two right ways to compute it differ; the difference that a nudge of the
        point by a few roundings makes is allowed on top.
        """
        row = self._binding.num_replays % len(x)
        point = x[row].detach()
        differentiable = score is not None and score.requires_grad
        try:
            want = _values_at(self._binding.runs.one, point, differentiable)
            nudged = _values_at(self._binding.runs.one, point * (1 + 8 * torch.finfo(x.dtype).eps), differentiable)
        except ModelError:
            raise
        except _PARTICLE_ERRORS:
            return None
        got = {"log density": log_density, "score": score}
        if score is not None and score.requires_grad:
            along = score[row] @ _direction(point)
            (got["score's derivative"],) = torch.autograd.grad(along, x, retain_graph=True, materialize_grads=True)
        for name, values in got.items():
            slack = 10 * (nudged[name] - want[name]).abs() if values is not None else 0.0
            if values is not None and not agree(values[row].detach(), want[name], slack):
                return f"the {name} at one draw is {_number(values[row])}, the model's {_number(want[name])}"
        return None

    # --- choosing the path --------------------------------------------------------------------------

    def _choose_path(self, names: Sequence[str]) -> TargetPath:
        """The first path that runs and agrees with the loop at points near the initial one and further away.

        The far points are there for models such as ``if (theta > 0).all()``, which are right under a plate only
        while all particles are on one side.
        """
        binding = self._binding
        init = binding.init
        steps = torch.tensor([-1.0, -0.1, 0.1, 1.0], dtype=init.dtype, device=init.device)
        points = binding.probes = init + steps[:, None] * _direction(init)
        self._check_supports(points[[0, -1]])
        log_density, score = self._reference(points)
        finite = log_density.isfinite() & score.isfinite().all(-1)
        if finite.any():
            points, log_density, score = points[finite], log_density[finite], score[finite]
        binding.bytes_per_particle = self._measure_memory(points[0])
        reasons = []
        for name in names:
            try:
                got = self._evaluate_along(name, points)
                derivative_agrees = not name.startswith("captured") or self._derivative_agrees(name, points[:1])
            except Exception as error:  # any failure of the user's model under a batch means "not this path"
                reasons.append(f"{name}: {first_line(error)}")
                continue
            if agree(got[0], log_density) and agree(got[1], score) and derivative_agrees:
                return TargetPath(name, "; ".join([*reasons, "agrees with the loop in log density and score"]))
            what = "disagrees with the loop"
            reasons.append(f"{name}: {what}" if derivative_agrees else f"{name}: {what} in the score's derivative")
        return TargetPath("loop", "; ".join(reasons) or "no other path allowed")

    def _reference(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Log densities and scores by the loop, run again to see whether they are always the same."""
        random_state = _random_state(points.device)
        log_density, score = self._evaluate_along("loop", points)
        assert log_density is not None
        assert score is not None
        # A model that drew random numbers may give the same value twice by chance, e.g. from a hidden Bernoulli.
        drew = not torch.equal(random_state, _random_state(points.device))
        for _ in range(16 if drew else 1):
            again, _ = self._evaluate_along("loop", points, "log_density")
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
        """Whether the score's derivative along one direction is the loop's, where the loop has one."""
        found = []
        for name in ("loop", path):
            x = points.detach().requires_grad_()
            try:
                with torch.enable_grad():
                    _, score = self._evaluate_along(name, x)
                    assert score is not None
                    (product,) = torch.autograd.grad((score * _direction(points[0])).sum(), x, materialize_grads=True)
            except _PARTICLE_ERRORS:
                if name == "loop":
                    return True
                raise
            found.append(product)
        return agree(found[1], found[0])

    def _measure_memory(self, point: Tensor) -> int:
        """Bytes of what one particle's score computes on the way."""
        with Allocations() as allocations, pyro.validation_enabled(False), poutine.block():
            with_autograd(self._binding.runs.one, point, True)
        return max(1, allocations.num_bytes)

    def _check_supports(self, points: Tensor) -> None:
        """Refuse a support that moves with the latents or the data: the layout's fixed transform would be wrong."""
        for point in points:
            with torch.no_grad(), poutine.block(), pyro.validation_enabled(False):
                try:
                    trace = self._binding.runs.trace(point)
                except ModelError:
                    raise
                except _PARTICLE_ERRORS:  # a far point may be infeasible; the loop tells if all are
                    continue
            for site in self.layout.sites:
                if not same_support(trace.nodes[site.name]["fn"].support, site.support):
                    raise ModelError(
                        f"the support of latent site '{site.name}' depends on other latents or on the data (at set-up "
                        f"it was {site.support}); expected a fixed support. Draw it on a fixed one and transform it, "
                        "e.g. u = pyro.sample('u', Uniform(0, 1)); x = low + (high - low) * u."
                    )


def _direction(point: Tensor) -> Tensor:
    """A fixed direction without zeros, of the shape of a point (D,)."""
    return torch.cos(torch.arange(len(point), dtype=point.dtype, device=point.device))


def _values_at(log_density: Callable[[Tensor], Tensor], point: Tensor, differentiable: bool) -> dict[str, Tensor]:
    """The log density of one point, its score, and the score's derivative along :func:`_direction`."""
    with torch.enable_grad():
        x = point.clone().requires_grad_(differentiable)
        with torch.set_grad_enabled(differentiable):
            value, score = with_autograd(log_density, x, True)
        assert score is not None
        found = {"log density": value.detach(), "score": score.detach()}
        if differentiable:
            (product,) = torch.autograd.grad(score @ _direction(point), x, materialize_grads=True)
            found["score's derivative"] = product
    return found


def _concatenate(parts: Sequence[Tensor | None]) -> Tensor | None:
    tensors = [part for part in parts if part is not None]
    return torch.cat(tensors) if tensors else None


def _number(value: Tensor) -> str:
    """A scalar, or the norm of a vector, for a message."""
    return f"{value.item():.6g}" if value.dim() == 0 else f"of norm {value.norm().item():.6g}"


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
