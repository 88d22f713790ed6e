"""Effect handlers that turn one run of a Pyro model into a log density.

:class:`SubstituteLatents` supplies the latents and the minibatch, :class:`LogJoint` also adds up the
log probabilities as the sites go by, without keeping a trace; :class:`Enumerate` is Pyro's
enumeration made safe under ``torch.func.vmap``.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from opt_einsum import shared_intermediates
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.distributions.util import scale_and_mask
from pyro.ops.contract import contract_tensor_tree
from pyro.ops.packed import broadcast_all, pack
from pyro.ops.packed import scale_and_mask as packed_scale_and_mask
from pyro.poutine import Trace
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_sivism.errors import LayoutChangedError, ModelError
from pyro_sivism.sites import LatentSite
from pyro_sivism.target.recording import is_recording

__all__ = [
    "Enumerate",
    "LogJoint",
    "SubstituteLatents",
    "enumerated_log_joint",
    "minibatch_rows",
    "vanished_site",
]


class SubstituteLatents(Messenger):
    """Set every latent site to a given value and every random minibatch to given indices.

    Args:
        sites: the latent sites, by name.
        values: their values on the support, at full plate size.
        minibatch: plate name -> the indices to use wherever the model would draw them.
        plate_sizes: plate name -> the full size that the indices were drawn from.
    """

    def __init__(
        self,
        sites: Mapping[str, LatentSite],
        values: Mapping[str, Tensor],
        minibatch: Mapping[str, Tensor],
        plate_sizes: Mapping[str, int],
    ) -> None:
        super().__init__()
        self._sites, self._values, self._minibatch = sites, values, minibatch
        self._plate_sizes = plate_sizes
        self._indices: dict[str, Tensor] = {}
        self._drawn: set[str] = set()
        self._masks_of_observed: dict[str, Tensor | bool | None] = {}

    def _pyro_sample(self, msg: dict) -> None:
        name = msg["name"]
        if site_is_subsample(msg):
            if msg["value"] is None and name in self._minibatch:
                if msg["fn"].size != self._plate_sizes[name]:
                    raise LayoutChangedError(
                        f"plate '{name}' had size {self._plate_sizes[name]} when the arguments were first seen and has "
                        f"{msg['fn'].size} now, though they are the same objects. Pass new arguments rather than "
                        "change old ones in place, so that the change is noticed."
                    )
                msg["value"] = self._minibatch[name]
                msg["done"] = True
            return
        if msg["is_observed"]:
            self._masks_of_observed[name] = msg["mask"]
            return
        if name in self._values:
            msg["value"] = minibatch_rows(msg, self._values[name], self._sites[name].event_dim, self._indices)
            msg["done"] = True
            self._drawn.add(name)
            twin = name.removesuffix("_unobserved") + "_observed"
            if name.endswith("_unobserved") and twin in self._masks_of_observed:
                _unmask_partly_observed(msg, self._masks_of_observed[twin])
        elif msg["infer"].get("enumerate") == "sequential":
            raise ModelError(
                f"discrete site '{name}' is marked infer={{'enumerate': 'sequential'}}, but discrete latents are "
                "summed over in parallel only. Remove the mark, and any Python branch on the site's value."
            )
        elif msg["infer"].get("_enumerate_dim") is None:
            raise ModelError(
                f"the model drew latent site '{name}', which it did not draw at set-up and which is not summed "
                "over. The set of latent sites must not depend on the latents or on chance; a discrete site must "
                "have finitely many values and be enumerated in parallel, or be hidden from model and guide alike."
            )

    def _pyro_post_sample(self, msg: dict) -> None:
        if site_is_subsample(msg):
            self._indices[msg["name"]] = msg["value"]

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        super().__exit__(exc_type, exc_value, traceback)
        missing = [name for name in self._values if name not in self._drawn]
        if exc_type is None and missing:
            raise vanished_site(f"latent site '{missing[0]}'")


def minibatch_rows(msg: dict, value: Tensor, event_dim: int, indices: Mapping[str, Any]) -> Tensor:
    """The rows of a full-size value that the subsampling plates around its site hold in this run."""
    for frame in msg["cond_indep_stack"]:
        if frame.vectorized and frame.full_size is not None and frame.size < frame.full_size:
            rows = indices[frame.name]
            if not isinstance(rows, Tensor):
                rows = torch.tensor(list(rows), device=value.device)
            value = value.index_select(frame.dim - event_dim, rows.to(value.device))
    return value


def vanished_site(site: str) -> ModelError:
    """The error for a ``site`` of the prototype that another run of the model has not."""
    return ModelError(
        f"{site} was there at set-up but not at other values of the latents; expected the same sites in every run. "
        "Replace the branch by torch.where or a mixture."
    )


def _unmask_partly_observed(msg: dict, mask_of_observed: Tensor | bool | None) -> None:
    """Give the latent that ``pyro.sample(..., obs_mask=)`` makes its prior at the observed entries too.

    Pyro makes a latent of every entry and masks the density of the observed ones, whose values nothing reads: flat
    directions without a posterior. Unmasked they have their prior given the other latents, which integrates to one
    and changes nothing else, unless it is raised to a power by ``poutine.scale``. What the model itself masks is in
    neither of the two masks, and stays so.
    """
    plates = math.prod(f.full_size / f.size for f in msg["cond_indep_stack"] if f.full_size and f.size > 0)
    if not bool((torch.as_tensor(msg["scale"]) - plates).abs().max() <= 1e-6 * plates):
        raise ModelError(
            f"site '{msg['name']}' comes from obs_mask under poutine.scale, where its density is not normalized; "
            "expected no scale but the plates'. Split the observations into the observed ones, scaled, and the rest."
        )
    if msg["mask"] is not None and mask_of_observed is not None:
        msg["mask"] = torch.as_tensor(msg["mask"]) | torch.as_tensor(mask_of_observed)


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
        plate_sizes: Mapping[str, int],
        particle_dim: int | None = None,
    ) -> None:
        super().__init__(sites, values, minibatch, plate_sizes)
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
    sum_dims = {d for m in sites if m["name"] in enumerated for d in m["packed"]["log_prob"]._pyro_dims}
    sum_dims -= set(trace.plate_to_symbol.values())

    total: Tensor | float = 0.0
    summed = []
    for msg in sites:
        if sum_dims.isdisjoint(msg["packed"]["log_prob"]._pyro_dims):
            total = total + msg["packed"]["log_prob"].sum()
        else:
            summed.append(msg)
    for component in _connected(summed, sum_dims):
        total = total + _log_marginal(component, sum_dims, trace.plate_to_symbol)
    return torch.as_tensor(total)


def _connected(sites: list[dict], sum_dims: set[str]) -> list[list[dict]]:
    """Split sites into the groups that share an enumerated variable, directly or through others."""
    groups: list[tuple[set[str], list[dict]]] = []
    for msg in sites:
        dims, members = sum_dims.intersection(msg["packed"]["log_prob"]._pyro_dims), [msg]
        apart = []
        for group in groups:
            if group[0].isdisjoint(dims):
                apart.append(group)
            else:
                dims, members = dims | group[0], group[1] + members
        groups = [*apart, (dims, members)]
    return [members for _, members in groups]


def _log_marginal(sites: list[dict], sum_dims: set[str], plate_to_symbol: Mapping[str, str]) -> Tensor:
    """``scale * log sum_k p_k`` of sites that share enumerated variables, summed over the plates around the sum."""
    factors: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    for msg in sites:
        ordinal = frozenset(plate_to_symbol[f.name] for f in msg["cond_indep_stack"] if f.vectorized)
        factor = packed_scale_and_mask(msg["packed"]["unscaled_log_prob"], mask=msg["packed"]["mask"])
        factors.setdefault(ordinal, []).append(factor)
    scale = _common_scale(sites)
    with shared_intermediates() as cache:
        contracted = contract_tensor_tree(factors, sum_dims, cache=cache)
    ((log_marginal,),) = contracted.values()
    if not isinstance(scale, Tensor):
        return scale * log_marginal.sum()
    if not set(_packed_dims(scale)) <= set(_packed_dims(log_marginal)):
        raise ModelError(
            f"site '{sites[0]['name']}' has a scale of shape {tuple(scale.shape)} inside a sum over enumerated "
            "values; expected one scale for each sum. Put the enumerated site and poutine.scale in the same plates."
        )
    log_marginal, scale = broadcast_all(log_marginal, scale)
    return (scale * log_marginal).sum()


def _common_scale(sites: list[dict]) -> Tensor | float:
    """The scale of all the sites, a number or a packed tensor."""
    scales = [_packed_scale(msg) for msg in sites]
    for msg, scale in zip(sites, scales):
        if not _same_scale(scale, scales[0]):
            raise ModelError(
                f"sites '{sites[0]['name']}' and '{msg['name']}' share an enumerated variable but have different "
                f"scales ({sites[0]['scale']} and {msg['scale']}); expected one scale for all sites that share a sum. "
                "Put them in the same plates and under the same poutine.scale."
            )
    return scales[0]


def _packed_scale(msg: dict) -> Tensor | float:
    scale = msg["scale"]
    return pack(scale, msg["infer"]["_dim_to_symbol"]) if isinstance(scale, Tensor) else scale


def _same_scale(a: Tensor | float, b: Tensor | float) -> bool:
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    # While a graph is recorded the values cannot be compared; they were when the model was run before.
    return _packed_dims(a) == _packed_dims(b) and (is_recording() or bool((a == b).all()))


def _packed_dims(tensor: Tensor) -> str:
    """One symbol for each dim of a packed tensor; a tensor made of a number is as good as packed."""
    return getattr(tensor, "_pyro_dims", "")
