"""Warnings that point at the user's line, not at ours."""

from __future__ import annotations

import os
import sys
import warnings

from pyro_sivism.errors import SivismWarning

__all__ = ["warn"]


def warn(message: str, category: type[SivismWarning]) -> None:
    """Warn at the first frame outside this package."""
    package = os.path.dirname(os.path.abspath(__file__))
    level, frame = 1, sys._getframe().f_back
    while frame is not None and os.path.abspath(frame.f_code.co_filename).startswith(package + os.sep):
        frame = frame.f_back
        level += 1
    warnings.warn(message, category, stacklevel=level + 1)
