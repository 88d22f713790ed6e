"""A model run again at many draws of its latents: what it observed, computed and would have drawn.

:meth:`Replay.evaluate` keeps the observations and gives the log likelihood of each one and the deterministic
sites; :meth:`Replay.simulate` lets go of them and draws every site that it is not given, which is the posterior
predictive, or with no latents given the prior and its predictive.

**Batches.** The model is run on one draw under ``torch.func.vmap``, as the target is. The path is taken if it runs
and agrees with a plain loop at the first draws: in every value for :meth:`Replay.evaluate`, in the log density of
what was drawn for :meth:`Replay.simulate`. Otherwise the loop is taken.

**Minibatches** that cover the subsampling plates are run one by one, and the results are put together at full size
(see ``minibatches``). That is right only if the data follow the plates' indices, which a second cover in random order
checks.

**Discrete latents** are summed out of the log likelihood where they belong to one observation: see ``pointwise``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.func import vmap

from pyro_sivism.layout import LatentLayout
from pyro_sivism.sites import is_factor, is_masked_out
from pyro_sivism.target.functorch import functorch_ready
from pyro_sivism.target.handlers import Enumerate
from pyro_sivism.target.minibatches import Indices, MinibatchCover
from pyro_sivism.target.paths import agree
from pyro_sivism.target.pointwise import pointwise_log_likelihood
from pyro_sivism.target.replay_handlers import Draw, Hold, ReplaySite
from pyro_sivism.target.sampling import functional_sampling, without_sampler_warnings

__all__ = ["Evaluation", "Replay"]

Tensors = dict[str, Tensor]
Keyed = dict[tuple[str, str], Tensor]  # (group, site) -> values

_NUMBERS_PER_BATCH = 2**22
_CHECKED_DRAWS = 2
_DRAW = "_pyro_sivism_draw"


@dataclass(frozen=True)
class Evaluation:
    """What :meth:`Replay.evaluate` found at S draws.

    Attributes:
        log_likelihood: observed site -> ``(S, *batch_shape)``: the log density of each observation, with neither a
            minibatch's scale nor ``poutine.scale``, and 0 where the observation is masked out.
        deterministic: deterministic site -> ``(S, *shape)``.
        left_out: site -> why it is in neither.
    """

    log_likelihood: Tensors
    deterministic: Tensors
    left_out: dict[str, str]


class Replay:
    """Runs of ``model(*args, **kwargs)`` at given draws of its latents.

    Args:
        model: a Pyro model.
        layout: its continuous latents.
        trace: a prototype trace of the model on these arguments.
        args, kwargs: the model's arguments.

    Attributes:
        flat_sites: latents whose own density is masked away, so that the model does not draw them from their prior.
        observed: the observed values at full plate size, by site.
        moving_sites: observed sites whose value depends on the latents, which are terms of the density and no data.
        sites: every latent, discrete, observed and deterministic site that can be had at full size.
        left_out: site -> why it cannot.

    Example:

        >>> import pyro.distributions as dist
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> y = torch.zeros(3)
        >>> trace = poutine.trace(model).get_trace(y)
        >>> replay = Replay(model, LatentLayout.from_trace(trace), trace, (y,))
        >>> replay.evaluate({"mu": torch.zeros(5)}).log_likelihood["y"].shape
        torch.Size([5, 3])
        >>> replay.simulate(5, {"mu": torch.zeros(5)})["y"].shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        model: Callable,
        layout: LatentLayout,
        trace: Trace,
        args: Sequence = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.layout = model, layout
        self.args, self.kwargs = tuple(args), dict(kwargs or {})
        nodes = [msg for msg in trace.nodes.values() if msg["type"] == "sample" and not site_is_subsample(msg)]
        dims = [frame.dim for msg in nodes for frame in msg["cond_indep_stack"] if frame.vectorized]
        self._nesting = -min(dims, default=0)
        self._cover = MinibatchCover(trace, layout.device)
        self._reasons: dict[str, str] = {}
        self.left_out: dict[str, str] = {}
        self.flat_sites = [msg["name"] for msg in nodes if not msg["is_observed"] and is_masked_out(msg)]
        self.sites: dict[str, ReplaySite] = {}
        for msg in nodes:
            sequential = [frame.name for frame in msg["cond_indep_stack"] if frame.name in self._cover.fixed]
            if is_factor(msg):
                continue
            if sequential:
                self.left_out[msg["name"]] = (
                    f"the sequential plate '{sequential[0]}' draws which of its sites exist. Use it as a context "
                    "manager, or give it its full size here"
                )
                continue
            self.sites[msg["name"]] = ReplaySite.from_message(msg)
        self._enumerates = any(site.kind == "discrete" for site in self.sites.values())
        if self._cover.vectorized_plates:
            self._check_data_follow_indices()
        self.observed, self.moving_sites = self._find_data()

    def of_kind(self, kind: str) -> dict[str, ReplaySite]:
        return {name: site for name, site in self.sites.items() if site.kind == kind}

    @property
    def subsampled_plates(self) -> list[str]:
        """The names of the plates that are smaller in one run of the model than in full."""
        return self._cover.plates

    def even_minibatches(self) -> list[Indices] | None:
        """Minibatches that visit every element of the subsampling plates once, so that the mean of their scaled log
        densities is that of the full data; None if there are none."""
        return list(self._cover.minibatches()) if self._cover.is_even and not self.left_out else None

    # --- what is asked for --------------------------------------------------------------------------

    @torch.no_grad()
    @without_sampler_warnings()
    def evaluate(self, values: Mapping[str, Tensor], batch_size: int | None = None) -> Evaluation:
        """The log likelihood of each observation and the deterministic sites at draws ``values``.

        Args:
            values: each continuous latent's values at full plate size, ``(S, *shape)``.
            batch_size: draws per run of the model; by memory if None.
        """
        self._reasons = {}
        run = self._choose_evaluation(values)
        found = self._in_batches(values, batch_size, lambda part: self._over_minibatches(self._evaluate_one, part, run))
        log_likelihood, deterministic = (_group(found, group) for group in ("log_likelihood", "deterministic"))
        return Evaluation(log_likelihood, deterministic, {**self.left_out, **self._reasons})

    @torch.no_grad()
    @without_sampler_warnings()
    def simulate(
        self, num_samples: int, values: Mapping[str, Tensor] | None = None, batch_size: int | None = None
    ) -> Tensors:
        """Draw every site that ``values`` does not give, observed ones too; deterministic sites come along.

        Args:
            num_samples: S.
            values: continuous latents to hold, ``(S, *shape)`` each; none to draw from the prior.
            batch_size: draws per run of the model; by memory if None.

        Returns:
            Each site's values at full plate size, ``(S, *shape)``, discrete latents as the model draws them given
            the continuous ones.
        """
        device = self.layout.device
        batch: dict[str, Tensor] = {_DRAW: torch.arange(num_samples, device=device), **(values or {})}
        run = self._choose_simulation(batch)
        found = self._in_batches(batch, batch_size, lambda part: self._simulate_batch(part, run))
        return {name: value for name, value in found.items() if name not in batch}

    # --- one run of the model -----------------------------------------------------------------------

    def _run_model(self, handler: Hold, enumerate_discrete: bool = False) -> None:
        model = self.model
        with poutine.block(), pyro.validation_enabled(False), handler, ExitStack() as stack:
            if enumerate_discrete:
                stack.enter_context(Enumerate(-1 - self._nesting))
                model = config_enumerate(model, default="parallel")
            model(*self.args, **self.kwargs)

    def _observe(self, values: Tensors, minibatch: Indices) -> Keyed:
        """The observed values of one minibatch."""
        handler = Hold(self.sites, values, minibatch)
        self._run_model(handler)
        return {("observed", name): handler.value(name) for name in self.of_kind("observed")}

    def _evaluate_one(self, values: Tensors, minibatch: Indices) -> Keyed:
        """The log likelihood and the deterministic sites of one draw and minibatch."""
        handler = Hold(self.sites, values, minibatch)
        self._run_model(handler, self._enumerates)
        result: Keyed = {}
        log_likelihood, reasons = pointwise_log_likelihood(list(handler.messages.values()), self._nesting)
        for name, site in self.sites.items():
            if site.kind == "observed" and name in log_likelihood:
                result["log_likelihood", name] = log_likelihood[name].expand(site.minibatch_batch_shape)
            elif site.kind == "deterministic":
                value = handler.value(name, broadcast=False)
                if value.shape == site.minibatch_shape:
                    result["deterministic", name] = value
                else:
                    reasons[name] = "what depends on a discrete latent that is summed over has no one value"
        self._reasons.update(reasons)
        return result

    def _simulate_one(
        self, values: Tensors, partial: Tensors, minibatch: Indices, done: Tensors, with_log_prob: bool = False
    ) -> Keyed:
        """The values of one draw and minibatch, and the log density of those that were drawn."""
        handler = Draw(self.sites, values, minibatch, partial, done)
        self._run_model(handler)
        names = [name for name in self.sites if name not in values]
        result: Keyed = {("value", name): handler.value(name) for name in names}
        if with_log_prob:
            drawn = [handler.messages[name] for name in names if self.sites[name].kind != "deterministic"]
            result |= {("log_prob", msg["name"]): msg["fn"].log_prob(msg["value"]).sum() for msg in drawn}
        return result

    # --- batches, minibatches and paths -------------------------------------------------------------

    def _choose_evaluation(self, values: Mapping[str, Tensor]) -> Callable:
        """``vmap`` if it runs and agrees with the loop at the first draws, else the loop."""
        few = [{name: value[:_CHECKED_DRAWS] for name, value in values.items()}]
        minibatch = next(self._cover.minibatches())
        want = _loop(self._evaluate_one, few, minibatch)
        try:
            got = _vmap(self._evaluate_one, few, minibatch)
        except Exception:  # any failure of the user's model under vmap means "not this path"
            return _loop
        return _vmap if got.keys() == want.keys() and all(agree(got[k], want[k]) for k in want) else _loop

    def _choose_simulation(self, values: Tensors) -> Callable:
        """``vmap`` if a loop held at what it draws finds the same log density there, else the loop."""
        few = {name: value[:_CHECKED_DRAWS] for name, value in values.items()}
        minibatch = next(self._cover.minibatches())
        try:
            got = _vmap(self._simulate_one, [few, {}], minibatch, {}, True)
        except Exception:  # any failure of the user's model under vmap means "not this path"
            return _loop
        drawn: Tensors = {}
        done: Tensors = {}
        for name in (name for group, name in got if group == "log_prob"):
            self._put_drawn(drawn, done, self.sites[name], got["value", name], minibatch)
        want = _loop(self._simulate_one, [few, drawn], minibatch, done, True)
        return _vmap if all(agree(got[key], want[key]) for key in want) else _loop

    def _in_batches(self, values: Mapping[str, Tensor], batch_size: int | None, run: Callable) -> dict:
        """``run`` on slices of the draws, put together on the CPU."""
        num_samples = len(next(iter(values.values())))
        batch_size = self._batch_size() if batch_size is None else batch_size
        result: dict[Any, Tensor] = {}
        for start in range(0, num_samples, batch_size):
            part = {name: value[start : start + batch_size] for name, value in values.items()}
            for key, value in run(part).items():
                if key not in result:
                    result[key] = torch.empty((num_samples, *value.shape[1:]), dtype=value.dtype)
                result[key][start : start + batch_size] = value.cpu()
        return result

    def _batch_size(self) -> int:
        """As many draws as keep a batch of all sites near ``_NUMBERS_PER_BATCH`` numbers."""
        per_draw = sum(math.prod(site.shape) for site in self.sites.values())
        return max(1, min(10_000, _NUMBERS_PER_BATCH // max(per_draw, 1)))

    def _over_minibatches(
        self, run_one: Callable, values: Tensors, run: Callable, generator: torch.Generator | None = None
    ) -> Keyed:
        """``run`` on each minibatch of a cover, put together at full size."""
        result: Keyed = {}
        for minibatch in self._cover.minibatches(generator):
            for key, value in run(run_one, [values], minibatch).items():
                site = self.sites[key[1]]
                event_dim = 0 if key[0] == "log_likelihood" else site.event_dim
                self._cover.put(result, key, value, site, event_dim, minibatch)
        return result

    def _simulate_batch(self, values: Tensors, run: Callable) -> Tensors:
        """Draw minibatch by minibatch; each holds what the ones before it have drawn, so that a draw is one whole."""
        partial: Tensors = {}
        done: Tensors = {}
        for minibatch in self._cover.minibatches():
            for (_, name), value in run(self._simulate_one, [values, partial], minibatch, done).items():
                self._put_drawn(partial, done, self.sites[name], value, minibatch)
        return partial

    def _put_drawn(self, partial: Tensors, done: Tensors, site: ReplaySite, value: Tensor, minibatch: Indices) -> None:
        """Write a minibatch's draws into those so far, and mark where they are."""
        self._cover.put(partial, site.name, value, site, site.event_dim, minibatch)
        held = {site.name: done[site.name][None]} if site.name in done else {}
        self._cover.put(held, site.name, torch.ones_like(value[:1], dtype=torch.bool), site, site.event_dim, minibatch)
        done[site.name] = held[site.name][0]

    # --- checks of the model ------------------------------------------------------------------------

    @torch.no_grad()
    def _find_data(self) -> tuple[Tensors, list[str]]:
        """The data at full size. An observed value that moves with the latents is none: ``obs=theta`` adds a term to
        the density, and a likelihood or a prediction of it has no meaning, so such a site is no longer held as one."""
        found = self._over_minibatches(self._observe, self._latents_at_origin(2), _loop)
        moving = [name for (_, name), value in found.items() if not _same(value[0], value[1])]
        for name in moving:
            del self.sites[name]
        return {name: value[0] for (_, name), value in found.items() if name not in moving}, moving

    def _latents_at_origin(self, num_draws: int) -> Tensors:
        """Latents at unconstrained points near 0, for questions whose answer should not depend on them."""
        points = torch.linspace(-0.1, 0.1, num_draws, dtype=self.layout.dtype, device=self.layout.device)
        return self.layout.constrain(points[:, None].expand(-1, self.layout.dim))

    @torch.no_grad()
    def _check_data_follow_indices(self) -> None:
        """Leave out sites whose full-size values depend on the order in which minibatches were taken."""
        values = self._latents_at_origin(1)
        found = []
        for generator in (None, torch.Generator().manual_seed(0)):
            observed = self._over_minibatches(self._observe, values, _loop, generator)
            evaluated = self._over_minibatches(self._evaluate_one, values, _loop, generator)
            found.append({**observed, **evaluated})
        plates = " and ".join(f"'{name}'" for name in self._cover.vectorized_plates)
        for key in found[0]:
            if not agree(found[0][key], found[1][key]):
                self.left_out[key[1]] = (
                    f"plate {plates} subsamples, and what it yields does not index these values, so that they are "
                    "unknown on the full data. Index the data by what the plate yields, or call this with the full "
                    "data and no subsampling"
                )
        for name in self.left_out:
            self.sites.pop(name, None)


def _vmap(run_one: Callable, batched: Sequence[Tensors], *rest: Any) -> Keyed:
    with functorch_ready(), functional_sampling():
        return vmap(lambda *one: run_one(*one, *rest), randomness="different")(*batched)


def _loop(run_one: Callable, batched: Sequence[Tensors], *rest: Any) -> Keyed:
    size = len(next(iter(batched[0].values())))
    runs = [run_one(*({k: v[i] for k, v in part.items()} for part in batched), *rest) for i in range(size)]
    return {key: torch.stack([run[key] for run in runs]) for key in runs[0]}


def _group(found: Keyed, group: str) -> Tensors:
    return {name: value for (other, name), value in found.items() if other == group}


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit; NaN equals NaN."""
    return bool(((a == b) | ((a != a) & (b != b))).all())
