"""Fused models run on a device other than the CPU, without mixing devices and with few waits."""

from __future__ import annotations

import subprocess
import sys

import pytest
from torch.utils import backend_registration

from paths import ROOT

HELPERS = ROOT / "tests" / "helpers"

# The device stays registered, and torch cannot clean it up when the interpreter exits.
RUN = "import os, pytest, sys; os._exit(pytest.main(sys.argv[1:]))"


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch cannot simulate a device",
)
@pytest.mark.parametrize(
    ("file", "which"),
    [
        ("checks_of_placed_training.py", "not slow"),
        *(
            pytest.param(file, which, marks=pytest.mark.slow)
            for file, which in (
                ("checks_of_placed_training.py", "slow"),
                ("checks_on_other_device.py", "not slow"),
                ("checks_on_other_device.py", "slow"),
            )
        ),
    ],
)
def test_checks_on_another_device(file: str, which: str) -> None:
    command = [sys.executable, "-c", RUN, "-q", "-p", "no:cacheprovider", "-m", which, str(HELPERS / file)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
