"""The target: the log density and score of a Pyro model on the unconstrained space."""

from pyro_sivism.target.density import Target, TargetPath

__all__ = ["Target", "TargetPath"]
