"""Is the fit right? Statistics of draws, scores and densities, chains from draws, and the verdict that combines all."""

from pyro_sivism.diagnostics.chains import Chains
from pyro_sivism.diagnostics.drift import DriftStatistics, drift_statistics
from pyro_sivism.diagnostics.fisher import FisherStatistics, fisher_statistics
from pyro_sivism.diagnostics.modes import Mode, ModeSearch, find_modes
from pyro_sivism.diagnostics.moments import MomentErrors
from pyro_sivism.diagnostics.stein import SteinStatistics, WorstDirection, stein_statistics
from pyro_sivism.diagnostics.tails import TailIndices, tail_indices
from pyro_sivism.diagnostics.verdict import Finding, Thresholds, Verdict, is_alarming, judge

__all__ = [
    "Chains",
    "DriftStatistics",
    "Finding",
    "FisherStatistics",
    "Mode",
    "ModeSearch",
    "MomentErrors",
    "SteinStatistics",
    "TailIndices",
    "Thresholds",
    "Verdict",
    "WorstDirection",
    "drift_statistics",
    "find_modes",
    "fisher_statistics",
    "is_alarming",
    "judge",
    "stein_statistics",
    "tail_indices",
]
