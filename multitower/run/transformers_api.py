"""Methods and properties that users of transformers and peft expect of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn

from ..tower import Tower


class Familiar(nn.Module):
    """A module with ``towers``, and some of the interface of transformers' and peft's models.

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
        """Device of the first tower's input: of the whole model, unless it is spread over several devices."""
        return next(self._each_tower()).device

    @property
    def devices(self) -> dict[str, torch.device]:
        """Device of each tower's input, as ``multitower.batch.to_device`` takes it.

        >>> from multitower.testing import tiny_model
        >>> tiny_model().devices
        {'speech': device(type='cpu'), 'text': device(type='cpu')}
        """
        return {name: cast(Tower, tower).device for name, tower in self.towers.items()}

    @property
    def hf_device_map(self) -> dict[str, torch.device]:
        """Device of each tower if there are several; the Trainer and accelerate then do not move the model.

        Raises:
            AttributeError: All towers are on one device, so the model can be moved.
        """
        if len(set(self.devices.values())) == 1:
            raise AttributeError("all towers are on one device, which model.device gives")
        return self.devices

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first floating-point parameter."""
        return next(each.dtype for each in self.parameters() if each.is_floating_point())

    def num_parameters(self, only_trainable: bool = False) -> int:
        """Return the number of parameters, counting shared ones once."""
        chosen = (each for each in self.parameters() if each.requires_grad or not only_trainable)
        return sum(each.numel() for each in chosen)

    def print_trainable_parameters(self) -> None:
        """Print the number of trained parameters in peft's format; see ``estimate`` for each part."""
        trained, all_of_them = self.num_parameters(only_trainable=True), self.num_parameters()
        share = 100 * trained / all_of_them
        print(f"trainable params: {trained:,} || all params: {all_of_them:,} || trainable%: {share:.4f}")

    def tie_weights(self) -> None:
        """Tie the towers' weights again; accelerate calls this after loading a model with a device map."""
        natives: list[Any] = [each.native for each in self._each_tower()]
        for native in natives:
            if hasattr(native, "tie_weights"):
                native.tie_weights()

    @property
    def _no_split_modules(self) -> list[str]:
        """Class names of layers that accelerate keeps on one device."""
        classes = {type(module).__name__ for module in self.modules()}
        natives = [each.native for each in self._each_tower()]
        named = {name for each in natives for name in getattr(each, "_no_split_modules", None) or ()}
        return sorted(named & classes)

    @property
    def is_activation_checkpointing(self) -> bool:
        """Whether some tower uses activation checkpointing."""
        return any(getattr(each, "gradient_checkpointing", False) for each in self.towers.modules())

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        """Recompute the towers' layers in the backward pass instead of storing their activations.

        This uses the towers' own implementation, which has no effect in eval mode, and so on frozen towers.
        Links always store their activations.

        Args:
            activation_checkpointing_kwargs: For ``torch.utils.checkpoint.checkpoint``; ``use_reentrant`` is
                False by default.
            options: Other arguments of the models' own method.

        Raises:
            ValueError: No tower supports it.
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
        """Store the activations of the towers' layers again."""
        for native in self._able_to_checkpoint():
            if hasattr(native, "activation_checkpointing_disable"):
                native.activation_checkpointing_disable()
            else:
                native.gradient_checkpointing_disable()

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        """Call ``activation_checkpointing_enable``, its name since transformers 5.23."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    gradient_checkpointing_disable = activation_checkpointing_disable

    def _able_to_checkpoint(self) -> list[Any]:
        natives = [each.native for each in self._each_tower()]
        return [each for each in natives if getattr(each, "supports_gradient_checkpointing", False)]

    def _each_tower(self) -> Iterator[Tower]:
        for tower in dict.fromkeys(self.towers.values()):
            assert isinstance(tower, Tower)
            yield tower
