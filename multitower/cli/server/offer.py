"""What a checkpoint has to offer: which towers stand for text and for sound, and what reads what."""

from __future__ import annotations

from dataclasses import dataclass

import networkx as nx

from ...pipeline.pipeline import Pipeline


@dataclass(frozen=True)
class Offer:
    """Which towers stand for text and for sound.

    >>> Offer("text", "speech", hears=True, speaks=False).outputs
    ('text',)

    Attributes:
        text: The tower of text.
        audio: The tower of sound; None where there is none.
        hears: Whether text is written after sound: the tower of text reads that of sound.
        speaks: Whether sound is made after text.
    """

    text: str
    audio: str | None
    hears: bool
    speaks: bool

    @property
    def outputs(self) -> tuple[str, ...]:
        """The towers that are decoded."""
        return (self.text, *([self.audio] if self.audio is not None and self.speaks else []))


def offer_of(pipe: Pipeline, text: str | None = None, audio: str | None = None) -> Offer:
    """Find out what a pipeline has to offer.

    Args:
        pipe: The model with its modalities.
        text: The tower of text, if there are several.
        audio: The tower of sound, if there are several.

    Raises:
        ValueError: There are several towers of a kind and none was chosen, the chosen one is of another kind,
            or there is neither.
    """
    text, audio = _tower(pipe, "text", text), _tower(pipe, "audio", audio)
    if text is None:
        raise ValueError(
            "no tower has a modality of text, so there is nothing to serve: all endpoints read or write text"
        )
    graph = pipe.model.graph.to_networkx()
    hears, speaks = (audio is not None and nx.has_path(graph, *way) for way in ((audio, text), (text, audio)))
    return Offer(text, audio, hears, speaks)


def _tower(pipe: Pipeline, media: str, chosen: str | None) -> str | None:
    fitting = [name for name, modality in pipe.modalities.items() if modality.media == media]
    if chosen is not None and chosen not in fitting:
        raise ValueError(
            f"tower {chosen!r} is none of {media}; of {media} are: {', '.join(fitting) or 'none'}"
        )
    if chosen is None and len(fitting) > 1:
        raise ValueError(
            f"several towers are of {media}: {', '.join(fitting)}; choose one by --{media}-tower"
        )
    return chosen or next(iter(fitting), None)
