"""A tower made of any transformers causal LM, without a table of architectures.

The model's own forward prepares masks, rotary tables and scales. To have it do so without running its
layers, a *shell* is made: a shallow copy of the modules on the path to the list of layers, sharing every
parameter, whose list holds stand-ins.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .base import Inject, Tower, TowerError
from .lora import base_model


class TransformersTower(Tower):
    """A causal LM from transformers, run layer by layer.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
    ...                      num_attention_heads=2, bos_token_id=1, eos_token_id=2)
    >>> model = LlamaForCausalLM(config).eval()
    >>> tower = TransformersTower(model)
    >>> tower.depth, tower.width, tower.vocab_size
    (2, 16, 50)
    >>> tokens = torch.tensor([[1, 7, 9]])
    >>> torch.equal(tower(tokens), model(tokens, use_cache=False).logits)
    True

    Args:
        model: The model. It is used as it is, not copied, and works on alone as before. Change its
            modules (resized embeddings, quantisation) before it becomes a tower. Of a ``peft.PeftModel``
            the model inside runs, adapters and all, and ``native`` is the PeftModel.
        layers: Path of the ``ModuleList`` of layers, as in "model.layers", for a model where it cannot
            be found from the model's ``_no_split_modules``.

    Raises:
        TowerError: No list of layers is found, the layers do not run once each in their order, or
            the layer-by-layer logits differ from the model's own.
    """

    def __init__(self, model: nn.Module, *, layers: str | None = None) -> None:
        super().__init__()
        self._native = _Unregistered(model)
        self.model = model = base_model(model)
        self.path, returns_tuple = _find_layers(model, layers)
        stack = self._stack
        self.depth = len(stack)
        self._tape: list[Call] = []
        self._final: list[Tensor] = []
        last = self.depth - 1
        prologue = [_stand_in(layer, _Record(self._tape, i == last)) for i, layer in enumerate(stack)]
        epilogue = [
            _stand_in(layer, _Hand(self._final if i == last else None, returns_tuple))
            for i, layer in enumerate(stack)
        ]
        # Not registered as submodules: their parameters are the model's and must not be counted twice.
        self._prologue, self._epilogue = (
            _Unregistered(_shell(model, self.path, layers)) for layers in (prologue, epilogue)
        )
        self.width, self.vocab_size = self._check()

    @property
    def _stack(self) -> nn.ModuleList:
        stack = self.model.get_submodule(self.path)
        assert isinstance(stack, nn.ModuleList)
        return stack

    @property
    def begin(self) -> int | None:  # type: ignore[override]  # read from the model, which may change it
        """The model's ``bos_token_id``."""
        return next(iter(_token_ids(self.model, "bos_token_id")), None)

    @property
    def end(self) -> tuple[int, ...]:  # type: ignore[override]  # read from the model, which may change it
        """The model's ``eos_token_id``, one or several."""
        return _token_ids(self.model, "eos_token_id")

    @property
    def native(self) -> nn.Module:
        """The transformers model itself, or the PeftModel around it."""
        native: nn.Module = self._native.module
        return native

    def embed(self, tokens: Tensor) -> tuple[Tensor, Context]:
        """Run what the model does before layer 1; see ``Tower.embed``."""
        self._tape.clear()
        with suppress(_LayersReached):
            self._prologue.module(input_ids=tokens, use_cache=False)
        calls = tuple(self._tape)
        self._tape.clear()
        if len(calls) != self.depth:
            raise TowerError(
                f"{type(self.model).__name__}: its forward reached {len(calls)} of {self.depth} stand-ins "
                "for its layers; was the forward of the model replaced after it was made?"
            )
        return calls[0].hidden, Context(tokens, calls)

    def layer(self, index: int, hidden: Tensor, context: Context) -> Tensor:
        """Run layer ``index``, counted from 1, with the arguments that the model would give it."""
        call = context.calls[index - 1]
        return _hidden(self._stack[index - 1](hidden, *call.args, **call.kwargs))

    def head(self, hidden: Tensor, context: Context) -> Tensor:
        """Run what the model does after its last layer: norm, head, scaling, caps."""
        self._final.append(hidden)
        try:
            logits: Tensor = self._epilogue.module(input_ids=context.tokens, use_cache=False).logits
        finally:
            self._final.clear()
        return logits

    def decoder(self, inject: Inject) -> Any:
        """Give a copy of the model, parameters shared, whose layers are followed by ``inject``."""
        place = _Place()
        shell = _shell(
            self.model,
            self.path,
            [_stand_in(layer, _Injected(layer, i, inject, place)) for i, layer in enumerate(self._stack, 1)],
        )
        native = shell.forward

        @functools.wraps(native)
        def forward(*args: Any, **kwargs: Any) -> Any:
            cache = kwargs.get("past_key_values")
            place.start = 0 if cache is None else int(cache.get_seq_length())
            return native(*args, **kwargs)

        shell.forward = forward
        return shell

    @torch.no_grad()
    def _check(self) -> tuple[int, int]:
        """Compare a short forward with the model's own; give the width and the vocabulary size."""
        device = next(self.model.parameters()).device
        if device.type == "meta":
            config = self.model.config.get_text_config()  # type: ignore[operator, union-attr]
            return config.hidden_size, config.vocab_size
        tokens = torch.arange(1, 5, device=device)[None]
        with _evaluated(self.model):
            native: Tensor = self.native(input_ids=tokens, use_cache=False).logits
            hidden, _ = self.embed(tokens)
            logits = self(tokens)
        if not torch.equal(native, logits):
            worst = (native.float() - logits.float()).abs().max().item()
            raise TowerError(
                f"{type(self.model).__name__} run layer by layer gives other logits than its own forward "
                f"(largest difference {worst:.2g}); write a small multitower.Tower for it"
            )
        return hidden.shape[-1], logits.shape[-1]


class _Unregistered(NamedTuple):
    module: Any


class Call(NamedTuple):
    """The state and the arguments with which a model calls one of its layers."""

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Context(NamedTuple):
    """What the layers and the head of a TransformersTower need: the tokens, and each layer's call."""

    tokens: Tensor
    calls: tuple[Call, ...]


class _LayersReached(Exception):  # noqa: N818  # not an error: it ends the prologue before norm and head
    pass


class _Record:
    """Stands in for a layer: notes its arguments, and ends the forward at the last one."""

    def __init__(self, tape: list[Call], last: bool) -> None:
        self.tape, self.last = tape, last

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.tape.append(Call(hidden, args, kwargs))
        if self.last:
            raise _LayersReached
        return hidden


class _Hand:
    """Stands in for a layer: hands on its input or, as the last one, the final state."""

    def __init__(self, final: list[Tensor] | None, returns_tuple: bool) -> None:
        self.final, self.returns_tuple = final, returns_tuple

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        state = hidden if self.final is None else self.final[0]
        return (state,) if self.returns_tuple else state


class _Place:
    """How many tokens were decoded before the present call."""

    start: int = 0


class _Injected:
    """Stands in for a layer: runs it, then ``inject``."""

    def __init__(self, layer: nn.Module, index: int, inject: Inject, place: _Place) -> None:
        self.layer, self.index, self.inject, self.place = layer, index, inject, place

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.index == 1:
            hidden = self.inject(0, hidden, self.place.start)
        output = self.layer(hidden, *args, **kwargs)
        state = self.inject(self.index, _hidden(output), self.place.start)
        return state if isinstance(output, Tensor) else (state, *output[1:])


def _hidden(output: Any) -> Tensor:
    hidden: Tensor = output if isinstance(output, Tensor) else output[0]
    return hidden


def _stand_in(layer: nn.Module, forward: Callable[..., Any]) -> nn.Module:
    """Copy a layer shallowly, so that the model finds all its attributes, and give it another forward."""
    stand_in = copy.copy(layer)
    stand_in.forward = forward
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        setattr(stand_in, hooks, type(getattr(layer, hooks))())
    return stand_in


def _shell(model: nn.Module, path: str, layers: list[nn.Module]) -> Any:
    """Copy the modules on the path to the list of layers, and put other layers there."""
    shell = node = copy.copy(model)
    *parents, last = path.split(".")
    for name in parents:
        child = copy.copy(node._modules[name])
        assert child is not None
        node._modules = {**node._modules, name: child}
        node = child
    node._modules = {**node._modules, last: nn.ModuleList(layers)}
    return shell


def _find_layers(model: nn.Module, path: str | None) -> tuple[str, bool]:
    """Find the list of layers; say also whether they return tuples."""
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    if path is None:
        found = [
            name
            for name, module in lists.items()
            if len(module) and all(type(layer).__name__ in kinds for layer in module)
        ]
    else:
        found = [path] if path in lists else []
    if len(found) != 1:
        raise TowerError(
            f"{type(model).__name__}: expected one list of layers of class {', '.join(sorted(kinds)) or '?'}"
            f", found {', '.join(found) or 'none'} among {', '.join(lists) or 'no module lists'}. Say which "
            "with TransformersTower(model, layers='...'), or write a small multitower.Tower"
        )
    return found[0], _probe(model, found[0])


@torch.no_grad()
def _probe(model: nn.Module, path: str) -> bool:
    """Check that each layer runs once and in order; say whether layers return tuples."""
    stack = list(model.get_submodule(path).children())
    if next(model.parameters()).device.type == "meta":
        return False
    order: list[int] = []
    tuples: list[bool] = []

    def note(index: int, layer: nn.Module, inputs: Any, output: Any) -> None:
        order.append(index)
        tuples.append(not isinstance(output, Tensor))

    hooks = [
        layer.register_forward_hook(functools.partial(note, index)) for index, layer in enumerate(stack, 1)
    ]
    try:
        with _evaluated(model):
            model(input_ids=torch.arange(1, 5, device=next(model.parameters()).device)[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if order != list(range(1, len(stack) + 1)):
        raise TowerError(
            f"{type(model).__name__} runs its {len(stack)} layers {path!r} in the order {order}; a tower's "
            "layers must run once each, in their order"
        )
    return tuples[0]


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode for a moment."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _token_ids(model: nn.Module, key: str) -> tuple[int, ...]:
    """Read token ids from the generation config, else from the config; they may be one, several or None."""
    for config in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        value = getattr(config, key, None)
        if value is not None:
            return tuple(value) if isinstance(value, list | tuple) else (int(value),)
    return ()
