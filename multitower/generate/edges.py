"""The begin and end tokens of modalities, as options of ``generate``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..plugins.modality import Modality
from ..run.fusion import Fusion
from .options import Options, options_of


def with_edges(options: Options, model: Fusion, modalities: Mapping[str, Modality]) -> dict[str, Any]:
    """Add the begin and end tokens of modalities to options, if they differ from their towers'.

    >>> from multitower.testing import tiny_model
    >>> from multitower_text import TextModality
    >>> with_edges({}, tiny_model(), {"text": TextModality()})
    {'bos_token_id': {'text': 256}, 'eos_token_id': {'text': 257}}
    """
    edges: dict[str, dict[str, int]] = {}
    for name, modality in modalities.items():
        tower, own = model.tower(name), options_of(name, options)
        wanted = {}
        if modality.begin != tower.begin:
            wanted["bos_token_id"] = modality.begin
        if modality.end not in tower.end:
            wanted["eos_token_id"] = modality.end
        for key, token in wanted.items():
            if key not in own:
                edges.setdefault(key, {})[name] = token
    return {**options, **{key: {**options.get(key, {}), **tokens} for key, tokens in edges.items()}}
