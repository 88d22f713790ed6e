"""One measurement in one fresh process, so that its peak memory is its own."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["peak_mib", "run_fresh"]

_STATUS = Path("/proc/self/status")


def peak_mib() -> float:
    """The most memory this process has held so far, in MiB.

    Linux hands ``ru_maxrss`` of the parent down to the child that it starts; ``VmHWM`` is the process's own.
    """
    if _STATUS.exists():
        (line,) = [line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) / 1024
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def run_fresh(script: str, point: Mapping[str, Any], *, ranks: int = 1, threads: int = 1) -> dict[str, Any]:
    """Run ``script --point JSON`` in a new process, or in so many ranks, and read the row it prints last.

    A process that fails gives the row ``{"error": its last line}``: failures stay in the table.
    """
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, *launcher, script, "--point", json.dumps(point)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        return {**point, "error": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
    return {**point, **json.loads(done.stdout.strip().splitlines()[-1])}
