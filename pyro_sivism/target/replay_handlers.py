"""The handlers of one run of the model in a replay, and what is known of its sites."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Size, Tensor

from pyro_sivism.sites import Site, plates_around, site_kind
from pyro_sivism.target.handlers import minibatch_rows, vanished_site
from pyro_sivism.target.minibatches import Indices

__all__ = ["Draw", "Hold", "ReplaySite"]


@dataclass(frozen=True)
class ReplaySite(Site):
    """A site of the model at full plate size, of ``kind`` "latent", "discrete", "observed" or "deterministic"."""

    kind: str

    @property
    def minibatch_shape(self) -> Size:
        """The shape of the value in one run of the model."""
        shape = list(self.shape)
        for plate in self.subsampled_plates:
            shape[plate.dim - self.event_dim] = plate.subsample_size
        return Size(shape)

    @property
    def minibatch_batch_shape(self) -> Size:
        return self.minibatch_shape[: len(self.batch_shape)]

    @classmethod
    def from_message(cls, msg: dict) -> ReplaySite:
        """A site's shape at full size, and the plates that its dims belong to."""
        value, fn, kind, plates = torch.as_tensor(msg["value"]), msg["fn"], site_kind(msg), plates_around(msg)
        shape, event_dim = value.shape, fn.event_dim
        if kind == "deterministic":
            # Without event_dim, pyro.deterministic takes all of the value for one event; look for the plates in it.
            candidates = range(event_dim + 1) if event_dim == len(shape) else [event_dim]
            fits = [e for e in candidates if all(_has_size(shape, p.dim - e, p.subsample_size) for p in plates)]
            event_dim, plates = (fits[0], plates) if fits and plates else (event_dim, ())
        else:
            batch_shape = torch.broadcast_shapes(fn.batch_shape, shape[: len(shape) - event_dim])
            shape = batch_shape + shape[len(shape) - event_dim :]
        full = list(shape)
        for plate in plates:
            full[plate.dim - event_dim] = plate.size
        return cls(msg["name"], Size(full), event_dim, plates, kind)


def _has_size(shape: Size, dim: int, size: int) -> bool:
    return len(shape) >= -dim and shape[dim] == size


class Hold(Messenger):
    """Hold latents at given values and minibatches at given indices, and remember every site."""

    def __init__(self, sites: Mapping[str, ReplaySite], values: Mapping[str, Tensor], minibatch: Indices) -> None:
        super().__init__()
        self._sites, self._values, self._minibatch = sites, values, minibatch
        self.messages: dict[str, dict] = {}

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if site_is_subsample(msg):
            if name in self._minibatch:  # also where the model passed its own ``subsample=``
                msg["value"] = self._minibatch[name]
                msg["done"] = True
        elif not msg["is_observed"] and name in self._values:
            msg["value"] = minibatch_rows(msg, self._values[name], self._sites[name].event_dim, self._minibatch)
            msg["done"] = True
        else:
            self._visit(msg)

    def _visit(self, msg: Any) -> None:
        """What to do with a sample site that is no held latent."""

    def _pyro_post_sample(self, msg: Any) -> None:
        if not site_is_subsample(msg):
            self.messages[msg["name"]] = msg.copy()

    def value(self, name: str, broadcast: bool = True) -> Tensor:
        """A site's value in this run, in the site's own shape."""
        if name not in self.messages:
            raise vanished_site(f"site '{name}'")
        value = torch.as_tensor(self.messages[name]["value"])
        return value.expand(self._sites[name].minibatch_shape) if broadcast else value


class Draw(Hold):
    """Also let go of the observations, and keep what an earlier minibatch has drawn.

    Args:
        partial: site -> its values so far, at full size.
        done: site -> where these have been drawn.
    """

    def __init__(
        self,
        sites: Mapping[str, ReplaySite],
        values: Mapping[str, Tensor],
        minibatch: Indices,
        partial: Mapping[str, Tensor],
        done: Mapping[str, Tensor],
    ) -> None:
        super().__init__(sites, values, minibatch)
        self._partial, self._done = partial, done

    def _visit(self, msg: Any) -> None:
        name = msg["name"]
        if msg["is_observed"]:
            if name not in self._sites or self._sites[name].kind != "observed":
                return
            msg["is_observed"] = False
        elif name not in self._sites:
            return
        # An observation may be larger than its distribution, as in sample("y", Normal(mu, 1), obs=y) without a plate.
        site = self._sites[name]
        if msg["fn"].batch_shape != site.minibatch_batch_shape:
            msg["fn"] = msg["fn"].expand(site.minibatch_batch_shape)
        value = msg["fn"](*msg["args"], **msg["kwargs"])
        if name in self._partial:
            done, partial = (
                minibatch_rows(msg, full[name], site.event_dim, self._minibatch) for full in (self._done, self._partial)
            )
            value = torch.where(done, partial, value)
        msg["value"], msg["done"] = value, True
