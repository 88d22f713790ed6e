"""What importing the package brings with it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_import_loads_nothing_that_only_some_fits_need():
    """In a fresh interpreter; ArviZ and what it loads took half the time of the import."""
    code = "import sys, pyro_sivism; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    root = Path(__file__).parents[2]
    loaded = subprocess.check_output([sys.executable, "-c", code], cwd=root, text=True).split()
    assert "pyro_sivism" in loaded
    assert not {"arviz", "matplotlib", "pandas", "scipy", "xarray"} & set(loaded)
