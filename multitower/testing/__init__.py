"""Tiny random towers and models, and checks for authors of towers, modalities and models.

Nothing is downloaded. ``multitower.testing.strategies``, which needs hypothesis, draws towers, graphs and
examples.
"""

from .modality.check_modality import check_modality, modality_report
from .modality.promises import MODALITY_PROMISES
from .model.batches import check_order, check_packing, check_padding, check_rows
from .model.check_model import MODEL_PROMISES, check_model, model_report
from .model.decoding import check_decoding, check_prefill
from .model.definition import check_definition
from .model.forward import check_causality, check_identity, check_sight, check_unimodal
from .model.on_disk import check_saved
from .model.schedule import check_schedule
from .model.session import check_session
from .model.training import check_frozen, check_gradients, check_losses
from .tiny import TinyTower, open_links, tiny_model, tiny_tower
from .tower.check_tower import check_tower, tower_report
from .tower.promises import TOWER_PROMISES

__all__ = [
    "MODALITY_PROMISES",
    "MODEL_PROMISES",
    "TOWER_PROMISES",
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
    "check_session",
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
