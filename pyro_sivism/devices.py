"""Where values are: the host reads those of the CPU at no cost, and waits for those of an accelerator.

A step that asks an accelerator for a value waits until everything that was queued before has run, and leaves it idle
until the host has queued more. Steps there are therefore written without such questions: what the CPU decides by an
``if`` is decided on the device, by a mask, and reports and errors come some steps later.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["is_at_hand", "keep_freed_memory"]

_BLOCK_SIZE = 30 * 2**20  # bytes; of larger ones glibc learns nothing


def is_at_hand(tensor: Tensor) -> bool:
    """Whether the host can read the values of ``tensor`` without waiting for a device."""
    return tensor.device.type == "cpu"


def keep_freed_memory() -> None:
    """Let the C library keep up to 60 MiB of memory that is freed, rather than return it to the system at once.

    A score of thousands of observations frees some megabytes at its end, and takes them again, page by page, in the
    next one: a fifth of the time of a step, measured on a virtual machine. glibc keeps twice the largest block of its
    own that it has seen freed, up to 32 MiB of it, so that it is enough to show it one (mallopt(3), on
    ``M_MMAP_THRESHOLD``). Without effect on other C libraries.
    """
    torch.empty(_BLOCK_SIZE, dtype=torch.uint8, device="cpu")
