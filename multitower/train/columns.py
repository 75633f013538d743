"""Encode the columns of a data set into examples, and collate them."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from numbers import Integral
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ..batch.collate import Batch, Segment, collate
from ..batch.pack import pack
from ..plugins.entry_points import as_modality
from ..plugins.modality import Modality

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEGMENTS, LENGTH = "segments", "length"


def encode_columns(
    dataset: Any,
    columns: Mapping[str, str],
    modalities: Mapping[str, Modality | PreTrainedTokenizerBase] = MappingProxyType({}),
    *,
    targets: Collection[str],
    **options: Any,
) -> Any:
    """Encode columns of a data set into examples: one segment per column, in the order of ``columns``.

    >>> from multitower_text import TextModality
    >>> text = TextModality()
    >>> rows = [{"question": "2+2?", "answer": "4", "id": 7}]
    >>> columns = {"question": "text", "answer": "text"}
    >>> (row,) = encode_columns(rows, columns, {"text": text}, targets=["answer"])
    >>> row["length"], [(segment["tower"], segment["target"]) for segment in row["segments"]]
    (9, [('text', False), ('text', True)])

    Without a modality, a tower's column must contain token ids, including begin and end:

    >>> rows = [{"units": [1, 5, 2], "words": [1, 7, 2]}]
    >>> encode_columns(rows, {"units": "speech", "words": "text"}, targets=["words"])[0]["length"]
    6

    A Hugging Face ``datasets`` object is mapped: cached on disk, in worker processes with ``num_proc=8``, or
    lazily if it streams; ``datasets.interleave_datasets([asr, tts, text], probabilities, seed)`` mixes
    several. Any other iterable of rows gives a list.

    Args:
        dataset: Rows, each a mapping from columns to raw data.
        columns: The tower of each column.
        modalities: The modality or transformers tokenizer of each tower; towers without one take token ids.
        targets: The columns to learn.
        options: Other arguments of ``datasets.Dataset.map``.

    Returns:
        The same kind of data set (or a list) with the columns "segments" and "length" (in tokens).

    Raises:
        ValueError: A target is not among ``columns``, or a row lacks a column.
        TypeError: ``targets`` is a string, something is neither a modality nor a tokenizer, or a column of a
            tower without modality does not contain token ids.
    """
    if isinstance(targets, str):
        raise TypeError(f"targets is a list of columns: targets=[{targets!r}]")
    unknown = [each for each in targets if each not in columns]
    if unknown:
        raise ValueError(
            f"targets {unknown} are none of the columns {list(columns)}; columns says which tower each "
            "column of the data set goes to"
        )
    encoders = {tower: as_modality(modalities[tower]) for tower in columns.values() if tower in modalities}
    for tower, encoder in encoders.items():
        if not isinstance(encoder, Modality):
            raise TypeError(
                f"the modality of {tower!r} is a {type(encoder).__name__}: give a Modality, as "
                f"TextModality({tower!r}), or a tokenizer of transformers"
            )
    encode = functools.partial(_encoded, columns=dict(columns), modalities=encoders, targets=list(targets))
    if hasattr(dataset, "map"):
        names = getattr(dataset, "column_names", None)
        if isinstance(names, Mapping):
            raise ValueError(
                f"encode one split at a time: there are {', '.join(names)}, as in dataset['train']"
            )
        mapped = dataset.map(encode, remove_columns=names, **options)
        # a stream may not know its columns before it runs
        return mapped.select_columns([SEGMENTS, LENGTH]) if names is None else mapped
    if options:
        raise TypeError(
            f"{', '.join(options)}: options are those of Dataset.map; this is {type(dataset).__name__}"
        )
    return [encode(row) for row in dataset]


def _encoded(
    row: Mapping[str, Any],
    columns: Mapping[str, str],
    modalities: Mapping[str, Modality],
    targets: Collection[str],
) -> dict[str, Any]:
    segments: list[dict[str, Any]] = []
    for column, tower in columns.items():
        if column not in row:
            raise ValueError(f"a row has no column {column!r}; it has {', '.join(map(repr, row))}")
        try:
            known = tower in modalities
            tokens = modalities[tower].encode(row[column]).tolist() if known else _ids(row[column], tower)
        except Exception as error:
            error.add_note(f"raised for tower {tower!r} in column {column!r}")
            raise
        segments.append({"tower": tower, "tokens": tokens, "target": column in targets})
    return {SEGMENTS: segments, LENGTH: sum(len(each["tokens"]) for each in segments)}


def _ids(value: Any, tower: str) -> list[int]:
    """Return a column's value as a list of token ids."""
    ids = value if isinstance(value, list) else getattr(value, "tolist", list)()
    if not ids or not all(isinstance(each, Integral) and not isinstance(each, bool) for each in ids):
        raise TypeError(
            f"there is no modality for {tower!r}, and this {type(value).__name__} is no list of token ids; "
            f"give encode_columns a modality, as in {{{tower!r}: TextModality(...)}}"
        )
    return [int(each) for each in ids]


class Collator:
    """Collates examples, or rows of ``encode_columns``, into a batch; a ``collate_fn`` for ``DataLoader``.

    >>> import multitower as mt
    >>> rows = [[mt.Segment("text", [3, 5, 4], target=True)], [mt.Segment("text", [3, 4], target=True)]]
    >>> Collator()(rows)["streams"]["text"]["tokens"].shape
    torch.Size([2, 3])

    Args:
        packed: Whether to pack several examples into a row; see ``pack``.
    """

    def __init__(self, *, packed: bool = False) -> None:
        self.packed = packed

    def __call__(self, rows: Sequence[Any]) -> Batch:
        """Collate examples or rows."""
        batch = collate([as_example(row) for row in rows])
        return pack(batch) if self.packed else batch


def as_example(row: Any) -> list[Any]:
    """Return the example in a row of ``encode_columns``; an example is returned as a list."""
    if isinstance(row, Mapping):
        if SEGMENTS not in row:
            raise ValueError(
                f"a row has the columns {', '.join(map(repr, row))} and no {SEGMENTS!r}; have "
                "multitower.train.encode_columns make examples of them"
            )
        return [Segment(**segment) for segment in row[SEGMENTS]]
    return list(row)
