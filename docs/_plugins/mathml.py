"""Have mkdocs set fences of ``math`` as MathML, which browsers show without any script."""

from __future__ import annotations

from typing import Any

from latex2mathml.converter import convert


def on_config(config: Any) -> Any:
    """Add the fence to those of superfences; mkdocs calls this."""
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {}).setdefault("custom_fences", [])
    fences.append({"name": "math", "class": "math", "format": as_mathml})
    return config


def as_mathml(source: str, *_: Any, **__: Any) -> str:
    """Return LaTeX as a block of MathML."""
    return f'<div class="math">{convert(source.strip(), display="block")}</div>'
