"""What training needs beside a loop: data, transformers' Trainer, kept states, checkpoints to resume from."""

from typing import TYPE_CHECKING, Any

from .columns import Collator, encode_columns
from .resume import load_training, save_training
from .state_cache import KeptStates

if TYPE_CHECKING:
    from .divide import shard
    from .trainer import Trainer

__all__ = ["Collator", "KeptStates", "Trainer", "encode_columns", "load_training", "save_training", "shard"]


def __getattr__(name: str) -> Any:
    if name == "Trainer":  # of transformers, an extra
        from .trainer import Trainer

        return Trainer
    if name == "shard":  # FSDP2 takes long to import
        from .divide import shard

        return shard
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
