"""Semi-implicit variational inference via score matching, for Pyro models.

sivism = SIVISM(model)
sivism.run(None, data)
idata = sivism.to_inference_data(data)
"""

from pyro_sivism.checkpoint import Checkpoint
from pyro_sivism.compare import Comparison, compare_with_nuts
from pyro_sivism.diagnostics import Verdict
from pyro_sivism.distributed import Ranks
from pyro_sivism.errors import SivismError, SivismWarning
from pyro_sivism.family import BatchAndMatch, DiagonalNormal, FixedGaussian, LowRankNormal, ScoreNetwork
from pyro_sivism.guide import SemiImplicitGuide
from pyro_sivism.layout import LatentLayout
from pyro_sivism.nuts import nuts_from
from pyro_sivism.objectives import FisherDivergence, Objective, PathGradientKL
from pyro_sivism.reparametrization import decenter
from pyro_sivism.results import FitResult, StepInfo
from pyro_sivism.sivism import SIVISM
from pyro_sivism.target import Target
from pyro_sivism.version import __version__

__all__ = [
    "SIVISM",
    "BatchAndMatch",
    "Checkpoint",
    "Comparison",
    "DiagonalNormal",
    "FisherDivergence",
    "FitResult",
    "FixedGaussian",
    "LatentLayout",
    "LowRankNormal",
    "Objective",
    "PathGradientKL",
    "Ranks",
    "ScoreNetwork",
    "SemiImplicitGuide",
    "SivismError",
    "SivismWarning",
    "StepInfo",
    "Target",
    "Verdict",
    "__version__",
    "compare_with_nuts",
    "decenter",
    "nuts_from",
]
