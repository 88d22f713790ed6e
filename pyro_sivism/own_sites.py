"""The sites that a model's author wrote, where latents of other names are drawn in their place.

Under ``poutine.reparam`` a latent ``theta`` is no sample site any more but a function of an *auxiliary* latent, which
Pyro names after it: ``theta_decentered``, ``theta_base``. What is reported is about ``theta``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from pyro.infer.reparam import TransformReparam
from pyro.infer.reparam.reparam import Reparam
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_sivism.layout import LatentLayout
from pyro_sivism.sites import Site, is_reparametrized
from pyro_sivism.target.replay import Replay

__all__ = ["OwnSites", "auxiliary_names", "own_sites_first"]

# By which the reparametrizations of Pyro 1.9 name what they draw.
_SUFFIXES = re.compile(
    "(_(base|decentered|normal|gamma|uniform|exponential|updated|shared_latent|dct|haar|transformed|trans|init|obs|z|t"
    "|split_[0-9]+))+"
)


class OwnSites:
    """A model's own sites: its latents, with each reparametrized one in the place of its auxiliary ones.

    Args:
        model: a Pyro model.
        layout: the latents it draws.
        trace: a prototype trace of it.
        args, kwargs: its arguments.

    Attributes:
        layout: as given.
        sites: the own sites, as the model has them. One that cannot be had at full size leaves its auxiliary latents.

    Example:

        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer.reparam import LocScaleReparam
        >>> def model():
        ...     tau = pyro.sample("tau", dist.HalfNormal(1.0))
        ...     pyro.sample("theta", dist.Normal(3.0, tau))
        >>> decentered = pyro.poutine.reparam(model, config={"theta": LocScaleReparam(0.0)})
        >>> trace = pyro.poutine.trace(decentered).get_trace()
        >>> own = OwnSites(decentered, LatentLayout.from_trace(trace), trace)
        >>> own.draws({"tau": torch.tensor([2.0]), "theta_decentered": torch.tensor([0.5])})
        {'tau': tensor([2.]), 'theta': tensor([4.])}
    """

    def __init__(
        self,
        model: Callable,
        layout: LatentLayout,
        trace: Trace,
        args: Sequence = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.layout, self._replay = layout, None
        self.sites: tuple[Site, ...] = layout.sites
        if not _reparametrized(trace):
            return
        self._replay = Replay(model, layout, trace, args, kwargs)
        available = self._replay.evaluate(layout.constrain(layout.init_from_trace(trace)[None])).deterministic
        latents: dict[str, Site] = {site.name: site for site in layout.sites}
        computed: dict[str, Site] = {n: self._replay.sites[n] for n in _reparametrized(trace) if n in available}
        own = {n: latents.get(n) or computed[n] for n in trace.nodes if n in latents or n in computed}
        auxiliary = _auxiliary(trace, computed)
        self.sites = tuple(site for name, site in own.items() if name not in auxiliary)

    def draws(self, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The own sites' draws, from those of all the latents, ``(S, *site shape)`` each."""
        values = self.all_draws(latents)
        return {site.name: values[site.name] for site in self.sites}

    def all_draws(self, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Draws of the latents and of every site that is computed from them."""
        values = {name: latents[name] for name in self.layout.names}  # one that is missing would be drawn anew
        return values if self._replay is None else values | self._replay.evaluate(values).deterministic


def auxiliary_names(config: Mapping[str, Reparam], latents: Collection[str]) -> dict[str, str]:
    """Decentered site -> the auxiliary latent that it is computed from, for the config that decenters them.

    A key of the config may be auxiliary itself: ``theta_base``, to be decentered, of a transformed ``theta``.
    """
    made = {
        key: f"{key}_base" if isinstance(reparam, TransformReparam) else f"{key}_decentered"
        for key, reparam in config.items()
    }

    def latent_of(name: str) -> str:
        return latent_of(made[name]) if name in made else name

    return {key: latent_of(key) for key in made if key not in made.values() and latent_of(key) in latents}


def own_sites_first(values: Mapping[str, Tensor], trace: Trace) -> dict[str, Tensor]:
    """The own sites as the model has them, then what it computes, then auxiliary latents."""
    own = _reparametrized(trace)
    auxiliary = _auxiliary(trace, own)

    def rank(name: str) -> int:
        if name in auxiliary:
            return 2
        return int(name not in own and trace.nodes[name]["is_observed"])

    return {name: values[name] for name in sorted((n for n in trace.nodes if n in values), key=rank)}


def _reparametrized(trace: Trace) -> list[str]:
    return [name for name, msg in trace.nodes.items() if msg["type"] == "sample" and is_reparametrized(msg)]


def _auxiliary(trace: Trace, reparametrized: Collection[str]) -> set[str]:
    """The sites that Pyro's handlers named after those, and drew for them just before: ``theta_mean`` is no auxiliary
    site of ``theta``, nor is a ``theta_t`` that the model draws elsewhere."""
    names = [n for n, msg in trace.nodes.items() if msg["type"] == "sample" and not site_is_subsample(msg)]
    found = set()
    for own in reparametrized:
        for name in reversed(names[: names.index(own)]):
            if not (name.startswith(own) and _SUFFIXES.fullmatch(name.removeprefix(own))):
                break
            found.add(name)
    return found
