"""Minibatches that cover the full data, and full-size values put together from them.

A plate that subsamples N elements down to B runs ceil(N / B) times with fixed indices that cover all N; the last
run overlaps where B does not divide N. Several such plates are covered by every combination of theirs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_sivism.sites import Site

__all__ = ["Indices", "MinibatchCover"]

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
