"""Decoding of a batch of rows by transformers' ``generate``, starting from cached keys and values."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..batch.collate import Segment
from ..batch.places import PLACES
from ..link.cross_attention import KeysValues
from ..run.embed import bounded, check_room
from ..run.tables import Rotations
from ..tower.abilities import plain
from .advance import Keeping, advance, kept_of
from .options import Settings, groups
from .rows import Prompt, Row, Said, cache_of, places_beside, rows_of
from .simultaneous import decode_together
from .tap_cache import Entry, TapCache, TapReader

FROM_A_CACHE = ("greedy_search", "sample", "beam_search", "beam_sample")
"""Generation modes of transformers that run only the part of a prompt that a given cache lacks."""


def decode(
    keeping: Keeping,
    rows: Mapping[int, Row],
    entry: str | tuple[str, ...],
    settings: Mapping[str, Settings],
    *,
    keep: bool,
) -> list[list[Row]]:
    """Decode rows, given by their numbers, batching those whose results this does not change.

    If ``keep``, also cache the keys and values of new tokens, because decoding may go on. Return for each row
    the new rows: one, or ``num_return_sequences``.
    """
    lengths: dict[str, list[int]] = {name: [] for name in settings}
    rows = _without_forgotten(keeping, rows, settings)
    for number, row in rows.items():
        for name, each in settings.items():
            said = row.of(name)
            times = torch.cat([said.times[said.base :], torch.tensor([row.time], device="cpu")])
            check_room(name, keeping.model.tower(name), times, f"example {number}, with a further token,")
            lengths[name].append(said.length + _begins(said, each))
    together = groups([(each, lengths[name]) for name, each in settings.items()])
    first = {tap.source for tap in keeping.model.schedule.taps if tap.target in settings}
    now = advance(keeping, list(rows.values()), first if isinstance(entry, str) else {*first, *settings})
    became: dict[int, list[Row]] = {}
    for group in together:
        part = [now[place] for place in group]
        if isinstance(entry, str):
            new = _alone(keeping, part, settings[entry], keep=keep)
        else:
            new = _together(keeping, part, settings, keep=keep)
        copies = len(new) // len(group)
        became |= {place: new[at * copies :][:copies] for at, place in enumerate(group)}
    return [became[place] for place in range(len(rows))]


def _without_forgotten(
    keeping: Keeping, rows: Mapping[int, Row], settings: Mapping[str, Settings]
) -> Mapping[int, Row]:
    """Return the rows without the segments that towers with ``memory="segment"`` have forgotten by now."""
    forgetful = [name for name in settings if keeping.model.forgets(name)]
    if not forgetful:
        return rows
    for name, (number, row) in itertools.product(forgetful, rows.items()):
        said = row.of(name)
        if not _begins(said, settings[name]) and said.begins(len(said.tokens), row.time):
            raise ValueError(
                f"example {number}: tower {name!r} has memory='segment' and forgot the segment that it is to "
                "continue when another tower's came after it; begin a new one"
            )
    now = advance(keeping, list(rows.values()), forgetful)
    return {number: row.forgetting(forgetful) for number, row in zip(rows, now, strict=True)}


def _alone(keeping: Keeping, rows: Sequence[Row], settings: Settings, *, keep: bool) -> list[Row]:
    """Decode one tower."""
    model, name = keeping.model, settings.name
    tower = model.tower(name)
    if _begun(rows, settings) and not _go_on_alike(rows, settings):
        rows = advance(keeping, rows, {name})  # then each has one token left to run
    rows, prompt = _prompts(keeping, rows, settings)
    noting = keep and _can_note(keeping, settings)
    past = cache_of([row.of(name) for row in rows]) if noting or _begun(rows, settings) else None
    copies = max(settings.config.num_beams or 1, settings.config.num_return_sequences or 1)
    if past is not None and copies > 1:
        past.batch_repeat_interleave(copies)
    before = 0 if past is None else int(past.get_seq_length())
    reader = TapReader(
        model,
        name,
        tap_cache(keeping, rows, [name]),
        prompt.times,
        keeping.read_layers(name) if noting else (),
        prompt.places,
    )
    decoder = bounded(tower.decoder(reader), name, tower)
    sequences = decode_rows(decoder, prompt.tokens, prompt.mask, prompt.starts, settings, past)
    returned = len(sequences) // len(rows)
    new = [rows[at // returned].then([Segment(name, each)]) for at, each in enumerate(sequences)]
    return _noted(keeping, new, name, reader, past, before) if noting else new


def _together(
    keeping: Keeping, rows: Sequence[Row], settings: Mapping[str, Settings], *, keep: bool
) -> list[Row]:
    """Decode several towers simultaneously."""
    prompts = {}
    for name, each in settings.items():
        rows, prompts[name] = _prompts(keeping, rows, each)
    noting = {name: keep and _can_note(keeping, each) for name, each in settings.items()}
    pasts = {
        name: cache_of([row.of(name) for row in rows])
        for name, each in settings.items()
        if noting[name] or _begun(rows, each)
    }
    before = {name: int(past.get_seq_length()) for name, past in pasts.items()}
    lanes = decode_together(
        keeping.model,
        tap_cache(keeping, rows, list(settings)),
        prompts,
        settings,
        pasts,
        {name: keeping.read_layers(name) for name in settings if noting[name]},
    )
    segments = zip(*(lane.segments() for lane in lanes), strict=True)
    new = [row.then([each]) for row, each in zip(rows, segments, strict=True)]
    for lane in lanes:
        if noting[lane.name]:
            new = _noted(keeping, new, lane.name, lane.reader, pasts[lane.name], before[lane.name])
    return new


def tap_cache(keeping: Keeping, rows: Sequence[Row], targets: Sequence[str]) -> TapCache:
    """Return the keys and values that taps into these towers read, for a batch of rows."""
    entries = {}
    for tap in keeping.model.schedule.taps:
        if tap.target in targets and any(tap in row.read for row in rows):
            said = [row.of(tap.source) for row in rows]
            times = [each.times[: each.done] for each in said]
            when = pad_sequence(times, batch_first=True, padding_value=-1, padding_side="left")
            when = when.to(keeping.model.tower(tap.target).device)
            keys, values = (part.contiguous() for part in kept_of(rows, tap))
            entries[tap] = Entry(KeysValues(keys, values), when, when >= 0)
    return TapCache(keeping.model, targets, entries)


def decode_rows(
    decoder: Any, tokens: Tensor, mask: Tensor, starts: Sequence[int], settings: Settings, past: Any = None
) -> list[Tensor]:
    """Decode prompts of different lengths with transformers.

    Args:
        decoder: A causal LM with ``generate``.
        tokens: The prompts, int64, shape (batch, length), padded on the left.
        mask: False at padding, bool, shape (batch, length).
        starts: The index at which each returned segment starts; see ``Prompt``.
        settings: The resolved options.
        past: A cache with the keys and values of the first of these tokens; decoding extends it.

    Returns:
        Each new segment on the CPU, up to and including its EOS token if there is one.
    """
    length = tokens.shape[1]
    options = {**settings.options, **settings.limits(length)}
    if past is not None:
        options["past_key_values"] = past
    sequences = decoder.generate(tokens, attention_mask=mask.long(), **options)
    copies = len(sequences) // len(tokens)
    return [
        _until_end(sequence.cpu(), length, settings.ends)[starts[number // copies] :]
        for number, sequence in enumerate(sequences)
    ]


def pad_left(rows: Sequence[Tensor], value: int) -> Tensor:
    """Stack rows of shape (length,), padded on the left."""
    return pad_sequence(list(rows), batch_first=True, padding_value=value, padding_side="left")


def _begun(rows: Sequence[Row], settings: Settings) -> bool:
    """Whether ``generate`` can start from cached keys and values of any of the rows."""
    return _takes_a_cache(settings) and any(row.of(settings.name).cached for row in rows)


def _go_on_alike(rows: Sequence[Row], settings: Settings) -> bool:
    """Whether ``generate`` has to run one token of each row, or equally many after caches of equal length."""
    said = [row.of(settings.name) for row in rows]
    new = {each.pending + 1 if _begins(each, settings) else max(each.pending, 1) for each in said}
    return new == {1} or len({(each.cached, each.pending) for each in said}) == 1


def _can_note(keeping: Keeping, settings: Settings) -> bool:
    """Whether the cache that ``generate`` leaves holds exactly the tokens of the returned rows."""
    one_by_one = _mode(settings) in ("greedy_search", "sample")
    single = (settings.config.num_return_sequences or 1) == 1
    return one_by_one and single and _takes_a_cache(settings) and keeping.caches(settings.name)


def _takes_a_cache(settings: Settings) -> bool:
    """Whether ``generate`` continues from a given cache.

    With assisted decoding or prompt lookup, it would run the whole prompt after the cache.
    """
    config = settings.config
    plain_cache = config.cache_implementation is None and config.use_cache is not False
    return plain_cache and _mode(settings) in FROM_A_CACHE


def _mode(settings: Settings) -> str:
    mode: str = settings.config.get_generation_mode(settings.options.get("assistant_model"))
    return mode


def _noted(
    keeping: Keeping, rows: Sequence[Row], name: str, reader: TapReader, cache: Any, before: int
) -> list[Row]:
    """Return the decoded rows with the keys and values that decoding left in the cache and in the reader."""
    length, prompt = int(cache.get_seq_length()), reader.times.shape[1] - 2
    fills = [int((reader.times[row, 1:] < 0).sum()) for row in range(len(rows))]
    done = [min(row.of(name).length, length - fill) for row, fill in zip(rows, fills, strict=True)]
    assert length >= prompt, "the cache lacks tokens of the prompt"
    whole = [slice(fill, fill + count) for fill, count in zip(fills, done, strict=True)]
    caches = rows_of(plain(cache), whole)
    said = [
        {**row.said, name: row.of(name)._replace(done=row.of(name).base + count, cache=each)}
        for row, count, each in zip(rows, done, caches, strict=True)
    ]
    read = [dict(row.read) for row in rows]
    rotations = Rotations({name: reader.stream_of(torch.arange(before, length, device="cpu"))})
    places = [slice(max(place.start - before, 0), place.stop - before) for place in whole]
    for tap in keeping.readers(name):
        module = keeping.model.tap(tap)
        states = torch.cat(reader.noted[tap.source_layer], 1)
        new = module.read(states, rotations.of_keys(tap, module))
        for row, (each,) in enumerate(rows_of([new], places)):
            old = read[row].get(tap)
            parts = [each] if old is None else [old, each]
            read[row][tap] = KeysValues(*(torch.cat(part, 2) for part in zip(*parts, strict=True)))
    return [replace(row, said=said[number], read=read[number]) for number, row in enumerate(rows)]


def _prompts(keeping: Keeping, rows: Sequence[Row], settings: Settings) -> tuple[list[Row], Prompt]:
    """Return a tower's prompts, and the rows, with the last token of each prompt not run yet.

    A prompt is what the tower remembers, followed by a BOS token unless a segment is continued.
    """
    name, device = settings.name, settings.tower.device
    begins = [_begins(row.of(name), settings) for row in rows]
    rows = [row if begin else row.but_last(name) for row, begin in zip(rows, begins, strict=True)]
    tokens, times = [], []
    for row, begin in zip(rows, begins, strict=True):
        said = row.of(name)
        new = torch.tensor([settings.begin] * begin, dtype=torch.long, device="cpu")
        tokens.append(torch.cat([said.tokens[said.base :], new]))
        times.append(torch.cat([said.times, torch.arange(row.time, row.time + begin + 1, device="cpu")]))
    starts = [max(len(each) for each in tokens) - begin for begin in begins]
    places = {}
    for other in keeping.beside(name):
        found = zip(rows, places_beside(rows, name, other, times), strict=True)
        places[PLACES + other] = pad_left([each[row.of(name).base :] for row, each in found], 0).to(device)
    padded = pad_left(tokens, settings.begin).to(device)
    times = [when[row.of(name).base :] for row, when in zip(rows, times, strict=True)]
    return rows, Prompt(padded, pad_left(times, -1).to(device), starts, places)


def _begins(said: Said, settings: Settings) -> bool:
    """Whether decoding starts a new segment after these tokens."""
    return not settings.continues or len(said.tokens) == 0 or int(said.tokens[-1]) in settings.ends


def _until_end(tokens: Tensor, prompt: int, end: Sequence[int]) -> Tensor:
    """Cut a row after the first EOS token that follows its prompt."""
    is_end = torch.isin(tokens[prompt:], torch.tensor(end, dtype=tokens.dtype, device=tokens.device))
    return tokens[: prompt + int(is_end.int().argmax()) + 1] if bool(is_end.any()) else tokens
