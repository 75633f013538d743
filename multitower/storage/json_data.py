"""Lossless conversion of built-in Python data to JSON and back."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any


def to_json(value: Any) -> Any:
    """Convert data to JSON types without loss: tuples, mappings and non-finite floats are tagged.

    >>> import json, math
    >>> value = {"betas": (0.9, 0.999), 30: None, "best": -math.inf}
    >>> from_json(json.loads(json.dumps(to_json(value)))) == value
    True
    """
    if type(value) is float and not math.isfinite(value):
        return {"float": repr(value)}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is list:
        return [to_json(each) for each in value]
    if type(value) is tuple:
        return {"tuple": [to_json(each) for each in value]}
    if isinstance(value, Mapping):
        kind = "counter" if isinstance(value, Counter) else "dict"
        return {kind: [[to_json(key), to_json(each)] for key, each in value.items()]}
    raise TypeError(f"{value!r}, a {type(value).__name__}, is not plain data")


def from_json(value: Any) -> Any:
    """Invert ``to_json``."""
    if isinstance(value, list):
        return [from_json(each) for each in value]
    if not isinstance(value, dict):
        return value
    try:
        ((kind, content),) = value.items()
        if kind == "float":
            return float(content)
        if kind == "tuple":
            return tuple(from_json(each) for each in content)
        return {"dict": dict, "counter": Counter}[kind](
            {from_json(key): from_json(each) for key, each in content}
        )
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"these are not data as they were saved: {str(value)[:60]}") from error
