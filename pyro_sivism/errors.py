"""Exceptions and warnings. Each says what it got, what it expected and what to do about it.

All exceptions derive from :class:`SivismError`, and also from the built-in a caller would expect
(``ValueError`` for a bad argument or model, ``RuntimeError`` for a call out of order), so that
both ``except SivismError`` and ``except ValueError`` read naturally.
"""

from __future__ import annotations


class SivismError(Exception):
    """Base class of every exception this package raises on purpose."""


class ModelError(SivismError, ValueError):
    """The model cannot be fitted as it is; the message names the site and the cure."""


class UnsupportedSiteError(ModelError):
    """A latent site whose support has no map to an unconstrained space."""


class EmptyModelError(ModelError):
    """The model has no continuous latent site, so there is nothing to infer."""


class NonDeterministicModelError(ModelError):
    """The log density changes between two evaluations at the same point."""


class LayoutChangedError(ModelError):
    """New arguments changed the model's latent sites after the guide was set up."""


class NonFiniteError(SivismError, ArithmeticError):
    """A log density, score or gradient is NaN or infinite where it must not be."""


class NotSetUpError(SivismError, RuntimeError):
    """A guide or an inference object was used before its set-up call."""


class OptimizerError(SivismError, ValueError):
    """An optimizer argument that this package cannot drive."""


class CompileError(SivismError, RuntimeError):
    """A step could not be compiled, or gave other gradients compiled; the message says why."""


class ArgumentError(SivismError, ValueError):
    """An argument of the wrong kind, size or range."""


class MissingDependencyError(SivismError, ImportError):
    """An optional package that this call needs is not installed; the message says how to get it."""


class DistributedError(SivismError, RuntimeError):
    """Another process of a fit on many is gone or silent, so that the fit cannot go on."""


class SivismWarning(UserWarning):
    """Base class of every warning this package gives."""


class TargetPathWarning(SivismWarning):
    """The model's score is computed by a slower path than the fastest one."""


class CompileWarning(SivismWarning):
    """The steps could not be compiled and go on as they are."""


class FitWarning(SivismWarning):
    """A run ended with a fit that is not to be trusted, or not finished."""


class NonFiniteWarning(SivismWarning):
    """Some particles had a non-finite log density or score and were left out."""
