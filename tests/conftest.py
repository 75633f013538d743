from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it; threads slow down tiny models

import pytest
import torch
from hypothesis import HealthCheck, settings

from fake_hub import downloaded, hub  # noqa: F401  # fixtures
from plugin import offer  # noqa: F401  # a fixture
from served import client, clip, pipe, server  # noqa: F401  # fixtures
from spoken_fusion import fused, parts  # noqa: F401  # fixtures
from victims import _offline, base  # noqa: F401  # fixtures

MODELS_TAKE_TIME = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("ci", max_examples=10, derandomize=True, **MODELS_TAKE_TIME)
settings.register_profile("deep", max_examples=500, print_blob=True, **MODELS_TAKE_TIME)
settings.load_profile("ci")


# These register a device with torch, so they run in a new process; see test_other_device.py.
collect_ignore_glob = ["helpers/other_device.py", "helpers/checks_o*.py"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
