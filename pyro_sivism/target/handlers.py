"""Effect handlers that turn one run of a Pyro model into a log density.

:class:`SubstituteLatents` supplies the latents and the minibatch, :class:`LogJoint` also adds up the
log probabilities as the sites go by, without keeping a trace; :class:`Enumerate` is Pyro's
enumeration made safe under ``torch.func.vmap``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import torch
from opt_einsum import shared_intermediates
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.distributions.util import is_identically_one, scale_and_mask
from pyro.ops.contract import contract_tensor_tree
from pyro.ops.packed import scale_and_mask as packed_scale_and_mask
from pyro.poutine import Trace
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_sivism.errors import ModelError
from pyro_sivism.layout import LatentSite

__all__ = ["Enumerate", "LogJoint", "SubstituteLatents", "enumerated_log_joint"]


class SubstituteLatents(Messenger):
    """Set every latent site to a given value and every random minibatch to given indices.

    Args:
        sites: the latent sites, by name.
        values: their values on the support, at full plate size.
        minibatch: plate name -> the indices to use wherever the model would draw them.
    """

    def __init__(
        self, sites: Mapping[str, LatentSite], values: Mapping[str, Tensor], minibatch: Mapping[str, Tensor]
    ) -> None:
        super().__init__()
        self._sites, self._values, self._minibatch = sites, values, minibatch
        self._indices: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: dict) -> None:
        name = msg["name"]
        if site_is_subsample(msg):
            if msg["value"] is None and name in self._minibatch:
                msg["value"] = self._minibatch[name]
                msg["done"] = True
            return
        if msg["is_observed"]:
            return
        if name in self._values:
            msg["value"] = self._take_minibatch(msg, self._values[name])
            msg["done"] = True
        elif msg["infer"].get("_enumerate_dim") is None:
            raise ModelError(
                f"the model drew latent site '{name}', which it did not draw at set-up and which is not summed "
                "over. The set of latent sites must not depend on the latents or on chance; a discrete site must "
                "have finitely many values and be enumerated in parallel, or be hidden from model and guide alike."
            )

    def _pyro_post_sample(self, msg: dict) -> None:
        if site_is_subsample(msg):
            self._indices[msg["name"]] = msg["value"]

    def _take_minibatch(self, msg: dict, value: Tensor) -> Tensor:
        """The rows of a full-size value that the plates around the site have drawn."""
        site = self._sites[msg["name"]]
        for frame in msg["cond_indep_stack"]:
            if frame.vectorized and frame.full_size is not None and frame.size < frame.full_size:
                dim = frame.dim - site.event_dim
                indices = self._indices[frame.name]
                if not isinstance(indices, Tensor):
                    indices = torch.tensor(list(indices), device=value.device)
                value = value.index_select(dim, indices.to(value.device))
        return value


class LogJoint(SubstituteLatents):
    """Also add up ``log p`` over all sites, scaled and masked as the model says.

    After the model has run, :attr:`log_joint` is a scalar, or ``(B,)`` if ``particle_dim`` names the batch
    dim of an outermost plate of B particles.
    """

    def __init__(
        self,
        sites: Mapping[str, LatentSite],
        values: Mapping[str, Tensor],
        minibatch: Mapping[str, Tensor],
        particle_dim: int | None = None,
    ) -> None:
        super().__init__(sites, values, minibatch)
        self._particle_dim = particle_dim
        self.log_joint: Tensor | float = 0.0

    def _pyro_post_sample(self, msg: dict) -> None:
        super()._pyro_post_sample(msg)
        if site_is_subsample(msg):
            return
        log_prob = msg["fn"].log_prob(msg["value"], *msg["args"], **msg["kwargs"])
        log_prob = scale_and_mask(log_prob, msg["scale"], msg["mask"])
        if self._particle_dim is None or log_prob.dim() < -self._particle_dim:
            self.log_joint = self.log_joint + log_prob.sum()
        else:
            self.log_joint = self.log_joint + log_prob.reshape(log_prob.shape[0], -1).sum(-1)


class Enumerate(EnumMessenger):
    """Pyro's parallel enumeration, reading shapes in a way that ``torch.func.vmap`` allows.

    The base class reads ``value.data.shape``; ``.data`` does not exist on a batched tensor, its shape does.
    """

    def _pyro_post_sample(self, msg: dict) -> None:
        value, fn = msg["value"], msg["fn"]
        if not isinstance(fn, TorchDistributionMixin) or value is None:
            return
        shape = value.shape[: value.dim() - fn.event_dim]
        dim_to_id = msg["infer"].setdefault("_dim_to_id", {})
        dim_to_id.update(self._param_dims.get(msg["name"], {}))
        self._value_dims[msg["name"]] = {
            dim: id_ for dim, id_ in dim_to_id.items() if len(shape) >= -dim and shape[dim] > 1
        }


def enumerated_log_joint(trace: Trace) -> Tensor:
    """The scalar log joint of a trace, with every enumerated site summed out.

    Sites that depend on no enumerated site are scaled as they are. For the others the mask goes inside the
    sum over values and the scale outside, ``scale * log sum_k p_k``: a minibatch's scale multiplies the log
    of a marginal likelihood, it is no power inside the sum.
    """
    trace.compute_log_prob()
    trace.pack_tensors()
    sites = [m for m in trace.nodes.values() if m["type"] == "sample" and not site_is_subsample(m)]
    enumerated = {m["name"] for m in sites if m["infer"].get("_enumerate_dim") is not None}
    plate_symbols = set(trace.plate_to_symbol.values())
    sum_dims = {d for m in sites if m["name"] in enumerated for d in m["packed"]["log_prob"]._pyro_dims}
    sum_dims -= plate_symbols

    total: Tensor | float = 0.0
    factors: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    scales = []
    for msg in sites:
        packed, name = msg["packed"], msg["name"]
        if name not in enumerated and sum_dims.isdisjoint(packed["log_prob"]._pyro_dims):
            total = total + packed["log_prob"].sum()
            continue
        ordinal = frozenset(trace.plate_to_symbol[f.name] for f in msg["cond_indep_stack"] if f.vectorized)
        # A mask drops what depends on the enumerated variable; its own probabilities still sum to one.
        mask = None if name in enumerated else packed["mask"]
        factor = packed_scale_and_mask(packed["unscaled_log_prob"], mask=mask)
        factors.setdefault(ordinal, []).append(factor)
        scales.append((name, msg["scale"]))
    if not factors:
        return torch.as_tensor(total)

    scale = _common_scale(scales)
    with shared_intermediates() as cache:
        contracted = contract_tensor_tree(factors, sum_dims, cache=cache)
    marginal = sum(term.sum() for terms in contracted.values() for term in terms)
    return total + scale * marginal


def _common_scale(scales: list[tuple[str, Tensor | float]]) -> Tensor | float:
    name, first = scales[0]
    for other, scale in scales[1:]:
        same = first is scale or bool(torch.as_tensor(first == scale).all())
        if not same:
            raise ModelError(
                f"sites '{name}' and '{other}' share an enumerated variable but have different scales ({first} and "
                f"{scale}); expected one scale for all sites that share a sum. Put them in the same plates and "
                "under the same poutine.scale."
            )
    return 1.0 if is_identically_one(first) else first
