"""SIVISM: semi-implicit variational inference via score matching, in the place of Pyro's SVI.

One step is

1. ``critic_steps`` times: draw from q without gradients, regress the critic on the conditional score;
2. once: draw from q with gradients, ask the objective for the guide's loss, and update the family;
3. average the family's weights into those of the guide, which is what everything reports;
4. if the model has learnable ``pyro.param``s, move them up E_q[log p] (variational EM).
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from pyro.optim import PyroOptim
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from tqdm.auto import tqdm

from pyro_sivism.errors import ArgumentError, ModelError, NonFiniteWarning, NotSetUpError, TargetPathWarning
from pyro_sivism.family import BatchAndMatch, GaussianFit, Preconditioner, SemiImplicit, WhitenedTarget
from pyro_sivism.guide import SemiImplicitGuide
from pyro_sivism.layout import LatentLayout
from pyro_sivism.objectives import Objective, PathGradientKL
from pyro_sivism.optimizers import Stepper, TorchOptimizerFactory, check_optimizer, clip_gradients, make_stepper
from pyro_sivism.recipe import Recipe
from pyro_sivism.target import Target
from pyro_sivism.target.density import check_finite_start
from pyro_sivism.warn import warn

__all__ = ["SIVISM", "FitResult", "StepInfo"]

Callback = Callable[["SIVISM", "StepInfo"], "bool | None"]

_NUM_STARTS = 4
_MAX_START_TRIES = 100
_PARAM_LR = 1e-2


class StepInfo(NamedTuple):
    """What one step did.

    Attributes:
        step: its number, from 1.
        loss: the Fisher divergence estimate, in the whitened space; it falls towards 0.
        critic_loss: the critic's loss at its last update.
        num_nonfinite: particles left out because their score was not finite.
    """

    step: int
    loss: float
    critic_loss: float
    num_nonfinite: int


@dataclass(frozen=True)
class FitResult:
    """What a call of :meth:`SIVISM.run` did.

    Attributes:
        num_steps: guide steps taken in this run.
        losses, critic_losses: one number per step of this run, float tensors (num_steps,).
        num_nonfinite: particles left out over all steps because their score was not finite.
        num_evaluations: scores of single points computed since set-up, all told.
        seconds: wall-clock of ``setup`` (prototype, path choice), ``preconditioner``, ``critic_warmup`` and ``steps``.
        interrupted: whether Ctrl-C or a callback ended the run early.
        preconditioner: the Gaussian the family started from; None for a fit resumed from a file.
        target_path: how scores are computed, and why.
    """

    num_steps: int
    losses: Tensor
    critic_losses: Tensor
    num_nonfinite: int
    num_evaluations: int
    seconds: dict[str, float]
    interrupted: bool
    preconditioner: GaussianFit | None
    target_path: str


@dataclass
class _Training:
    """What only training needs: the live family, the critic, and their optimizers."""

    family: SemiImplicit
    critic: nn.Module
    guide_stepper: Stepper
    critic_stepper: Stepper
    recipe: Recipe
    step: int = 0
    schedule_start: int = 0
    schedule_length: int | None = None
    param_stepper: Stepper | None = None
    seconds: dict[str, float] = field(default_factory=dict)


class SIVISM:
    """Fits a :class:`SemiImplicitGuide` to a Pyro model by score matching.

    It takes the place of ``pyro.infer.SVI``:

    .. code-block:: diff

        - svi = SVI(model, AutoNormal(model), optim, loss=Trace_ELBO())
        + svi = SIVISM(model, SemiImplicitGuide(model), optim)
          for step in range(1000):
              loss = svi.step(data)

    and needs no settings: ``SIVISM(model).run(None, data)``.

    Args:
        model: a Pyro model; it need not be written for batches. Discrete latents with finitely many values are
            summed over.
        guide: a :class:`SemiImplicitGuide` of the model; made with its defaults if None.
        optim: the guide's optimizer: a ``pyro.optim`` object or a callable from parameters to a torch optimizer, both
            used as they are; if None Adam on the recipe's schedule. It also moves the model's ``pyro.param``s.
        loss: the objective; :class:`PathGradientKL` if None, because it measured far more reliable than the paper's
            :class:`FisherDivergence`, which is one argument away.
        critic_optim: the critic's optimizer, likewise.
        critic: a module from (B, D) to (B, D) in the place of the default score network.
        num_particles: draws per batch, B.
        preconditioner: fits the Gaussian that q starts from; :class:`BatchAndMatch` if None.
        critic_steps: critic updates per guide update.

    Raises:
        OptimizerError: ``optim`` or ``critic_optim`` is of a kind that cannot be driven.
        ArgumentError: another argument is of the wrong kind.

    Example:

        >>> import pyro, pyro.distributions as dist
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> pyro.set_rng_seed(0)
        >>> sivism = SIVISM(model)
        >>> fit = sivism.run(20, torch.ones(100), progress_bar=False)
        >>> sivism.sample(1000)["mu"].shape
        torch.Size([1000])
    """

    def __init__(
        self,
        model: Callable,
        guide: SemiImplicitGuide | None = None,
        optim: PyroOptim | TorchOptimizerFactory | None = None,
        loss: Objective | None = None,
        *,
        critic_optim: PyroOptim | TorchOptimizerFactory | None = None,
        critic: nn.Module | None = None,
        num_particles: int | None = None,
        preconditioner: Preconditioner | None = None,
        critic_steps: int | None = None,
    ) -> None:
        guide = SemiImplicitGuide(model) if guide is None else guide
        if not isinstance(guide, SemiImplicitGuide):
            raise ArgumentError(
                f"guide is a {type(guide).__name__}; expected a SemiImplicitGuide of the whole model, or None. Other "
                "autoguides, and guide lists, are trained by pyro.infer.SVI."
            )
        if loss is not None and not isinstance(loss, Objective):
            raise ArgumentError(
                f"loss is a {type(loss).__name__}; expected an objective such as PathGradientKL() or "
                "FisherDivergence(), or None. Losses of Pyro's SVI need the density of the guide, which a "
                "semi-implicit one does not have."
            )
        for name, value in (("num_particles", num_particles), ("critic_steps", critic_steps)):
            if value is not None and value < 1:
                raise ArgumentError(f"expected {name} of at least 1, got {value}")
        check_optimizer(optim, "optim")
        check_optimizer(critic_optim, "critic_optim")
        self.model, self.guide, self.optim, self.critic_optim = model, guide, optim, critic_optim
        self.loss = PathGradientKL() if loss is None else loss
        self.preconditioner = BatchAndMatch() if preconditioner is None else preconditioner
        self._critic, self._num_particles, self._critic_steps = critic, num_particles, critic_steps
        self._training: _Training | None = None
        self._target: Target | None = None
        self._signature: Any = None
        self._gaussian_fit: GaussianFit | None = None
        self._warned_nonfinite = False

    # --- set-up -------------------------------------------------------------------------------------

    @property
    def target(self) -> Target:
        """The model's log density and score on its current arguments; ``target.path`` says how it is computed."""
        if self._target is None:
            raise NotSetUpError(
                "this SIVISM has seen no arguments of the model yet. Call sivism.setup(*args, **kwargs), step or run."
            )
        return self._target

    @property
    def critic(self) -> nn.Module:
        """The score network."""
        return self._require_training().critic

    @property
    def num_steps_taken(self) -> int:
        """Guide steps since set-up, over all runs and resumptions."""
        return 0 if self._training is None else self._training.step

    def setup(self, *args: Any, **kwargs: Any) -> SIVISM:
        """Run the model once, choose how to compute its score, fit the Gaussian, and warm the critic up.

        The first :meth:`step` or :meth:`run` does this from its own arguments; a second call does nothing.

        Raises:
            ModelError: the model cannot be fitted; the message names the site and the cure.
            NonFiniteError: no finite starting point was found.
        """
        if self._training is None or self._target is None:
            self._bind(args, kwargs)
        return self

    def _bind(self, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Point everything at these arguments, setting up or checking what is new."""
        signature = _signature(args, kwargs)
        if self._target is not None and signature == self._signature:
            self._target.rebind(args, kwargs)
            return
        started = time.perf_counter()
        trace = self.guide.trace_model(*args, **kwargs)
        layout = LatentLayout.from_trace(trace)
        if self.guide.is_set_up:
            self.guide.layout.check_same(layout)
        else:
            self.guide.setup_from_trace(trace, self._recipe(layout.dim))
        if self._target is None:
            self._target = Target(self.model, self.guide.layout, trace, args, kwargs)
        else:
            self._target.bind(trace, args, kwargs)
        if self._target.path.name == "loop":
            warn(
                "the model's score is computed one particle at a time, which is slow: "
                f"{self._target.path.reason}. Draws are right all the same.",
                TargetPathWarning,
            )
        seconds = time.perf_counter() - started
        if self._training is None:
            self._training = self._make_training(self.guide.layout.init_from_trace(trace))
            self._training.seconds["setup"] = seconds
        self._connect(self._training)
        self._signature = signature
        if self._training.step == 0 and "critic_warmup" not in self._training.seconds:
            self._warm_up(self._training)

    def _recipe(self, dim: int) -> Recipe:
        recipe = self.loss.adapt_recipe(Recipe.for_dim(dim))
        return replace(
            recipe,
            num_particles=self._num_particles or recipe.num_particles,
            critic_steps=self._critic_steps or recipe.critic_steps,
        )

    def _make_training(self, init: Tensor) -> _Training:
        """Fit the preconditioner, then make the live family, the critic and the optimizers."""
        started = time.perf_counter()
        fit = self.preconditioner.fit(self.target, self._starts(init))
        self.guide.affine = fit.affine
        self._gaussian_fit = fit
        training = self._assemble(copy.deepcopy(self.guide.family), self._make_critic())
        training.seconds["preconditioner"] = time.perf_counter() - started
        return training

    def _make_critic(self) -> nn.Module:
        layout = self.guide.layout
        critic = self._critic
        if critic is None:
            critic = self.loss.make_critic(layout.dim, self._recipe(layout.dim).critic_hidden_dims)
        return critic.to(layout.device, layout.dtype)

    def _assemble(self, family: SemiImplicit, critic: nn.Module) -> _Training:
        recipe = self._recipe(self.guide.layout.dim)
        prefix = self.guide._pyro_name
        return _Training(
            family,
            critic,
            guide_stepper=make_stepper(
                self.optim,
                {f"{prefix}.training.{name}": p for name, p in family.named_parameters()},
                "optim",
                lr=recipe.guide_lr,
                betas=recipe.betas,
                slow_params=family.conditional.input_parameters(),
                slow_factor=recipe.input_lr_factor,
            ),
            critic_stepper=make_stepper(
                self.critic_optim,
                {f"{prefix}.critic.{name}": p for name, p in critic.named_parameters()},
                "critic_optim",
                lr=recipe.critic_lr,
                betas=recipe.betas,
                slow_params=getattr(critic, "input_parameters", list)(),
                slow_factor=recipe.input_lr_factor,
            ),
            recipe=recipe,
        )

    def _connect(self, training: _Training) -> None:
        """Tell the objective what to work on, and find the model's own parameters."""
        self.loss.setup(training.family, WhitenedTarget(self.target, self.guide.affine), training.critic)
        params = self.target.params()
        known = {} if training.param_stepper is None else training.param_stepper.params
        if {name: id(p) for name, p in params.items()} != {name: id(p) for name, p in known.items()}:
            training.param_stepper = (
                make_stepper(self.optim, params, "optim", lr=_PARAM_LR, betas=training.recipe.betas) if params else None
            )

    def _starts(self, init: Tensor) -> Tensor:
        """Finite starting points: the guide's initial values, and draws from U(-2, 2) around the origin."""
        target = self.target

        def uniform(count: int) -> Tensor:
            return 4.0 * torch.rand(count, target.dim, dtype=init.dtype, device=init.device) - 2.0

        starts = torch.cat([init[None], uniform(_NUM_STARTS - 1)])
        log_density, score = target.log_density_and_score(starts)
        if not bool((log_density.isfinite() & score.isfinite().all(-1)).any()):
            starts = torch.cat([init[None], uniform(_MAX_START_TRIES)])
        return check_finite_start(target, starts)[:_NUM_STARTS]

    def _warm_up(self, training: _Training) -> None:
        """Let the critic learn the score of the first q, which the guide's first step relies on."""
        started = time.perf_counter()
        for _ in range(training.recipe.critic_warmup_steps):
            self._critic_step(training, lr_factor=1.0)
        training.seconds["critic_warmup"] = time.perf_counter() - started

    def _require_training(self) -> _Training:
        if self._training is None:
            raise NotSetUpError(
                "this SIVISM has not been set up yet. Call sivism.setup(*args, **kwargs), step or run first."
            )
        return self._training

    # --- training -----------------------------------------------------------------------------------

    def step(self, *args: Any, **kwargs: Any) -> float:
        """Take one step on the model's arguments and return the loss, as ``SVI.step`` does.

        The loss is an estimate of the Fisher divergence E_q |grad log p - grad log q|^2 in the whitened space,
        for every objective. New arguments of the same shapes are taken as a new minibatch; other shapes are
        checked against the layout first.

        Raises:
            LayoutChangedError: the arguments changed the shape of a latent site.
            NonFiniteError: every particle's score, or a gradient, is not finite.
        """
        self._bind(args, kwargs)
        return self._step().loss

    def _step(self) -> StepInfo:
        training = self._require_training()
        recipe, factor = training.recipe, self._lr_factor(training)
        self.target.resample_minibatch()
        for _ in range(recipe.critic_steps):
            critic_loss = self._critic_step(training, factor)

        params = list(training.guide_stepper.params.values())
        sample = training.family.rsample(recipe.num_particles)
        losses = self.loss.guide_loss(sample, training.step)
        gradients = torch.autograd.grad(losses.loss, params, allow_unused=True)
        training.guide_stepper.step(clip_gradients(gradients, recipe.clip_norm, "guide"), factor)
        self._average_weights(training)
        if training.param_stepper is not None:
            self._param_step(training.param_stepper, sample.x.detach(), factor)

        training.step += 1
        info = StepInfo(
            training.step, losses.fisher_divergence.item(), critic_loss.item(), int(losses.num_nonfinite.item())
        )
        self._report_nonfinite(info)
        return info

    def _critic_step(self, training: _Training, lr_factor: float) -> Tensor:
        with torch.no_grad():
            sample = training.family.rsample(training.recipe.num_particles)
            if hasattr(training.critic, "update_moments"):
                training.critic.update_moments(sample.x)
        loss = self.loss.critic_loss(sample, training.step)
        params = list(training.critic_stepper.params.values())
        gradients = torch.autograd.grad(loss, params, allow_unused=True)
        training.critic_stepper.step(clip_gradients(gradients, training.recipe.clip_norm, "critic"), lr_factor)
        return loss.detach()

    def _param_step(self, stepper: Stepper, y: Tensor, lr_factor: float) -> None:
        """Move the model's parameters up ``E_q[log p]``, the M step of variational EM, at the guide's own draws."""
        log_density = self.target.log_density(self.guide.affine.forward(y))
        finite = log_density.isfinite()
        loss = -torch.where(finite, log_density, 0.0).sum() / finite.sum()
        gradients = torch.autograd.grad(loss, list(stepper.params.values()), allow_unused=True)
        stepper.step(gradients, lr_factor)

    @torch.no_grad()
    def _average_weights(self, training: _Training) -> None:
        """Average the live weights into the guide's, over few steps at first and about 100 later."""
        decay = min(training.recipe.averaging_decay, (1.0 + training.step) / (10.0 + training.step))
        averaged, live = list(self.guide.family.parameters()), list(training.family.parameters())
        torch._foreach_lerp_(averaged, live, 1.0 - decay)

    def _lr_factor(self, training: _Training) -> float:
        """The schedule: a linear ramp from set-up, then a cosine over a run of known length, or constant."""
        recipe = training.recipe
        ramp = min(1.0, (training.step + 1) / recipe.ramp_steps)
        if training.schedule_length is None:
            return ramp
        progress = min(1.0, (training.step - training.schedule_start) / training.schedule_length)
        low = recipe.final_lr_fraction
        return ramp * (low + (1.0 - low) * 0.5 * (1.0 + math.cos(math.pi * progress)))

    def _report_nonfinite(self, info: StepInfo) -> None:
        if info.num_nonfinite and not self._warned_nonfinite:
            self._warned_nonfinite = True
            warn(
                f"step {info.step}: the target's score was not finite at {info.num_nonfinite} particles, which were "
                "left out of the step; q may be cut off there. Later steps are counted in FitResult.num_nonfinite.",
                NonFiniteWarning,
            )

    def run(
        self,
        num_steps: int | None = None,
        *args: Any,
        progress_bar: bool = True,
        callbacks: Sequence[Callback] = (),
        **kwargs: Any,
    ) -> FitResult:
        """Set up if need be, then take ``num_steps`` steps on the same arguments.

        Args:
            num_steps: 1,000 for D <= 32 and 3,000 beyond if None.
            progress_bar: show the loss and steps per second.
            callbacks: each called as ``callback(sivism, info)`` after each step; a true result ends the run.

        Ctrl-C ends the run and keeps the fit.
        """
        if num_steps is not None and not (isinstance(num_steps, int) and num_steps >= 0):
            raise ArgumentError(
                f"expected num_steps to be None or an integer of at least 0 as run's first argument, got "
                f"{type(num_steps).__name__}; the model's arguments come after it: run(None, data)"
            )
        self._bind(args, kwargs)
        training = self._require_training()
        num_steps = training.recipe.num_steps if num_steps is None else num_steps
        training.schedule_start, training.schedule_length = training.step, num_steps
        history: list[StepInfo] = []
        interrupted, started = False, time.perf_counter()
        try:
            with tqdm(total=num_steps, disable=not progress_bar, desc="SIVISM") as bar:
                while len(history) < num_steps and not interrupted:
                    info = self._step()
                    history.append(info)
                    bar.update()
                    if len(history) % 20 == 0:
                        bar.set_postfix_str(f"loss {info.loss:.3g}", refresh=False)
                    interrupted = any([callback(self, info) for callback in callbacks])
        except KeyboardInterrupt:
            interrupted = True
        finally:
            training.schedule_length = None
        seconds = {**training.seconds, "steps": time.perf_counter() - started}
        return FitResult(
            num_steps=len(history),
            losses=torch.tensor([info.loss for info in history]),
            critic_losses=torch.tensor([info.critic_loss for info in history]),
            num_nonfinite=sum(info.num_nonfinite for info in history),
            num_evaluations=self.target.num_evaluations,
            seconds=seconds,
            interrupted=interrupted,
            preconditioner=self._gaussian_fit,
            target_path=str(self.target.path),
        )

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """The loss of the guide as it is reported (averaged weights), on fresh draws. Changes no parameter.

        Raises:
            NotSetUpError: before set-up.
        """
        training = self._require_training()
        self._bind(args, kwargs)
        with self._evaluating(training):
            sample = self.guide.family.rsample(training.recipe.num_particles)
            losses = self.loss.guide_loss(sample, training.step)
        return losses.fisher_divergence.item()

    @contextmanager
    def _evaluating(self, training: _Training) -> Iterator[None]:
        """A fresh minibatch for the time of an evaluation; the step's own is put back."""
        minibatch = self.target.minibatch
        self.target.resample_minibatch()
        try:
            with torch.no_grad():
                yield
        finally:
            self.target.minibatch = minibatch

    # --- results ------------------------------------------------------------------------------------

    def sample(self, num_samples: int) -> dict[str, Tensor]:
        """Posterior draws of every latent site, on its support: ``(num_samples, *site shape)``.

        Sites inside a subsampling plate come at the plate's full size.

        Raises:
            NotSetUpError: before set-up.
        """
        self._require_training()
        return self.guide.layout.constrain(self.sample_unconstrained(num_samples))

    def sample_unconstrained(self, num_samples: int, batch_size: int = 10_000) -> Tensor:
        """Draws of the unconstrained vector, ``(num_samples, D)``."""
        self._require_training()
        sizes = [min(batch_size, num_samples - i) for i in range(0, num_samples, batch_size)]
        return torch.cat([self.guide.sample_unconstrained(size) for size in sizes])

    # --- saving -------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the fit to a file: the guide, the critic, the optimizers' states and the model's parameters."""
        training = self._require_training()
        state = {
            "guide": self.guide,
            "family": training.family,
            "critic": training.critic,
            "guide_optim": training.guide_stepper.state_dict(),
            "critic_optim": training.critic_stepper.state_dict(),
            "params": {name: p.detach() for name, p in self.target.params().items()},
            "step": training.step,
            "seconds": training.seconds,
        }
        torch.save(state, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: Callable, **kwargs: Any) -> SIVISM:
        """A fit written by :meth:`save`, ready to sample, or to go on with ``step`` and ``run``.

        Args:
            path: the file; it is unpickled, so load only files you trust.
            model: the model the fit was made with; models are code and are not saved.
            kwargs: the arguments of :class:`SIVISM` the fit was made with (``optim``, ``loss``, ...), to go on as before.
        """
        state = torch.load(path, weights_only=False)
        guide = state["guide"]
        guide.attach_model(model)
        sivism = cls(model, guide, critic=state["critic"], **kwargs)
        training = sivism._assemble(state["family"], state["critic"])
        training.guide_stepper.load_state_dict(state["guide_optim"])
        training.critic_stepper.load_state_dict(state["critic_optim"])
        training.step, training.seconds = state["step"], state["seconds"]
        sivism._training = training
        _restore_params(state["params"])
        return sivism


def _restore_params(saved: dict[str, Tensor]) -> None:
    """Put the model's learned parameters back into Pyro's param store, where the store has them already."""
    import pyro

    store = pyro.get_param_store()
    for name, value in saved.items():
        if name in store._params:
            if store._params[name].shape != value.shape:
                raise ModelError(
                    f"pyro.param '{name}' has shape {tuple(store._params[name].shape)} in this process and "
                    f"{tuple(value.shape)} in the file; load the fit with the model it was made with"
                )
            store._params[name].data.copy_(value)


def _signature(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple:
    """What must stay the same for a call to be a new minibatch of the same problem: shapes, dtypes and plain values."""
    leaves, structure = tree_flatten((tuple(args), kwargs))
    return (
        str(structure),
        tuple(
            (tuple(leaf.shape), leaf.dtype, leaf.device)
            if isinstance(leaf, Tensor)
            else (type(leaf), leaf if isinstance(leaf, (int, float, str, bool, type(None))) else id(leaf))
            for leaf in leaves
        ),
    )
