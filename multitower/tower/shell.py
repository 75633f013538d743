"""Shallow copies of a model whose layers are replaced.

A model's own forward prepares masks, rotary tables and scales. To run it without its layers, a *shell* is
made: a copy of the modules on the path to the list of layers. It shares every parameter, but its list
contains stand-ins.
"""

from __future__ import annotations

import copy
import functools
import itertools
import types
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import TowerError

Inject = Callable[[int, Tensor, Tensor], Tensor]
"""Called with (layer, state after it, positions); returns the state to continue with.

Layer 0 is the embedding. The state has shape (batch, length of this call, width); positions are the tokens'
indices in their rows, int64, shape (length of this call,).
"""


class Copy(NamedTuple):
    """A copied module, its original, and the name of the child that leads to the layers."""

    twin: nn.Module
    original: nn.Module
    child: str


class Shell(NamedTuple):
    """A shell, and the modules that were copied for it."""

    model: Any
    copies: tuple[Copy, ...]

    def follow(self) -> None:
        """Update the copies to their originals' training mode and current children.

        A head, for instance, is replaced when an adapter is added to it. The child that leads to the layers
        is a copy itself, or the list of stand-ins, and is kept.
        """
        below = (*(copy.original for copy in self.copies[1:]), None)
        for (twin, original, child), expected in zip(self.copies, below, strict=True):
            if twin.training != original.training:
                twin.training = original.training
            now: Any = original._modules.get(child)
            kept: Any = twin._modules[child]
            if expected is None:
                fits = isinstance(now, nn.ModuleList) and len(now) == len(kept)
            else:  # it may be wrapped, as by torch.compile
                fits = now is expected or (now is not None and expected in set(now.modules()))
            if not fits:
                raise TowerError(
                    f"{child!r} of {type(original).__name__} was replaced, or has another number of layers, "
                    "since the model became a tower: compile the graph anew, or use FusedModel.swap"
                )
            children = {**original._modules, child: kept}
            if len(children) != len(twin._modules) or any(
                twin._modules.get(name) is not module for name, module in children.items()
            ):
                twin._modules = children


class Call(NamedTuple):
    """The state and the other arguments of a model's call of one of its layers."""

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Carried(NamedTuple):
    """Placeholder for an additional output of a layer, which the model passes to a later layer."""

    layer: int
    place: int


class Context(NamedTuple):
    """The context of a TransformersTower for its layers and head.

    Attributes:
        tokens: The tokens.
        options: The other arguments of the model's forward.
        layers: The layers, in order of execution.
        calls: The model's call of each layer.
        carried: Additional outputs of the layers that have run, by layer.
    """

    tokens: Tensor
    options: dict[str, Any]
    layers: tuple[nn.Module, ...]
    calls: tuple[Call, ...]
    carried: dict[int, tuple[Any, ...]]


def resolve(value: Any, context: Context) -> Any:
    """Replace a placeholder in a layer's arguments by the earlier layer's output."""
    return context.carried[value.layer][value.place] if isinstance(value, Carried) else value


class Script:
    """What the stand-ins do in one forward: record their calls, or return the final state if it is given."""

    def __init__(self, final: tuple[Any, ...] | None = None) -> None:
        self.calls: list[Call] = []
        self.final = final


_PLAYED: ContextVar[Script] = ContextVar("_PLAYED")


class _Traced:
    """The script under torch.compile, which cannot trace a ContextVar and traces one call at a time."""

    script: Script | None = None


def play(shell: Shell, script: Script, inputs: dict[str, Any]) -> Any:
    """Run a shell's forward with stand-ins that follow a script, which other threads do not see."""
    if torch.compiler.is_dynamo_compiling():
        _Traced.script = script
        try:
            return shell.model(**inputs)
        finally:
            _Traced.script = None
    before = _PLAYED.set(script)
    try:
        return shell.model(**inputs)
    finally:
        _PLAYED.reset(before)


def _played() -> Script:
    if torch.compiler.is_dynamo_compiling() and _Traced.script is not None:
        return _Traced.script
    script = _PLAYED.get(None) or _Traced.script  # a graph break may switch between the two
    assert script is not None
    return script


class LayersReached(Exception):  # noqa: N818  # not an error: it stops a forward before norm and head
    """All layers have been called."""


class StandIn:
    """The forward of one stand-in.

    Args:
        index: The layer, counted from 1.
        last: Whether this is the last layer.
        extras: Number of outputs besides the state; None if the layer returns a bare tensor.
        keyword: Name of the layer's first parameter, by which the state may be passed.
    """

    def __init__(self, index: int, last: bool, extras: int | None, keyword: str) -> None:
        self.index, self.last, self.extras, self.keyword = index, last, extras, keyword

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Record the call, and return its state, or the final state."""
        call, script = as_call(args, kwargs, self.keyword), _played()
        if script.final is None:
            script.calls.append(call)
            if self.last:
                raise LayersReached
        elif self.last:
            return script.final if self.extras is not None else script.final[0]
        if self.extras is None:
            return call.hidden
        return (call.hidden, *(Carried(self.index, place) for place in range(self.extras)))


class Unexpected:
    """The forward of a stand-in for a layer that did not run during the probe."""

    def __init__(self, layer: int) -> None:
        self.layer = layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Raise a TowerError."""
        raise TowerError(f"layer {self.layer} runs now, but did not when the model became a tower")


def as_call(args: tuple[Any, ...], kwargs: dict[str, Any], keyword: str) -> Call:
    """Separate the state from a layer's other arguments: it is the first one, or has this keyword."""
    if args:
        return Call(args[0], args[1:], kwargs)
    return Call(kwargs[keyword], (), {key: value for key, value in kwargs.items() if key != keyword})


def as_tuple(output: Any) -> tuple[Any, ...]:
    """Return a layer's output as a tuple whose first item is the state."""
    return (output,) if isinstance(output, Tensor) else tuple(output)


def stand_in(layer: nn.Module, forward: Callable[..., Any]) -> nn.Module:
    """Return a shallow copy of a layer, with all its attributes, but another forward and no hooks."""
    twin = copy.copy(layer)
    twin.forward = forward
    if hasattr(twin, "gradient_checkpointing"):
        twin.gradient_checkpointing = False  # type: ignore[assignment]  # a plain flag, not a submodule
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        setattr(twin, hooks, type(getattr(layer, hooks))())
    return twin


def make_shell(model: nn.Module, path: str, layers: Sequence[nn.Module]) -> Shell:
    """Copy the modules on the path to the list of layers, and replace the list."""
    shell = node = _twin(model)
    names = path.split(".")
    copies = [Copy(shell, model, names[0])]
    for name, child in itertools.pairwise(names):
        original = node._modules[name]
        assert original is not None
        twin = _twin(original)
        copies.append(Copy(twin, original, child))
        node._modules = {**node._modules, name: twin}
        node = twin
    node._modules = {**node._modules, names[-1]: nn.ModuleList(layers)}
    return Shell(shell, tuple(copies))


def _twin(original: nn.Module) -> nn.Module:
    """Copy a module shallowly, and rebind a forward that was bound to it, as accelerate's hooks do.

    A forward from ``torch.compile`` always runs the original, so the copy goes without it.
    """
    twin = copy.copy(original)
    for key, value in vars(original).items():
        compiled = getattr(value, "_torchdynamo_orig_callable", None)
        if getattr(compiled, "__self__", None) is original:
            del vars(twin)[key]
        elif isinstance(value, types.MethodType) and value.__self__ is original:
            vars(twin)[key] = types.MethodType(value.__func__, twin)
        elif isinstance(value, functools.partial) and any(each is original for each in value.args):
            args = (twin if each is original else each for each in value.args)
            rebound = functools.partial(value.func, *args, **value.keywords)
            vars(rebound).update(vars(value))  # includes __wrapped__, needed for the signature
            vars(twin)[key] = rebound
    return twin
