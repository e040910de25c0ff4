"""What is recorded with each stage: versions of the packages, and peak memory."""

from __future__ import annotations

import platform
import re
import sys
from importlib.metadata import version
from pathlib import Path

_PACKAGES = ("gradsift", "torch", "transformers", "peft", "datasets", "numpy", "pyarrow")


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    return {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES}


def peak_memory() -> int:
    """Return the largest resident size of this process so far, in bytes; 0 on Windows."""
    if sys.platform == "win32":
        return 0
    status = Path("/proc/self/status")
    if status.exists():  # getrusage begins with the peak of the process that began this one
        found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text())
        if found:
            return int(found[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
