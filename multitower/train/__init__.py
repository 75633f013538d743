"""Training: data set columns, a transformers Trainer, cached states, checkpoints to resume from, FSDP2."""

from typing import TYPE_CHECKING, Any

from .columns import Collator, encode_columns
from .resume import load_training, save_training
from .state_cache import KeptStates

if TYPE_CHECKING:
    from .divide import shard
    from .trainer import Trainer

__all__ = ["Collator", "KeptStates", "Trainer", "encode_columns", "load_training", "save_training", "shard"]


def __getattr__(name: str) -> Any:
    if name == "Trainer":  # imports transformers, an extra
        from .trainer import Trainer

        return Trainer
    if name == "shard":  # FSDP2 is slow to import
        from .divide import shard

        return shard
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
