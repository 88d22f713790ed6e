"""Whether a model's observations are such as its sites can have.

Pyro refuses those that are not where it computes a log density with validation on. Scores are computed with validation
off, where observations of another shape broadcast to more terms than there are, and a formula gives a number for what
is off its support: both fit, and look right.
"""

from __future__ import annotations

import torch
from pyro.distributions import Delta
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Size, Tensor

from pyro_sivism.bijections import same_support
from pyro_sivism.errors import ModelError
from pyro_sivism.sites import innermost, is_factor, layers

__all__ = ["check_observations"]


def check_observations(trace: Trace, elsewhere: Trace) -> None:
    """Raise unless every observation fits the shape of its site, and lies on its support.

    Not looked at are supports that move with the latents, entries that are masked or NaN, events that are masked in
    part, and sites that do not validate, as with ``validate_args=False`` or ``pyro.enable_validation(False)``.

    Args:
        trace: a run of the model, with the user's validation.
        elsewhere: a run at other values of the latents.

    Raises:
        ModelError: it names the site and the cure.
    """
    for name, msg in trace.nodes.items():
        is_data = msg["type"] == "sample" and msg["is_observed"] and not site_is_subsample(msg)
        if not is_data or is_factor(msg) or isinstance(innermost(msg["fn"]), Delta):
            continue
        _check_shape(msg)
        other = elsewhere.nodes.get(name)
        if other is not None and all(getattr(fn, "_validate_args", False) for fn in layers(msg["fn"])):
            _check_support(msg, other)


def _check_shape(msg: dict) -> None:
    fn, value = msg["fn"], torch.as_tensor(msg["value"])
    own_batch, own_shape = Size(fn.batch_shape), Size(fn.batch_shape) + Size(fn.event_shape)
    try:
        shape = torch.broadcast_shapes(own_shape, value.shape)
        batch = torch.broadcast_shapes(own_batch, value.shape[: value.dim() - fn.event_dim])
    except RuntimeError:  # the log density raises as well
        return
    fits = Size(shape).numel() <= max(own_shape.numel(), value.numel())
    if any(frame.vectorized for frame in msg["cond_indep_stack"]):
        fits = fits and _without_leading_ones(Size(batch)) == _without_leading_ones(own_batch)
    if not fits:
        raise ModelError(
            f"site '{msg['name']}' has shape {tuple(own_shape)} and observations of shape {tuple(value.shape)}, which "
            f"together broadcast to {Size(shape).numel()} numbers, of shape {tuple(shape)}; "
            "expected observations of the site's own shape. Reshape them, as by squeeze(-1), or add a plate."
        )


def _without_leading_ones(shape: Size) -> Size:
    while len(shape) and shape[0] == 1:
        shape = shape[1:]
    return shape


def _check_support(msg: dict, elsewhere: dict) -> None:
    fn, value = msg["fn"], torch.as_tensor(msg["value"])
    _, *inner = layers(fn)
    if any(getattr(each, "_mask", None) is not None for each in inner):
        return
    try:
        if not same_support(fn.support, elsewhere["fn"].support):
            return
        is_off = ~fn.support.check(value)
    except (NotImplementedError, RuntimeError, ValueError):  # a support that cannot be asked
        return
    is_off = is_off & ~_has_nan(value, fn.event_dim)
    for mask in (msg["mask"], getattr(fn, "_mask", None)):
        if mask is not None:
            is_off = is_off & torch.as_tensor(mask, device=is_off.device)
    if bool(is_off.any()):
        known = value[value == value]  # no NaN
        low, high = known.min().item(), known.max().item()
        raise ModelError(
            f"site '{msg['name']}' ({type(fn).__name__}) has observations off its support, {fn.support}: "
            f"{int(is_off.sum())} of them; they are from {low:.6g} to {high:.6g}. Recode the data, or choose a "
            "distribution that has them; validate_args=False takes them as they are."
        )


def _has_nan(value: Tensor, event_dim: int) -> Tensor:
    is_nan = value != value
    return is_nan.flatten(value.dim() - event_dim).any(-1) if event_dim else is_nan
