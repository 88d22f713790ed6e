"""The same fit on many processes, by ``torch.distributed``.

An ordinary script, with the whole data on every rank,

.. code-block:: python

    sivism = SIVISM(model)
    sivism.run(None, data, callbacks=[Checkpoint("fit.pt", every=100)])
    sivism.save("fit.pt")

is started on K processes by ``torchrun --nproc-per-node=K script.py``, or on many machines as ``torchrun`` describes.
A process group that the script has initialized itself is used as well, whatever its backend. On CUDA give each process
its own device first, ``torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))``, and move the data there.

What is shared, and how:

- **Particles.** Of the B particles of a batch rank r draws ``B // K``, the first ``B % K`` ranks one more. With n_r of
  them in its loss, of gradient g_r, every rank steps along

      g = sum_r n_r g_r / sum_r n_r,

  which is the gradient of one process with all the particles. Parameters are therefore the same everywhere, and so is
  each step's report.
- **Chains.** Where a run follows chains, each rank has 512 of its own, and compares with them its own n_r draws.
- **Minibatches.** Each rank draws its own rows for a subsampling plate, at the plate's own ``subsample_size``: every
  rank's density is unbiased, hence so is g, and its noise is that of K minibatches. A script that draws minibatches
  itself, with torch and after set-up, gets other ones on each rank, to the same effect.
- **Random numbers.** Set-up (the prototype, the preconditioner, the networks' first weights) runs on every rank with
  rank 0's random numbers, and what it made is broadcast from rank 0. After it, and from the start of a ``run``, each
  rank draws its own. All follow from rank 0's: ``pyro.set_rng_seed`` makes a fit on K processes reproducible.
- **Reports and files.** Rank 0 shows the progress bar, warns and writes files.

A step with two critic updates makes six exchanges, three of them as large as a network: it pays where the scores of a
batch cost more than that.

``setup``, ``step`` and ``run`` are called by all ranks; all else (``sample``, ``evaluate_loss``, ``save``,
``to_inference_data``) works on one rank alone. To fit another model on each rank, or to go on from a file on one rank
only, pass ``ranks=Ranks.alone()``.

A rank that dies closes its connections, so that the others raise :class:`DistributedError` within the step; one that
is silent for :attr:`Ranks.timeout` seconds in a step is given up. ``SIVISM.load`` goes on from the last checkpoint.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pyro_sivism.errors import ArgumentError, DistributedError

__all__ = ["Ranks"]

_PROBE_TAG = 20_230  # of messages that are sent to see who is there; nobody receives them


T = TypeVar("T")


class Ranks:
    """The processes that share a fit, seen from one of them. With a single one every method is a no-op.

    Args:
        rank: which of them this is, from 0.
        size: how many they are, K.
        host_group, device_group: the ``torch.distributed`` groups for tensors on the host and on CUDA devices.

    Attributes:
        timeout: seconds to wait for the other ranks within a step, 30 by default. A rank that is busy with something
            else, such as a long callback, may need more: ``Ranks.find().timeout = 300``.
        last_checkpoint: the file that was last written, from which to go on if a rank dies; "" if none was.

    Example:

        >>> ranks = Ranks.alone()
        >>> ranks.is_first, ranks.share(128)
        (True, 128)
        >>> ranks.pool([torch.tensor(2.0), None], weight=128)
        [tensor(2.), None]
    """

    def __init__(self, rank: int = 0, size: int = 1, host_group: Any = None, device_group: Any = None) -> None:
        self.rank, self.size = rank, size
        self.timeout, self.last_checkpoint = 30.0, ""
        self._host_group, self._device_group = host_group, device_group
        self._failure: str | None = None

    @classmethod
    def alone(cls) -> Ranks:
        """This process on its own, whatever others there are."""
        return cls()

    @classmethod
    def find(cls) -> Ranks:
        """The ranks of the initialized process group, else of ``torchrun``'s environment, else this process alone.

        The first call in a process group must be made by all its ranks; later ones return the same object.
        """
        if not dist.is_available():
            return cls.alone()
        if not dist.is_initialized():
            if not _launched_with_others():
                return cls.alone()
            dist.init_process_group("gloo")
            atexit.register(_leave)
        if dist.get_world_size() == 1:
            return cls.alone()
        global _found
        if _found is None or _found[0] is not dist.group.WORLD:
            has_nccl = torch.cuda.is_available() and dist.is_nccl_available()
            ranks = cls(
                dist.get_rank(),
                dist.get_world_size(),
                dist.new_group(backend="gloo"),
                dist.new_group(backend="nccl") if has_nccl else None,
            )
            _found = dist.group.WORLD, ranks
        return _found[1]

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which reports and writes files."""
        return self.rank == 0

    # --- particles ----------------------------------------------------------------------------------

    def share(self, total: int) -> int:
        """How many of ``total`` particles are this rank's.

        Raises:
            ArgumentError: some rank would have none.
        """
        if total < self.size:
            raise ArgumentError(f"expected num_particles of at least the number of processes, {self.size}; got {total}")
        return total // self.size + (self.rank < total % self.size)

    def gather(self, rows: Tensor, total: int) -> Tensor:
        """The rows of all ranks, ``(total, ...)`` in the order of ranks, from this one's, ``(share(total), ...)``."""
        if self.size == 1:
            return rows
        start = self.rank * (total // self.size) + min(self.rank, total % self.size)
        gathered = rows.new_zeros((total, *rows.shape[1:]))
        gathered[start : start + len(rows)] = rows
        self._add_up(gathered)
        return gathered

    def pool(self, tensors: Sequence[Tensor | None], weight: Tensor | float) -> list[Any]:
        """One list of tensors from every rank's: floating-point ones averaged, integer ones (counts) added up.

        Args:
            tensors: of the same shapes and on one device on all ranks; None where None on all.
            weight: this rank's weight in the averages, the number of its particles that they are means of.
        """
        if self.size == 1:
            return list(tensors)
        present = [tensor.detach() for tensor in tensors if tensor is not None]
        weight = torch.as_tensor(weight, dtype=present[0].dtype, device=present[0].device)
        parts = [t * weight if t.is_floating_point() else t for t in present]
        buffer = torch.cat([part.flatten() for part in (*parts, weight)])
        self._add_up(buffer)
        sums = iter(buffer[:-1].split([t.numel() for t in present]))
        pooled: list[Tensor | None] = []
        for tensor in tensors:
            if tensor is None:
                pooled.append(None)
            else:
                value = next(sums) / buffer[-1] if tensor.is_floating_point() else next(sums)
                pooled.append(value.reshape(tensor.shape).to(tensor.dtype))
        return pooled

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is true on any rank."""
        if self.size == 1:
            return flag
        count = torch.tensor(float(flag))
        self._add_up(count)
        return bool(count)

    # --- set-up -------------------------------------------------------------------------------------

    def broadcast_(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors, in place, with rank 0's. Waits for ranks that are still on their way here."""
        if self.size == 1:
            return
        for tensor in tensors:
            buffer = tensor.detach().contiguous()
            self._communicate(dist.broadcast, buffer, src=0)
            tensor.data.copy_(buffer)

    @contextmanager
    def same_random_numbers(self) -> Iterator[None]:
        """Within, all ranks draw rank 0's random numbers; from then on each draws its own."""
        if self.size == 1:
            yield
            return
        seed = torch.randint(2**62, ())
        self.broadcast_([seed])
        torch.manual_seed(int(seed))
        try:
            yield
        finally:
            torch.manual_seed(int(seed) + 1 + self.rank)

    def draw_apart(self) -> None:
        """From now on each rank draws random numbers of its own, which follow from rank 0's."""
        with self.same_random_numbers():
            pass

    # --- communication ------------------------------------------------------------------------------

    def together(self, work: Callable[..., T], *args: Any) -> T:
        """Do this rank's part of what the ranks do in step; say where to go on from if another one fails."""
        try:
            return work(*args)
        except DistributedError as error:
            last = self.last_checkpoint
            saved = f"The last checkpoint is {last!r}." if last else "There is no checkpoint."
            raise DistributedError(f"{error} {saved}") from error.__cause__
        except BaseException as error:
            self._abandon(error)
            raise

    def _abandon(self, error: BaseException) -> None:
        """Refuse to communicate from now on: this rank left a step half done, so its messages would be misread."""
        if self.size > 1 and self._failure is None:
            self._failure = f"rank {self.rank} has left an earlier step by {type(error).__name__}"

    def _add_up(self, tensor: Tensor) -> None:
        """Sum a tensor over the ranks, in place."""
        if tensor.is_cuda and self._device_group is not None:
            # NCCL would wait for a dead rank on the device, where no error can be raised.
            self._communicate(dist.all_reduce, torch.zeros(1), timeout=self.timeout)
        self._communicate(dist.all_reduce, tensor, timeout=self.timeout)

    def _communicate(self, collective: Callable, tensor: Tensor, timeout: float | None = None, **options: Any) -> None:
        """Run a collective; without a timeout it waits as long as the process group does.

        Raises:
            DistributedError: a rank is gone, or did not answer in time.
        """
        if self._failure is not None:
            raise DistributedError(f"{self._failure}; this process group can fit no more. Start the script again.")
        on_device = tensor.is_cuda and self._device_group is not None
        group = self._device_group if on_device else self._host_group
        try:
            work = collective(tensor, group=group, async_op=True, **options)
            if timeout is None or on_device:
                work.wait()
            else:
                work.wait(timedelta(seconds=timeout))
        except RuntimeError as error:
            lost = self._lost_ranks()
            if lost:
                what, hint = f"lost rank(s) {', '.join(map(str, lost))}", "See that process's output for the cause."
            else:
                what = f"got no answer from another rank ({(str(error).splitlines() or [''])[0]})"
                hint = f"If it was only busy for {self.timeout:g} s, set Ranks.find().timeout higher on all ranks."
            self._failure = f"rank {self.rank} of {self.size} {what}"
            raise DistributedError(f"{self._failure}; the fit cannot go on. {hint}") from error

    def _lost_ranks(self) -> list[int]:
        """The ranks whose connection to this one is closed."""
        lost = []
        for other in range(self.size):
            if other != self.rank:
                try:
                    dist.isend(torch.zeros(1), other, self._host_group, _PROBE_TAG)
                except RuntimeError:
                    lost.append(other)
        return lost


_found: tuple[Any, Ranks] | None = None  # the process group, and its ranks


def _launched_with_others() -> bool:
    """Whether the environment is that of one process among several, as ``torchrun`` starts them."""
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return all(name in os.environ for name in needed) and int(os.environ["WORLD_SIZE"]) > 1


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
