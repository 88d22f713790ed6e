"""What every benchmark writes beside its figures."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import arviz
import pyro
import torch

import pyro_sivism


def versions() -> dict[str, str]:
    """Versions of what was measured, the commit, and the processor."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return {
        "pyro_sivism": pyro_sivism.__version__,
        "commit": commit.stdout.strip() or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pyro": pyro.__version__,
        "arviz": arviz.__version__,
        "processor": platform.processor() or platform.machine(),
        "threads": str(torch.get_num_threads()),
    }
