"""Files that are whole or not there: a fit killed at any moment leaves the last checkpoint intact."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch

from pyro_sivism.errors import ArgumentError

if TYPE_CHECKING:
    from pyro_sivism.results import StepInfo
    from pyro_sivism.sivism import SIVISM

__all__ = ["Checkpoint", "write_atomically"]


class Checkpoint:
    """A callback of :meth:`SIVISM.run` that saves the fit now and then.

    Args:
        path: the file, written anew each time, as by :meth:`SIVISM.save`; go on from it by :meth:`SIVISM.load`.
        every: guide steps between two saves.

    Raises:
        ArgumentError: ``every`` is less than 1.

    Example:

        >>> import os, tempfile
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_sivism import SIVISM
        >>> def model():
        ...     pyro.sample("x", dist.Normal(0.0, 1.0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "fit.pt")
        ...     _ = SIVISM(model).run(5, progress_bar=False, callbacks=[Checkpoint(path, every=2)])
        ...     SIVISM.load(path, model).num_steps_taken
        4
    """

    def __init__(self, path: str | os.PathLike[str], every: int = 100) -> None:
        if every < 1:
            raise ArgumentError(f"expected a checkpoint every 1 step or more, got every={every}")
        self.path, self.every = path, every

    def __call__(self, sivism: SIVISM, info: StepInfo) -> None:
        if info.step % self.every == 0:
            sivism.save(self.path)


def write_atomically(state: Any, path: str | os.PathLike[str]) -> None:
    """``torch.save`` to a file beside ``path`` that then takes its place, which readers see at once or not at all."""
    temporary = f"{os.fspath(path)}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise
