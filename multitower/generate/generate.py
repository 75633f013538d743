"""Decoding by transformers' own generate.

The other towers run once over what is given; each tap into the decoded tower keeps their keys and values.
Then a copy of that tower, whose layers are followed by the taps, is to transformers an ordinary causal LM.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..batch.collate import Example, Segment, check_examples, make_streams, place_in_time
from ..run.fusion import Fusion
from ..run.room import bounded, check_room
from ..tower import Tower
from ..tower.offload import execution_device
from ..tower.probe import evaluated
from .grouping import alike_when_padded, check_batches, groups, length_limit, most_new
from .options import as_ids, begin_token, check_named, check_options, filled, given, options_of
from .tap_cache import TapCache, TapReader
from .together import check_stepwise, decode_together

Entry = str | tuple[str, ...]
"""A tower to decode, or several to decode at the same time."""

Policy = Callable[[Example], Entry | None]
"""Called with an example as it stands; says what to decode next, or None when it is complete."""

Decoded = list[list[Segment | tuple[Segment, ...]]]


@torch.no_grad()
def generate(
    model: Fusion,
    examples: Sequence[Example],
    output: Sequence[Entry] | Policy,
    options: Mapping[str, Any],
) -> Decoded:
    """Decode a segment for each entry of ``output``; see ``FusedModel.generate``.

    Raises:
        ValueError: Nothing is to be decoded, a tower is unknown or has no begin token, an example holds
            a target, or an option cannot be passed on.
    """
    check_given(examples, {name: model.tower(name).vocab_size for name in model.towers})
    check_named(options, model.graph.towers)
    rows = [list(example) for example in examples]
    with evaluated(model):
        if callable(output):
            return _follow(model, rows, output, options)
        _check_output(model, output, options, len(rows))
        cache = TapCache.fill(model, make_streams(rows), _names(output))
        decoded: Decoded = []
        for number, entry in enumerate(output, 1):
            _check_room(model, dict(enumerate(rows)), entry)
            new = _decode(model, cache, rows, entry, options)
            decoded = [[*row, each] for row, each in zip(decoded or [[] for _ in new], new, strict=True)]
            if number < len(output):
                rows = [[*row, each] for row, each in zip(rows, new, strict=True)]
                cache = _after(model, cache, rows, [entry])
        return decoded


def _follow(
    model: Fusion, examples: Sequence[Example], policy: Policy, options: Mapping[str, Any]
) -> Decoded:
    """Decode what a policy asks for, rows that want the same together, until it wants no more."""
    rows: Decoded = [list(example) for example in examples]
    cache = TapCache.fill(model, make_streams(rows), list(model.towers))
    going = list(range(len(rows)))
    while going:
        wanted: dict[Entry, list[int]] = {}
        for row in going:
            entry = policy(rows[row])
            if entry is not None:
                wanted.setdefault(entry, []).append(row)
        decoded: dict[int, Segment | tuple[Segment, ...]] = {}
        stopped = len(rows) > sum(map(len, wanted.values()))
        check_batches(len(wanted) + stopped, options)
        for entry, chosen in wanted.items():
            _check_output(model, [entry], options, len(chosen))
            _check_room(model, {row: rows[row] for row in chosen}, entry)
            new = _decode(model, cache.of_rows(chosen), [rows[row] for row in chosen], entry, options)
            if len(new) > len(chosen):
                raise ValueError("num_return_sequences > 1 needs output=[...] with a single tower")
            decoded |= zip(chosen, new, strict=True)
        for row, each in decoded.items():
            rows[row].append(each)
        going = sorted(decoded)
        if going:
            cache = _after(model, cache, rows, list(wanted))
    return [row[len(example) :] for row, example in zip(rows, examples, strict=True)]


def _after(model: Fusion, cache: TapCache, rows: Sequence[Example], entries: Sequence[Entry]) -> TapCache:
    """Bring a cache up to date: a tower decoded alone runs over its tokens, several at a time need all."""
    streams = make_streams(rows)
    if len(entries) > 1 or not isinstance(entries[0], str):
        return TapCache.fill(model, streams, cache.targets)
    cache.refresh(entries[0], streams[entries[0]])
    return cache


def _decode(
    model: Fusion, cache: TapCache, rows: Sequence[Example], entry: Entry, options: Mapping[str, Any]
) -> Sequence[Segment | tuple[Segment, ...]]:
    if isinstance(entry, str):
        return _decode_segments(model, cache, rows, entry, options)
    return _decode_side_by_side(model, cache, rows, entry, options)


def _decode_side_by_side(
    model: Fusion,
    cache: TapCache,
    rows: Sequence[Example],
    names: tuple[str, ...],
    options: Mapping[str, Any],
) -> list[tuple[Segment, ...]]:
    """Decode several towers at the same time, rows together where no padding gets in the way."""
    towers = {name: model.tower(name) for name in names}
    check_stepwise(options, towers)
    own = {name: options_of(name, options) for name in names}
    begins = {name: _begin(towers[name], own[name]) for name in names}
    prompts = [{name: _prompt(row, name, begins[name]) for name in names} for row in rows]
    lengths = [tuple(len(tokens) for tokens, _ in prompt.values()) for prompt in prompts]
    longest = dict(zip(names, map(max, zip(*lengths, strict=True)), strict=True))
    apart = not all(alike_when_padded(towers[name], own[name], longest[name]) for name in names)
    decoded: dict[int, tuple[Segment, ...]] = {}
    batches = sorted(set(lengths)) if apart else [None]
    check_batches(len(batches), options)
    for key in batches:
        chosen = [row for row, length in enumerate(lengths) if key in (None, length)]
        padded = {
            name: (
                pad_left([prompts[row][name][0] for row in chosen], begins[name]),
                pad_left([prompts[row][name][1] for row in chosen], -1),
            )
            for name in names
        }
        limit = min(most_new(name, towers[name], own[name], padded[name][0].shape[1]) for name in names)
        segments = decode_together(model, cache.of_rows(chosen), padded, own, limit)
        decoded |= zip(chosen, segments, strict=True)
    return [decoded[row] for row in range(len(rows))]


def _decode_segments(
    model: Fusion, cache: TapCache, rows: Sequence[Example], name: str, options: Mapping[str, Any]
) -> list[Segment]:
    """Decode rows, together where that does not change what each becomes."""
    tower, options = model.tower(name), options_of(name, options)
    begin = _begin(tower, options)
    prompts = [_prompt(row, name, begin) for row in rows]
    decoded: dict[int, list[Segment]] = {}
    for group in groups(tower, [len(tokens) for tokens, _ in prompts], options):
        times = pad_left([prompts[row][1] for row in group], -1).to(tower.device)
        reader = TapReader(model, name, cache.of_rows(group), times)
        sequences = decode_rows(
            bounded(tower.decoder(reader), name, tower),
            [prompts[row][0] for row in group],
            begin=begin,
            end=tower.end,
            options=options,
            most=tower.max_length,
        )
        copies = len(sequences) // len(group)
        for number, row in enumerate(group):
            own = sequences[number * copies : (number + 1) * copies]
            decoded[row] = [Segment(name, sequence) for sequence in own]
    return [segment for row in range(len(rows)) for segment in decoded[row]]


def decode_rows(
    decoder: Any,
    prompts: Sequence[Tensor],
    *,
    begin: int,
    end: Sequence[int],
    options: Mapping[str, Any],
    most: int | None = None,
) -> list[Tensor]:
    """Let transformers decode after prompts of unlike length.

    Args:
        decoder: A causal LM with ``generate``.
        prompts: int64, each of shape (length,), the last token being the begin token of the new segment.
        begin: That token.
        end: The tokens that may end the segment.
        options: Options of ``generate``; they win over what is set here.
        most: How many tokens a row may have; None where there is no limit.

    Returns:
        Each new segment on the CPU, from its begin token to its end token if it was reached.
    """
    tokens = pad_left(prompts, begin)
    mask = pad_left([torch.ones_like(prompt) for prompt in prompts], 0)
    length = tokens.shape[1]
    limit = length_limit(decoder, options, length, most)
    if limit is not None:
        options = {
            key: value for key, value in options.items() if key not in ("max_new_tokens", "max_length")
        }
    settings = filled(
        options,
        {
            "bos_token_id": begin,
            "eos_token_id": list(end) or None,
            "pad_token_id": end[0] if end else begin,
            "return_dict_in_generate": False,
            **({} if limit is None else {"max_new_tokens": limit}),
        },
    )
    device = execution_device(decoder)
    sequences = decoder.generate(tokens.to(device), attention_mask=mask.to(device), **settings)
    ends = as_ids(given(settings, "eos_token_id"))
    return [_until_end(sequence[length - 1 :].cpu(), ends) for sequence in sequences]


def check_given(examples: Sequence[Example], vocabularies: Mapping[str, int]) -> None:
    """Check examples that are to be decoded from, against the vocabulary sizes of all that may stand in them.

    Raises:
        ValueError: There are none, they are no segments or hold a target, or a name or token is unknown.
    """
    if len(examples) == 0:
        raise ValueError("there are no examples to decode from")
    check_examples(examples)
    for number, example in enumerate(examples):
        for segment, _ in place_in_time(example, number):
            _check_name(segment.tower, vocabularies)
            if segment.target:
                raise ValueError(
                    f"example {number} holds a target segment: give generate only what is known, without "
                    "answers"
                )
            low, high = map(int, torch.as_tensor(segment.tokens).aminmax())
            size = vocabularies[segment.tower]
            if low < 0 or high >= size:
                raise ValueError(
                    f"example {number} holds token {low if low < 0 else high} of {segment.tower!r}, which "
                    f"has a vocabulary of {size} (ids 0 to {size - 1}); was it encoded for another tower?"
                )


def _check_output(model: Fusion, output: Sequence[Entry], options: Mapping[str, Any], examples: int) -> None:
    if isinstance(output, str) or not output or () in output:
        raise ValueError(f"output must be a list of towers to decode, as in output=['text'], not {output!r}")
    names = _names(output)
    for name in names:
        _check_name(name, model.graph.towers)
    for entry in output:
        if not isinstance(entry, str) and len(set(entry)) < len(entry):
            raise ValueError(f"a tower stands twice in {entry}: at one time it can take only one token")
    check_options(options, {name: model.tower(name) for name in names}, examples)


def _check_room(model: Fusion, rows: Mapping[int, Example], entry: Entry) -> None:
    """Check that what is to be decoded next can begin, the begin token being one more."""
    for name in _names([entry]):
        for number, row in rows.items():
            check_room(
                name, model.tower(name), _prompt(row, name, 0)[1], f"example {number}, with a begin token,"
            )


def _names(output: Sequence[Entry]) -> list[str]:
    return [name for entry in output for name in ((entry,) if isinstance(entry, str) else entry)]


def _check_name(name: str, towers: Collection[str]) -> None:
    if name not in towers:
        raise ValueError(f"there is no tower {name!r}; the towers are {', '.join(towers)}")


def _begin(tower: Tower, options: Mapping[str, Any]) -> int:
    begin = begin_token(tower, options)
    assert begin is not None
    return begin


def _prompt(row: Example, name: str, begin: int) -> tuple[Tensor, Tensor]:
    """Return the tokens of one row's earlier segments of the tower, then the begin token, and their times."""
    timed = place_in_time([*row, Segment(name, [begin])])
    own = [(torch.as_tensor(segment.tokens), time) for segment, time in timed if segment.tower == name]
    times = [torch.arange(time, time + len(tokens)) for tokens, time in own]
    return torch.cat([tokens for tokens, _ in own]), torch.cat(times)


def pad_left(rows: Sequence[Tensor], value: int) -> Tensor:
    """Stack rows of shape (length,), padded on the left.

    >>> pad_left([torch.tensor([1, 2]), torch.tensor([3])], 0).tolist()
    [[1, 2], [0, 3]]
    """
    return pad_sequence(list(rows), batch_first=True, padding_value=value, padding_side="left")


def _until_end(tokens: Tensor, end: Sequence[int]) -> Tensor:
    """Cut a segment after its first end token; the begin token at its front may be the same id."""
    is_end = torch.isin(tokens[1:], torch.tensor(end, dtype=tokens.dtype))
    return tokens[: int(is_end.int().argmax()) + 2] if bool(is_end.any()) else tokens
