"""Encode chats with a tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .special import tokenizer_name


def encode_chat(tokenizer: Any, chat: list[Mapping[str, Any]], *, sanitize: bool) -> list[int]:
    """Return the token ids of a chat, including the begin and end tokens that the template adds.

    Args:
        tokenizer: A transformers tokenizer with a chat template.
        chat: The messages.
        sanitize: Whether special tokens spelled out in messages are encoded as ordinary text.

    Raises:
        ValueError: The template does not accept the chat.
    """
    import jinja2

    try:
        ids = tokenizer.apply_chat_template(
            chat, sanitize_control_tokens=sanitize, return_dict=False, tokenizer_kwargs={"verbose": False}
        )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise ValueError(
            f"the chat template of tokenizer {tokenizer_name(tokenizer)!r} does not take this chat: {error}"
        ) from error
    return [int(i) for i in ids]
