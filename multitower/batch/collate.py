"""Segments of interleaved examples, and their collated batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils.rnn import pad_sequence

IGNORE = -100
"""The label of positions that are not predicted, as in ``torch.nn.functional.cross_entropy``."""

STATES = "layer "
"""Prefix of a stream's keys for cached states: "layer 2" is the output of layer 2 of its tower."""

EXAMPLES = "examples"
"""Key of a packed stream: the example of each token, int64, ascending in each row; see ``pack``."""

Stream = dict[str, Tensor]
Streams = Mapping[str, Mapping[str, Tensor]]


class Batch(TypedDict):
    """What ``collate`` returns and ``model(**batch)`` takes."""

    streams: dict[str, Stream]


@dataclass(frozen=True, eq=False)
class Segment:
    """A run of tokens of one tower within an example.

    >>> import multitower as mt
    >>> example = [mt.Segment("speech", [7, 1, 2, 8]), mt.Segment("text", [3, 5, 4], target=True)]

    Attributes:
        tower: Name of the tower that the tokens belong to.
        tokens: Token ids of the tower's vocabulary, shape (length,), including begin and end tokens.
        target: Whether these tokens contribute to the loss (all but the first, which is never predicted). A
            backward pass of a batch without any target raises an error.
    """

    tower: str
    tokens: Sequence[int] | Tensor
    target: bool = False


Example = Sequence[Segment | tuple[Segment, ...]]
"""Segments in order of time; those in a tuple, of different towers, start at the same time."""


def collate(examples: Sequence[Example]) -> Batch:
    """Collate examples into a batch: a stream for each tower, padded on the right.

    >>> import multitower as mt
    >>> batch = mt.collate([
    ...     [mt.Segment("speech", [7, 1, 8]), mt.Segment("text", [3, 5, 4], target=True)],
    ...     [mt.Segment("text", [3, 4])],
    ... ])
    >>> batch["streams"]["text"]["tokens"].tolist()
    [[3, 5, 4], [3, 4, 0]]
    >>> batch["streams"]["text"]["times"].tolist()
    [[3, 4, 5], [0, 1, -1]]
    >>> batch["streams"]["text"]["labels"].tolist()
    [[-100, 5, 4], [-100, -100, -100]]

    Segments in a tuple run in parallel; the next segment starts when the longest has ended:

    >>> duet = (mt.Segment("music", [1, 2, 3]), mt.Segment("dance", [5, 6]))
    >>> batch = mt.collate([[mt.Segment("text", [3, 4]), duet, mt.Segment("text", [7])]])
    >>> [stream["times"].tolist() for stream in batch["streams"].values()]
    [[[0, 1, 5]], [[2, 3, 4]], [[2, 3]]]

    Args:
        examples: Each a sequence of segments in order of time; an entry may be a tuple of segments of
            different towers that start at the same time.

    Returns:
        ``{"streams": {tower: {"tokens", "times", "mask", "labels"}}}`` with int64 tensors (mask: bool) of
        shape (batch, length of that tower's longest stream). ``times`` are token counts from the
        start of the example, on a clock that all towers share, and -1 at padding; ``labels`` equal the tokens
        (the model shifts them), and are -100 at positions that are not predicted.

    Raises:
        ValueError: The batch, an example or a segment is empty, or tokens are not a row of whole numbers.
    """
    if len(examples) == 0:
        raise ValueError("the batch is empty; collate needs at least one example")
    check_examples(examples)
    for number, example in enumerate(examples):
        if len(example) == 0:
            raise ValueError(f"example {number} has no segments")
    return {"streams": make_streams(examples)}


def to_device(
    batch: Batch,
    device: torch.device | str | Mapping[str, torch.device | str],
    *,
    non_blocking: bool = False,
) -> Batch:
    """Return a batch with its tensors on a device; everything else in it is kept.

    >>> import multitower as mt
    >>> from multitower.testing import tiny_model
    >>> model, batch = tiny_model(), mt.collate([[mt.Segment("text", [1, 7, 2], target=True)]])
    >>> model(**mt.batch.to_device(batch, model.device)).loss.device
    device(type='cpu')

    Args:
        batch: A batch from ``collate``, packed or not, with or without cached states.
        device: The device; or a device for each tower, as ``model.devices`` returns.
        non_blocking: See ``Tensor.to``.

    Raises:
        ValueError: There is a stream for a tower without a device.
    """
    places = device if isinstance(device, Mapping) else dict.fromkeys(batch["streams"], device)
    lacking = [name for name in batch["streams"] if name not in places]
    if lacking:
        raise ValueError(f"there is a stream for {lacking[0]!r}, but the towers are {', '.join(places)}")
    streams = {
        name: {key: tensor.to(places[name], non_blocking=non_blocking) for key, tensor in stream.items()}
        for name, stream in batch["streams"].items()
    }
    return {**batch, "streams": streams}


def count_targets(batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Return the number of labels in several batches by tower: ``num_items_in_batch``.

    >>> import multitower as mt
    >>> examples = [[mt.Segment("text", [0, *[5] * length, 1], target=True)] for length in (2, 6)]
    >>> batches = [mt.collate([example]) for example in examples]
    >>> {name: count.item() for name, count in mt.batch.count_targets(batches).items()}
    {'text': 10}

    Losses with this divisor, ``model(**batch, num_items_in_batch=counts)``, add up to the loss of one batch
    with all examples.

    Args:
        batches: Batches from ``collate``, packed or not; streams without labels are skipped.

    Returns:
        For each stream with labels an int64 scalar, on their device.
    """
    counts: dict[str, Tensor] = {}
    for batch in batches:
        for name, stream in batch["streams"].items():
            if "labels" in stream:
                here = (stream["labels"][:, 1:] != IGNORE).sum()
                counts[name] = counts[name] + here if name in counts else here
    return counts


def check_examples(examples: Sequence[Example]) -> None:
    """Check that each example is a list of segments, or of tuples of them; it may be empty."""
    for number, example in enumerate(examples):
        entries = list(example) if isinstance(example, Sequence) else []
        segments = [each for entry in entries for each in (entry if isinstance(entry, tuple) else (entry,))]
        wrong = [each for each in segments if not isinstance(each, Segment)]
        if wrong or not isinstance(example, Sequence):
            raise ValueError(
                f"example {number} must be a list of multitower.Segment, or of tuples of them; this is a "
                f"{type(wrong[0] if wrong else example).__name__}"
            )


def make_streams(examples: Sequence[Example]) -> dict[str, Stream]:
    """Return the streams of a batch; unlike in ``collate``, examples may be empty."""
    timed = [place_in_time(example, number) for number, example in enumerate(examples)]
    names = list(dict.fromkeys(segment.tower for row in timed for segment, _ in row))
    rows: dict[str, list[Stream]] = {name: [] for name in names}
    for row in timed:
        pieces: dict[str, list[Stream]] = {name: [_nothing()] for name in names}
        for segment, time in row:
            tokens = torch.as_tensor(segment.tokens)
            labels = torch.full_like(tokens, IGNORE)
            if segment.target:
                labels[1:] = tokens[1:]
            pieces[segment.tower].append(
                {
                    "tokens": tokens,
                    "times": torch.arange(time, time + len(tokens)),
                    "mask": torch.ones_like(tokens, dtype=torch.bool),
                    "labels": labels,
                }
            )
        for name in names:
            rows[name].append({key: torch.cat([piece[key] for piece in pieces[name]]) for key in PADDING})
    return {
        name: {
            key: pad_sequence([row[key] for row in rows[name]], batch_first=True, padding_value=value)
            for key, value in PADDING.items()
        }
        for name in names
    }


def place_in_time(example: Example, number: int = 0) -> list[tuple[Segment, int]]:
    """Return the segments of an example, with tokens as tensors, and the start time of each.

    >>> example = [(Segment("a", [1, 2]), Segment("b", [3])), Segment("a", [4])]
    >>> [(segment.tower, time) for segment, time in place_in_time(example)]
    [('a', 0), ('b', 0), ('a', 2)]
    """
    timed: list[tuple[Segment, int]] = []
    time = 0
    for entry in example:
        together = entry if isinstance(entry, tuple) else (entry,)
        towers = [segment.tower for segment in together]
        if len(set(towers)) < len(towers) or not towers:
            raise ValueError(
                f"example {number}: segments that run at the same time must be of different towers, not "
                f"{', '.join(towers) or 'none'}"
            )
        tensors = [replace(segment, tokens=_as_tokens(segment, number)) for segment in together]
        timed += [(segment, time) for segment in tensors]
        time += max(len(segment.tokens) for segment in tensors)
    return timed


PADDING = {"tokens": 0, "times": -1, "mask": False, "labels": IGNORE}


def check_streams(streams: Mapping[str, Mapping[str, Tensor]], vocabularies: Mapping[str, int]) -> None:
    """Check the format of streams, and their tokens against the towers' vocabulary sizes.

    Values are inspected only on the CPU: elsewhere, that would synchronise with the device.
    """
    if not streams:
        raise ValueError("the batch has no streams; build it with multitower.collate")
    for name, stream in streams.items():
        if name not in vocabularies:
            raise ValueError(f"there is a stream for {name!r}, but the towers are {', '.join(vocabularies)}")
        missing = [key for key in ("tokens", "times", "mask") if key not in stream]
        if missing:
            raise ValueError(
                f"stream {name!r} lacks {' and '.join(map(repr, missing))}; build batches with "
                "multitower.collate"
            )
        tokens = stream["tokens"]
        for key, value in stream.items():
            states = key.startswith(STATES)
            if value.shape[:2] != tokens.shape or value.dim() != (3 if states else 2):
                wanted = "they must be (batch, length, width) and" if states else "both must be"
                raise ValueError(
                    f"stream {name!r}: {key} has shape {tuple(value.shape)} and tokens has "
                    f"{tuple(tokens.shape)}; {wanted} (batch, length)"
                )
        if values_at_hand(tokens) and tokens.numel():
            _check_values(name, stream, vocabularies[name])
    if len({EXAMPLES in stream for stream in streams.values()}) > 1:
        unpacked = [name for name, stream in streams.items() if EXAMPLES not in stream]
        raise ValueError(f"streams of one batch must all be packed or none, but {unpacked} are not")
    rows = [stream["tokens"].shape[0] for stream in streams.values()]
    if any(size != rows[0] for size in rows):
        shapes = {name: tuple(stream["tokens"].shape) for name, stream in streams.items()}
        raise ValueError(f"streams of one batch must have the same number of rows, not {shapes}")


def values_at_hand(tensor: Tensor) -> bool:
    """Whether a tensor's values can be inspected without synchronising with a device or breaking a graph.

    >>> values_at_hand(torch.ones(2)), values_at_hand(torch.ones(2, device="meta"))
    (True, False)
    """
    if torch.compiler.is_compiling() or tensor.device.type != "cpu":
        return False
    return not isinstance(tensor, FakeTensor)


def _check_values(name: str, stream: Mapping[str, Tensor], vocabulary: int) -> None:
    tokens, mask = stream["tokens"], stream["mask"]
    low, high = map(int, tokens.aminmax())
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"stream {name!r} contains token {low if low < 0 else high}, but tower {name!r} has a "
            f"vocabulary of {vocabulary} (ids 0 to {vocabulary - 1}); was it encoded for another tower?"
        )
    if bool((mask[:, 1:] > mask[:, :-1]).any()):
        raise ValueError(f"stream {name!r} must be padded on the right: its mask is True again after False")
    if EXAMPLES in stream and bool((stream[EXAMPLES].diff() < 0).any()):
        raise ValueError(
            f"stream {name!r} is packed, but the examples in a row are not in ascending order; build it with "
            "multitower.pack"
        )


def _as_tokens(segment: Segment, example: int) -> Tensor:
    where = f"example {example}, segment of tower {segment.tower!r}"
    try:
        if isinstance(segment.tokens, str | bytes | Mapping):
            raise TypeError
        tokens = torch.as_tensor(segment.tokens).detach().cpu()
    except (TypeError, ValueError, RuntimeError, LookupError, OverflowError) as error:
        raise ValueError(
            f"{where}: tokens must be a row of ids, which this {type(segment.tokens).__name__} is not: "
            "give what the modality's encode gives, or tokenizer(text).input_ids with begin and end tokens"
        ) from error
    if tokens.dim() != 1 or tokens.numel() == 0:
        raise ValueError(f"{where}: tokens must be a row of one or more ids, not {tuple(tokens.shape)}")
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise ValueError(f"{where}: tokens must be whole numbers, not {tokens.dtype}")
    return tokens.long()


def _nothing() -> Stream:
    empty = torch.empty(0, dtype=torch.long)
    return {"tokens": empty, "times": empty, "mask": empty.bool(), "labels": empty}
