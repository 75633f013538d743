"""What training needs beside a loop: kept states, and checkpoints to resume from."""

from .resume import load_training, save_training
from .state_cache import KeptStates

__all__ = ["KeptStates", "load_training", "save_training"]
