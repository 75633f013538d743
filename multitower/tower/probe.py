"""Probe a running model: where its layers are, how they are called, whether it is causal."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import TowerError
from .shell import as_call, as_tuple
from .weights import execution_device

ROWS, LENGTH = 3, 7
"""Size of a probe's batch: numbers that are unlikely among a model's own sizes."""

RECORDED = ("output_hidden_states", "output_attentions", "output_router_logits")
"""Config flags that make a forward record layer outputs, with hooks on the layers."""


class Layout(NamedTuple):
    """The layout of the state between a model's layers, relative to (batch, length, width).

    Several residual streams are flattened to one state.

    Attributes:
        batch: The batch axis.
        length: The axis of tokens.
        sizes: Sizes of all other axes.
    """

    batch: int
    length: int
    sizes: tuple[int, ...]

    def to_tower(self, state: Tensor) -> Tensor:
        """Return a state as (batch, length, width)."""
        return state if self.is_plain else state.movedim((self.batch, self.length), (0, 1)).flatten(2)

    def to_model(self, state: Tensor) -> Tensor:
        """Return a state in the model's layout."""
        if self.is_plain:
            return state
        unfolded = state.reshape(*state.shape[:2], *self.sizes)
        return unfolded.movedim((0, 1), (self.batch, self.length))

    @property
    def is_plain(self) -> bool:
        """Whether the model's layout is (batch, length, width)."""
        return (self.batch, self.length, len(self.sizes)) == (0, 1, 1)


class Layers(NamedTuple):
    """Where a model's layers are, and how it calls them.

    Attributes:
        path: Path of the ``ModuleList``.
        order: Indices in that list of the layers that run, counted from 0.
        extras: For each of these, the number of outputs besides the state; None for a bare tensor.
        keyword: Name of the first parameter of the layers' forward.
        layout: Layout of the state between layers.
    """

    path: str
    order: tuple[int, ...]
    extras: tuple[int | None, ...]
    keyword: str
    layout: Layout


class Proof(NamedTuple):
    """The results of the checks when a model became a tower.

    Attributes:
        path: Path of the list of layers.
        width: Width of the state between them.
        beyond: Number of scored tokens beyond the vocabulary size in the config.
        masked: Whether norm and head give the same results if the model gets a mask.
        positions: Number of positions in the model's table; None without a table.
    """

    path: str
    width: int
    beyond: int
    masked: bool
    positions: int | None


class Seen(NamedTuple):
    """One call of a module in a ``ModuleList``, during a probe."""

    place: int
    hidden: Any
    output: Any


def probe(model: nn.Module, path: str | None = None) -> tuple[Layers, Tensor]:
    """Run a model once; return its layers and logits.

    The layers are the outermost list whose modules map a state to one of the same shape.
    """
    name = type(model).__name__
    lists = {key: module for key, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    seen, logits = _run(model, lists)
    running = {key: calls for key, calls in seen.items() if _layout(calls[0].hidden) and _keeps_state(calls)}
    if path is not None:
        found = [path] if path in running else []
    else:
        found = [key for key in running if not any(key.startswith(f"{other}.") for other in running)]
        kinds = set(getattr(model, "_no_split_modules", None) or ())
        named = [key for key in found if type(lists[key][running[key][0].place]).__name__ in kinds]
        found = named or found
    if len(found) != 1:
        raise TowerError(
            f"{name}: expected one list of layers that take and give the state, found "
            f"{', '.join(found) or 'none'} among {', '.join(lists) or 'no module lists'}. Say which with "
            "TransformersTower(model, layers='...'), or write a small multitower.Tower"
        )
    calls = running[found[0]]
    order = tuple(call.place for call in calls)
    if sorted(set(order)) != list(order):
        raise TowerError(
            f"{name} runs the layers of {found[0]!r} in the order {[place + 1 for place in order]}; a "
            "tower's layers must run once each, in their order. Write a small multitower.Tower for it"
        )
    for number, (before, after) in enumerate(itertools.pairwise(calls), 1):
        state = as_tuple(before.output)[0]
        if state is not after.hidden and not torch.equal(state, after.hidden):
            raise TowerError(
                f"{name} changes the state between its layers {number} and {number + 1} of {found[0]!r}, "
                "which a tower could not do layer by layer. Write a small multitower.Tower for it"
            )
    extras = tuple(
        None if isinstance(call.output, Tensor) else len(as_tuple(call.output)) - 1 for call in calls
    )
    layout = _layout(calls[0].hidden)
    assert layout is not None
    keyword = _keyword(lists[found[0]][order[0]])
    return Layers(found[0], order, extras, keyword, layout), logits


def plain_layers(model: nn.Module, path: str, width: int) -> Layers:
    """Return the layers in a list, if all are known to run in order on a state of (batch, length, width)."""
    stack = dict(model.named_modules()).get(path)
    if not isinstance(stack, nn.ModuleList) or not len(stack):
        raise ValueError(f"{type(model).__name__} has no layers in {path!r}")
    order, extras = tuple(range(len(stack))), (None,) * len(stack)
    return Layers(path, order, extras, _keyword(stack[0]), Layout(0, 1, (width,)))


def probe_tokens(model: nn.Module) -> Tensor:
    """Return tokens of shape (ROWS, LENGTH); the last two rows differ only in their last token."""
    size = vocabulary(model)
    tokens = (torch.arange(ROWS * LENGTH) * 5 + size // 2) % size
    rows = tokens.view(ROWS, LENGTH)
    rows[-1] = rows[-2]
    rows[-1, -1] = (rows[-2, -1] + 1) % size
    return rows.to(execution_device(model))


def check_causal(name: str, logits: Tensor) -> None:
    """Check that the last two rows of a probe differ only in the logits of their last token."""
    one, other = logits[-2:, :-1].float()
    leak = (one - other).abs().max().item()
    if leak > torch.finfo(logits.dtype).eps ** (2 / 3) * logits[-2:].float().abs().max().item():
        raise TowerError(
            f"{name} is not causal: another last token changes the logits of earlier ones (by {leak:.2g}). A "
            "tower must be a decoder; families that can be both need config.is_decoder=True"
        )


def vocabulary(model: Any) -> int:
    """Return the vocabulary size in the config, which ``resize_token_embeddings`` keeps up to date."""
    size: int = model.config.get_text_config(decoder=True).vocab_size
    return size


def last_position(model: Any) -> int | None:
    """Return ``max_position_embeddings``; None if there is no limit, for which some configs have -1."""
    limit: int | None = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return limit if limit is not None and limit > 0 else None


def rounding(logits: Tensor) -> float:
    """Return the tolerance for logits that are computed in different ways.

    Whatever the dtype, models compute softmax, norms and rotary tables in float32.
    """
    eps = max(torch.finfo(each).eps for each in (logits.dtype, torch.float32))
    return float(eps**0.5 * logits.abs().max().item())


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Set a model to eval mode temporarily."""
    modes = {module: module.training for module in model.modules()}
    if any(modes.values()):  # skip the slow call if nothing is in training mode
        model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            if module.training != training:
                module.training = training


@torch.no_grad()
def _run(model: nn.Module, lists: dict[str, nn.ModuleList]) -> tuple[dict[str, list[Seen]], Tensor]:
    """Run a model on the probe, and record each call of a module in a list."""
    seen: dict[str, list[Seen]] = {}

    def note(key: str, place: int, layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        keyword = _keyword(layer)
        if args or keyword in kwargs:
            hidden = as_call(args, kwargs, keyword).hidden
            seen.setdefault(key, []).append(Seen(place, hidden, output))

    hooks = [
        layer.register_forward_hook(functools.partial(note, key, place), with_kwargs=True)
        for key, layers in lists.items()
        for place, layer in enumerate(layers)
    ]
    name, tokens = type(model).__name__, probe_tokens(model)
    try:
        with evaluated(model):
            output = model(input_ids=tokens, **forward_options(model))
    except Exception as error:
        raise TowerError(
            f"{name} does not run on tokens of shape {tuple(tokens.shape)} alone, which a tower must: "
            f"{type(error).__name__}: {error}{_likely_cause(model)}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    if not isinstance(output, tuple) and not hasattr(output, "logits"):
        raise TowerError(f"{name} returns no logits: load it with its head, by AutoModelForCausalLM")
    logits = logits_of(output)
    if logits.dim() != 3 or logits.shape[:2] != tokens.shape:
        raise TowerError(
            f"{name} gives logits of shape {tuple(logits.shape)} for tokens of shape {tuple(tokens.shape)}; "
            "a tower must score each token once"
        )
    return seen, logits


def _likely_cause(model: nn.Module) -> str:
    config: Any = model.config
    if getattr(config, "is_encoder_decoder", False):
        return ". It has an encoder, and a tower is a decoder alone"
    count = getattr(config.get_text_config(decoder=True), "num_codebooks", 1)
    return f". It predicts {count} codebooks a step, and a tower one token" if count > 1 else ""


def forward_options(model: nn.Module) -> dict[str, bool]:
    """Return arguments for a forward that computes only logits, whatever the config requests."""
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    configs = (config,) if text is config else (config, text)
    asked = (flag for flag in RECORDED for each in configs if getattr(each, flag, False))
    return {"use_cache": False, **dict.fromkeys(asked, False)}


def logits_of(output: Any) -> Tensor:
    """Return the logits from a causal LM's output, a model output or a tuple."""
    logits: Tensor = output[0] if isinstance(output, tuple) else output.logits
    return logits


def _layout(hidden: Any) -> Layout | None:
    """Return the layout of a state; None if this is not one."""
    shape = list(hidden.shape) if isinstance(hidden, Tensor) and hidden.is_floating_point() else []
    if len(shape) < 3 or ROWS not in shape or LENGTH not in shape:
        return None
    axes = shape.index(ROWS), shape.index(LENGTH)
    return Layout(*axes, tuple(size for axis, size in enumerate(shape) if axis not in axes))


def _keeps_state(calls: list[Seen]) -> bool:
    return all(
        isinstance(state := as_tuple(call.output)[0], Tensor) and state.shape == call.hidden.shape
        for call in calls
    )


def _keyword(layer: nn.Module) -> str:
    forward: Callable[..., Any] = layer.forward
    return next(iter(inspect.signature(forward).parameters), "")
