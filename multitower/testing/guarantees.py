"""What a tower guarantees: each guarantee a check that says how it is broken."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..tower import Inject, Tower, TransformersTower

TOLERANCE = 1e-4
"""How far two ways to the same float32 logits may differ, against the largest of them."""

Logits = Callable[[nn.Module, Tensor], Tensor]
"""From a model and tokens of shape (batch, length) to logits of shape (batch, length, vocab_size)."""


class Case(NamedTuple):
    """A tower that is checked, and how to get the logits of its model."""

    tower: Tower
    own: Logits | None

    @property
    def has_native(self) -> bool:
        """Whether the tower was made of another model."""
        return self.tower.native is not self.tower

    def native(self, tokens: Tensor) -> Tensor:
        """Give the logits of the model that the tower was made of."""
        model: Any = self.tower.native
        if self.own is not None:
            return self.own(model, tokens)
        if isinstance(self.tower, TransformersTower):
            output = model(input_ids=tokens, use_cache=False)
        else:
            output = model(tokens)
        logits: Tensor = output[0] if isinstance(output, tuple) else getattr(output, "logits", output)
        return logits

    def copy(self) -> Case:
        """Copy the tower and the model."""
        return self._replace(tower=copy.deepcopy(self.tower))

    def tokens(self, rows: int, length: int) -> Tensor:
        """Draw random tokens, the first and the last of the vocabulary among them."""
        size = self.tower.vocab_size
        generator = torch.Generator().manual_seed(rows + length)
        tokens = torch.randint(size, (rows, length), generator=generator)
        tokens[0, :2] = torch.tensor([size - 1, 0])[:length]
        return tokens.to(self.tower.device)

    def run(self, tokens: Tensor) -> Tensor:
        """Run the tower layer by layer."""
        hidden, context = self.tower.embed(tokens)
        for index in range(1, self.tower.depth + 1):
            hidden = self.tower.layer(index, hidden, context)
        return self.tower.head(hidden, context)


def _check_attributes(case: Case) -> None:
    tower = case.tower
    for key in ("depth", "width", "vocab_size"):
        value = getattr(tower, key, None)
        positive = isinstance(value, int) and value > 0
        assert positive, f"{key} must be a positive whole number, not {value!r}"
    limit = tower.max_length
    assert limit is None or (isinstance(limit, int) and limit > 0), (
        f"max_length must be positive, not {limit!r}"
    )
    assert isinstance(tower.end, tuple), f"end must be a tuple of token ids, as in (2,), not {tower.end!r}"
    for key, token in [("begin", tower.begin), *(("end", token) for token in tower.end)]:
        if key == "end" or token is not None:
            assert isinstance(token, int), f"{key} must be a token id, not {token!r}"
            inside = 0 <= token < tower.vocab_size
            assert inside, f"{key}: token {token} is beyond the vocabulary of {tower.vocab_size}"


@torch.no_grad()
def _check_shapes(case: Case) -> None:
    tower, tokens = case.tower, case.tokens(2, 5)
    before = tokens.clone()
    hidden, context = _call("embed", tower.embed, tokens)
    assert torch.equal(tokens, before), "embed changes the tokens in place; work on a copy of them"
    expected = (2, 5, tower.width)
    assert hidden.shape == expected, f"embed gives {tuple(hidden.shape)}, expected {expected}"
    for index in range(1, tower.depth + 1):
        kept = hidden.clone()
        output = _call(f"layer {index} of {tower.depth}", tower.layer, index, hidden, context)
        assert torch.equal(hidden, kept), (
            f"layer {index} changes in place the state that it is given, which links still read; write "
            "x = x + ... and not x += ..."
        )
        hidden = output
        assert hidden.shape == expected, f"layer {index} gives {tuple(hidden.shape)}, expected {expected}"
    kept = hidden.clone()
    logits, expected = _call("head", tower.head, hidden, context), (2, 5, tower.vocab_size)
    assert torch.equal(hidden, kept), "head changes in place the state that it is given"
    assert logits.shape == expected, f"head gives {tuple(logits.shape)}, expected {expected}"
    assert logits.isfinite().all(), "some logits are not finite"
    least = 8 * torch.finfo(logits.dtype).eps * logits.abs().max()
    assert (logits[0] - logits[1]).abs().max() > least, "the logits do not depend on the tokens"
    assert torch.equal(logits, tower(tokens)), "tower(tokens) is not what embed, layer and head give"
    places = torch.tensor([1, 3], device=logits.device)
    some = _call("head_at", tower.head_at, hidden, context, places)
    assert some.shape == (2, 2, tower.vocab_size), f"head_at gives {tuple(some.shape)} for two places"
    _assert_close(some, logits[:, places], "head_at gives other logits than head")


@torch.no_grad()
def _check_repetition(case: Case) -> None:
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
def _check_identity(case: Case) -> None:
    tokens = case.tokens(3, 9)
    if case.has_native or case.own is not None:
        _assert_equal(case.run(tokens), case.native(tokens))


@torch.no_grad()
def _check_causality(case: Case) -> None:
    tokens = case.tokens(1, 9)
    logits = case.run(tokens)
    for place in range(1, 9):
        changed = tokens.clone()
        changed[:, place:] = (tokens[:, place:] + 1) % case.tower.vocab_size
        _assert_close(
            case.run(changed)[:, :place],
            logits[:, :place],
            f"the logits before token {place} change with the tokens from there on",
        )


@torch.no_grad()
def _check_rows(case: Case) -> None:
    tokens = case.tokens(3, 9)
    logits = case.run(tokens)
    for row, length in enumerate((9, 6, 3)):
        alone = case.run(tokens[row : row + 1, :length])[0]
        _assert_close(logits[row, :length], alone, "a row alone, without what follows, is scored otherwise")


def _check_padding(case: Case) -> None:
    tokens = case.tokens(2, 8)
    tokens[:, 5:] = 0
    tokens[1] = 0
    with torch.no_grad():
        _assert_close(
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


def _check_gradients(case: Case) -> None:
    trained = case.copy()
    tower, tokens = trained.tower.requires_grad_(True), case.tokens(2, 6)
    found = _gradients(tower, trained.run(tokens))
    assert found, "no parameter receives a gradient"
    for name, gradient in found.items():
        assert gradient.isfinite().all(), f"the gradient of {name} is not finite"
    if case.has_native:
        for name, expected in _gradients(tower, trained.native(tokens)).items():
            assert name in found, f"no gradient reaches {name}, which the model's own forward does train"
            _assert_close(found[name], expected, f"the gradient of {name} is not the model's own")
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
def _check_bfloat16(case: Case) -> None:
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
        _assert_equal(logits, expected)


def _check_decoding(case: Case) -> None:
    _decode(case, length=6, paddings=(0, 0))
    _decode(case, length=1, paddings=(0,))


def _check_left_padding(case: Case) -> None:
    if case.tower.pads_left:
        _decode(case, length=6, paddings=(0, 3, 5))


GUARANTEES: dict[str, Callable[[Case], None]] = {
    "attributes": _check_attributes,
    "shapes": _check_shapes,
    "repetition": _check_repetition,
    "identity": _check_identity,
    "causality": _check_causality,
    "rows": _check_rows,
    "padding": _check_padding,
    "gradients": _check_gradients,
    "bfloat16": _check_bfloat16,
    "decoding": _check_decoding,
    "left padding": _check_left_padding,
}
"""The checks by name: each raises an AssertionError that explains what is wrong."""


@torch.no_grad()
def _decode(case: Case, length: int, paddings: tuple[int, ...], steps: int = 4) -> None:
    """Decode with a change after each layer; compare with the same change where all is computed at once."""
    tower, prompts = case.tower, case.tokens(len(paddings), length)
    mask = torch.ones_like(prompts)
    for row, padding in enumerate(paddings):
        mask[row, :padding] = 0
        prompts[row, :padding] = 0
    calls: list[tuple[int, list[int], tuple[int, ...]]] = []

    def inject(layer: int, state: Tensor, positions: Tensor) -> Tensor:
        calls.append((layer, positions.tolist(), tuple(state.shape)))
        return state * (1 + 0.1 * torch.sin(layer + positions.to(state)))[None, :, None]

    decoded = tower.decoder(inject).generate(
        prompts,
        attention_mask=mask,
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    for number, (layer, positions, shape) in enumerate(calls):
        last = length + number // (tower.depth + 1) - 1
        due = number % (tower.depth + 1)
        assert layer == due, f"the decoder injects after layer {layer} where layer {due} is due"
        assert positions == list(range(last + 1 - len(positions), last + 1)), (
            f"the decoder says that {len(positions)} tokens up to position {last} stand at {positions}"
        )
        expected = (len(paddings), len(positions), tower.width)
        assert shape == expected, f"the decoder injects into states of shape {shape}, expected {expected}"
    assert len(calls) == steps * (tower.depth + 1), f"{steps} steps inject {len(calls)} times"
    for row, padding in enumerate(paddings):
        tokens = decoded.sequences[row : row + 1, padding:-1]
        logits = _run(tower, tokens, inject, first=padding)
        stepwise = torch.stack([step[row] for step in decoded.logits])
        _assert_close(
            stepwise,
            logits[0, -steps:].float(),
            f"decoding {length - padding} tokens after {padding} of padding differs from a forward",
        )


def _run(tower: Tower, tokens: Tensor, inject: Inject, first: int) -> Tensor:
    """Run a tower alone, with ``inject`` after each layer; the first token stands at position ``first``."""
    positions = torch.arange(first, first + tokens.shape[1], device=tokens.device)
    hidden, context = tower.embed(tokens)
    hidden = inject(0, hidden, positions)
    for index in range(1, tower.depth + 1):
        hidden = inject(index, tower.layer(index, hidden, context), positions)
    return tower.head(hidden, context)


def _call(what: str, function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except Exception as error:
        raise AssertionError(f"{what} fails with {type(error).__name__}: {error}") from error


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
    """Give a number that depends unlike on each value."""
    return (values.float() * torch.arange(values.numel(), device=values.device).view_as(values).cos()).mean()


def _assert_equal(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape, (
        f"the model's own logits have shape {tuple(expected.shape)}, the tower's {tuple(found.shape)}; say "
        "how to get them with check_tower(tower, logits=lambda native, tokens: ...)"
    )
    worst = (found - expected).abs().max().item()
    assert torch.equal(found, expected), f"the logits are not the model's own (they differ by {worst:.2g})"


def _assert_close(found: Tensor, expected: Tensor, what: str) -> None:
    tolerance = max(TOLERANCE, torch.finfo(expected.dtype).eps ** 0.5 / 4)
    worst = (found - expected).abs().max().item()
    assert worst <= tolerance * expected.abs().max().item(), f"{what} (by {worst:.2g})"
