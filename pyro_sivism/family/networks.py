"""The two networks: one that mixes Gaussians, one that learns the score of the mixture."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

__all__ = ["MLP", "ScoreNetwork", "bounded"]

_MAX_GATE = 4.0  # where q has sd 1: slopes of its score from -5 to 3; what is steeper is left to the network itself


class MLP(nn.Sequential):
    """Linear layers with SiLU between them, from (*batch, in) to (*batch, out).

    Smooth, because the guide's gradient goes through the critic's slope in ``FisherDivergence``.

    Args:
        in_dim, out_dim: sizes of the first and the last layer.
        hidden_dims: sizes of the layers between them; empty for a linear map.
        zero_last: start with the output identically zero.
    """

    def __init__(self, in_dim: int, out_dim: int, hidden_dims: Sequence[int], *, zero_last: bool = False) -> None:
        dims = [in_dim, *hidden_dims]
        layers: list[nn.Module] = []
        for n, m in pairwise(dims):
            layers += [nn.Linear(n, m), nn.SiLU()]
        last = nn.Linear(dims[-1], out_dim)
        if zero_last:
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        super().__init__(*layers, last)

    def input_parameters(self) -> list[nn.Parameter]:
        """The parameters of the first layer, whose gradients grow with the input's dimension."""
        return list(self[0].parameters())


def bounded(values: Tensor, bound: float) -> Tensor:
    """Values between -bound and bound, smoothly, the small ones left as they are."""
    return bound * torch.tanh(values / bound)


class ScoreNetwork(nn.Module):
    """An estimate of ``grad log q(x)``: the score of a diagonal Gaussian plus a learned residual,

        s(x) = (-x' + a(x') + b(x') x') / sd,      x' = (x - mean) / sd,

    with ``mean`` and ``sd`` running moments of q (:meth:`update_moments`), and ``a`` and ``b`` the outputs of one MLP,
    which start at zero, so that the first estimate is the score of the Gaussian with q's own moments.

    The *gates* b are what hierarchies want: where one latent is the scale of others, ``p(x_j | t) = N(0, e^{2t})``, the
    score ``-e^{-2t} x_j`` is a product of two coordinates, which an MLP of a hundred of them learns slowly from noise,
    while b is a function of t alone. They are bounded, so that s grows no faster than x where there are few draws.

    Args:
        dim: D.
        hidden_dims: widths of the residual's layers.
        decay: weight of a new batch in the running moments.
        gaussian_base: if False, leave out the Gaussian's score: a network for a difference of scores,
            ``(a(x') + b(x') x') / sd``.
        gated: if False, leave out b, which doubles the network's last layer.

    Example:

        >>> score = ScoreNetwork(2, hidden_dims=(32,))
        >>> score(torch.ones(1, 2)).tolist()
        [[-1.0, -1.0]]
    """

    mean: Tensor
    sd: Tensor

    def __init__(
        self,
        dim: int,
        hidden_dims: Sequence[int],
        *,
        decay: float = 0.02,
        gaussian_base: bool = True,
        gated: bool = True,
    ) -> None:
        super().__init__()
        self.gaussian_base = gaussian_base
        self.net = MLP(dim, 2 * dim if gated else dim, hidden_dims, zero_last=True)
        self.decay = decay
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("sd", torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Points (B, D) -> estimated scores (B, D)."""
        standardized = (x - self.mean) / self.sd
        score, *gates = self.net(standardized).split(len(self.sd), -1)
        if self.gaussian_base:
            score = score - standardized
        for gate in gates:
            score = torch.addcmul(score, bounded(gate, _MAX_GATE), standardized)
        return score / self.sd

    @torch.no_grad()
    def update_moments(self, x: Tensor) -> None:
        """Move the running mean and sd towards those of draws (B, D); B may be 1.

        The new moments are those of a mixture, of the old ones with weight ``1 - decay`` and the batch with ``decay``.
        """
        variance, mean = torch.var_mean(x, 0, correction=0)
        between = (1.0 - self.decay) * (mean - self.mean).square()
        self.sd.copy_(self.sd.square().lerp(variance + between, self.decay).sqrt())
        self.mean.lerp_(mean, self.decay)

    def input_parameters(self) -> list[nn.Parameter]:
        return self.net.input_parameters()
