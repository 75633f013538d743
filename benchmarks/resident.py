"""How much memory a process has had at most, and measurements in processes of their own."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
STATUS = Path("/proc/self/status")
PLAIN_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Has glibc give back at once what is freed, so that the resident set is what is in use."""


def peak() -> int:
    """Return the largest resident set that this process has had since ``forget_peak``, in bytes."""
    largest = _status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT if largest is None else largest


def resident() -> int:
    """Return the resident set of this process, in bytes; where that is not told, the largest that it had."""
    present = _status("VmRSS")
    return peak() if present is None else present


def forget_peak() -> None:
    """Have the peak begin anew from what is resident now, where the system offers that."""
    forget = Path("/proc/self/clear_refs")
    if forget.exists():
        forget.write_text("5", encoding="ascii")


def child(script: str, options: Sequence[str], environment: Mapping[str, str] | None = None) -> Any:
    """Run a script in a new process; return what its last line of output says in JSON."""
    command = [sys.executable, script, *options]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **(environment or {})}
    )
    return json.loads(done.stdout.splitlines()[-1])


def _status(key: str) -> int | None:
    """Return what Linux says of this process, in bytes."""
    if not STATUS.exists():
        return None
    lines = dict(line.split(":", 1) for line in STATUS.read_text(encoding="ascii").splitlines())
    return 1024 * int(lines[key].split()[0])
