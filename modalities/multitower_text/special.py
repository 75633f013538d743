"""The ids of a tokenizer, and its special tokens."""

from __future__ import annotations

from collections.abc import Set
from typing import Any


def tokenizer_name(tokenizer: Any) -> str:
    """Return a tokenizer's name for error messages."""
    return getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__


def known_ids(tokenizer: Any) -> frozenset[int]:
    """Return all ids of a tokenizer; ids of added tokens may have gaps.

    Raises:
        TypeError: It is not a transformers tokenizer.
    """
    from transformers import PreTrainedTokenizerBase

    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(
            f"tokenizer is a {type(tokenizer).__name__}: give one of transformers. A processor holds it as "
            ".tokenizer; PreTrainedTokenizerFast(tokenizer_object=...) makes one of tokenizers.Tokenizer"
        )
    return frozenset(tokenizer.get_vocab().values()) | frozenset(tokenizer.added_tokens_decoder)


def resolve(tokenizer: Any, known: Set[int], edge: str, special: str, given: int | str | None) -> int:
    """Return the id of the begin or end token: the given one, else the tokenizer's.

    Raises:
        ValueError: There is none, or it is not in the vocabulary.
    """
    if given is None:
        own = getattr(tokenizer, f"{special}_token_id")
        if own is None:
            raise ValueError(
                f"tokenizer {tokenizer_name(tokenizer)!r} has no {special} token: pass {edge}=, the id or "
                f"name of a token in its vocabulary. Its special tokens are {tokenizer.all_special_tokens}"
            )
        return int(own)
    token = tokenizer.get_vocab().get(given) if isinstance(given, str) else given
    if token not in known:
        raise ValueError(
            f"{edge}={given!r} is not in the vocabulary of tokenizer {tokenizer_name(tokenizer)!r} "
            f"({len(tokenizer)} tokens): add the token to the tokenizer and the tower first, or pass another"
        )
    return int(token)


def unreachable(tokenizer: Any, edges: set[int]) -> set[int]:
    """Return the ids to which text must not be encoded: special tokens, and added begin or end tokens.

    The unknown token is not among them: it is special, but text may contain it.
    """
    added = tokenizer.added_tokens_decoder.items()
    special = {i for i, token in added if token.special or i in edges} | set(tokenizer.all_special_ids)
    return special - ({tokenizer.unk_token_id} - edges)
