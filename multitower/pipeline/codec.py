"""From raw data to segments and back, by the modalities of a model's towers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..batch.collate import Segment
from ..generate.options import options_of
from ..model import FusedModel
from ..plugins.modality import Modality
from .raw import Raw, by_tower, leaves, read_example, replaced


@dataclass(frozen=True)
class Codec:
    """A model, and the modalities of its towers.

    >>> from multitower.testing import tiny_model
    >>> Codec(tiny_model(), {}).encode([[Segment("text", [1, 7])]])
    [[Segment(tower='text', tokens=[1, 7], target=False)]]
    """

    model: FusedModel
    modalities: Mapping[str, Modality]

    def modality(self, name: str, where: str) -> Modality:
        """Return the modality of a tower; ``where`` says in errors what asks for it.

        Raises:
            ValueError: There is no such tower, or it has none.
        """
        if not isinstance(name, str) or name not in self.model.towers:
            raise ValueError(
                f"{where}: there is no tower {name!r}; the towers are {', '.join(self.model.towers)}"
            )
        if name not in self.modalities:
            raise ValueError(
                f"{where}: tower {name!r} has no modality; there are ones for "
                f"{', '.join(self.modalities) or 'none'}: Pipeline(model, {{{name!r}: ...}})"
            )
        return self.modalities[name]

    def encode(self, examples: Sequence[Any]) -> list[list[Any]]:
        """Return examples of segments, where raw data may stand; see ``Pipeline``.

        Raises:
            ValueError: A tower is unknown or has no modality; or what modalities raise.
            TypeError: Something is no example, or raw data are of a type that the modality does not take.
        """
        rows = [read_example(example, number) for number, example in enumerate(examples)]
        table: dict[Raw, Segment] = {}
        for name, raws in by_tower(leaf for leaf in leaves(rows) if isinstance(leaf, Raw)).items():
            for raw in raws:
                accepts = self.modality(name, raw.where).accepts
                if not isinstance(raw.data, accepts):
                    kinds = " or ".join(kind.__name__ for kind in accepts)
                    raise TypeError(
                        f"{raw.where}: tower {name!r} takes {kinds}, not {type(raw.data).__name__}"
                    )
            try:
                encoded = self.modalities[name].encode_batch([raw.data for raw in raws])
            except Exception as error:
                error.add_note(f"raised for tower {name!r} in {'; '.join(raw.where for raw in raws)}")
                raise
            segments = (Segment(name, tokens) for tokens in encoded)
            table |= zip(raws, segments, strict=True)
        return replaced(rows, lambda leaf: table.get(leaf, leaf))

    def decode(self, rows: Sequence[Any], *, pairs: bool) -> list[list[Any]]:
        """Return raw data in place of segments, or the pairs of a tower and its raw data."""
        table: dict[Segment, Any] = {}
        for name, segments in by_tower(leaves(rows)).items():
            raws = self.modality(name, "output").decode_batch([segment.tokens for segment in segments])
            table |= zip(segments, raws, strict=True)
        return replaced(rows, lambda leaf: (leaf.tower, table[leaf]) if pairs else table[leaf])

    def with_edges(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Have towers begin and end with their modalities' tokens, where theirs are others."""
        edges: dict[str, dict[str, int]] = {}
        for name, modality in self.modalities.items():
            tower, own = self.model.tower(name), options_of(name, options)
            wanted = {}
            if modality.begin != tower.begin:
                wanted["bos_token_id"] = modality.begin
            if modality.end not in tower.end:
                wanted["eos_token_id"] = modality.end
            for key, token in wanted.items():
                if key not in own:
                    edges.setdefault(key, {})[name] = token
        return {**options, **{key: {**options.get(key, {}), **tokens} for key, tokens in edges.items()}}
