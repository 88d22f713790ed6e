"""What every benchmark writes beside its figures."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
from collections.abc import Iterable, Sequence
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
    report = {"versions": versions(), "settings": vars(args), "rows": rows}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2, default=str) + "\n")  # paths as strings
    if not quiet:
        print(f"wrote {args.out}")


def read(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """The rows of these runs, which :func:`write` wrote."""
    return [row for path in paths for row in json.loads(Path(path).read_text())["rows"]]


def print_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    """A Markdown table whose columns stand in line on a terminal, too: the first to the left, the others right."""
    lines = [header, *lines]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    for first, *others in lines:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:]))]
        print(f"| {' | '.join(cells)} |")
