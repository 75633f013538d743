"""Checks of a tower's decoding."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ...base.extras import require
from ...tower import Tower
from ...tower.shell import Inject
from ..report import call
from .case import TowerCase, assert_alike


def check_steps(case: TowerCase) -> None:
    """Decode prompts of equal length."""
    _decode(case, length=6, paddings=(0, 0))
    _decode(case, length=1, paddings=(0,))


def check_left_padding(case: TowerCase) -> None:
    """Decode prompts of different lengths, if the tower supports it."""
    if case.tower.pads_left:
        _decode(case, length=6, paddings=(0, 3, 5))


@torch.no_grad()
def check_cache(case: TowerCase) -> None:
    """Run tokens in pieces with a cache whose rows are reordered in between."""
    tower = case.tower
    if not tower.caches:
        return
    tokens, order = case.tokens(3, 9), torch.tensor([2, 0, 1])
    whole, cache = case.run(tokens), require("transformers", "transformers").DynamicCache()
    for start, end in pairwise((0, 3, 4, 7, 9)):
        if start == 4:
            cache.reorder_cache(order)
            tokens, whole = tokens[order], whole[order]
        found = call("embed(tokens, cache), a layer or the head", case.run, tokens[:, start:end], cache)
        held = cache.get_seq_length()
        assert held == end, (
            f"after {end} tokens the cache holds {held}: each layer must hand the keys and values of all "
            "that it is given to cache.update(keys, values, index - 1), once"
        )
        assert_alike(
            found,
            whole[:, start:end],
            f"{end - start} tokens after {start} in a cache{' of reordered rows' if start >= 4 else ''} get "
            "other logits than without; do positions and masks begin at cache.get_seq_length(), and is "
            "all that layers remember in the cache?",
        )


@torch.no_grad()
def _decode(case: TowerCase, length: int, paddings: tuple[int, ...], steps: int = 4) -> None:
    """Decode with a modification after each layer; compare with a full forward with the same modification."""
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
        assert_alike(
            stepwise,
            logits[0, -steps:].float(),
            f"decoding {length - padding} tokens after {padding} of padding differs from a forward",
        )


def _run(tower: Tower, tokens: Tensor, inject: Inject, first: int) -> Tensor:
    """Run a tower with ``inject`` after each layer; the first token has position ``first``."""
    positions = torch.arange(first, first + tokens.shape[1], device=tokens.device)
    hidden, context = tower.embed(tokens)
    hidden = inject(0, hidden, positions)
    for index in range(1, tower.depth + 1):
        hidden = inject(index, tower.layer(index, hidden, context), positions)
    return tower.head(hidden, context)
