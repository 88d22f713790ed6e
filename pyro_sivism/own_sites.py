"""The sites that a model's author wrote, where latents of other names are drawn in their place.

Under ``poutine.reparam`` a latent ``theta`` is no sample site any more but a function of an *auxiliary* latent, which
Pyro names after it: ``theta_decentered``, ``theta_base``. What is reported is about ``theta``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pyro.poutine import Trace
from torch import Tensor

from pyro_sivism.layout import LatentLayout
from pyro_sivism.sites import Site, is_reparametrized
from pyro_sivism.target.replay import Replay

__all__ = ["OwnSites", "auxiliary_names", "own_sites_first"]


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
        self.sites = tuple(site for name, site in own.items() if not _is_auxiliary(name, computed))

    def draws(self, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The own sites' draws, from those of all the latents, ``(S, *site shape)`` each."""
        values = {name: latents[name] for name in self.layout.names}  # one that is missing would be drawn anew
        if self._replay is not None:
            values |= self._replay.evaluate(latents).deterministic
        return {site.name: values[site.name] for site in self.sites}


def auxiliary_names(trace: Trace) -> dict[str, list[str]]:
    """Reparametrized site -> the auxiliary latents that it is computed from, of the model's own sites."""
    reparametrized = _reparametrized(trace)
    latents = [name for name in trace.stochastic_nodes if name not in reparametrized]
    return {
        own: [name for name in latents if _is_auxiliary(name, [own])]
        for own in reparametrized
        if not _is_auxiliary(own, reparametrized)
    }


def own_sites_first(values: Mapping[str, Tensor], trace: Trace) -> dict[str, Tensor]:
    """The own sites as the model has them, then what it computes, then auxiliary latents."""
    own = _reparametrized(trace)

    def rank(name: str) -> int:
        if _is_auxiliary(name, own):
            return 2
        return int(name not in own and trace.nodes[name]["is_observed"])

    return {name: values[name] for name in sorted((n for n in trace.nodes if n in values), key=rank)}


def _reparametrized(trace: Trace) -> list[str]:
    return [name for name, msg in trace.nodes.items() if msg["type"] == "sample" and is_reparametrized(msg)]


def _is_auxiliary(name: str, reparametrized: Mapping[str, Any] | Sequence[str]) -> bool:
    """Whether Pyro's handlers named a site after one of those."""
    return any(name.startswith(f"{own}_") for own in reparametrized)
