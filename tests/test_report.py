from __future__ import annotations

import torch

from report import _steadiness


def test_sharp_and_ordered_attention_is_preferred() -> None:
    ordered = torch.eye(6)
    assert (
        _steadiness(ordered) > _steadiness(0.5 * ordered + 0.5 / 6) > _steadiness(torch.full((6, 6), 1 / 6))
    )
    assert _steadiness(ordered.flip(0)) < 0


def test_faint_attention_is_no_error() -> None:
    assert 0 < _steadiness(0.01 * torch.eye(3)) < 0.011
    assert abs(_steadiness(torch.zeros(3, 4))) < 1e-5
