"""Memory that is freed and taken again."""

import os
import platform
import subprocess
import sys

import pytest

TAKE_AND_FREE = """
import resource, torch
from pyro_sivism.devices import keep_freed_memory

{before}

def take():
    some = [torch.ones(2**18) for _ in range(8)]

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

take()
before = faults()
for _ in range(10):
    take()
print((faults() - before) / 10)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other libraries free as they like")
def test_freed_memory_is_kept():
    """Pages that were returned to the system are faults when they are written to again, 2,048 here if of 4 KiB."""

    def faults(before):
        code = TAKE_AND_FREE.format(before=before)
        own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "LD_PRELOAD"))}
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=own)
        return float(run.stdout)

    assert faults("keep_freed_memory()") < 0.2 * faults("")
