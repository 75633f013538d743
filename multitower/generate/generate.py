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
from ..run.max_positions import bounded, check_room
from ..tower.decode_transformers import FOR_SPEED
from ..tower.probe import evaluated
from .options import STOPS, Options, Settings, check_batches, check_named, check_shared, groups, settle
from .simultaneous import check_stepwise, decode_together
from .tap_cache import TapCache, TapReader

Entry = str | tuple[str, ...]
"""A tower to decode, or several to decode at the same time."""

Policy = Callable[[Example], Entry | None]
"""Called with an example as it stands; says what to decode next, or None when it is complete."""

Prompt = tuple[Tensor, Tensor]
"""The tokens of one row's earlier segments of a tower, then the begin token, and their times."""

Decoded = list[list[Segment | tuple[Segment, ...]]]


@torch.no_grad()
def generate(
    model: Fusion, examples: Sequence[Example], output: Sequence[Entry] | Policy, options: Options
) -> Decoded:
    """Decode a segment for each entry of ``output``; see ``FusedModel.generate``.

    Raises:
        ValueError: Nothing is to be decoded, a tower is unknown or has no begin token, an example holds
            a target, or an option cannot be passed on.
    """
    check_given(examples, {name: model.tower(name).vocab_size for name in model.towers})
    check_named(options, model.graph.towers)
    plan = {} if callable(output) else _plan(model, output, options, len(examples))
    targets = list(model.towers) if callable(output) else _names(output)
    rows: Decoded = [list(example) for example in examples]
    going, asked = list(range(len(rows))), list[list[Entry]]()
    with evaluated(model):
        cache = TapCache.fill(model, make_streams(rows), targets)
        while wanted := _ask(output, len(asked), rows, going):
            going = sorted(row for chosen in wanted.values() for row in chosen)
            check_batches(len(wanted) + (len(going) < len(rows)), options)
            if asked:
                cache = _after(model, cache, rows, asked[-1])
            asked.append(list(wanted))
            for entry, chosen in wanted.items():
                if entry not in plan:
                    plan |= _plan(model, [entry], options, len(examples), several=True)
                new = _decode(model, cache, {row: rows[row] for row in chosen}, entry, plan[entry])
                if len(new) > len(chosen):
                    return [[each] for each in new]
                for row, each in zip(chosen, new, strict=True):
                    rows[row].append(each)
    return [row[len(example) :] for row, example in zip(rows, examples, strict=True)]


def _ask(
    output: Sequence[Entry] | Policy, step: int, rows: Sequence[Example], going: Sequence[int]
) -> dict[Entry, list[int]]:
    """Return what is to be decoded next, each with the rows that want it."""
    if not callable(output):
        return {entry: list(going) for entry in output[step : step + 1]}
    wanted: dict[Entry, list[int]] = {}
    for row in going:
        entry = output(rows[row])
        if entry is not None:
            wanted.setdefault(entry, []).append(row)
    return wanted


def _plan(
    model: Fusion, output: Sequence[Entry], options: Options, examples: int, *, several: bool = False
) -> dict[Entry, dict[str, Settings]]:
    """Return the checked settings of each entry's towers; more entries are to come if ``several``."""
    if (
        isinstance(output, str)
        or not output
        or not all(each and isinstance(each, str | tuple) for each in output)
    ):
        raise ValueError(f"output must be a list of towers to decode, as in output=['text'], not {output!r}")
    names = list(dict.fromkeys(_names(output)))
    for name in names:
        _check_name(name, model.graph.towers)
    check_shared(options, names)
    plan = {}
    for entry in output:
        together = not isinstance(entry, str)
        if together and len(set(entry)) < len(entry):
            raise ValueError(f"a tower stands twice in {entry}: at one time it can take only one token")
        own = {**dict.fromkeys(FOR_SPEED), **options} if together else options
        settings = {name: settle(name, model.tower(name), own) for name in _names([entry])}
        for name, each in settings.items():
            _check_call(each, model.tower(name).vocab_size, several or len(output) > 1 or together, examples)
        if together:
            check_stepwise(options, settings)
        plan[entry] = settings
    return plan


def _check_call(settings: Settings, vocabulary: int, several: bool, examples: int) -> None:
    """Check that a tower can be decoded with its settings, alone or one of several, from so many examples."""
    if not 0 <= settings.begin < vocabulary:
        raise ValueError(
            f"the begin token {settings.begin} is outside the vocabulary of {vocabulary} of tower "
            f"{settings.name!r}"
        )
    if settings.get("streamer") is not None and examples > 1:
        raise ValueError("a streamer follows one row; call generate for one example at a time")
    if (settings.config.num_return_sequences or 1) > 1:
        if several:
            raise ValueError(
                "num_return_sequences > 1 needs a single output tower, as in output=['text']; decode the "
                "next from these"
            )
        if any(settings.get(key) for key in STOPS):
            raise ValueError(
                f"num_return_sequences > 1 with {' or '.join(STOPS)}: nothing says where each of them "
                "stopped; call generate once for each"
            )


def _decode(
    model: Fusion,
    cache: TapCache,
    rows: Mapping[int, Example],
    entry: Entry,
    settings: Mapping[str, Settings],
) -> Sequence[Segment | tuple[Segment, ...]]:
    """Decode rows, by their numbers in the cache, together where that does not change what each becomes."""
    numbers, prompts = list(rows), {name: list[Prompt]() for name in settings}
    for number, row in rows.items():
        for name, each in settings.items():
            tokens, times = _prompt(row, name, each.begin)
            check_room(name, model.tower(name), times, f"example {number}, with a begin token,")
            prompts[name].append((tokens, times))
    lengths = [(each, [len(tokens) for tokens, _ in prompts[name]]) for name, each in settings.items()]
    decoded: dict[int, Any] = {}
    for group in groups(lengths):
        part = cache.of_rows([numbers[row] for row in group])
        padded = {
            name: (
                pad_left([prompts[name][row][0] for row in group], each.begin).to(each.tower.device),
                pad_left([prompts[name][row][1] for row in group], -1).to(each.tower.device),
            )
            for name, each in settings.items()
        }
        if isinstance(entry, str):
            tokens, times = padded[entry]
            reader = TapReader(model, entry, part, times)
            decoder = bounded(model.tower(entry).decoder(reader), entry, model.tower(entry))
            sequences = decode_rows(decoder, tokens, times >= 0, settings[entry])
            new: Any = [Segment(entry, sequence) for sequence in sequences]
        else:
            new = decode_together(model, part, padded, settings)
        copies = len(new) // len(group)
        decoded |= {row: new[number * copies :][:copies] for number, row in enumerate(group)}
    return [each for row in range(len(numbers)) for each in decoded[row]]


def decode_rows(decoder: Any, tokens: Tensor, mask: Tensor, settings: Settings) -> list[Tensor]:
    """Let transformers decode after prompts of unlike length.

    Args:
        decoder: A causal LM with ``generate``.
        tokens: The prompts, int64, shape (batch, length), padded on the left, each with the begin token
            of the new segment at its end.
        mask: Where they are not padding, bool, shape (batch, length).
        settings: With what to decode.

    Returns:
        Each new segment on the CPU, from its begin token to its end token if it was reached.
    """
    length = tokens.shape[1]
    options = {**settings.options, **settings.limits(length)}
    sequences = decoder.generate(tokens, attention_mask=mask.long(), **options)
    return [_until_end(sequence[length - 1 :].cpu(), settings.ends) for sequence in sequences]


def _after(model: Fusion, cache: TapCache, rows: Sequence[Example], entries: Sequence[Entry]) -> TapCache:
    """Bring a cache up to date: a tower decoded alone runs over its tokens, several at a time need all."""
    streams = make_streams(rows)
    if len(entries) > 1 or not isinstance(entries[0], str):
        return TapCache.fill(model, streams, cache.targets)
    cache.refresh(entries[0], streams[entries[0]])
    return cache


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


def _names(output: Sequence[Entry]) -> list[str]:
    return [name for entry in output for name in ((entry,) if isinstance(entry, str) else entry)]


def _check_name(name: str, towers: Collection[str]) -> None:
    if name not in towers:
        raise ValueError(f"there is no tower {name!r}; the towers are {', '.join(towers)}")


def _prompt(row: Example, name: str, begin: int) -> Prompt:
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
