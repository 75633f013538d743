"""Every guarantee that a tower gives, checked on a few random tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from ..tower import Inject, Tower, TowerError
from .compare import assert_close, assert_equal, native_logits, tolerance

NOT_ITS_OWN = "the logits are not the model's own"


def check_tower(tower: Tower) -> None:
    """Check every guarantee of a tower; say which it breaks, and how.

    >>> from multitower.testing import tiny_tower
    >>> check_tower(tiny_tower())

    The tower is left as it was. It is run on the CPU in float32 or wherever it is; half precision has
    wider tolerances. Tokens are drawn from the upper half of its vocabulary.

    Raises:
        TowerError: Some guarantee is broken; all of them are listed.
    """
    broken = {name: reason for name, reason in tower_report(tower).items() if reason}
    if broken:
        raise TowerError(
            f"{type(tower).__name__} breaks {len(broken)} of {len(GUARANTEES)} guarantees:"
            + "".join(f"\n  {name}: {reason}" for name, reason in broken.items())
        )


def tower_report(tower: Tower) -> dict[str, str]:
    """Check each guarantee of a tower; give by its name what is wrong, empty where nothing is.

    >>> from multitower.testing import tiny_tower
    >>> tower_report(tiny_tower())["causality"]
    ''
    """
    mode = tower.training
    tower.eval()
    report = {}
    try:
        for name, check in GUARANTEES.items():
            report[name] = ""
            try:
                check(tower)
            except AssertionError as error:
                report[name] = str(error)
            except Exception as error:  # whatever a tower raises is its author's to read
                report[name] = f"{type(error).__name__}: {error}"
    finally:
        tower.train(mode)
    return report


def _check_attributes(tower: Tower) -> None:
    for key in ("depth", "width", "vocab_size"):
        value = getattr(tower, key, None)
        positive = isinstance(value, int) and value > 0
        assert positive, f"{key} must be a positive whole number, not {value!r}"
    ids = [*tower.end, *([] if tower.begin is None else [tower.begin])]
    for token in ids:
        assert 0 <= token < tower.vocab_size, f"token {token} is beyond the vocabulary of {tower.vocab_size}"


@torch.no_grad()
def _check_shapes(tower: Tower) -> None:
    tokens = _tokens(tower, 2, 5)
    hidden, context = tower.embed(tokens)
    expected = (2, 5, tower.width)
    assert hidden.shape == expected, f"embed gives {tuple(hidden.shape)}, expected {expected}"
    for index in range(1, tower.depth + 1):
        hidden = tower.layer(index, hidden, context)
        assert hidden.shape == expected, f"layer {index} gives {tuple(hidden.shape)}, expected {expected}"
    logits, expected = tower.head(hidden, context), (2, 5, tower.vocab_size)
    assert logits.shape == expected, f"head gives {tuple(logits.shape)}, expected {expected}"
    assert logits.isfinite().all(), "some logits are not finite"
    assert not torch.equal(logits[0], logits[1]), "the logits do not depend on the tokens"
    assert torch.equal(logits, tower(tokens)), "the same tokens give other logits the second time"


@torch.no_grad()
def _check_identity(tower: Tower) -> None:
    tokens = _tokens(tower, 3, 9)
    assert_equal(tower(tokens), native_logits(tower.native)(tokens), NOT_ITS_OWN)


@torch.no_grad()
def _check_causality(tower: Tower) -> None:
    tokens = _tokens(tower, 1, 9)
    logits = tower(tokens)
    for place in range(1, 9):
        changed = tokens.clone()
        changed[:, place] = tokens[:, place] % (tower.vocab_size - 1) + 1
        _close(
            tower(changed)[:, :place], logits[:, :place], f"token {place} changes the logits of earlier ones"
        )


@torch.no_grad()
def _check_rows(tower: Tower) -> None:
    tokens = _tokens(tower, 3, 9)
    logits = tower(tokens)
    for row, length in enumerate((9, 6, 3)):
        alone = tower(tokens[row : row + 1, :length])[0]
        _close(logits[row, :length], alone, "a row alone, without what follows, is scored otherwise")


def _check_gradients(tower: Tower) -> None:
    tokens = _tokens(tower, 2, 6)
    trained = copy.deepcopy(tower).requires_grad_(True)
    found = _gradients(trained, trained)
    assert found, "no parameter receives a gradient"
    for name, gradient in found.items():
        assert gradient.isfinite().all(), f"the gradient of {name} is not finite"
    if tower.native is not tower:
        for name, expected in _gradients(trained, native_logits(trained.native)).items():
            _close(found[name], expected, f"the gradient of {name} is not the model's own")
    with torch.no_grad():
        hidden, context = trained.embed(tokens)
    hidden.requires_grad_(True)
    state = hidden
    for index in range(1, tower.depth + 1):
        state = trained.layer(index, state, context)
    (gradient,) = torch.autograd.grad(trained.head(state, context).float().square().mean(), hidden)
    assert gradient.any(), "no gradient reaches the state that enters layer 1"


@torch.no_grad()
def _check_bfloat16(tower: Tower) -> None:
    half = copy.deepcopy(tower).to(torch.bfloat16)
    tokens = _tokens(tower, 2, 6)
    try:
        expected = native_logits(half.native)(tokens)
    except Exception as error:
        raise AssertionError(f"the model itself does not run ({type(error).__name__}: {error})") from error
    logits = half(tokens)
    assert logits.isfinite().all(), "some logits are not finite"
    assert_equal(logits, expected, NOT_ITS_OWN)


def _check_decoding(tower: Tower) -> None:
    _decode(tower, paddings=(0, 0))


def _check_left_padding(tower: Tower) -> None:
    if tower.pads_left:
        _decode(tower, paddings=(0, 3))


GUARANTEES: dict[str, Callable[[Tower], None]] = {
    "attributes": _check_attributes,
    "shapes": _check_shapes,
    "identity": _check_identity,
    "causality": _check_causality,
    "rows": _check_rows,
    "gradients": _check_gradients,
    "bfloat16": _check_bfloat16,
    "decoding": _check_decoding,
    "left padding": _check_left_padding,
}
"""The checks by name: each raises an AssertionError that explains what is wrong."""


@torch.no_grad()
def _decode(tower: Tower, paddings: tuple[int, ...], steps: int = 4) -> None:
    """Decode with a change after each layer; compare with the same change where all is computed at once."""
    length, seen = 6, []
    prompts = _tokens(tower, len(paddings), length)
    mask = torch.ones_like(prompts)
    for row, padding in enumerate(paddings):
        mask[row, :padding] = 0
        prompts[row, :padding] = 0

    def inject(layer: int, state: Tensor, positions: Tensor) -> Tensor:
        if layer == tower.depth:
            seen.extend(positions.tolist())
        return state * (1 + 0.1 * torch.sin(layer + positions.to(state)))[None, :, None]

    decoded = tower.decoder(inject).generate(
        prompts,
        attention_mask=mask,
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert sorted(set(seen))[-1] == length + steps - 2, f"decoding says that its tokens stand at {seen}"
    for row, padding in enumerate(paddings):
        tokens = decoded.sequences[row : row + 1, padding:-1]
        logits = _run(tower, tokens, inject, first=padding)
        stepwise = torch.stack([step[row] for step in decoded.logits])
        _close(
            stepwise,
            logits[0, -steps:],
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


def _tokens(tower: Tower, rows: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows + length)
    low = tower.vocab_size // 2
    return torch.randint(low, tower.vocab_size, (rows, length), generator=generator).to(tower.device)


def _gradients(tower: Tower, model: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    names, parameters = zip(*tower.named_parameters(), strict=True)
    loss = model(_tokens(tower, 2, 6)).float().square().mean()
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {name: each for name, each in zip(names, gradients, strict=True) if each is not None}


def _close(found: Tensor, expected: Tensor, what: str) -> None:
    assert_close(found, expected, what, max(tolerance(torch.float32), tolerance(expected.dtype)))
