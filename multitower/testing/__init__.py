"""Tiny random towers and models, and checks for authors of towers, modalities and models.

None of it needs a download. ``multitower.testing.strategies`` draws towers, graphs and examples
for hypothesis, which it needs.
"""

from .batches import check_order, check_packing, check_padding, check_rows
from .checkpoints import check_saved
from .decoding import check_decoding, check_prefill
from .definition import check_definition
from .forward import check_causality, check_identity, check_sight, check_unimodal
from .modalities import MODALITY_PROMISES, check_modality, modality_report
from .models import PROMISES, check_model, model_report
from .schedules import check_schedule
from .tiny import TinyTower, open_links, tiny_model, tiny_tower
from .towers import check_tower, tower_report
from .training import check_frozen, check_gradients, check_losses

__all__ = [
    "MODALITY_PROMISES",
    "PROMISES",
    "TinyTower",
    "check_causality",
    "check_decoding",
    "check_definition",
    "check_frozen",
    "check_gradients",
    "check_identity",
    "check_losses",
    "check_modality",
    "check_model",
    "check_order",
    "check_packing",
    "check_padding",
    "check_prefill",
    "check_rows",
    "check_saved",
    "check_schedule",
    "check_sight",
    "check_tower",
    "check_unimodal",
    "modality_report",
    "model_report",
    "open_links",
    "tiny_model",
    "tiny_tower",
    "tower_report",
]
