"""Which tensors of a fused model stand in which file."""

from __future__ import annotations

from torch import Tensor, nn

from ..fused import FusedModel
from ..tower import Tower, TransformersTower
from ..tower.lora import is_peft_model


def fusion_state(model: FusedModel) -> dict[str, Tensor]:
    """Give what belongs to no tower: links and input adapters."""
    return {key: value for key, value in model.state_dict().items() if not key.startswith("towers.")}


def whole(tower: Tower) -> nn.Module:
    """Give what a tower is made of: a PeftModel, a transformers model, or a ``Tower`` in plain PyTorch."""
    native = tower.native
    return native if is_peft_model(native) or isinstance(tower, TransformersTower) else tower
