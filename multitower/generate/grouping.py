"""Which rows can be decoded together, and how long each may grow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..tower import Tower
from .options import STOPS, Decodable, Options, given, setting

MAX_NEW_TOKENS = 1024
"""How long a segment may grow when neither the caller nor the tower says so."""

OF_THE_BATCH = ("logits_processor", "prefix_allowed_tokens_fn")
"""Functions that may tell the rows of a batch by their place in it."""

OF_THE_WHOLE_ROW = (
    "bad_words_ids",
    "encoder_no_repeat_ngram_size",
    "forced_bos_token_id",
    "min_length",
    "no_repeat_ngram_size",
    "sequence_bias",
    "watermarking_config",
)
"""Options that take padding on the left of a row for a part of it."""


def groups(tower: Decodable, lengths: Sequence[int], options: Options) -> list[list[int]]:
    """Return which rows can be decoded together so that each becomes what it would alone.

    >>> from multitower.testing import tiny_tower
    >>> groups(tiny_tower(), [5, 2, 5], {}), groups(tiny_tower(), [5, 2, 5], {"no_repeat_ngram_size": 2})
    ([[0, 1, 2]], [[1], [0, 2]])

    Args:
        tower: The tower that is decoded.
        lengths: The lengths of the rows' prompts.
        options: The options.

    Raises:
        ValueError: A function among the options has to see all rows together.
    """
    rows = range(len(lengths))
    together = [list(rows)]
    if any(setting(tower, options, key) for key in STOPS):
        together = [[row] for row in rows]
    elif len(set(lengths)) > 1 and not alike_when_padded(tower, options, max(lengths)):
        together = [[row for row in rows if lengths[row] == length] for length in sorted(set(lengths))]
    check_batches(len(together), options)
    return together


def check_batches(count: int, options: Options) -> None:
    """Check that no function among the options has to see together what is decoded in several batches.

    Raises:
        ValueError: One has.
    """
    for key in OF_THE_BATCH:
        if count > 1 and options.get(key):
            raise ValueError(
                f"{key} would see these examples in {count} batches, since together they are not "
                "decoded as each is alone; call generate once for each"
            )


def alike_when_padded(tower: Decodable, options: Options, longest: int) -> bool:
    """Whether rows that are padded on the left to ``longest`` tokens become what they would alone."""
    limited = setting(tower, options, "max_new_tokens") is not None
    keys = OF_THE_WHOLE_ROW if limited else (*OF_THE_WHOLE_ROW, "max_length")
    if any(setting(tower, options, key) for key in keys):
        return False
    roomy = limited or tower.max_length is None or longest + MAX_NEW_TOKENS <= tower.max_length
    return roomy and tower.pads_left


def most_new(name: str, tower: Tower, options: Options, prompt: int) -> int:
    """Return how many tokens a segment may get after its begin token.

    Args:
        name: The tower.
        tower: The tower.
        options: The options.
        prompt: How many tokens its row has so far.

    Raises:
        ValueError: The row is as long as it may be, or is to get no tokens.
    """
    told: int | None = setting(tower, options, "max_new_tokens")
    if told is not None:
        if told < 1:
            raise ValueError(f"tower {name!r} is to get {told} new tokens (max_new_tokens); give 1 or more")
        return told
    whole = setting(tower, options, "max_length")
    if whole is not None and whole <= prompt:
        raise ValueError(
            f"tower {name!r} is to have rows of {whole} tokens (max_length), {prompt} are there already; "
            "pass max_new_tokens"
        )
    limit = length_limit(tower.native, options, prompt, tower.max_length)
    return whole - prompt if limit is None else limit


def length_limit(model: Any, options: Options, prompt: int, most: int | None) -> int | None:
    """Return how long a segment may grow where neither the caller nor the model does; None where one does.

    Args:
        model: A causal LM, or whatever a tower was made of.
        options: Options of ``generate``.
        prompt: How many tokens stand before the segment's second.
        most: How many tokens a row may have; None where there is no limit.
    """
    own = getattr(model, "generation_config", None)
    for key in ("max_new_tokens", "max_length"):
        if given(options, key) is not None or (key not in options and getattr(own, key, None) is not None):
            return None
    room = MAX_NEW_TOKENS if most is None else most - prompt
    return max(1, min(MAX_NEW_TOKENS, room))
