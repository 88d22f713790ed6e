"""What every benchmark writes beside its figures."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

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
        "arviz": metadata.version("arviz"),  # to import it takes a second, of fits that are timed from their start
        "processor": platform.processor() or platform.machine(),
        "threads": str(torch.get_num_threads()),
    }


def write(args: argparse.Namespace, rows: list[dict[str, Any]], *, quiet: bool = False) -> None:
    """Write the settings, the versions and one row for each measurement to ``args.out`` as JSON, and say so."""
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"versions": versions(), "settings": settings, "rows": rows}, indent=2) + "\n")
    if not quiet:
        print(f"wrote {args.out}")
