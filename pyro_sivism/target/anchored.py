"""A subsampled target with most of the minibatch's noise taken out.

With n of N rows in a minibatch b, the score ``s_b(x)`` of a minibatch is unbiased, but in units of the posterior sd its
noise is about ``sqrt(N / n)``, of which nothing is about x: it is there at every point alike. So let the score at an
*anchor* a near the posterior's centre be known from all rows, and use

    s(x) = s_b(x) - s_b(a) + s_full(a),

which is unbiased too. Posterior draws are about one sd from a, and the noise left is that of the rows' *curvature*,
about ``sqrt(1 / n)``. It is the gradient of

    l(x) = l_b(x) - l_b(a) + l_full(a) + (x - a) . (s_full(a) - s_b(a)).

It costs one more particle in each batch, and one pass over the data for each anchor.

The source is Baker, Fearnhead, Fox, Nemeth, "Control variates for stochastic gradient MCMC" (Statistics and Computing,
2019), section 3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_sivism.target.arguments import version_of

if TYPE_CHECKING:
    from pyro_sivism.layout import LatentLayout
    from pyro_sivism.target.density import Target

__all__ = ["AnchoredTarget"]

_MAX_ROUNDS = 4  # over the data, where no single one visits every row equally often


class AnchoredTarget:
    """``target`` with the minibatch's noise at ``anchor`` taken out, everywhere.

    What the model reads must stay as it is: :attr:`is_current` tells whether it has.

    Args:
        target: a target for which :meth:`applies` holds.
        anchor: a point ``(D,)`` near the centre of the posterior.

    Example:

        >>> import pyro, pyro.distributions as dist
        >>> from pyro_sivism.layout import LatentLayout
        >>> from pyro_sivism.target import Target
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("rows", len(y), subsample_size=2) as rows:
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y[rows])
        >>> y = torch.arange(6.0)
        >>> trace = pyro.poutine.trace(model).get_trace(y)
        >>> target = Target(model, LatentLayout.from_trace(trace), trace, (y,))
        >>> AnchoredTarget(target, torch.zeros(1)).score(torch.zeros(1, 1)).item()  # of all six rows: their sum
        15.0
    """

    def __init__(self, target: Target, anchor: Tensor) -> None:
        self._target = target
        self._anchor = anchor.detach().to(target.layout.dtype)[None]
        self._call, self._path = target.call, target.path
        self._versions = [version_of(tensor) for tensor in self._call.tensors]
        minibatch = target.minibatch
        log_densities, scores = [], []
        with torch.no_grad():
            for target.minibatch in self._cover():
                log_density, score = target.log_density_and_score(self._anchor)
                log_densities.append(log_density.double())
                scores.append(score.double())
        target.minibatch = minibatch
        self._closed_over = target.closed_over
        self._log_density, self._score = torch.stack(log_densities).mean(0), torch.stack(scores).mean(0)

    @staticmethod
    def applies(target: Target) -> bool:
        """Whether there is noise to take out: one subsampling plate, no latents inside it, no ``pyro.param``s, and a
        captured density.

        A latent inside the plate is seen by few minibatches, a parameter that moves leaves the anchor behind, and so
        would a global of the model's, whose changes only a captured density finds.
        """
        if len(target.subsamples) != 1 or not target.path.name.startswith("captured"):
            return False
        return not any(site.subsampled_plates for site in target.layout.sites) and not target.params()

    @property
    def is_current(self) -> bool:
        """Whether the target is still bound to the same arguments, nobody has written into them or into what the model
        closes over, and no check of its captured density has failed."""
        call = self._target.call
        return (
            self._target.path is self._path
            and (call.signature, call.frozen) == (self._call.signature, self._call.frozen)
            and all(tensor is other for tensor, other in zip(call.tensors, self._call.tensors))
            and all(version_of(tensor) == version for tensor, version in zip(call.tensors, self._versions))
            and self._target.closed_over == self._closed_over
        )

    @property
    def dim(self) -> int:
        return self._target.dim

    @property
    def layout(self) -> LatentLayout:
        return self._target.layout

    @property
    def is_subsampled(self) -> bool:
        return True

    def resample_minibatch(self) -> None:
        """Draw another minibatch."""
        self._target.resample_minibatch()

    def log_density(self, x: Tensor) -> Tensor:
        return self.log_density_and_score(x)[0]

    def score(self, x: Tensor) -> Tensor:
        score = self._target.score(self._with_anchor(x))
        return score[:-1] + (self._score - score[-1:].detach()).to(x.dtype)

    def log_density_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_density, score = self._target.log_density_and_score(self._with_anchor(x))
        shift = (self._log_density - log_density[-1:].detach()).to(x.dtype)
        slope = (self._score - score[-1:].detach()).to(x.dtype)
        tilt = (x - self._anchor.to(x.dtype)) @ slope[0]
        return log_density[:-1] + shift + tilt, score[:-1] + slope

    def _with_anchor(self, x: Tensor) -> Tensor:
        return torch.cat([x, self._anchor.to(x.dtype)])

    def _cover(self) -> Iterator[dict[str, Tensor]]:
        """Minibatches that visit every row equally often, if that takes no more than a few rounds; nearly so else."""
        ((name, plate),) = self._target.subsamples.items()
        size, width = plate.size, plate.subsample_size
        num_minibatches = min(size // math.gcd(size, width), _MAX_ROUNDS * -(-size // width))
        order = torch.randperm(size, device=plate.device)
        rows = torch.arange(width, device=plate.device)
        for i in range(num_minibatches):
            yield {name: order[(rows + i * width) % size]}
