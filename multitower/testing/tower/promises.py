"""Checks of a tower; each raises an AssertionError that says what is wrong."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ...batch.places import positions
from ...tower import Tower
from ..compare import assert_equal
from ..report import call
from .case import TowerCase, assert_alike
from .decoding import check_cache, check_left_padding, check_steps


def _check_attributes(case: TowerCase) -> None:
    tower = case.tower
    for key in ("depth", "width", "vocab_size"):
        value = getattr(tower, key, None)
        positive = isinstance(value, int) and value > 0
        assert positive, f"{key} must be a positive whole number, not {value!r}"
    for key in ("max_length", "hard_limit"):
        limit = getattr(tower, key)
        assert limit is None or (isinstance(limit, int) and limit > 0), (
            f"{key} must be positive, not {limit!r}"
        )
    assert isinstance(tower.end, tuple), f"end must be a tuple of token ids, as in (2,), not {tower.end!r}"
    for key, token in [("begin", tower.begin), *(("end", token) for token in tower.end)]:
        if key == "end" or token is not None:
            assert isinstance(token, int), f"{key} must be a token id, not {token!r}"
            inside = 0 <= token < tower.vocab_size
            assert inside, f"{key}: token {token} is beyond the vocabulary of {tower.vocab_size}"


@torch.no_grad()
def _check_shapes(case: TowerCase) -> None:
    tower, tokens = case.tower, case.tokens(2, 5)
    before = tokens.clone()
    hidden, context = call("embed", tower.embed, tokens)
    assert torch.equal(tokens, before), "embed changes the tokens in place; work on a copy of them"
    expected = (2, 5, tower.width)
    assert hidden.shape == expected, f"embed gives {tuple(hidden.shape)}, expected {expected}"
    for index in range(1, tower.depth + 1):
        kept = hidden.clone()
        output = call(f"layer {index} of {tower.depth}", tower.layer, index, hidden, context)
        assert torch.equal(hidden, kept), (
            f"layer {index} changes in place the state that it is given, which links still read; write "
            "x = x + ... and not x += ..."
        )
        hidden = output
        assert hidden.shape == expected, f"layer {index} gives {tuple(hidden.shape)}, expected {expected}"
    kept = hidden.clone()
    logits, expected = call("head", tower.head, hidden, context), (2, 5, tower.vocab_size)
    assert torch.equal(hidden, kept), "head changes in place the state that it is given"
    assert logits.shape == expected, f"head gives {tuple(logits.shape)}, expected {expected}"
    assert logits.isfinite().all(), "some logits are not finite"
    least = 8 * torch.finfo(logits.dtype).eps * logits.abs().max()
    assert (logits[0] - logits[1]).abs().max() > least, "the logits do not depend on the tokens"
    assert torch.equal(logits, tower(tokens)), "tower(tokens) is not what embed, layer and head give"
    places = torch.tensor([1, 3], device=logits.device)
    some = call("head_at", tower.head_at, hidden, context, places)
    assert some.shape == (2, 2, tower.vocab_size), f"head_at gives {tuple(some.shape)} for two places"
    assert_alike(some, logits[:, places], "head_at gives other logits than head")


@torch.no_grad()
def _check_repetition(case: TowerCase) -> None:
    tower, tokens, others = case.tower, case.tokens(2, 5), case.tokens(3, 7)
    first, other = case.run(tokens), case.run(others)
    assert torch.equal(first, case.run(tokens)), (
        "the same tokens give other logits the second time: is something random in eval mode, or kept from "
        "the call before?"
    )
    hidden, context = tower.embed(tokens)
    other_hidden, other_context = tower.embed(others)
    state, other_state = hidden, other_hidden
    for index in range(1, tower.depth + 1):
        state = tower.layer(index, state, context)
        other_state = tower.layer(index, other_state, other_context)
    mixed = "two batches in turns, layer by layer, disturb each other; keep what layers need in the context"
    assert torch.equal(first, tower.head(state, context)), mixed
    assert torch.equal(other, tower.head(other_state, other_context)), mixed
    for index in range(1, tower.depth + 1):
        hidden = tower.layer(index, hidden, context)
    assert torch.equal(first, tower.head(hidden, context)), (
        "a second pass with the same context gives other logits; layers and head must leave it as it is"
    )


@torch.no_grad()
def _check_identity(case: TowerCase) -> None:
    tokens = case.tokens(3, 9)
    if case.has_native or case.own is not None:
        _check_native(case.run(tokens), case.native(tokens))


@torch.no_grad()
def _check_causality(case: TowerCase) -> None:
    tokens = case.tokens(1, 9)
    logits = case.run(tokens)
    for place in range(1, 9):
        changed = tokens.clone()
        changed[:, place:] = (tokens[:, place:] + 1) % case.tower.vocab_size
        assert_alike(
            case.run(changed)[:, :place],
            logits[:, :place],
            f"the logits before token {place} change with the tokens from there on",
        )


@torch.no_grad()
def _check_rows(case: TowerCase) -> None:
    tokens = case.tokens(3, 9)
    logits = case.run(tokens)
    for row, length in enumerate((9, 6, 3)):
        alone = case.run(tokens[row : row + 1, :length])[0]
        assert_alike(logits[row, :length], alone, "a row alone, without what follows, is scored otherwise")


def _check_padding(case: TowerCase) -> None:
    tokens = case.tokens(2, 8)
    tokens[:, 5:] = 0
    tokens[1] = 0
    with torch.no_grad():
        assert_alike(
            case.run(tokens)[:1, :5], case.run(tokens[:1, :5]), "zeros on the right change the logits before"
        )
    padded = case.copy()
    parameters = list(padded.tower.requires_grad_(True).parameters())
    logits = padded.run(tokens)
    assert logits.isfinite().all(), (
        "a row of nothing but zeros, which is padding, gives logits that are not finite"
    )
    for gradient in torch.autograd.grad(logits.float().square().mean(), parameters, allow_unused=True):
        assert gradient is None or gradient.isfinite().all(), (
            "a row of nothing but zeros, which is padding, gives gradients that are not finite"
        )


@torch.no_grad()
def _check_packing(case: TowerCase) -> None:
    """Run rows with several examples, if the tower supports it."""
    if not case.tower.packs:
        return
    lengths = torch.tensor([7, 3, 1, 5])
    tokens = case.tokens(4, 7)
    examples = [row[:length] for row, length in zip(tokens, lengths, strict=True)]
    places = positions(torch.arange(4).repeat_interleave(lengths)[None]).to(tokens.device)
    run = functools.partial(case.run, torch.cat(examples)[None], positions=places)
    together = call("embed(tokens, positions=positions), a layer or the head", run)
    alone = torch.cat([case.run(each[None]) for each in examples], 1)
    assert_alike(
        together,
        alone,
        "an example in a row with others gets other logits than alone; do positions begin anew, and do "
        "layers keep examples apart?",
    )


def _check_gradients(case: TowerCase) -> None:
    trained = case.copy()
    tower, tokens = trained.tower.requires_grad_(True), case.tokens(2, 6)
    found = _gradients(tower, trained.run(tokens))
    assert found, "no parameter receives a gradient"
    for name, gradient in found.items():
        assert gradient.isfinite().all(), f"the gradient of {name} is not finite"
    if case.has_native:
        for name, expected in _gradients(tower, trained.native(tokens)).items():
            assert name in found, f"no gradient reaches {name}, which the model's own forward does train"
            assert_alike(found[name], expected, f"the gradient of {name} is not the model's own")
    else:
        names = [name for name, _ in tower.named_parameters() if name not in found]
        assert not names, f"no gradient reaches {', '.join(names)}: is each layer run, with gradients?"
    with torch.no_grad():
        hidden, context = tower.embed(tokens)
    for index in range(1, tower.depth + 1):
        state = hidden.detach().requires_grad_(True)
        hidden = tower.layer(index, state, context)
        assert _passes_back(hidden, state), f"no gradient passes back through layer {index}"
    state = hidden.detach().requires_grad_(True)
    assert _passes_back(tower.head(state, context), state), "no gradient passes back through the head"


@torch.no_grad()
def _check_bfloat16(case: TowerCase) -> None:
    half = case.copy()
    half.tower.to(torch.bfloat16)
    tokens = case.tokens(2, 6)
    try:
        expected = half.native(tokens) if case.has_native else None
    except Exception as error:
        raise AssertionError(f"the model itself does not run ({type(error).__name__}: {error})") from error
    logits = half.run(tokens)
    assert logits.isfinite().all(), "some logits are not finite"
    if expected is not None:
        _check_native(logits, expected)


TOWER_PROMISES: dict[str, Callable[[TowerCase], None]] = {
    "attributes": _check_attributes,
    "shapes": _check_shapes,
    "repetition": _check_repetition,
    "identity": _check_identity,
    "causality": _check_causality,
    "rows": _check_rows,
    "padding": _check_padding,
    "packing": _check_packing,
    "gradients": _check_gradients,
    "bfloat16": _check_bfloat16,
    "decoding": check_steps,
    "left padding": check_left_padding,
    "cache": check_cache,
}
"""The checks by name; each raises an AssertionError that explains what is wrong."""


def _check_native(found: Tensor, expected: Tensor) -> None:
    """Compare with the model's own logits, bit for bit."""
    assert found.shape == expected.shape, (
        f"the model's own logits have shape {tuple(expected.shape)}, the tower's {tuple(found.shape)}; say "
        "how to get them with check_tower(tower, logits=lambda native, tokens: ...)"
    )
    assert_equal(found, expected, "the logits are not the model's own")


def _gradients(tower: Tower, logits: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*tower.named_parameters(), strict=True)
    gradients = torch.autograd.grad(_sum(logits), parameters, allow_unused=True)
    return {name: each for name, each in zip(names, gradients, strict=True) if each is not None}


def _passes_back(output: Tensor, state: Tensor) -> bool:
    if not output.requires_grad:
        return False
    (gradient,) = torch.autograd.grad(_sum(output), state, allow_unused=True)
    return gradient is not None and bool(gradient.any())


def _sum(values: Tensor) -> Tensor:
    """Return a sum with a different weight for each value."""
    return (values.float() * torch.arange(values.numel(), device=values.device).view_as(values).cos()).mean()
