"""What users of transformers and peft expect of a model, by the names that they know."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn

from ..tower import Tower


class Familiar(nn.Module):
    """A module with ``towers``, and properties and methods as transformers' and peft's models have.

    >>> from multitower.testing import tiny_model
    >>> model = tiny_model()
    >>> model.device, model.dtype, model.num_parameters(), model.num_parameters(only_trainable=True)
    (device(type='cpu'), torch.float32, 7080, 5880)
    >>> model.print_trainable_parameters()
    trainable params: 5,880 || all params: 7,080 || trainable%: 83.0508
    """

    towers: nn.ModuleDict

    @property
    def device(self) -> torch.device:
        """Where the first tower takes its tokens; where all is, unless it was spread over several devices."""
        return next(self._each_tower()).device

    @property
    def devices(self) -> dict[str, torch.device]:
        """Where each tower takes its tokens: what ``multitower.batch.to_device`` takes for a batch of them.

        >>> from multitower.testing import tiny_model
        >>> tiny_model().devices
        {'speech': device(type='cpu'), 'text': device(type='cpu')}
        """
        return {name: cast(Tower, tower).device for name, tower in self.towers.items()}

    @property
    def hf_device_map(self) -> dict[str, torch.device]:
        """Where each tower is, if on several devices: by this the Trainer and accelerate leave them there.

        Raises:
            AttributeError: All of them are on one, and may be moved.
        """
        if len(set(self.devices.values())) == 1:
            raise AttributeError("all towers are on one device, which model.device gives")
        return self.devices

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first parameter that holds floating-point numbers."""
        return next(each.dtype for each in self.parameters() if each.is_floating_point())

    def num_parameters(self, only_trainable: bool = False) -> int:
        """Return how many parameters there are; those that towers share count once."""
        chosen = (each for each in self.parameters() if each.requires_grad or not only_trainable)
        return sum(each.numel() for each in chosen)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are trained, in peft's words; ``estimate`` says it part by part."""
        trained, all_of_them = self.num_parameters(only_trainable=True), self.num_parameters()
        share = 100 * trained / all_of_them
        print(f"trainable params: {trained:,} || all params: {all_of_them:,} || trainable%: {share:.4f}")

    def tie_weights(self) -> None:
        """Tie again what towers tie, as accelerate does after it has loaded a divided model."""
        natives: list[Any] = [each.native for each in self._each_tower()]
        for native in natives:
            if hasattr(native, "tie_weights"):
                native.tie_weights()

    @property
    def _no_split_modules(self) -> list[str]:
        """Name the classes of layers of which accelerate makes units."""
        classes = {type(module).__name__ for module in self.modules()}
        natives = [each.native for each in self._each_tower()]
        named = {name for each in natives for name in getattr(each, "_no_split_modules", None) or ()}
        return sorted(named & classes)

    @property
    def is_activation_checkpointing(self) -> bool:
        """Whether some tower computes layers anew in the backward pass."""
        return any(getattr(each, "gradient_checkpointing", False) for each in self.towers.modules())

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        """Have towers compute their layers anew in the backward pass, instead of keeping what these save.

        That is done by the towers' own models, as they do alone. Frozen towers are in eval mode, in which
        they do not, and links keep what they save.

        Args:
            activation_checkpointing_kwargs: For ``torch.utils.checkpoint.checkpoint``; ``use_reentrant`` is
                False unless it is given.
            options: What else the models' own method takes.

        Raises:
            ValueError: No tower can.
        """
        able = self._able_to_checkpoint()
        if not able:
            raise ValueError("no tower supports gradient checkpointing; models of transformers do")
        settings = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        for native in able:
            if hasattr(native, "activation_checkpointing_enable"):
                native.activation_checkpointing_enable(activation_checkpointing_kwargs=settings, **options)
            else:  # before transformers 5.23
                native.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings, **options)

    def activation_checkpointing_disable(self) -> None:
        """Have towers keep again what their layers save for the backward pass."""
        for native in self._able_to_checkpoint():
            if hasattr(native, "activation_checkpointing_disable"):
                native.activation_checkpointing_disable()
            else:
                native.gradient_checkpointing_disable()

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        """Do as ``activation_checkpointing_enable``, which is its name since transformers 5.23."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    gradient_checkpointing_disable = activation_checkpointing_disable

    def _able_to_checkpoint(self) -> list[Any]:
        natives = [each.native for each in self._each_tower()]
        return [each for each in natives if getattr(each, "supports_gradient_checkpointing", False)]

    def _each_tower(self) -> Iterator[Tower]:
        for tower in dict.fromkeys(self.towers.values()):
            assert isinstance(tower, Tower)
            yield tower
