"""Peak memory of a process, and measurements in new processes."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

UNIT = 1 if sys.platform == "darwin" else 1024  # unit of ru_maxrss in bytes
STATUS = Path("/proc/self/status")
PLAIN_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Makes glibc return freed memory at once, so that the resident set is the memory in use."""


def peak() -> int:
    """Return the peak resident set of this process since ``forget_peak``, in bytes."""
    largest = _status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT if largest is None else largest


def resident() -> int:
    """Return the resident set of this process in bytes; if unknown, its peak."""
    present = _status("VmRSS")
    return peak() if present is None else present


def forget_peak() -> None:
    """Reset the peak to the present resident set, if the system supports it."""
    forget = Path("/proc/self/clear_refs")
    if forget.exists():
        forget.write_text("5", encoding="ascii")


def child(script: str, options: Sequence[str], environment: Mapping[str, str] | None = None) -> Any:
    """Run a script in a new process; return the JSON in its last line of output."""
    command = [sys.executable, script, *options]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **(environment or {})}
    )
    return json.loads(done.stdout.splitlines()[-1])


def _status(key: str) -> int | None:
    """Return a value of /proc/self/status in bytes; None if not available."""
    if not STATUS.exists():
        return None
    lines = dict(line.split(":", 1) for line in STATUS.read_text(encoding="ascii").splitlines())
    return 1024 * int(lines[key].split()[0])
