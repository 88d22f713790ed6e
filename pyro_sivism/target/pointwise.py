"""The log likelihood of each observation, discrete latents summed out, from one run of a model.

    log p(y_i | x) = log sum_z f(y_i, z_i) - log sum_z f(z_i),

f being the product of all factors that depend on the discrete latents z_i, where these belong to observation i
alone. In any other case (a latent shared by observations, a hidden Markov chain) the observations are not
independent given x, which LOO needs, and there is no such term.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_sivism.sites import is_factor, site_kind

__all__ = ["pointwise_log_likelihood"]


def pointwise_log_likelihood(messages: Sequence[dict], nesting: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """``log p(y_i | x)`` of each observed site, of its batch shape, from one run with discrete latents enumerated.

    Args:
        messages: the sample sites of the run.
        nesting: how many batch dims belong to plates; dims further left enumerate discrete latents.

    Returns:
        The log likelihoods, unscaled and 0 where masked out, and for other observed sites the reason why there is
        none (see the head of this module).
    """
    log_probs, dims, plates = {}, {}, {}
    enumerated: dict[str, int] = {}
    for msg in messages:
        name = msg["name"]
        if site_kind(msg) == "deterministic":
            continue
        log_prob = msg["fn"].log_prob(msg["value"], *msg["args"], **msg["kwargs"])
        if msg["infer"].get("_enumerate_dim") is not None:
            enumerated[name] = msg["infer"]["_enumerate_dim"]
        else:  # a mask drops what depends on the discrete variable; its own probabilities still sum to one
            log_prob = scale_and_mask(log_prob, 1.0, msg["mask"])
        log_probs[name] = log_prob
        dims[name] = {d for d in range(-log_prob.dim(), -nesting) if log_prob.shape[d] > 1}
        plates[name] = {frame.name for frame in msg["cond_indep_stack"] if frame.vectorized}

    observed = [msg["name"] for msg in messages if site_kind(msg) == "observed" and not is_factor(msg)]
    result: dict[str, Tensor] = {}
    reasons: dict[str, str] = {}
    for name in observed:
        # Without discrete latents, dims beyond the plates' are those of data drawn outside any plate.
        if not enumerated or not dims[name]:
            result[name] = log_probs[name]
            continue
        connected = _connected(dims, dims[name])
        members = [other for other in log_probs if dims[other] & connected]
        latents = [other for other in members if other in enumerated]
        if len({enumerated[other] for other in latents}) < len(latents):
            reasons[name] = f"a chain of discrete latents ({', '.join(latents[:3])}, ...) ties observations together"
        elif any(other in observed and other != name for other in members):
            reasons[name] = f"several observed sites share the discrete latent '{latents[0]}'"
        elif any(plates[other] != plates[name] for other in members):
            reasons[name] = f"several observations share the discrete latent '{latents[0]}'"
        else:
            joint = sum(log_probs[other] for other in members)
            rest = sum(log_probs[other] for other in members if other != name)
            result[name] = _sum_out(joint, connected, nesting) - _sum_out(rest, connected, nesting)
    note = ", so that they are not independent given the continuous latents, as LOO needs"
    return result, {name: reason + note for name, reason in reasons.items()}


def _connected(dims: Mapping[str, set[int]], start: set[int]) -> set[int]:
    """The enumeration dims reached from ``start`` through factors that depend on several."""
    reached, size = set(start), 0
    while size < len(reached):
        size = len(reached)
        reached |= set().union(*(d for d in dims.values() if d & reached))
    return reached


def _sum_out(log_prob: Any, dims: set[int], nesting: int) -> Tensor:
    present = [d for d in dims if log_prob.dim() >= -d]
    total = torch.logsumexp(log_prob, present, keepdim=True) if present else log_prob
    return total.reshape(total.shape[max(0, total.dim() - nesting) :])
