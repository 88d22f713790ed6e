"""A model run again at many draws of its latents: what it observed, computed and would have drawn.

:meth:`Replay.evaluate` keeps the observations and gives the log likelihood of each one and the deterministic
sites; :meth:`Replay.simulate` lets go of them and draws every site that it is not given, which is the posterior
predictive, or with no latents given the prior and its predictive.

**Batches.** The model is run on one draw under ``torch.func.vmap``, as the target is. The path is taken if it runs
and agrees with a plain loop at the first draws: in every value for :meth:`Replay.evaluate`, in the log density of
what was drawn for :meth:`Replay.simulate`. Otherwise the loop is taken.

**Minibatches.** A plate that subsamples N elements down to B runs ceil(N / B) times with fixed indices that cover
all N, and the results are put together at full size; the last run overlaps where B does not divide N. That is right
only if the data follow the plate's indices, which a second cover in random order checks.

**Discrete latents** are summed out of the log likelihood where they belong to one observation: see ``pointwise``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Size, Tensor
from torch.func import vmap

from pyro_sivism.errors import ModelError
from pyro_sivism.layout import LatentLayout, PlateDim
from pyro_sivism.target.functorch import functorch_ready
from pyro_sivism.target.handlers import Enumerate
from pyro_sivism.target.pointwise import is_factor, pointwise_log_likelihood, site_kind
from pyro_sivism.target.sampling import functional_sampling

__all__ = ["Evaluation", "Replay", "ReplaySite"]

Indices = Mapping[str, Tensor]
Tensors = dict[str, Tensor]
Keyed = dict[tuple[str, str], Tensor]  # (group, site) -> values

_NUMBERS_PER_BATCH = 2**22
_CHECKED_DRAWS = 2


@dataclass(frozen=True)
class ReplaySite:
    """A site of the model at full plate size.

    Attributes:
        name: its name.
        kind: "latent", "discrete", "observed" or "deterministic".
        shape: of its value, ``batch_shape + event_shape``.
        event_dim: how many dims on the right belong to one event.
        plates: the vectorized plates around it, outermost first.
    """

    name: str
    kind: str
    shape: Size
    event_dim: int
    plates: tuple[PlateDim, ...]

    @property
    def batch_shape(self) -> Size:
        return self.shape[: len(self.shape) - self.event_dim]

    @property
    def subsampled_plates(self) -> tuple[PlateDim, ...]:
        return tuple(plate for plate in self.plates if plate.is_subsampled)

    @property
    def dims(self) -> tuple[str, ...]:
        """A name for each dim of the value: the plate's where there is one, else ``site_dim_i``."""
        names = {plate.dim + len(self.batch_shape): plate.name for plate in self.plates}
        return tuple(names.get(i, f"{self.name}_dim_{i}") for i in range(len(self.shape)))

    @property
    def minibatch_shape(self) -> Size:
        """The shape of the value in one run of the model."""
        shape = list(self.shape)
        for plate in self.subsampled_plates:
            shape[plate.dim - self.event_dim] = plate.subsample_size
        return Size(shape)


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
        frames = {frame.name: frame for msg in nodes for frame in msg["cond_indep_stack"]}
        self._nesting = -min((frame.dim for frame in frames.values() if frame.vectorized), default=0)
        self._subsampled = {f.name: f for f in frames.values() if f.full_size is not None and f.size < f.full_size}
        # A sequential plate names its sites by its indices; they stay those of the prototype.
        self._fixed_indices = {
            name: trace.nodes[name]["value"]
            for name, frame in self._subsampled.items()
            if not frame.vectorized and name in trace.nodes
        }
        self.left_out: dict[str, str] = {}
        self._reasons: dict[str, str] = {}
        self.flat_sites = [msg["name"] for msg in nodes if not msg["is_observed"] and _is_masked_out(msg)]
        self.sites: dict[str, ReplaySite] = {}
        for msg in nodes:
            sequential = [frame.name for frame in msg["cond_indep_stack"] if frame.name in self._fixed_indices]
            if is_factor(msg):  # pyro.factor: a density, and no observation
                continue
            if sequential:
                self.left_out[msg["name"]] = (
                    f"the sequential plate '{sequential[0]}' draws which of its sites exist; use it as a context "
                    "manager, or give it its full size here"
                )
                continue
            self.sites[msg["name"]] = _replay_site(msg)
        self._enumerates = any(site.kind == "discrete" for site in self.sites.values())
        if any(frame.vectorized for frame in self._subsampled.values()):
            self._check_data_follow_indices()
        self.observed, self.moving_sites = self._find_data()

    def of_kind(self, kind: str) -> dict[str, ReplaySite]:
        return {name: site for name, site in self.sites.items() if site.kind == kind}

    @property
    def subsampled_plates(self) -> list[str]:
        """The names of the plates that are smaller in one run of the model than in full."""
        return list(self._subsampled)

    def even_minibatches(self) -> list[Indices] | None:
        """Minibatches that visit every element of the subsampling plates once, so that the mean of their scaled log
        densities is that of the full data; None if there are none."""
        even = all(frame.vectorized and frame.full_size % frame.size == 0 for frame in self._subsampled.values())
        return list(self._cover()) if even and not self.left_out else None

    # --- what is asked for --------------------------------------------------------------------------

    @torch.no_grad()
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

    def _run_model(self, handler: _Hold) -> None:
        with poutine.block(), pyro.validation_enabled(False), handler:
            self.model(*self.args, **self.kwargs)

    def _observe(self, values: Tensors, minibatch: Indices) -> Keyed:
        handler = _Hold(self.sites, values, minibatch)
        self._run_model(handler)
        return {("observed", name): handler.value(name) for name in self.of_kind("observed")}

    def _evaluate_one(self, values: Tensors, minibatch: Indices) -> Keyed:
        """The log likelihood and the deterministic sites of one draw and minibatch."""
        handler = _Hold(self.sites, values, minibatch)
        if self._enumerates:
            with poutine.block(), pyro.validation_enabled(False), handler, Enumerate(-1 - self._nesting):
                config_enumerate(self.model, default="parallel")(*self.args, **self.kwargs)
        else:
            self._run_model(handler)
        result: Keyed = {}
        log_likelihood, reasons = pointwise_log_likelihood(list(handler.messages.values()), self._nesting)
        for name, site in self.sites.items():
            if site.kind == "observed" and name in log_likelihood:
                shape = site.minibatch_shape[: len(site.batch_shape)]
                result["log_likelihood", name] = log_likelihood[name].expand(shape)
            elif site.kind == "deterministic":
                value = handler.value(name, broadcast=False)
                if value.shape == site.minibatch_shape:
                    result["deterministic", name] = value
                else:
                    reasons[name] = "it depends on a discrete latent that is summed over, so it has no one value"
        self._reasons.update(reasons)
        return result

    def _simulate_one(
        self, values: Tensors, partial: Tensors, minibatch: Indices, done: Tensors, with_log_prob: bool = False
    ) -> Keyed:
        """The values of one draw and minibatch, and the log density of those that were drawn."""
        handler = _Draw(self.sites, values, minibatch, partial, done)
        self._run_model(handler)
        names = [name for name in self.sites if name not in values]
        result: Keyed = {("value", name): handler.value(name) for name in names}
        if with_log_prob:
            drawn = [handler.messages[name] for name in names if self.sites[name].kind != "deterministic"]
            result |= {("log_prob", msg["name"]): msg["fn"].log_prob(msg["value"]).sum() for msg in drawn}
        return result

    # --- batches, minibatches and paths -------------------------------------------------------------

    def _vmap(self, run_one: Callable, batched: Sequence[Tensors], *rest: Any) -> Keyed:
        with functorch_ready(), functional_sampling():
            return vmap(lambda *one: run_one(*one, *rest), randomness="different")(*batched)

    def _loop(self, run_one: Callable, batched: Sequence[Tensors], *rest: Any) -> Keyed:
        size = len(next(iter(batched[0].values())))
        runs = [run_one(*({k: v[i] for k, v in part.items()} for part in batched), *rest) for i in range(size)]
        return {key: torch.stack([run[key] for run in runs]) for key in runs[0]}

    def _choose_evaluation(self, values: Mapping[str, Tensor]) -> Callable:
        """``vmap`` if it runs and agrees with the loop at the first draws, else the loop."""
        few = [{name: value[:_CHECKED_DRAWS] for name, value in values.items()}]
        minibatch = next(self._cover())
        want = self._loop(self._evaluate_one, few, minibatch)
        try:
            got = self._vmap(self._evaluate_one, few, minibatch)
        except Exception:  # any failure of the user's model under vmap means "not this path"
            return self._loop
        return self._vmap if got.keys() == want.keys() and all(_close(got[k], want[k]) for k in want) else self._loop

    def _choose_simulation(self, values: Tensors) -> Callable:
        """``vmap`` if a loop held at what it draws finds the same log density there, else the loop."""
        few = {name: value[:_CHECKED_DRAWS] for name, value in values.items()}
        minibatch = next(self._cover())
        try:
            got = self._vmap(self._simulate_one, [few, {}], minibatch, {}, True)
        except Exception:  # any failure of the user's model under vmap means "not this path"
            return self._loop
        drawn: Tensors = {}
        done: Tensors = {}
        for name in (name for group, name in got if group == "log_prob"):
            self._put_drawn(drawn, done, self.sites[name], got["value", name], minibatch)
        want = self._loop(self._simulate_one, [few, drawn], minibatch, done, True)
        return self._vmap if all(_close(got[key], want[key]) for key in want) else self._loop

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
        for minibatch in self._cover(generator):
            for key, value in run(run_one, [values], minibatch).items():
                site = self.sites[key[1]]
                self._put(result, key, value, site, 0 if key[0] == "log_likelihood" else site.event_dim, minibatch)
        return result

    def _simulate_batch(self, values: Tensors, run: Callable) -> Tensors:
        """Draw minibatch by minibatch; each holds what the ones before it have drawn, so that a draw is one whole."""
        partial: Tensors = {}
        done: Tensors = {}
        for minibatch in self._cover():
            for (_, name), value in run(self._simulate_one, [values, partial], minibatch, done).items():
                self._put_drawn(partial, done, self.sites[name], value, minibatch)
        return partial

    def _put_drawn(self, partial: Tensors, done: Tensors, site: ReplaySite, value: Tensor, minibatch: Indices) -> None:
        """Write a minibatch's draws into those so far, and mark where they are."""
        self._put(partial, site.name, value, site, site.event_dim, minibatch)
        held = {site.name: done[site.name][None]} if site.name in done else {}
        self._put(held, site.name, torch.ones_like(value[:1], dtype=torch.bool), site, site.event_dim, minibatch)
        done[site.name] = held[site.name][0]

    def _put(self, result: dict, key: Any, value: Tensor, site: ReplaySite, event_dim: int, minibatch: Indices) -> None:
        """Write a minibatch's ``value (S, *minibatch shape)`` into ``result[key] (S, *full shape)``."""
        if not site.subsampled_plates:
            result[key] = value
            return
        index = [torch.arange(n, device=value.device) for n in value.shape]
        shape = list(value.shape)
        for plate in site.subsampled_plates:
            shape[plate.dim - event_dim] = plate.size
            index[plate.dim - event_dim] = minibatch[plate.name].to(value.device)
        if key not in result:
            result[key] = value.new_zeros(shape)
        result[key][torch.meshgrid(*index, indexing="ij")] = value

    def _cover(self, generator: torch.Generator | None = None) -> Iterator[Indices]:
        """Minibatches that cover the subsampling plates, in order, or in an order drawn from ``generator``."""
        parts: list[list[tuple[str, Tensor]]] = []
        for name, frame in self._subsampled.items():
            if not frame.vectorized:
                continue
            size, width = int(frame.full_size), int(frame.size)
            order = torch.arange(size) if generator is None else torch.randperm(size, generator=generator)
            starts = [min(start, size - width) for start in range(0, size, width)]
            parts.append([(name, order[start : start + width].to(self.layout.device)) for start in starts])
        for combination in itertools.product(*parts):
            yield {**self._fixed_indices, **dict(combination)}

    @torch.no_grad()
    def _find_data(self) -> tuple[Tensors, list[str]]:
        """The data at full size. An observed value that moves with the latents is none: ``obs=theta`` adds a term to
        the density, and a likelihood or a prediction of it has no meaning, so such a site is no longer held as one."""
        found = self._over_minibatches(self._observe, self._latents_at_origin(2), self._loop)
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
            observed = self._over_minibatches(self._observe, values, self._loop, generator)
            evaluated = self._over_minibatches(self._evaluate_one, values, self._loop, generator)
            found.append({**observed, **evaluated})
        plates = " and ".join(f"'{name}'" for name, frame in self._subsampled.items() if frame.vectorized)
        for key in found[0]:
            if not _close(found[0][key], found[1][key]):
                self.left_out[key[1]] = (
                    f"plate {plates} subsamples, and the site does not follow the plate's indices, so its values on "
                    "the full data are unknown here. Index the data by what the plate yields, or call this with the "
                    "full data and no subsampling"
                )
        for name in self.left_out:
            self.sites.pop(name, None)


_DRAW = "_pyro_sivism_draw"


class _Hold(Messenger):
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
            msg["value"] = self._rows(msg, self._values[name], self._sites[name].event_dim)
            msg["done"] = True
        else:
            self._visit(msg)

    def _visit(self, msg: Any) -> None:
        """What to do with a sample site that is no held latent."""

    def _pyro_post_sample(self, msg: Any) -> None:
        if not site_is_subsample(msg):
            self.messages[msg["name"]] = msg.copy()

    def _rows(self, msg: Any, value: Tensor, event_dim: int) -> Tensor:
        """The rows of a full-size value that the minibatch holds."""
        for frame in msg["cond_indep_stack"]:
            if frame.vectorized and frame.name in self._minibatch:
                value = value.index_select(frame.dim - event_dim, self._minibatch[frame.name].to(value.device))
        return value

    def value(self, name: str, broadcast: bool = True) -> Tensor:
        """A site's value in this run, in the site's own shape."""
        if name not in self.messages:
            raise ModelError(
                f"site '{name}' was there at set-up but not at other values of the latents; expected the same sites in "
                "every run. Replace the branch by torch.where or a mixture."
            )
        value = torch.as_tensor(self.messages[name]["value"])
        return value.expand(self._sites[name].minibatch_shape) if broadcast else value


class _Draw(_Hold):
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
        batch_shape = site.minibatch_shape[: len(site.batch_shape)]
        if msg["fn"].batch_shape != batch_shape:
            msg["fn"] = msg["fn"].expand(batch_shape)
        value = msg["fn"](*msg["args"], **msg["kwargs"])
        if name in self._partial:
            done, partial = (self._rows(msg, full[name], site.event_dim) for full in (self._done, self._partial))
            value = torch.where(done, partial, value)
        msg["value"], msg["done"] = value, True


def _replay_site(msg: dict) -> ReplaySite:
    """A site's shape at full size, and the plates that its dims belong to."""
    frames = sorted((frame for frame in msg["cond_indep_stack"] if frame.vectorized), key=lambda frame: frame.dim)
    value, fn, kind = torch.as_tensor(msg["value"]), msg["fn"], site_kind(msg)
    shape, event_dim = value.shape, fn.event_dim
    if kind == "deterministic":
        # Without event_dim, pyro.deterministic takes all of the value for one event; look for the plates in it.
        candidates = range(event_dim + 1) if event_dim == len(shape) else [event_dim]
        fits = [e for e in candidates if all(_has_size(shape, f.dim - e, f.size) for f in frames)]
        event_dim, frames = (fits[0], frames) if fits and frames else (event_dim, [])
    else:
        batch_shape = torch.broadcast_shapes(fn.batch_shape, shape[: len(shape) - event_dim])
        shape = batch_shape + shape[len(shape) - event_dim :]
    plates = tuple(PlateDim(f.name, f.dim, int(f.full_size or f.size), int(f.size)) for f in frames)
    full = list(shape)
    for plate in plates:
        full[plate.dim - event_dim] = plate.size
    return ReplaySite(msg["name"], kind, Size(full), event_dim, plates)


def _is_masked_out(msg: dict) -> bool:
    """Whether a latent's own density is masked away, so that drawing from it is not drawing from its prior."""
    fn, masks = msg["fn"], [msg["mask"]]
    while hasattr(fn, "base_dist"):
        masks.append(getattr(fn, "_mask", None))
        fn = fn.base_dist
    return any(mask is not None and not bool(torch.as_tensor(mask).any()) for mask in masks)


def _group(found: Keyed, group: str) -> Tensors:
    return {name: value for (other, name), value in found.items() if other == group}


def _has_size(shape: Size, dim: int, size: int) -> bool:
    return len(shape) >= -dim and shape[dim] == size


def _same(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | ((a != a) & (b != b))).all())


def _close(got: Tensor, want: Tensor) -> bool:
    """Equal up to the rounding of sums taken in another order; NaN equals NaN."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return False
    if not want.is_floating_point():
        return bool((got == want).all())
    tolerance = 50 * torch.finfo(want.dtype).eps ** 0.75
    scale = want[want.isfinite()].abs().max().item() if want.isfinite().any() else 0.0
    return torch.allclose(got, want, rtol=tolerance, atol=tolerance * (1.0 + scale), equal_nan=True)
