"""Check that the messages in docs/troubleshooting.md are those of the library."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import multitower
from paths import ROOT

PAGE = ROOT / "docs/troubleshooting.md"


def messages() -> list[str]:
    """Return all strings of the library, with an ellipsis for each formatted value."""
    found = []
    for path in Path(multitower.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [each.value if isinstance(each, ast.Constant) else "…" for each in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def quoted() -> list[str]:
    """Return the code in the first column of tables of messages."""
    found, speaks = [], False
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cell = line.split("|")[1] if line.startswith("|") else ""
        if not cell or "---" in cell:
            speaks = speaks and bool(cell)
        elif cell.strip() in ("Message", "Message or sight", "What is seen"):
            speaks = cell.strip().startswith("Message")
        elif speaks:
            found += re.findall(r"`([^`]+)`", cell)
    return found


def test_messages_are_those_of_the_library() -> None:
    everything = messages()
    wanted = quoted()
    assert len(wanted) > 40
    invented = []
    for message in wanted:
        fragments = [re.escape(part.strip()) for part in message.split("…")]
        if not any(re.search(".*".join(fragments), text, re.DOTALL) for text in everything):
            invented.append(message)
    assert not invented
