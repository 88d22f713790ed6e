"""SIVISM: semi-implicit variational inference via score matching, in the place of Pyro's SVI."""

from __future__ import annotations

import copy
import numbers
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from pyro.infer.autoguide.initialization import init_to_median
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_sivism.assessment import assess
from pyro_sivism.checkpoint import write_atomically
from pyro_sivism.cycles import Cycles
from pyro_sivism.devices import is_at_hand, keep_freed_memory
from pyro_sivism.diagnostics import Chains, Verdict
from pyro_sivism.distributed import Ranks
from pyro_sivism.errors import ArgumentError, FitWarning, NotSetUpError, SivismError
from pyro_sivism.family import BatchAndMatch, GaussianFit, Preconditioner, WhitenedTarget
from pyro_sivism.guide import SemiImplicitGuide
from pyro_sivism.inference_data import split_keywords, to_inference_data
from pyro_sivism.initialization import Initialization, warn_of_loop
from pyro_sivism.layout import LatentLayout
from pyro_sivism.objectives import Objective, PathGradientKL
from pyro_sivism.optimizers import OptimizerLike, check_optimizer
from pyro_sivism.recipe import Recipe
from pyro_sivism.reparametrization import suggestion
from pyro_sivism.results import FitResult, History, Seconds, StepInfo
from pyro_sivism.target import Target
from pyro_sivism.target.anchored import AnchoredTarget
from pyro_sivism.target.density import PATHS, UNCAPTURED_PATHS
from pyro_sivism.training import Training
from pyro_sivism.warn import warn

__all__ = ["SIVISM"]

Callback = Callable[["SIVISM", StepInfo], "bool | None"]

_MIN_STEPS_TO_JUDGE = 100
_CURES = (
    "Run more steps, standardize the data, use float64, or reparametrize the model; or use its draws to start NUTS."
)


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
        guide: a :class:`SemiImplicitGuide` of the model; made with its defaults if None. A guide that another
            SIVISM has trained goes on from where it is.
        optim: the guide's optimizer: a ``pyro.optim`` object or a callable from parameters to a torch optimizer, both
            used as they are, on gradients clipped to a norm of 5; if None Adam on the recipe's schedule. It also moves
            the model's ``pyro.param``s.
        loss: the objective; :class:`PathGradientKL` if None, because it measured far more reliable than the paper's
            game, ``FisherDivergence(path_weight=0)``, which is one argument away.
        critic_optim: the critic's optimizer, likewise.
        critic: a module from (B, D) to (B, D) in the place of the default score network.
        num_particles: draws per batch, B.
        preconditioner: fits the Gaussian that q starts from; :class:`BatchAndMatch` if None.
        critic_steps: critic updates per guide update.
        capture: keep the model's log density as a graph of tensor operations and replay that, rather than run the model
            in each step. Where it cannot be done or would not be right the model is run; ``target.path`` says so.
        compile: compile the steps by ``torch.compile``, which takes a minute or more and needs a C++ compiler. If None
            where a ``run`` has so many steps left that this is repaid, which takes tens of thousands.
        decenter: fit latents whose scale depends on other latents, and about which the data say little, at a fixed
            scale, as :func:`~pyro_sivism.decenter` does, if the Gaussian that q starts from has the higher ELBO there.
            What is drawn and reported are the model's own sites. A guide that was set up before keeps its coordinates.
            If False never.
        ranks: the processes that share the fit, see :mod:`pyro_sivism.distributed`; those that ``torchrun`` started or
            ``torch.distributed`` knows if None.

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
        optim: OptimizerLike | None = None,
        loss: Objective | None = None,
        *,
        critic_optim: OptimizerLike | None = None,
        critic: nn.Module | None = None,
        num_particles: int | None = None,
        preconditioner: Preconditioner | None = None,
        critic_steps: int | None = None,
        capture: bool = True,
        compile: bool | None = None,
        decenter: bool = True,
        ranks: Ranks | None = None,
    ) -> None:
        if not callable(model):
            raise ArgumentError(f"model is a {type(model).__name__}; expected a callable with Pyro primitives")
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
            if value is not None and not (_is_integer(value) and value >= 1):
                raise ArgumentError(f"expected {name} to be an integer of at least 1, got {value!r}")
        if critic is not None and not isinstance(critic, nn.Module):
            raise ArgumentError(f"critic is a {type(critic).__name__}; expected None or a torch.nn.Module")
        can_fit = callable(getattr(preconditioner, "fit", None)) and not isinstance(preconditioner, type)
        if preconditioner is not None and not can_fit:
            raise ArgumentError(
                f"preconditioner is a {type(preconditioner).__name__}; expected None, BatchAndMatch(), "
                "FixedGaussian(...) or another object with a method fit"
            )
        if compile is not None and not isinstance(compile, bool):
            raise ArgumentError(f"compile is a {type(compile).__name__}; expected True, False or None")
        if ranks is not None and not isinstance(ranks, Ranks):
            raise ArgumentError(f"ranks is a {type(ranks).__name__}; expected None, Ranks.find() or Ranks.alone()")
        check_optimizer(optim, "optim")
        check_optimizer(critic_optim, "critic_optim")
        self.own_model, self.guide, self.optim, self.critic_optim = model, guide, optim, critic_optim
        self.loss = PathGradientKL() if loss is None else loss.unbound()  # another fit may share the object
        self.preconditioner = BatchAndMatch() if preconditioner is None else preconditioner
        self._critic, self._num_particles, self._critic_steps = critic, num_particles, critic_steps
        self.paths, self._compile = PATHS if capture else UNCAPTURED_PATHS, compile
        self._ranks = ranks
        self._may_decenter: bool | None = None if decenter else False  # None: not if the guide is set up at the start
        self._training: Training | None = None
        self._target: Target | None = None
        self._anchored: AnchoredTarget | None = None
        self._gaussian_fit: GaussianFit | None = None
        self._verdict: Verdict | None = None
        self._seconds = Seconds()
        self._saved: dict[str, Any] | None = None

    # --- set-up -------------------------------------------------------------------------------------

    @property
    def model(self) -> Callable:
        """The model that is fitted: as it was given, or decentered."""
        return self.guide.reparametrized(self.own_model)

    @property
    def target(self) -> Target:
        """The model's log density and score on its current arguments; ``target.path`` says how it is computed."""
        if self._target is None:
            raise NotSetUpError(
                "this SIVISM has seen no arguments of the model yet. Call sivism.setup(*args, **kwargs), step or run."
            )
        return self._target

    @property
    def _scored(self) -> Target | AnchoredTarget:
        """The target that q is fitted to: with less noise, where random minibatches make noise."""
        return self.target if self._anchored is None else self._anchored

    @property
    def ranks(self) -> Ranks:
        """The processes that share the fit."""
        if self._ranks is None:
            self._ranks = Ranks.find()
        return self._ranks

    @property
    def critic(self) -> nn.Module:
        """The score network."""
        return self._require_training().critic

    @property
    def num_steps_taken(self) -> int:
        """Guide steps since set-up, over all runs and resumptions."""
        if self._training is not None:
            return self._training.num_steps
        return 0 if self._saved is None else self._saved["training"]["num_steps"]

    def setup(self, *args: Any, **kwargs: Any) -> SIVISM:
        """Run the model once, choose how to compute its score, and fit the Gaussian that q starts from.

        The first :meth:`step` or :meth:`run` does this from its own arguments; a second call does nothing.

        Raises:
            ModelError: the model cannot be fitted; the message names the site and the cure.
            NonFiniteError: no finite starting point was found.
        """
        if self._training is None:
            self._bind(args, kwargs)
        return self

    def _bind(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Training:
        """Point everything at these arguments, setting up or checking what is new."""
        training = self._training
        if training is not None and self._target is not None and self._target.rebind(args, kwargs):
            self.guide.remember_arguments(tuple(args), kwargs)
            if self._anchored is not None and not self._anchored.is_current:
                self._anchored = None  # the user has minibatches, or other data, too
                self._connect(training)
            return training
        if training is None:
            keep_freed_memory()
            with self.ranks.same_random_numbers():
                self._start(args, kwargs)
                training = self._make_training()
                self._anchored = self._make_anchored()
            modules = (self.guide, training.family, training.critic)
            self.ranks.broadcast_(tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))
            self.ranks.broadcast_(self.target.params().values())
        else:
            self._bind_anew(args, kwargs)
            self._anchored = None
        self.guide.remember_arguments(tuple(args), kwargs)
        self._connect(training)
        self._training = training
        return training

    def _start(self, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Make the target, and the guide's family and its Gaussian."""
        if self._may_decenter is None:  # not again, where this fails and is tried again
            self._may_decenter = not self.guide.is_set_up
        how = Initialization(
            self.preconditioner, self._recipe, self.paths, self._may_decenter, self.ranks, self._seconds
        )
        self._target, self._gaussian_fit = how.start(self.own_model, self.guide, args, kwargs)

    def _bind_anew(self, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Point the target at arguments of a signature that it has not seen."""
        trace = self.guide.trace_model(*args, **kwargs)
        self.guide.layout.check_same(LatentLayout.from_trace(trace))
        self.target.bind(trace, args, kwargs)
        if self.ranks.is_first:
            warn_of_loop(self.target)

    def _make_anchored(self) -> AnchoredTarget | None:
        """The target with less of the minibatches' noise; None where there is none that can be taken out."""
        return AnchoredTarget(self.target, self.guide.affine.loc) if AnchoredTarget.applies(self.target) else None

    def _recipe(self, dim: int) -> Recipe:
        recipe = self.loss.adapt_recipe(Recipe.for_dim(dim))
        return replace(
            recipe,
            num_particles=int(self._num_particles or recipe.num_particles),
            critic_steps=int(self._critic_steps or recipe.critic_steps),
        )

    def _make_training(self) -> Training:
        """A live copy of the guide's family, a critic and their optimizers; restored from a file if there is one."""
        layout, saved = self.guide.layout, self._saved
        recipe = self._recipe(layout.dim)
        critic = self._critic
        if critic is None:
            critic = self.loss.make_critic(layout.dim, recipe.critic_hidden_dims, gated=recipe.gated)
        return Training(
            copy.deepcopy(self.guide.family) if saved is None else saved["family"],
            self.guide.family,
            critic.to(layout.device, layout.dtype) if saved is None else saved["critic"],
            self.loss,
            recipe,
            optim=self.optim,
            critic_optim=self.critic_optim,
            name=self.guide._pyro_name,
            ranks=self.ranks,
            compile=self._compile,
            seconds=self._seconds,
        )

    def _connect(self, training: Training) -> None:
        """Point the training at the current target, and restore a saved state."""
        params, saved = self.target.params(), self._saved
        if saved is not None:
            for name, value in saved["model_params"].items():
                if name in params:
                    params[name].data.copy_(value)
        training.connect(WhitenedTarget(self._scored, self.guide.affine), self.target, params)
        if saved is not None:
            training.load_state_dict(saved["training"])
            self._saved = None

    def _require_training(self) -> Training:
        if self._training is None:
            raise NotSetUpError(
                "this SIVISM has not been set up yet. Call sivism.setup(*args, **kwargs), step or run first."
            )
        return self._training

    # --- training -----------------------------------------------------------------------------------

    def step(self, *args: Any, **kwargs: Any) -> float:
        """Take one step on the model's arguments and return the loss, as ``SVI.step`` does.

        The loss is an estimate of the Fisher divergence E_q |grad log p - grad log q|^2 in the whitened space,
        for every objective; with random minibatches their noise comes on top. New arguments of the same shapes are
        taken as a new minibatch; other shapes are checked against the layout first.

        Raises:
            LayoutChangedError: the arguments changed the shape of a latent site.
            NonFiniteError: every particle's score, or a gradient, is not finite.
            DistributedError: another process that shares the fit is gone.
        """
        training = self._bind(args, kwargs)
        self._verdict = None  # it was on another q
        (info,) = training.read([self.ranks.together(training.advance)])
        return info.loss

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
            num_steps: if None as many as it takes until q has settled, at most 2,400; none where the Gaussian that q
                starts from is the posterior; the most where random minibatches leave scores noisy. Where q is not
                settled it follows chains, too; see :mod:`pyro_sivism.stopping`. If given, so many steps of the
                objective alone.
            progress_bar: show the loss and steps per second.
            callbacks: each called as ``callback(sivism, info)`` after each step; a true result ends the run.
                :class:`Checkpoint` is one.

        Ctrl-C ends the run and keeps the fit; where processes share the fit, it is raised.

        Raises:
            As :meth:`setup` and :meth:`step`.
        """
        if num_steps is not None and not (_is_integer(num_steps) and num_steps >= 0):
            raise ArgumentError(
                f"expected num_steps to be None or an integer of at least 0 as run's first argument, got "
                f"{type(num_steps).__name__}; the model's arguments come after it: run(None, data)"
            )
        training = self._bind(args, kwargs)
        self._verdict = None  # it was on another q
        self.ranks.draw_apart()  # a script may have seeded all ranks alike since set-up
        history = History(training.read, reads_each=bool(callbacks) or is_at_hand(self.guide.loc))
        self._seconds.setdefault("steps", 0.0)
        with tqdm(total=num_steps, disable=not (progress_bar and self.ranks.is_first), desc="SIVISM") as bar:

            def on_step() -> bool:
                bar.update()
                if not bar.disable and bar.n % 20 == 0:
                    bar.set_postfix_str(f"loss {history.infos[-1].loss:.3g}", refresh=False)
                asked_to_end = [callback(self, history.infos[-1]) for callback in callbacks]
                return any(asked_to_end)

            def on_cycle(number: int) -> None:
                bar.total = len(history.infos) + number

            cycles = Cycles(
                training, self._scored, self.guide.affine, history, on_step, on_cycle, self.ranks, self._seconds
            )
            try:
                if num_steps is not None:
                    interrupted = cycles.take(num_steps)
                else:
                    # A q that is not the Gaussian's, a critic that would not know it, or parameters to be learned, want
                    # a cycle in any case.
                    is_known = training.num_steps == 0 and self._gaussian_fit is not None
                    is_known = is_known and training.critic_knows_gaussian()
                    interrupted = cycles.take_until_settled(goes_on=not is_known or bool(self.target.params()))
            except KeyboardInterrupt:
                if self.ranks.size > 1:  # the others cannot know after which step
                    raise
                interrupted = True
            finally:
                training.plan(None)
        infos = history.read()
        if (num_steps is None or len(infos) >= _MIN_STEPS_TO_JUDGE) and self.ranks.is_first:
            self._verdict = self._judge(training, cycles.chains)
            if progress_bar and self._verdict is not None:
                print(f"SIVISM: {self._verdict}")
            self._report_drift(training)
        return FitResult(
            num_steps=len(infos),
            losses=torch.tensor([info.loss for info in infos]),
            critic_losses=torch.tensor([info.critic_loss for info in infos]),
            num_nonfinite=sum(info.num_nonfinite for info in infos),
            num_evaluations=self.target.num_evaluations,
            seconds=dict(self._seconds),
            interrupted=interrupted,
            preconditioner=self._gaussian_fit,
            target_path=str(self.target.path),
            evidence=tuple(cycles.evidence),
            verdict=self._verdict,
        )

    def _judge(self, training: Training, chains: Chains | None) -> Verdict | None:
        """The verdict on the guide, with a warning unless it is good; None if there could be none."""
        try:
            with self._seconds.of("verdict"):
                verdict = assess(
                    self._scored, self.guide.affine, training.averaged, training.objective, self._gaussian_fit, chains
                )
        except SivismError as error:
            warn(f"the fit could not be judged: {error}", FitWarning)
            return None
        if verdict.level != "good":
            cures = " ".join(filter(None, (suggestion(self.target), _CURES)))
            warn(f"the fit is {verdict.level}: {verdict.sentence}. {cures}", FitWarning)
        return verdict

    def _report_drift(self, training: Training) -> None:
        """Say so where the run ended with the model's parameters still on their way."""
        drifting = training.drifting_model_params()
        if drifting:
            warn(
                f"the model's parameters {drifting} were still moving in one direction when the run ended, so that "
                "they are no maximum yet. Call run again, or pass an optim with a higher learning rate.",
                FitWarning,
            )

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """The loss of the guide as it is reported (averaged weights), on fresh draws. Changes nothing: what follows is
        about the arguments of the fit.

        Raises:
            NotSetUpError: before set-up.
        """
        self._require_training()
        fitted_args, fitted_kwargs = self.target.arguments
        anchored = self._anchored
        try:
            training = self._bind(args, kwargs)
            self.target.resample_minibatch()
            return training.evaluate().fisher_divergence.item()
        finally:
            training = self._bind(fitted_args, fitted_kwargs)
            if anchored is not None and self._anchored is None:
                self._anchored = anchored if anchored.is_current else self._make_anchored()
                self._connect(training)

    # --- results ------------------------------------------------------------------------------------

    def sample(self, num_samples: int) -> dict[str, Tensor]:
        """Posterior draws of every latent site, on its support: ``(num_samples, *site shape)``.

        Sites inside a subsampling plate come at the plate's full size.

        Raises:
            NotSetUpError: before set-up; also in a fit read from a file, if sites are decentered, which the model
                computes from its arguments.
        """
        return self.guide.constrain(self.sample_unconstrained(num_samples))

    def sample_unconstrained(self, num_samples: int, batch_size: int = 10_000) -> Tensor:
        """Draws of the unconstrained vector that ``guide.layout`` describes, ``(num_samples, D)``, made in batches of
        ``batch_size``."""
        if num_samples < 1:
            raise ArgumentError(f"expected num_samples of at least 1, got {num_samples}")
        sizes = [min(batch_size, num_samples - i) for i in range(0, num_samples, batch_size)]
        return torch.cat([self.guide.sample_unconstrained(size) for size in sizes])

    def to_inference_data(self, *args: Any, num_samples: int = 1000, **kwargs: Any) -> Any:
        """The fit as an ArviZ ``InferenceData`` (an ``xarray.DataTree`` on ArviZ 1.x).

        Posterior, predictives, pointwise log likelihoods, prior and data, with the plates' names as dims. Takes the
        model's arguments (those of the last step if none) and the keywords of
        :func:`pyro_sivism.inference_data.to_inference_data`, which documents the groups: ``coords``, ``dims``,
        ``posterior_predictive``, ``log_likelihood``, ``prior``, ``constant_data``, ``batch_size``.
        """
        model_kwargs, options = split_keywords(self.model, kwargs)
        if self._saved is not None:  # the model's learned parameters are still in the file
            self._bind(args, model_kwargs)
        return to_inference_data(self, *args, num_samples=num_samples, **model_kwargs, **options)

    # --- saving -------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the fit to a file: the guide, the critic, the optimizers' states, the model's parameters, the verdict.

        A file that is there is replaced at once when the new one is complete. Of processes that share the fit, rank 0
        writes, whoever calls.
        """
        if self._saved is None:
            self._require_training()
        self.ranks.last_checkpoint = os.fspath(path)
        if not self.ranks.is_first:
            return
        if self._saved is not None:  # loaded, and not gone on with
            write_atomically(self._saved, path)
            return
        training = self._require_training()
        state = {
            "guide": self.guide,
            "family": training.family,
            "critic": training.critic,
            "training": training.state_dict(),
            "model_params": {name: p.detach().clone() for name, p in self.target.params().items()},
            "seconds": dict(self._seconds),
            "verdict": self._verdict,
            "settings": {
                "loss": self.loss.unbound(),
                "num_particles": self._num_particles,
                "critic_steps": self._critic_steps,
            },
        }
        write_atomically(state, path)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], model: Callable, *, init_loc_fn: Callable = init_to_median, **kwargs: Any
    ) -> SIVISM:
        """A fit written by :meth:`save`, ready to sample from, or to go on with ``step`` and ``run``.

        Args:
            path: the file; it is unpickled, so load only files you trust.
            model: the model the fit was made with; models are code and are not saved.
            init_loc_fn: as of the guide that the fit was made with, where the model wants one.
            kwargs: arguments of :class:`SIVISM`. The objective, ``num_particles`` and ``critic_steps`` are those of the
                file unless given; pass the optimizers that the fit was made with, to go on as before. The model's
                learned ``pyro.param``s are put back at the first call with arguments.
        """
        saved = torch.load(path, weights_only=False)
        saved["guide"].attach_model(model, init_loc_fn)
        sivism = cls(model, saved["guide"], **{**saved["settings"], **kwargs})
        sivism._saved, sivism._seconds, sivism._verdict = saved, Seconds(saved["seconds"]), saved["verdict"]
        return sivism


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
