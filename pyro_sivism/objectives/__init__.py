"""How q moves. Pure torch."""

from pyro_sivism.objectives.base import GuideLoss, Objective
from pyro_sivism.objectives.fisher import FisherDivergence
from pyro_sivism.objectives.path_gradient import PathGradientKL
from pyro_sivism.objectives.sliced_distance import SlicedDistance

__all__ = ["FisherDivergence", "GuideLoss", "Objective", "PathGradientKL", "SlicedDistance"]
