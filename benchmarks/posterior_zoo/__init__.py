"""Posteriors to be judged on: ordinary Pyro models on small data, none of which the defaults were chosen on.

Data are synthetic, from a seed written in the model's file, or ship with scikit-learn, which is imported by those that
need it: that takes a second, and fits are timed from their process's start. Models are for one draw of
their latents, as a user would write them: no plate of particles is planned for.
"""

from posterior_zoo import exact, hierarchies, processes, regressions
from posterior_zoo.registry import POSTERIORS, Draws, Posterior

__all__ = ["POSTERIORS", "Draws", "Posterior", "exact", "hierarchies", "processes", "regressions"]
