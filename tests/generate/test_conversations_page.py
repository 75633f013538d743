"""Run docs/conversations.md on small towers."""

from __future__ import annotations

import re
from typing import Any

import multitower as mt
from letters import simple_pipe
from paths import ROOT


def test_what_the_page_shows_runs() -> None:
    page = (ROOT / "docs/conversations.md").read_text(encoding="utf-8")
    pipe = simple_pipe()
    names: dict[str, Any] = {"mt": mt, "pipe": pipe, "model": pipe.model}
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(block, names)
    assert len(names["answer"].tokens) > 1
    assert isinstance(names["text"], str)
