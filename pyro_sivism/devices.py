"""Where values are: the host reads those of the CPU at no cost, and waits for those of an accelerator.

A step that asks an accelerator for a value waits until everything that was queued before has run, and leaves it idle
until the host has queued more. Steps there are therefore written without such questions: what the CPU decides by an
``if`` is decided on the device, by a mask, and reports and errors come some steps later.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["is_at_hand"]


def is_at_hand(tensor: Tensor) -> bool:
    """Whether the host can read the values of ``tensor`` without waiting for a device."""
    return tensor.device.type == "cpu"
