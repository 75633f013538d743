"""Graphs as Mermaid flowcharts, which GitHub, the Hub and notebooks display."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .spec import LinkSpec, TowerSpec

SIGNS = {"#": "#35;", '"': "#quot;", "<": "#lt;", ">": "#gt;", "&": "#amp;"}


def flowchart(
    towers: Mapping[str, tuple[TowerSpec, Iterable[str]]], links: Iterable[tuple[LinkSpec, Iterable[str]]]
) -> str:
    """Return a flowchart with a box per tower and an arrow per link, each labelled by lines of text.

    >>> speech = TowerSpec("speech", "path/to/decoder", train="all")
    >>> text = TowerSpec("text", "path/to/decoder")
    >>> link = LinkSpec("speech", "text", "speech->text", interleave=1)
    >>> print(flowchart({"speech": (speech, ["4 layers"]), "text": (text, [])}, [(link, [])]))
    flowchart LR
        t0["speech<br/>4 layers"]:::trained
        t1["text"]:::frozen
        t0 -- "speech-#gt;text" --> t1
        classDef trained fill:#fde9c8,stroke:#c98a1b,color:#222
        classDef frozen fill:#e4eaf1,stroke:#7d8ea3,color:#222
    """
    places = {name: f"t{number}" for number, name in enumerate(towers)}
    lines = ["flowchart LR"]
    for name, (spec, words) in towers.items():
        kind = "frozen" if spec.train == "none" else "trained"
        lines.append(f"    {places[name]}[{label(name, *words)}]:::{kind}")
    for link, words in links:
        arrow = f"-- {label(link.name, *words)} -->"
        lines.append(f"    {places[link.source]} {arrow} {places[link.target]}")
    lines.append("    classDef trained fill:#fde9c8,stroke:#c98a1b,color:#222")
    lines.append("    classDef frozen fill:#e4eaf1,stroke:#7d8ea3,color:#222")
    return "\n".join(lines)


def label(*lines: str) -> str:
    """Quote a label for Mermaid, escaping special characters."""
    return '"' + "<br/>".join("".join(SIGNS.get(sign, sign) for sign in line) for line in lines) + '"'
