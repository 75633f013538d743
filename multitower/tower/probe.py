"""Look at a model while it runs: where its layers are, how they are called, whether it is causal."""

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
"""Size of the batch of a probe: numbers that no model is likely to have as its own."""

RECORDED = ("output_hidden_states", "output_attentions", "output_router_logits")
"""What a config may have a forward record of its layers, by hooks that it puts on them."""


class Layout(NamedTuple):
    """How a model lays out the state between its layers, against (batch, length, width).

    Some keep several residual streams, which are then one state of the sum of their widths.

    Attributes:
        batch: Which axis is that of rows.
        length: Which axis is that of tokens.
        sizes: Of all other axes.
    """

    batch: int
    length: int
    sizes: tuple[int, ...]

    def to_tower(self, state: Tensor) -> Tensor:
        """Return a state as (batch, length, width)."""
        return state if self.is_plain else state.movedim((self.batch, self.length), (0, 1)).flatten(2)

    def to_model(self, state: Tensor) -> Tensor:
        """Return a state as the model lays it out."""
        if self.is_plain:
            return state
        unfolded = state.reshape(*state.shape[:2], *self.sizes)
        return unfolded.movedim((0, 1), (self.batch, self.length))

    @property
    def is_plain(self) -> bool:
        """Whether the model's layout is the tower's."""
        return (self.batch, self.length, len(self.sizes)) == (0, 1, 1)


class Layers(NamedTuple):
    """Where a model has its layers, and how it calls them.

    Attributes:
        path: Path of the ``ModuleList``.
        order: For each layer that runs its place in that list, counted from 0.
        extras: For each layer that runs how many things it gives beside its state; None for a bare tensor.
        keyword: Name of the first parameter of the layers' forward.
        layout: How the state between layers is laid out.
    """

    path: str
    order: tuple[int, ...]
    extras: tuple[int | None, ...]
    keyword: str
    layout: Layout


class Proof(NamedTuple):
    """What a model has shown of itself when it became a tower.

    Attributes:
        path: Path of the list of its layers.
        width: The width of the state between them.
        beyond: How many more tokens the head scores than its config says.
        masked: Whether norm and head give the same where they are handed a mask.
        positions: For how many tokens its table of positions has room; None where it has none.
    """

    path: str
    width: int
    beyond: int
    masked: bool
    positions: int | None


class Seen(NamedTuple):
    """One call of a child of a module list, during a probe."""

    place: int
    hidden: Any
    output: Any


def probe(model: nn.Module, path: str | None = None) -> tuple[Layers, Tensor]:
    """Run a model once; return its layers, the outermost list whose members hand on a state, and logits."""
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
    """Return the layers of a model of which all in one list are known to run, in order, on a plain state."""
    stack = dict(model.named_modules()).get(path)
    if not isinstance(stack, nn.ModuleList) or not len(stack):
        raise ValueError(f"{type(model).__name__} has no layers in {path!r}")
    order, extras = tuple(range(len(stack))), (None,) * len(stack)
    return Layers(path, order, extras, _keyword(stack[0]), Layout(0, 1, (width,)))


def probe_tokens(model: nn.Module) -> Tensor:
    """Return tokens of shape (ROWS, LENGTH): unlike rows, the last two unlike only in their last token."""
    size = vocabulary(model)
    tokens = (torch.arange(ROWS * LENGTH) * 5 + size // 2) % size
    rows = tokens.view(ROWS, LENGTH)
    rows[-1] = rows[-2]
    rows[-1, -1] = (rows[-2, -1] + 1) % size
    return rows.to(execution_device(model))


def check_causal(name: str, logits: Tensor) -> None:
    """Check that the last two rows of a probe, alike but for their last token, are scored alike before it."""
    one, other = logits[-2:, :-1].float()
    leak = (one - other).abs().max().item()
    if leak > torch.finfo(logits.dtype).eps ** (2 / 3) * logits[-2:].float().abs().max().item():
        raise TowerError(
            f"{name} is not causal: another last token changes the logits of earlier ones (by {leak:.2g}). A "
            "tower must be a decoder; families that can be both need config.is_decoder=True"
        )


def vocabulary(model: Any) -> int:
    """Return how many token ids a model has by its config, which ``resize_token_embeddings`` keeps right."""
    size: int = model.config.get_text_config(decoder=True).vocab_size
    return size


def last_position(model: Any) -> int | None:
    """Return how many tokens a row may have by ``max_position_embeddings``; -1 there means no limit."""
    limit: int | None = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return limit if limit is not None and limit > 0 else None


def rounding(logits: Tensor) -> float:
    """Return by how much the same logits may differ where they are found in another way.

    Whatever the dtype, models take softmax, norms and rotary tables in float32.
    """
    eps = max(torch.finfo(each).eps for each in (logits.dtype, torch.float32))
    return float(eps**0.5 * logits.abs().max().item())


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode for a moment."""
    modes = {module: module.training for module in model.modules()}
    if any(modes.values()):  # where none trains, which is quick to find out, none is told again
        model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            if module.training != training:
                module.training = training


@torch.no_grad()
def _run(model: nn.Module, lists: dict[str, nn.ModuleList]) -> tuple[dict[str, list[Seen]], Tensor]:
    """Run a model on a probe and note each call of a member of a list."""
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
            logits = logits_of(model(input_ids=tokens, **forward_options(model)))
    except Exception as error:
        raise TowerError(
            f"{name} does not run on tokens of shape {tuple(tokens.shape)} alone, which a tower must: "
            f"{type(error).__name__}: {error}{_codebooks(model)}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    if logits.dim() != 3 or logits.shape[:2] != tokens.shape:
        raise TowerError(
            f"{name} gives logits of shape {tuple(logits.shape)} for tokens of shape {tuple(tokens.shape)}; "
            "a tower must score each token once"
        )
    return seen, logits


def _codebooks(model: nn.Module) -> str:
    config: Any = model.config
    count = getattr(config.get_text_config(decoder=True), "num_codebooks", 1)
    return f". It predicts {count} codebooks a step, and a tower one token" if count > 1 else ""


def forward_options(model: nn.Module) -> dict[str, bool]:
    """Return the arguments for a forward that computes logits and no more, whatever its config asks for."""
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    configs = (config,) if text is config else (config, text)
    asked = (flag for flag in RECORDED for each in configs if getattr(each, flag, False))
    return {"use_cache": False, **dict.fromkeys(asked, False)}


def logits_of(output: Any) -> Tensor:
    """Return the logits of what a causal LM returned, a model output or a plain tuple."""
    logits: Tensor = output[0] if isinstance(output, tuple) else output.logits
    return logits


def _layout(hidden: Any) -> Layout | None:
    """Return how a probe's state is laid out; None if it is none."""
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
