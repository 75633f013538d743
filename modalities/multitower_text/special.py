"""What a tokenizer's vocabulary holds, and which of its tokens are no text."""

from __future__ import annotations

from collections.abc import Set
from typing import Any


def tokenizer_name(tokenizer: Any) -> str:
    """Return the name that an error calls a tokenizer by."""
    return getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__


def known_ids(tokenizer: Any) -> frozenset[int]:
    """Return all ids of a tokenizer; between those of added tokens there may be gaps.

    Raises:
        TypeError: It is not a tokenizer of transformers.
    """
    from transformers import PreTrainedTokenizerBase

    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(
            f"tokenizer is a {type(tokenizer).__name__}: give one of transformers. A processor holds it as "
            ".tokenizer; PreTrainedTokenizerFast(tokenizer_object=...) makes one of tokenizers.Tokenizer"
        )
    return frozenset(tokenizer.get_vocab().values()) | frozenset(tokenizer.added_tokens_decoder)


def resolve(tokenizer: Any, known: Set[int], edge: str, special: str, given: int | str | None) -> int:
    """Return the id of the begin or end token: the one given, or else the tokenizer's own.

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
    """Return the ids that no text may be encoded to: special tokens, and added ones that begin or end.

    The token of what is unknown is special, too, and yet comes from text.
    """
    added = tokenizer.added_tokens_decoder.items()
    special = {i for i, token in added if token.special or i in edges} | set(tokenizer.all_special_ids)
    return special - ({tokenizer.unk_token_id} - edges)
