"""Tests of the modality octets."""

import pytest
import torch

from multitower.testing import check_modality
from multitower_octets import OctetsModality


def test_promises():
    check_modality(OctetsModality(), [b"", b"hello", bytes(range(256))])


def test_tokens():
    assert OctetsModality().encode(b"hi").tolist() == [256, 104, 105, 257]


def test_what_means_nothing_is_dropped():
    assert OctetsModality().decode(torch.tensor([104, 256, 105, 9_999])) == b"hi"


def test_other_data_are_refused():
    with pytest.raises(TypeError, match="from bytes, not from str"):
        OctetsModality().encode("hi")
