"""The training loop: one family, one critic, one objective, and their optimizers.

One step is

1. ``critic_steps`` times: draw from q without gradients, and move the critic down its loss;
2. once: draw from q with gradients, ask the objective for the guide's loss, and move the family down it; down the
   distance to chains, too, where a run has such to follow;
3. average the family's weights into those that are reported;
4. if the model has learnable parameters, move them up E_q[log p] (variational EM).

On an accelerator a step asks for no value (see ``devices.py``): what may go wrong is decided by masks, and
:meth:`Training.read` tells, of several steps together.

Where several processes share the fit, each draws its share of the particles, and gradients and reports are pooled.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_sivism.compiled import CompiledGradients
from pyro_sivism.devices import is_at_hand
from pyro_sivism.distributed import Ranks
from pyro_sivism.errors import CompileError, CompileWarning, ModelError, NonFiniteError, NonFiniteWarning
from pyro_sivism.family import SemiImplicit, TargetDensity
from pyro_sivism.objectives import GuideLoss, Objective, SlicedDistance
from pyro_sivism.optimizers import OptimizerLike, Stepper, clip_gradients, make_stepper, nonfinite_gradient
from pyro_sivism.recipe import Recipe
from pyro_sivism.results import Seconds, StepInfo, StepReport
from pyro_sivism.target import Target
from pyro_sivism.target.paths import first_line
from pyro_sivism.warn import warn

__all__ = ["STEPS_BEFORE_COMPILING", "Training"]

_MODEL_PARAM_LR = 2e-2
_CHECK_EVERY = 100
STEPS_BEFORE_COMPILING = 50  # until then the score's graph is recorded, and the time of a step known
_COMPILED_SAVING = 0.3  # of a step's time; measured .3 to .5
_COMPILE_SECONDS = 90.0  # cold, on one core; half of it is usual


class Training:
    """The state of a fit in progress.

    Args:
        family: the live family, which the optimizer moves.
        averaged: the family that is reported, whose weights follow the live ones.
        critic: a module from (B, D) to (B, D).
        objective: what to move them by.
        recipe: the settings.
        optim, critic_optim: the user's optimizers, or None for ours.
        name: prefix of the parameters' names, which per-parameter optimizer arguments see.
        ranks: the processes that share the fit.
        compile: compile the steps; if None where :meth:`compile_if_repaid` finds that it pays.
        seconds: where to write down what warming up and compiling took.
    """

    def __init__(
        self,
        family: SemiImplicit,
        averaged: SemiImplicit,
        critic: nn.Module,
        objective: Objective,
        recipe: Recipe,
        *,
        optim: OptimizerLike | None,
        critic_optim: OptimizerLike | None,
        name: str,
        ranks: Ranks,
        compile: bool | None = False,
        seconds: Seconds | None = None,
    ) -> None:
        self.family, self.averaged, self.critic = family, averaged, critic
        self.objective, self.recipe = objective, recipe
        self.ranks, self._num_particles = ranks, ranks.share(recipe.num_particles)
        self.num_steps = 0
        self.is_warm = False
        self._optim = optim
        self._compiles = self._wants_compiling = compile
        self._seconds = Seconds() if seconds is None else seconds
        self._schedule: tuple[int, int] | None = None
        self._warned_nonfinite = False
        self._guide_stepper = make_stepper(
            optim,
            {f"{name}.training.{key}": p for key, p in family.named_parameters()},
            "optim",
            lr=recipe.guide_lr,
            betas=recipe.betas,
            slow_params=family.conditional.input_parameters(),
            slow_factor=recipe.input_lr_factor,
        )
        self._critic_stepper = make_stepper(
            critic_optim,
            {f"{name}.critic.{key}": p for key, p in critic.named_parameters()},
            "critic_optim",
            lr=recipe.critic_lr,
            betas=recipe.betas,
            slow_params=getattr(critic, "input_parameters", list)(),
            slow_factor=recipe.input_lr_factor,
        )
        # Walking the modules for them takes a tenth of a small step.
        self._live_params: list[Tensor] = list(family.parameters())
        self._averaged_params: list[Tensor] = list(averaged.parameters())
        self._buffers = list(zip(averaged.buffers(), family.buffers()))
        self._compiled: CompiledGradients | None = None
        self._distance: SlicedDistance | None = None
        self._skipped: dict[str, Tensor] = {}  # whose update was skipped since the last look, where nobody has seen it
        self._model_stepper: Stepper | None = None
        self._model_drift: dict[str, tuple[Tensor, Tensor]] = {}

    def connect(self, target: TargetDensity, source: Target, model_params: Mapping[str, Tensor]) -> None:
        """Work on this whitened target, made of ``source``, from now on, and learn these parameters of the model."""
        self.target, self.source = target, source
        self._compiled = None
        self.objective.setup(self.family, target, self.critic)
        known = {} if self._model_stepper is None else self._model_stepper.params
        if {key: id(p) for key, p in model_params.items()} == {key: id(p) for key, p in known.items()}:
            return
        self._model_stepper = None
        if model_params:
            self._model_stepper = make_stepper(
                self._optim, model_params, "optim", lr=_MODEL_PARAM_LR, betas=self.recipe.betas
            )

    @torch.no_grad()
    def critic_knows_gaussian(self) -> bool:
        """Whether the critic takes q for the standard normal that it is at first, as the default one does untrained."""
        points = torch.stack([torch.ones(self.family.dim), torch.linspace(-2.0, 2.0, self.family.dim)])
        points = points.to(self._live_params[0])
        return torch.equal(self.objective.critic_value(points, torch.zeros_like(points)), points)

    def warm_up(self) -> None:
        """Let the critic learn the score of the first q, which the guide's first step relies on; once."""
        if not self.is_warm:
            with self._seconds.of("critic_warmup"):
                for _ in range(self.recipe.critic_warmup_steps):
                    self._critic_step(lr_factor=1.0)
        self.is_warm = True

    def plan(self, num_steps: int | None) -> None:
        """Let the learning rate fall over the next ``num_steps`` steps, or stay constant if None."""
        self._schedule = None if num_steps is None else (self.num_steps, num_steps)

    @property
    def learns_model(self) -> bool:
        """Whether the model has parameters to be learned."""
        return self._model_stepper is not None

    @property
    def num_own_particles(self) -> int:
        """This rank's draws in a batch."""
        return self._num_particles

    def follow(self, distance: SlicedDistance | None) -> None:
        """Let steps to come lower this distance of q's draws, too, with the objective's loss."""
        if distance is not None and self._distance is not None:
            self._distance.copy_(distance)  # where compiled steps read it
            return
        if self._compiled is not None and distance is not self._distance:
            self._compiled, self._compiles = None, self._wants_compiling  # they are other steps now
        self._distance = distance

    def compile_if_repaid(self, steps_left: int, seconds_per_step: float) -> None:
        """Compile where the seconds it usually saves exceed those it usually takes by far."""
        saving = _COMPILED_SAVING * seconds_per_step * steps_left
        if self._compiles is None and self.ranks.size == 1 and saving > 2 * _COMPILE_SECONDS:
            self._compile()

    def _compile(self) -> None:
        """Compile the gradients of the steps to come, without effect on what they are; once for the same steps, whether
        it succeeds or not."""
        self._compiles = False
        with self._seconds.of("compile"):
            try:
                if self.objective.depends_on_step:
                    raise CompileError(f"the loss of {type(self.objective).__name__} changes from step to step")
                functions = (self._own_critic_gradients, self._own_guide_gradients)
                self._compiled = CompiledGradients(functions, self.source)
            except CompileError as error:
                warn(f"the steps could not be compiled, and go on as they are: {error}", CompileWarning)

    @property
    def is_compiled(self) -> bool:
        return self._compiled is not None

    def advance(self) -> StepReport:
        """Take the next step of a fit: on a new minibatch, after the critic's warm-up, compiled where that is wanted.

        Raises:
            As :meth:`step`.
        """
        self.warm_up()
        self.source.resample_minibatch()  # one minibatch for the critic and the guide alike
        if self._compiles and self.num_steps >= STEPS_BEFORE_COMPILING:
            self._compile()
        return self.step()

    def step(self) -> StepReport:
        """Take one step, as the module docstring says.

        Raises:
            NonFiniteError: every particle's score is non-finite, or a gradient is; the guide has not been moved. On an
                accelerator it is :meth:`read` that raises.
        """
        lr_factor = self._lr_factor()
        for _ in range(self.recipe.critic_steps):
            critic_loss = self._critic_step(lr_factor)

        gradients, divergence, num_nonfinite, x = self._guide_gradients()
        self._update("guide", self._guide_stepper, gradients, lr_factor)
        self._average_weights()
        if self._model_stepper is not None:
            self._model_step(self._model_stepper, x, lr_factor)

        self.num_steps += 1
        return StepReport(self.num_steps, divergence, critic_loss, num_nonfinite)

    def read(self, reports: Sequence[StepReport]) -> list[StepInfo]:
        """What steps since the last look did, in numbers; on an accelerator the one place where the host waits for it.

        Raises:
            NonFiniteError: of one of these steps; it moved nothing.
        """
        if not reports:
            return []
        steps, *tensors = zip(*reports)
        infos = [StepInfo(*row) for row in zip(steps, *(torch.stack(column).tolist() for column in tensors))]
        for info in infos:
            if info.num_nonfinite == self.recipe.num_particles:
                raise NonFiniteError(
                    f"step {info.step}: the target's score, or a derivative of it that the objective needs, was not "
                    f"finite at any of {info.num_nonfinite} particles. Check the model for overflow far from the "
                    "posterior (float64 data often cures it), or lower the learning rate."
                )
        skipped, self._skipped = self._skipped, {}
        for whose, is_skipped in skipped.items():
            if is_skipped:
                raise nonfinite_gradient(whose)
        for info in infos:
            self._report_nonfinite(info)
        return infos

    @torch.no_grad()
    def evaluate(self) -> GuideLoss:
        """The losses of the averaged family on fresh draws; nothing is updated."""
        return self.objective.guide_loss(self.averaged.rsample(self.recipe.num_particles), self.num_steps)

    # --- pieces of a step ---------------------------------------------------------------------------

    def _update(self, whose: str, stepper: Stepper, gradients: Sequence[Tensor | None], lr_factor: float) -> None:
        """Move the guide or the critic along its gradients, unless they are not finite."""
        clipped, skip = clip_gradients(gradients, self.recipe.clip_norm, whose)
        stepper.step(clipped, lr_factor, skip)
        if skip is not None:
            self._skipped[whose] = torch.maximum(skip, self._skipped.get(whose, skip))

    def _guide_gradients(self) -> tuple[list[Tensor | None], Tensor, Tensor, Tensor]:
        """The guide's gradients, the Fisher divergence and how many particles were left out, over all ranks; this
        rank's draws."""
        try:
            *own, divergence, num_counted, num_nonfinite, x = self._run(1, self._own_guide_gradients)
        except NonFiniteError:
            if self.ranks.size == 1:
                raise
            # None of this rank's particles counts. If none counts anywhere the average is NaN, which all ranks refuse.
            params = self._guide_stepper.params.values()
            x = next(iter(params)).new_full((self._num_particles, self.family.dim), torch.nan)
            own, divergence = [torch.zeros_like(param) for param in params], x.new_zeros(())
            num_counted = torch.zeros((), dtype=torch.long, device=x.device)
            num_nonfinite = num_counted + self._num_particles
        *gradients, divergence, num_nonfinite = self.ranks.pool([*own, divergence, num_nonfinite], num_counted)
        return gradients, divergence, num_nonfinite, x

    def _own_guide_gradients(self) -> list[Any]:
        sample = self.family.rsample(self._num_particles)
        losses = self.objective.guide_loss(sample, self.num_steps)
        loss = losses.loss if self._distance is None else losses.loss + self._distance(sample.x)
        num_counted = self._num_particles - losses.num_nonfinite  # before the backward pass counts its own
        params = list(self._guide_stepper.params.values())
        gradients = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=self.ranks.size > 1)
        return [*gradients, losses.fisher_divergence, num_counted, losses.num_nonfinite, sample.x.detach()]

    def _run(self, index: int, function: Callable[[], list[Any]]) -> Sequence[Any]:
        """The critic's (0) or the guide's (1) gradients, compiled where they are."""
        if self._compiled is not None and not self._compiled.is_current:
            self._compiled = None
        if self._compiled is None:
            return function()
        if self.num_steps % _CHECK_EVERY == 0:  # a step by the usual way, which looks at the model again
            self.source.check_soon()
            return function()
        try:
            return self._compiled(index)
        except RuntimeError as error:  # such as memory that CUDA graphs find no more of
            self._compiled = None
            warn(f"the compiled steps failed, and go on as they were: {first_line(error)}", CompileWarning)
            return function()

    def _critic_step(self, lr_factor: float) -> Tensor:
        *own, loss, x = self._run(0, self._own_critic_gradients)
        *gradients, loss = self.ranks.pool([*own, loss], self._num_particles)
        if own:  # there are none in a critic in closed form
            self._update("critic", self._critic_stepper, gradients, lr_factor)
        update_moments = getattr(self.critic, "update_moments", None)
        if update_moments is not None:
            update_moments(self.ranks.gather(x, self.recipe.num_particles))
        return loss

    def _own_critic_gradients(self) -> list[Any]:
        with torch.no_grad():
            sample = self.family.rsample(self._num_particles)
        loss = self.objective.critic_loss(sample, self.num_steps)
        params = list(self._critic_stepper.params.values())
        gradients = torch.autograd.grad(loss, params, allow_unused=True) if params else ()
        return [*gradients, loss.detach(), sample.x]

    def _model_step(self, stepper: Stepper, x: Tensor, lr_factor: float) -> None:
        """The M step of variational EM: move the model's parameters up ``E_q[log p]`` at the guide's own draws."""
        params, shared = list(stepper.params.values()), self.ranks.size > 1
        log_density = self.target.log_density(x)
        finite = log_density.isfinite()
        gradients: Sequence[Tensor | None]
        if shared and not bool(finite.any()):  # the other ranks' particles decide
            gradients = [torch.zeros_like(param) for param in params]
        else:
            if not is_at_hand(x) or not bool(finite.all()):
                # Masked in the sum, a NaN would still have a NaN gradient: evaluate a finite one in its place.
                x = torch.where(finite[:, None], x, x[finite.int().argmax(0, keepdim=True)])
                log_density = torch.where(finite, self.target.log_density(x), 0.0)
            loss = -log_density.sum() / finite.sum().clamp(min=1)
            gradients = [None] * len(params)
            if loss.requires_grad:
                gradients = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=shared)
        if all(gradient is None for gradient in gradients):
            raise ModelError(
                f"the log density no longer depends on the model's parameters {list(stepper.params)}, which it did at "
                "set-up. If the param store was cleared, make a new SIVISM."
            )
        gradients = self.ranks.pool(gradients, finite.sum())
        for name, gradient in zip(stepper.params, gradients):
            if gradient is not None:
                mean, size = self._model_drift.get(name, (torch.zeros_like(gradient), torch.zeros_like(gradient)))
                self._model_drift[name] = mean.lerp(gradient, 0.01), size.lerp(gradient.abs(), 0.01)
        stepper.step(gradients, lr_factor, skip=None if is_at_hand(x) else (~finite.any()).float())

    def drifting_model_params(self) -> list[str]:
        """The model's parameters whose gradients all had one sign over the last hundred steps or so."""
        return [name for name, (mean, size) in self._model_drift.items() if bool((mean.abs() > 0.8 * size).any())]

    @torch.no_grad()
    def _average_weights(self) -> None:
        """Average the live weights into the reported ones: over few steps at first, about 100 later."""
        decay = min(self.recipe.averaging_decay, (1.0 + self.num_steps) / (10.0 + self.num_steps))
        torch._foreach_lerp_(self._averaged_params, self._live_params, 1.0 - decay)
        for averaged_buffer, live_buffer in self._buffers:
            averaged_buffer.copy_(live_buffer)

    def _lr_factor(self) -> float:
        """The schedule: a linear ramp from set-up, then a cosine over a run of known length, or constant."""
        ramp = min(1.0, (self.num_steps + 1) / self.recipe.ramp_steps)
        if self._schedule is None:
            return ramp
        start, length = self._schedule
        progress, low = min(1.0, (self.num_steps - start) / length), self.recipe.final_lr_fraction
        return ramp * (low + (1.0 - low) * 0.5 * (1.0 + math.cos(math.pi * progress)))

    def _report_nonfinite(self, info: StepInfo) -> None:
        if info.num_nonfinite and not self._warned_nonfinite and self.ranks.is_first:
            self._warned_nonfinite = True
            warn(
                f"step {info.step}: the target's score, or a derivative of it that the objective needs, was not finite "
                f"at {info.num_nonfinite} particles, which were left out of the step; q may be cut off there. Later "
                "steps are counted in FitResult.num_nonfinite.",
                NonFiniteWarning,
            )

    # --- saving -------------------------------------------------------------------------------------

    def snapshot(self) -> list[dict[str, Tensor]]:
        """Copies of what q and its critic are now, for :meth:`restore`."""
        return [copy.deepcopy(module.state_dict()) for module in (self.family, self.averaged, self.critic)]

    def restore(self, snapshot: Sequence[Mapping[str, Tensor]]) -> None:
        """Put q and its critic back to where they were; the optimizers stay as they are."""
        for module, state in zip((self.family, self.averaged, self.critic), snapshot):
            module.load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed fit needs beside the modules."""
        return {
            "guide_optim": self._guide_stepper.state_dict(),
            "critic_optim": self._critic_stepper.state_dict(),
            "model_optim": None if self._model_stepper is None else self._model_stepper.state_dict(),
            "num_steps": self.num_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; the modules are the caller's to restore, before this training is made."""
        self._guide_stepper.load_state_dict(state["guide_optim"])
        self._critic_stepper.load_state_dict(state["critic_optim"])
        if self._model_stepper is not None and state["model_optim"] is not None:
            self._model_stepper.load_state_dict(state["model_optim"])
        self.num_steps, self.is_warm = state["num_steps"], True
