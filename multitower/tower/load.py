"""From what a user names as a tower to a Tower."""

from __future__ import annotations

from safetensors import SafetensorError
from torch import nn

from ..extras import require
from .base import Tower, TowerError
from .transformers import TransformersTower


def as_tower(name: str, source: str | nn.Module | None) -> Tower:
    """Give the tower for a folder, a Hub id, a transformers causal LM or a ``Tower``.

    >>> as_tower("text", None)
    Traceback (most recent call last):
    multitower.tower.base.TowerError: tower 'text' was declared with a module, which ... does not hold; ...

    Raises:
        TowerError: There is nothing to load, or it is not a decoder that can be run layer by layer.
    """
    if source is None:
        raise TowerError(
            f"tower {name!r} was declared with a module, which this graph does not hold; pass it anew, "
            f"as in from_pretrained(folder, towers={{{name!r}: module}})"
        )
    if isinstance(source, Tower):
        return source
    if isinstance(source, str):
        transformers = require("transformers", "transformers")
        try:
            source = transformers.AutoModelForCausalLM.from_pretrained(
                source, dtype="auto", trust_remote_code=False
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            if "trust_remote_code" in str(error):
                raise TowerError(
                    f"tower {name!r}: {source!r} brings code of its own, which is never run unasked; read "
                    "it, load the model yourself with trust_remote_code=True, and give that module instead"
                ) from error
            raise TowerError(f"tower {name!r}: cannot load {source!r} as a causal LM: {error}") from error
    assert isinstance(source, nn.Module)
    if not hasattr(source, "config"):
        raise TowerError(
            f"tower {name!r}: {type(source).__name__} is neither a transformers causal LM nor a "
            "multitower.Tower; write a small multitower.Tower around it"
        )
    try:
        return TransformersTower(source)
    except TowerError as error:
        raise TowerError(f"tower {name!r}: {error}") from error
