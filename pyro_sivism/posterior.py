"""The distributions that a semi-implicit guide hands to Pyro."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
from pyro.distributions import TorchDistribution, constraints
from torch import Size, Tensor
from torch.distributions import register_kl

from pyro_sivism.family import AffineMap, SemiImplicit

__all__ = ["SemiImplicitPosterior", "Transformed"]


class SemiImplicitPosterior(TorchDistribution):
    """The distribution of a semi-implicit guide's unconstrained latents.

    ``log_prob`` is defined for the last draw only: ``log (1/K) sum_k q(x|z_k)`` with the draw's own z among
    the K mixing draws, whose expectation over draws is at least ``E log q``. At any other point there is no
    such bound, and :meth:`log_prob` refuses.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self, family: SemiImplicit, affine: AffineMap, num_mixing: int, batch_shape: Sequence[int] = ()
    ) -> None:
        self.family, self.affine, self.num_mixing = family, affine, num_mixing
        self._last: tuple[Tensor, Tensor] | None = None
        super().__init__(Size(batch_shape), Size((family.dim,)), validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> SemiImplicitPosterior:
        return SemiImplicitPosterior(self.family, self.affine, self.num_mixing, batch_shape)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        draw = self.family.rsample(Size(sample_shape) + self.batch_shape)
        x = self.affine.forward(draw.x)
        self._last = (x, draw.z)
        return x

    def log_prob(self, value: Tensor) -> Tensor:
        if self._last is None or self._last[0] is not value:
            raise NotImplementedError(
                "the density of a semi-implicit guide has no closed form, and no bound away from its own draws. For an "
                "estimate at given points use guide.log_prob_estimate(x, num_mixing)."
            )
        estimate = self.family.log_prob_estimate(self.affine.inverse(value), self.num_mixing, own_z=self._last[1])
        return estimate.value - self.affine.log_abs_det


class Transformed(dist.Delta):
    """A site's value as a function of the auxiliary draw, with the density of the change of variables.

    Pyro's divergence of a ``Delta`` from a prior leaves that density out, by which ``TraceMeanField_ELBO`` would
    report a false ELBO for every site with a constrained support.
    """


@register_kl(Transformed, dist.Distribution)
def _kl_of_transformed(p: Transformed, q: dist.Distribution) -> Tensor:
    return p.log_density - q.log_prob(p.v)
