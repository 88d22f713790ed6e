"""Minibatches: random ones, those that cover the full data, and what is put together from them.

A plate that subsamples N elements down to B runs ceil(N / B) times with fixed indices that cover all N; the last
run overlaps where B does not divide N. Several such plates are covered by every combination of theirs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_sivism.sites import Site
from pyro_sivism.target.anchored import AnchoredTarget

if TYPE_CHECKING:
    from pyro_sivism.target.density import Target

__all__ = ["Indices", "MinibatchAverage", "MinibatchCover", "draw_indices"]

Indices = Mapping[str, Tensor]


class MinibatchCover:
    """The subsampling plates of a prototype trace, and minibatches that visit all their elements.

    Args:
        trace: a prototype trace.
        device: where the indices go.

    Attributes:
        plates: the names of the plates that are smaller in one run of the model than in full.
        fixed: the indices of sequential ones among them. Such a plate names its sites by its indices, which stay
            those of the prototype.
    """

    def __init__(self, trace: Trace, device: torch.device) -> None:
        self._device = device
        sites = [msg for msg in trace.nodes.values() if msg["type"] == "sample" and not site_is_subsample(msg)]
        frames = {frame.name: frame for msg in sites for frame in msg["cond_indep_stack"]}
        subsampled = [f for f in frames.values() if f.full_size is not None and f.size < f.full_size]
        self.plates = [frame.name for frame in subsampled]
        self.fixed = {
            frame.name: trace.nodes[frame.name]["value"]
            for frame in subsampled
            if not frame.vectorized and frame.name in trace.nodes
        }
        self._sizes = {f.name: (int(f.full_size), int(f.size)) for f in subsampled if f.vectorized}

    @property
    def vectorized_plates(self) -> list[str]:
        """Those of :attr:`plates` that the cover runs through."""
        return list(self._sizes)

    @property
    def is_even(self) -> bool:
        """Whether the cover visits each element of every plate exactly once."""
        return len(self._sizes) == len(self.plates) and all(size % width == 0 for size, width in self._sizes.values())

    def minibatches(self, generator: torch.Generator | None = None) -> Iterator[Indices]:
        """Indices by plate for each run of the model, in order, or in an order drawn from ``generator``."""
        parts: list[list[tuple[str, Tensor]]] = []
        for name, (size, width) in self._sizes.items():
            order = torch.arange(size) if generator is None else torch.randperm(size, generator=generator)
            starts = [min(start, size - width) for start in range(0, size, width)]
            parts.append([(name, order[start : start + width].to(self._device)) for start in starts])
        for combination in itertools.product(*parts):
            yield {**self.fixed, **dict(combination)}

    @staticmethod
    def put(result: dict, key: Any, value: Tensor, site: Site, event_dim: int, minibatch: Indices) -> None:
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


def draw_indices(size: int, count: int, device: torch.device | None = None) -> Tensor:
    """``count`` different indices below ``size``, every ordered choice equally likely, at a cost that grows with
    ``count`` and not with ``size``.

    Uniform draws with their repetitions left out are such a choice; where ``count`` is not small against ``size``, a
    permutation is cheaper.
    """
    if 4 * count < size:
        draws = torch.randint(size, (count + count // 2 + 16,), device=device)
        values, inverse = draws.unique(return_inverse=True)
        if len(values) >= count:
            position = torch.arange(len(draws), device=device)
            first = torch.full_like(values, len(draws)).scatter_reduce(0, inverse, position, "amin")
            return values[first.argsort()[:count]]
    return torch.randperm(size, device=device)[:count]


class MinibatchAverage:
    """A subsampled target, averaged over the parts of a random partition of its plates.

    Each part is scaled to the full data, so that the average is unbiased; its parts together visit every row.
    """

    def __init__(self, target: Target, num_minibatches: int) -> None:
        self._target, self._num_minibatches = target, num_minibatches
        self.resample_minibatch()

    @property
    def dim(self) -> int:
        return self._target.dim

    def resample_minibatch(self) -> None:
        """Draw another partition."""
        self._parts: list[dict[str, Tensor]] = [{} for _ in range(self._num_minibatches)]
        for name, fn in self._target.subsamples.items():
            count = self._num_minibatches * fn.subsample_size
            order = draw_indices(fn.size, min(count, fn.size), fn.device)
            for i, part in enumerate(self._parts):
                rows = torch.arange(i * fn.subsample_size, (i + 1) * fn.subsample_size, device=fn.device)
                part[name] = order[rows % len(order)]

    def anchored_at(self, x: Tensor) -> AnchoredTarget | MinibatchAverage:
        """The target without the minibatches' noise at a point ``x (D,)`` near its centre, where that can be had."""
        return AnchoredTarget(self._target, x) if AnchoredTarget.applies(self._target) else self

    def log_density(self, x: Tensor) -> Tensor:
        return self.log_density_and_score(x)[0]

    def score(self, x: Tensor) -> Tensor:
        return self.log_density_and_score(x)[1]

    def log_density_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        minibatch = self._target.minibatch
        log_density, score = x.new_zeros(len(x)), torch.zeros_like(x)
        for part in self._parts:
            self._target.minibatch = part
            part_log_density, part_score = self._target.log_density_and_score(x)
            log_density, score = log_density + part_log_density, score + part_score
        self._target.minibatch = minibatch
        return log_density / len(self._parts), score / len(self._parts)
