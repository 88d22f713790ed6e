"""The defaults, by dimension: what a fit uses where the user says nothing.

Measured on real posteriors. Every number is in the whitened space, where the fitted Gaussian is N(0, I).
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Recipe"]

_MAX_MIXING_DIM = 256
_MAX_GATED_DIM = 1024


@dataclass(frozen=True)
class Recipe:
    """Settings of one fit.

    Attributes:
        mixing_dim: M, the length of z.
        guide_hidden_dims, critic_hidden_dims: widths of the two networks.
        guide_lr, critic_lr: Adam's learning rates; ``ramp_steps`` up, then a cosine down to ``final_lr_fraction``.
        input_lr_factor: the learning rate of layers that read a D-vector, relative to the others; their
            gradients grow with D.
        betas: Adam's.
        clip_norm: gradients longer than this are scaled down to it.
        averaging_decay: of the exponential average of the guide's weights, which is what is reported.
        scale_depends_on_z: whether the conditional sd is a network of z.
        gated: whether both networks have gates, which multiply coordinates.
        max_steps: of ``run(None)``, which ends before where it can; see :mod:`pyro_sivism.stopping`.
        num_particles: draws per batch, B.
        critic_steps: critic updates per guide update.
        critic_warmup_steps: critic updates before the first guide update.
        init_scale, min_scale, max_scale: the conditional sd at the start, its floor and its ceiling.
    """

    mixing_dim: int
    guide_hidden_dims: tuple[int, ...]
    critic_hidden_dims: tuple[int, ...]
    guide_lr: float
    critic_lr: float
    input_lr_factor: float
    scale_depends_on_z: bool
    gated: bool
    max_steps: int = 2400
    num_particles: int = 256
    critic_steps: int = 2
    critic_warmup_steps: int = 25
    min_scale: float = 0.3
    init_scale: float = 0.75
    max_scale: float = 1.2
    ramp_steps: int = 25
    final_lr_fraction: float = 0.03
    betas: tuple[float, float] = (0.9, 0.99)
    clip_norm: float = 5.0
    averaging_decay: float = 0.98

    @classmethod
    def for_dim(cls, dim: int) -> Recipe:
        """The defaults for D = ``dim``.

        The floor of the conditional sd is .3: the critic is regressed on numbers of variance 1/sd^2, and where its
        error is too large to resolve q, q's score comes out too flat, which pushes the sd down further, until it sits
        at the floor. With a floor of .1 a Gaussian-process regression of 13 dimensions and two crossed Gaussians in
        the plane collapsed that way; above .4 a curved ridge is too blurred.

        A step of few dimensions costs what its hundreds of small operations cost to start, a fifth to a half more of it
        with 256 draws than with 128, and 150 such steps at twice the rates ended as right as 300 of 128 draws did. What
        is told of steps here was partly measured by those, and they count half.

        The steps are at most 2,400. That is for thin tails and funnels; most fits end after 150 to 300. By the
        objective alone the largest error of a mean in the same Gaussian-process regression was .09 sds after 1,200, the
        median of five seeds, and .06 after 2,400; following chains, .05 after 300 to 1,200.

        Beyond D = 256 the guide moves more slowly. It need not before: at half the rate a two-parameter response model
        of 144 dimensions took 1,200 steps for 600; and where nothing is followed, 600 steps on a hierarchy of 90
        dimensions and 500 on minibatches of one of 84 ended alike at both rates.

        Up to D = 256 the conditional sd follows z, and up to 1,024 both networks are gated. Without gates it did not
        end well beyond D = 32: the worst sd of a hierarchical regression in 90 dimensions was off by .68 in log2 after
        150 steps and by .08 after 2,400 with constant sds, and a hierarchy in 203 dimensions collapsed where they
        followed z; with gates both are off by .1 and less after 150 to 600 steps. Where D is in the thousands, of no
        hierarchy that was measured, gates would double the networks' largest layers.

        Hidden layers are at most 256 wide, and beyond D = 256 z is shorter than x, so that the networks grow with D and
        not with D^2; a critic of 432 did no better than one of 256 in 144 dimensions. Coordinates without a mixing
        variable of their own start with conditional sd 1.

        The default critic begins as the exact score of the first q and needs little of a warm-up; a critic of the
        user's, or a guide that was trained before, is what it is there for.
        """
        large = dim > 256
        return cls(
            mixing_dim=min(dim, _MAX_MIXING_DIM),
            guide_hidden_dims=(_clip(2 * dim, 64, 256),) * 2,
            critic_hidden_dims=(_clip(3 * dim, 128, 256),) * 2,
            guide_lr=6e-3 * (30.0 / dim) ** 0.5 if large else 6e-3,
            critic_lr=1.2e-2,
            input_lr_factor=min(1.0, 16.0 / dim),
            scale_depends_on_z=not large,
            gated=dim <= _MAX_GATED_DIM,
        )


def _clip(value: int, low: int, high: int) -> int:
    return max(low, min(high, value))
