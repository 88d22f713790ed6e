"""What q is: the semi-implicit family, its critic and its coordinates. Pure torch."""

from pyro_sivism.family.affine import AffineMap, TargetDensity, WhitenedTarget
from pyro_sivism.family.conditionals import Conditional, DiagonalNormal, LowRankNormal
from pyro_sivism.family.gaussian_fit import GaussianFit
from pyro_sivism.family.networks import MLP, ScoreNetwork
from pyro_sivism.family.preconditioner import BatchAndMatch, FixedGaussian, Preconditioner
from pyro_sivism.family.semi_implicit import LogDensityEstimate, SemiImplicit, SemiImplicitSample

__all__ = [
    "MLP",
    "AffineMap",
    "BatchAndMatch",
    "Conditional",
    "DiagonalNormal",
    "FixedGaussian",
    "GaussianFit",
    "LogDensityEstimate",
    "LowRankNormal",
    "Preconditioner",
    "ScoreNetwork",
    "SemiImplicit",
    "SemiImplicitSample",
    "TargetDensity",
    "WhitenedTarget",
]
