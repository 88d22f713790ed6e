"""The log density of a Pyro model and its score, for a batch of unconstrained points.

For one point x the target is

    log p(x) = sum over sites of scale * log p(site | parents) + log |d values / d x|,

with discrete latents summed out, minibatches scaled, and the sites of ``mask``, ``factor`` and ``obs``
counted as the model says; the score is its gradient in x.

Users rarely write models for batches, so a batch is evaluated along one of three paths:

- ``vmap``: one particle's log density under ``torch.func.vmap``. The model is not asked for anything.
- ``plate``: the model under an outermost plate of particles, as ``Trace_ELBO(vectorize_particles=True)``
  does. The model must use plates and negative dims throughout.
- ``loop``: one particle after the other. Always right, and slow.

The first path that runs *and* agrees with the loop in log density and score is taken;
:attr:`Target.path` says which, and why the others were passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.func import grad_and_value, vmap

from pyro_sivism.bijections import same_support
from pyro_sivism.errors import ArgumentError, ModelError, NonDeterministicModelError, NonFiniteError
from pyro_sivism.layout import LatentLayout, is_enumerable
from pyro_sivism.target.functorch import functorch_ready
from pyro_sivism.target.handlers import Enumerate, LogJoint, SubstituteLatents, enumerated_log_joint
from pyro_sivism.target.paths import TargetPath, agree, first_line, with_autograd

__all__ = ["Target", "TargetPath", "check_finite_start"]

PARTICLE_PLATE = "_pyro_sivism_particles"

# What a distribution or a factorization raises at a bad point: ValueError from validation that the user switched on
# for one distribution, LinAlgError (a RuntimeError), or torch.func refusing to word either of them.
_PARTICLE_ERRORS = (RuntimeError, ValueError)


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
        'vmap'
    """

    def __init__(
        self,
        model: Callable,
        layout: LatentLayout,
        trace: Trace,
        args: Sequence = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        paths: Sequence[str] = ("vmap", "plate"),
    ) -> None:
        self.model, self.layout = model, layout
        self._try_paths = tuple(paths)
        self._sites = {site.name: site for site in layout.sites}
        self.num_evaluations = 0
        self.bind(trace, args, kwargs)

    @property
    def dim(self) -> int:
        return self.layout.dim

    @property
    def path(self) -> TargetPath:
        """Which path computes the scores, and why."""
        return self._path

    @property
    def is_subsampled(self) -> bool:
        """Whether the model draws random minibatches, so that the density is an unbiased estimate."""
        return bool(self._subsamples)

    def bind(self, trace: Trace, args: Sequence = (), kwargs: Mapping[str, Any] | None = None) -> None:
        """Point the target at other arguments, whose prototype trace is ``trace``, and check it there."""
        self.args, self.kwargs = tuple(args), dict(kwargs or {})
        nodes = [msg for msg in trace.nodes.values() if msg["type"] == "sample"]
        dims = [f.dim for msg in nodes for f in msg["cond_indep_stack"] if f.vectorized]
        self._max_plate_nesting = -min(dims, default=0)
        self._enumerates = any(
            is_enumerable(msg) and not msg["is_observed"] and not site_is_subsample(msg) for msg in nodes
        )
        self._subsamples = {
            msg["name"]: msg["fn"]
            for msg in nodes
            if site_is_subsample(msg) and msg["fn"].subsample_size is not None
            if msg["fn"].subsample_size < msg["fn"].size
        }
        self._plate_sizes = {name: fn.size for name, fn in self._subsamples.items()}
        self.resample_minibatch()
        self._init = self.layout.init_from_trace(trace)
        self._path = self._choose_path(self._init)

    def rebind(self, args: Sequence = (), kwargs: Mapping[str, Any] | None = None) -> None:
        """Point the target at other arguments of the same shapes, checking only that no support moved with them."""
        old = (*self.args, *self.kwargs.values())
        self.args, self.kwargs = tuple(args), dict(kwargs or {})
        new = (*self.args, *self.kwargs.values())
        changed = len(old) != len(new) or any(a is not b for a, b in zip(old, new))
        if changed and any(vars(site.support) for site in self.layout.sites):
            self._check_supports(self._probes[:1])

    def resample_minibatch(self) -> None:
        """Draw new indices for every random minibatch; all densities use them until the next call."""
        self.minibatch = {name: fn.sample() for name, fn in self._subsamples.items()}

    def over_minibatches(self, max_minibatches: int = 16) -> MinibatchAverage | Target:
        """The target averaged over several minibatches at a time: itself where there are none.

        The minibatches are a random partition of the plates, so that every latent inside a subsampled plate has a
        proper density. Where no latent is inside one, at most ``max_minibatches`` of them are taken.
        """
        if not self._subsamples:
            return self
        count = max(-(-fn.size // fn.subsample_size) for fn in self._subsamples.values())
        has_local_latents = any(site.subsampled_plates for site in self.layout.sites)
        return MinibatchAverage(self, count if has_local_latents else min(count, max_minibatches))

    def log_density(self, x: Tensor) -> Tensor:
        """``log p(x)``, shape (B,), at points (B, D); differentiable in x and in the model's params."""
        return self._evaluate(x, with_score=False)[0]

    def score(self, x: Tensor) -> Tensor:
        """``grad log p(x)``, shape (B, D); differentiable in x where x requires a gradient."""
        return self.log_density_and_score(x)[1]

    def log_density_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``log p(x)`` (B,) and ``grad log p(x)`` (B, D) from one evaluation."""
        log_density, score = self._evaluate(x, with_score=True)
        assert score is not None
        return log_density, score

    def params(self) -> dict[str, Tensor]:
        """The unconstrained leaf tensors behind the model's ``pyro.param`` and module parameters, by name."""
        with torch.no_grad(), poutine.block(), poutine.trace(param_only=True) as capture:
            self._trace(self._init)  # the latents held, as a prior need not be one to draw from
        leaves = {
            name: (msg["value"].unconstrained() if hasattr(msg["value"], "unconstrained") else msg["value"])
            for name, msg in capture.trace.nodes.items()
            if msg["type"] == "param"
        }
        return {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}

    def nonfinite_sites(self, x: Tensor) -> list[str]:
        """The sites whose log probability is NaN or infinite, or cannot be computed, at one point ``x (D,)``."""
        bad = []
        with torch.no_grad(), poutine.block(), pyro.validation_enabled(False):
            try:
                trace = self._trace(x.to(self.layout.dtype))
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

    # --- evaluation ---------------------------------------------------------------------------------

    def _evaluate(self, x: Tensor, with_score: bool) -> tuple[Tensor, Tensor | None]:
        if x.dim() != 2 or x.shape[0] == 0 or x.shape[1] != self.dim:
            raise ArgumentError(f"expected points of shape (B, {self.dim}) with B > 0, got {tuple(x.shape)}")
        self.num_evaluations += x.shape[0]
        try:
            return self._evaluate_along(self._path.name, x, with_score)
        except ModelError:
            raise
        except _PARTICLE_ERRORS:
            # Some particle failed, e.g. its matrix was not positive definite: find which, and call it non-finite.
            return self._evaluate_along("loop", x, with_score)

    def _evaluate_along(self, path: str, x: Tensor, with_score: bool) -> tuple[Tensor, Tensor | None]:
        dtype, x = x.dtype, x.to(self.layout.dtype)
        differentiable = torch.is_grad_enabled() and x.requires_grad
        evaluate = {"vmap": self._vmap, "plate": self._plate, "loop": self._loop}[path]
        with pyro.validation_enabled(False), poutine.block(), ExitStack() as stack:
            if with_score and not differentiable:
                stack.enter_context(torch.no_grad())
            log_density, score = evaluate(x, with_score)
        return log_density.to(dtype), None if score is None else score.to(dtype)

    def _vmap(self, x: Tensor, with_score: bool) -> tuple[Tensor, Tensor | None]:
        with functorch_ready():
            if not with_score:
                return vmap(self._run_one)(x), None
            score, log_density = vmap(grad_and_value(self._run_one))(x)
        return log_density, score

    def _plate(self, x: Tensor, with_score: bool) -> tuple[Tensor, Tensor | None]:
        return with_autograd(self._run_in_plate, x, with_score)

    def _loop(self, x: Tensor, with_score: bool) -> tuple[Tensor, Tensor | None]:
        """One particle after the other. One that fails is NaN; that all fail is the model's error."""
        log_densities, scores, errors = [], [], []
        for point in x:
            try:
                log_density, score = with_autograd(self._run_one, point, with_score)
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

    def _run_one(self, x: Tensor) -> Tensor:
        """``log p(x)`` of one point ``(D,)``, by one run of the model."""
        if self._enumerates:
            log_joint: Tensor | float = enumerated_log_joint(self._trace(x))
        else:
            handler = LogJoint(self._sites, self.layout.constrain(x), self.minibatch, self._plate_sizes)
            with handler:
                self.model(*self.args, **self.kwargs)
            log_joint = handler.log_joint
        return log_joint + self.layout.log_abs_det_jacobian(x)

    def _run_in_plate(self, x: Tensor) -> Tensor:
        """``log p(x)`` of B points, by one run of the model inside a plate of B particles."""
        if self._enumerates:
            raise NotImplementedError("enumerated sites and a plate of particles are not combined")
        num_particles, nesting = x.shape[0], self._max_plate_nesting
        aligned = x.reshape((num_particles,) + (1,) * nesting + (self.dim,))
        values = {site.name: site.transform(u) for site, u in self.layout.split_aligned(aligned)}
        handler = LogJoint(self._sites, values, self.minibatch, self._plate_sizes, particle_dim=-1 - nesting)
        with handler, pyro.plate(PARTICLE_PLATE, num_particles, dim=-1 - nesting):
            self.model(*self.args, **self.kwargs)
        return handler.log_joint + self.layout.log_abs_det_jacobian(x)

    def _trace(self, x: Tensor) -> Trace:
        """One run of the model at one point ``(D,)``, discrete latents enumerated."""
        model, capture = self.model, poutine.trace()
        substitute = SubstituteLatents(self._sites, self.layout.constrain(x), self.minibatch, self._plate_sizes)
        with capture, substitute, ExitStack() as stack:
            if self._enumerates:
                stack.enter_context(Enumerate(first_available_dim=-1 - self._max_plate_nesting))
                model = config_enumerate(model, default="parallel")
            model(*self.args, **self.kwargs)
        return capture.trace

    # --- choosing the path --------------------------------------------------------------------------

    def _choose_path(self, init: Tensor) -> TargetPath:
        """The first path that runs and agrees with the loop at points near ``init`` and further away.

        The far points are there for models such as ``if (theta > 0).all()``, which are right under a plate only
        while all particles are on one side.
        """
        steps = torch.tensor([-1.0, -0.1, 0.1, 1.0], dtype=init.dtype, device=init.device)
        wobble = torch.cos(torch.arange(self.dim, dtype=init.dtype, device=init.device))
        points = self._probes = init + steps[:, None] * wobble
        self._check_supports(points[[0, -1]])
        log_density, score = self._reference(points)
        finite = log_density.isfinite() & score.isfinite().all(-1)
        if finite.any():
            points, log_density, score = points[finite], log_density[finite], score[finite]
        reasons = []
        for name in self._try_paths:
            try:
                got = self._evaluate_along(name, points, with_score=True)
            except Exception as error:  # any failure of the user's model under a batch means "not this path"
                reasons.append(f"{name}: {first_line(error)}")
                continue
            if agree(got[0], log_density) and agree(got[1], score):
                return TargetPath(name, "; ".join([*reasons, "agrees with the loop in log density and score"]))
            reasons.append(f"{name}: disagrees with the loop")
        return TargetPath("loop", "; ".join(reasons) or "no other path allowed")

    def _reference(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Log densities and scores by the loop, run again to see whether they are always the same."""
        random_state = _random_state(points.device)
        log_density, score = self._evaluate_along("loop", points, with_score=True)
        assert score is not None
        # A model that drew random numbers may give the same value twice by chance, e.g. from a hidden Bernoulli.
        drew = not torch.equal(random_state, _random_state(points.device))
        for _ in range(16 if drew else 1):
            again, _ = self._evaluate_along("loop", points, with_score=False)
            if not agree(again, log_density):
                raise NonDeterministicModelError(
                    "the model's log density differed between two runs at the same latents and minibatch: "
                    f"{log_density.tolist()}, then {again.tolist()}. Expected a deterministic model: draw random "
                    "numbers by pyro.sample, do not hide latent sites by poutine.block (discrete ones are summed "
                    "over), and put modules with dropout into eval()."
                )
        return log_density, score

    def _check_supports(self, points: Tensor) -> None:
        """Refuse a support that moves with the latents or the data: the layout's fixed transform would be wrong."""
        for point in points:
            with torch.no_grad(), poutine.block(), pyro.validation_enabled(False):
                try:
                    trace = self._trace(point)
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


class MinibatchAverage:
    """A subsampled target, averaged over the parts of a random partition of its plates.

    Each part is scaled to the full data, so that the average is unbiased; its parts together visit every row.
    """

    def __init__(self, target: Target, num_minibatches: int) -> None:
        self._target, self._num_minibatches = target, num_minibatches
        self.resample_minibatch()

    @property
    def dim(self) -> int:
        return self._target.dim

    def resample_minibatch(self) -> None:
        """Draw another partition."""
        parts: list[dict[str, Tensor]] = [{} for _ in range(self._num_minibatches)]
        for name, fn in self._target._subsamples.items():
            order = torch.randperm(fn.size, device=fn.device)
            for i, part in enumerate(parts):
                rows = torch.arange(i * fn.subsample_size, (i + 1) * fn.subsample_size, device=fn.device)
                part[name] = order[rows % fn.size]
        self._parts = parts

    def log_density(self, x: Tensor) -> Tensor:
        return self.log_density_and_score(x)[0]

    def score(self, x: Tensor) -> Tensor:
        return self.log_density_and_score(x)[1]

    def log_density_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        minibatch = self._target.minibatch
        log_density, score = x.new_zeros(len(x)), torch.zeros_like(x)
        for part in self._parts:
            self._target.minibatch = part
            part_log_density, part_score = self._target.log_density_and_score(x)
            log_density, score = log_density + part_log_density, score + part_score
        self._target.minibatch = minibatch
        return log_density / len(self._parts), score / len(self._parts)


def check_finite_start(target: Target, starts: Tensor) -> Tensor:
    """The rows of ``starts (S, D)`` with finite log density and score.

    Raises:
        NonFiniteError: there is none; the message names the sites that are non-finite at the first.
    """
    log_density, score = target.log_density_and_score(starts)
    finite = log_density.isfinite() & score.isfinite().all(-1)
    if not finite.any():
        sites = target.nonfinite_sites(starts[0])
        where = f"site(s) {', '.join(sites)}" if sites else "the score (the log densities are finite)"
        raise NonFiniteError(
            f"the log density or score is not finite at any of {len(starts)} starting points; at the first, the "
            f"cause is {where}. Check the data for NaN (under a mask too: its gradient is still NaN, so use "
            "torch.nan_to_num) and the observed values against their supports, or give a feasible start: "
            "SemiImplicitGuide(model, init_loc_fn=pyro.infer.autoguide.init_to_value(values=...))."
        )
    return starts[finite]


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
