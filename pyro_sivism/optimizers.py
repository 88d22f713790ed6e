"""One way to drive three kinds of optimizers: our default, Pyro's, and torch's."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pyro
import torch
from pyro.optim import PyroOptim
from torch import Tensor, nn
from torch.optim.adam import adam

from pyro_sivism.devices import is_at_hand
from pyro_sivism.errors import ArgumentError, NonFiniteError, OptimizerError

__all__ = [
    "ClippedGradients",
    "OptimizerLike",
    "Stepper",
    "check_optimizer",
    "clip_gradients",
    "make_stepper",
    "nonfinite_gradient",
]

TorchOptimizerFactory = Callable[[Iterable[Tensor]], torch.optim.Optimizer]
OptimizerLike = PyroOptim | TorchOptimizerFactory


def check_optimizer(optim: Any, argument: str) -> None:
    """Raise :class:`OptimizerError` unless ``optim`` is None, a PyroOptim, or a factory of torch optimizers."""
    if optim is None or isinstance(optim, PyroOptim):
        return
    if isinstance(optim, torch.optim.Optimizer):
        raise OptimizerError(
            f"{argument} is a {type(optim).__name__} already bound to parameters, but this one's parameters do not "
            "exist yet. Pass pyro.optim.Adam({'lr': 1e-3}), or a factory such as "
            "functools.partial(torch.optim.Adam, lr=1e-3), or nothing for a good default."
        )
    if not callable(optim):
        raise OptimizerError(
            f"{argument} is a {type(optim).__name__}; expected a pyro.optim optimizer, a callable from parameters to "
            "a torch optimizer, or None for a good default."
        )


class Stepper:
    """Takes one optimizer step from gradients. Base class of the three kinds below.

    Args:
        params: the parameters, by name.
    """

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        self.params = dict(params)

    def step(self, gradients: Sequence[Tensor | None], lr_factor: float, skip: Tensor | None = None) -> None:
        """Move every parameter along its gradient.

        Args:
            gradients: of the parameters, in their order.
            lr_factor: the schedule's, for our own optimizer.
            skip: a scalar; where it is 1, nothing is to move. Our own optimizer decides that on the device, others make
                the host wait for it.
        """
        if skip is not None and bool(skip):
            return
        for param, gradient in zip(self.params.values(), gradients):
            param.grad = gradient
        self._step(lr_factor)
        for param in self.params.values():
            param.grad = None

    def _step(self, lr_factor: float) -> None:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        raise NotImplementedError

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError


class _AdamStepper(Stepper):
    """Our default: Adam with a lower rate for wide input layers, on the recipe's schedule."""

    def __init__(
        self,
        params: Mapping[str, Tensor],
        lr: float,
        betas: tuple[float, float],
        slow_params: Iterable[Tensor],
        slow_factor: float,
    ) -> None:
        super().__init__(params)
        slow_ids = {id(p) for p in slow_params} if slow_factor != 1.0 else set()  # one call for all, where it can be
        values = list(self.params.values())
        slow = [i for i, p in enumerate(values) if id(p) in slow_ids]
        rest = [i for i, p in enumerate(values) if id(p) not in slow_ids]
        self._groups = [(indices, rate) for indices, rate in ((rest, lr), (slow, lr * slow_factor)) if indices]
        self._betas = betas
        self._means = [torch.zeros_like(p, requires_grad=False) for p in values]
        self._squares = [torch.zeros_like(p, requires_grad=False) for p in values]
        self._counts = [torch.zeros((), dtype=torch.float32, device=p.device) for p in values]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor | None], lr_factor: float, skip: Tensor | None = None) -> None:
        values = list(self.params.values())
        for group, lr in self._groups:
            moved = [(i, gradient) for i in group if (gradient := gradients[i]) is not None]
            indices = [i for i, _ in moved]
            # The function behind torch.optim.Adam: the object's bookkeeping takes a twentieth of a small step.
            adam(
                [values[i] for i in indices],
                [gradient for _, gradient in moved],
                [self._means[i] for i in indices],
                [self._squares[i] for i in indices],
                [],
                [self._counts[i] for i in indices],
                fused=True,
                found_inf=skip,
                amsgrad=False,
                beta1=self._betas[0],
                beta2=self._betas[1],
                lr=lr * lr_factor,
                weight_decay=0.0,
                eps=1e-8,
                maximize=False,
            )

    def state_dict(self) -> dict[str, Any]:
        return {"means": self._means, "squares": self._squares, "counts": self._counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, own in self.state_dict().items():
            for tensor, saved in zip(own, state[name]):
                tensor.copy_(saved)


class _TorchStepper(Stepper):
    """The user's torch optimizer, at the user's learning rate."""

    def __init__(self, params: Mapping[str, Tensor], factory: TorchOptimizerFactory, argument: str) -> None:
        super().__init__(params)
        try:
            optimizer = factory(list(self.params.values()))
        except Exception as error:  # whatever a callable that is no optimizer factory may raise
            reason = (str(error).splitlines() or [""])[0][:200]
            raise OptimizerError(
                f"{argument} could not be called with a list of parameters: {reason}. Expected a torch optimizer class "
                "or factory, e.g. functools.partial(torch.optim.Adam, lr=1e-3)."
            ) from error
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise OptimizerError(
                f"{argument} returned a {type(optimizer).__name__}; expected a torch.optim.Optimizer, e.g. from "
                "functools.partial(torch.optim.Adam, lr=1e-3)."
            )
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise OptimizerError(
                f"{argument} is {type(optimizer).__name__}, which evaluates the loss several times a step; expected an "
                "optimizer that steps from one stochastic gradient, e.g. torch.optim.Adam."
            )
        self._optimizer = optimizer

    def _step(self, lr_factor: float) -> None:
        self._optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return self._optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._optimizer.load_state_dict(state)


class _PyroStepper(Stepper):
    """A PyroOptim, as SVI drives it: called with parameters that the param store knows by name.

    A PyroOptim asks the store for a parameter's name, to choose per-parameter arguments and to label its state.
    Parameters the store does not know are put there under their own name, or under the first free ``name_1``,
    ``name_2``, ... if another fit in the process has it.
    """

    def __init__(self, params: Mapping[str, Tensor], optim: PyroOptim) -> None:
        super().__init__(params)
        self._optim = optim
        self._names_in_store = {name: _name_in_store(name, param) for name, param in self.params.items()}

    def _step(self, lr_factor: float) -> None:
        self._optim([param for param in self.params.values() if param.grad is not None])

    def state_dict(self) -> dict[str, Any]:
        # get_state() would also hold the parameters of other fits that share the optimizer.
        state = {}
        for name, param in self.params.items():
            if param in self._optim.optim_objs:
                state[name] = _state_of(self._optim.optim_objs[param])
            elif self._names_in_store[name] in self._optim._state_waiting_to_be_consumed:
                state[name] = self._optim._state_waiting_to_be_consumed[self._names_in_store[name]]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._optim.set_state({self._names_in_store[name]: value for name, value in state.items()})


def _name_in_store(name: str, param: Tensor) -> str:
    """The param store's name of a parameter, which is put there under a free name if it is not yet."""
    store = pyro.get_param_store()
    known = store.param_name(param)
    if known is not None:
        return known
    free, count = name, 0
    while free in store:
        count += 1
        free = f"{name}_{count}"
    pyro.param(free, param)
    # The store's weak reference from the value to the unconstrained tensor, here the same, cannot be pickled.
    param.__dict__.pop("unconstrained", None)
    return free


def _state_of(optimizer: Any) -> dict[str, Any]:
    """The state of a torch optimizer or scheduler, in the form that ``PyroOptim.set_state`` takes."""
    if hasattr(optimizer, "optimizer"):
        return {"scheduler": optimizer.state_dict(), "optimizer": optimizer.optimizer.state_dict()}
    return optimizer.state_dict()


def make_stepper(
    optim: PyroOptim | TorchOptimizerFactory | None,
    params: Mapping[str, Tensor],
    argument: str,
    *,
    lr: float,
    betas: tuple[float, float],
    slow_params: Iterable[nn.Parameter] = (),
    slow_factor: float = 1.0,
) -> Stepper:
    """A stepper for ``params`` from what the user passed as ``argument``; the keywords describe our default."""
    check_optimizer(optim, argument)
    if optim is None:
        return _AdamStepper(params, lr, betas, slow_params, slow_factor)
    if isinstance(optim, PyroOptim):
        return _PyroStepper(params, optim)
    return _TorchStepper(params, optim, argument)


class ClippedGradients(NamedTuple):
    """Gradients of a bounded norm. ``skip`` is 1 where they are not finite, so that nothing must be moved by them, and
    None where the host has seen that they are."""

    gradients: list[Tensor | None]
    skip: Tensor | None


def clip_gradients(gradients: Sequence[Tensor | None], max_norm: float, whose: str) -> ClippedGradients:
    """The gradients, scaled down to a total norm of ``max_norm``.

    Raises:
        ArgumentError: there is no gradient at all.
        NonFiniteError: the total norm is NaN or infinite, and at hand.
    """
    present = [g for g in gradients if g is not None]
    if not present:
        raise ArgumentError(
            f"the loss of the {whose} depends on none of the {whose}'s parameters; expected a gradient for some. "
            "Check a custom critic, conditional or objective for a detach or no_grad."
        )
    # In float64, where no square overflows.
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(present)), dtype=torch.double)
    if is_at_hand(norm):
        norm, skip = norm.item(), None
        if not math.isfinite(norm):
            raise nonfinite_gradient(whose)
        if norm <= max_norm:
            return ClippedGradients(list(gradients), skip)
        scale = max_norm / norm
    else:
        scale, skip = (max_norm / norm).clamp(max=1.0), (~norm.isfinite()).float()
    # Not in place: autograd may give one tensor as the gradient of two parameters, or an expanded one.
    scaled = iter(torch._foreach_mul(present, scale))
    return ClippedGradients([None if g is None else next(scaled) for g in gradients], skip)


def nonfinite_gradient(whose: str) -> NonFiniteError:
    """The error for a gradient that must not be followed."""
    return NonFiniteError(
        f"the {whose}'s gradient is not finite; the {whose} was left as it is. Lower the learning rate, or check "
        "the model for overflow far from the posterior (float64 data often cures it)."
    )
