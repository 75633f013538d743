"""Decoding with transformers' ``generate``.

The source towers run once over the prompt, and each tap caches the keys and values that it reads. To
transformers, the decoded tower is an ordinary causal LM: a copy that runs the taps after its layers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import torch

from ..batch.collate import Example, Segment, check_examples, place_in_time
from ..run.fusion import Fusion
from ..tower.decode_transformers import FOR_SPEED
from ..tower.probe import evaluated
from .advance import Keeping
from .options import (
    STOPS,
    Options,
    Settings,
    check_batches,
    check_named,
    check_shared,
    check_single,
    settle,
)
from .rows import Row
from .simultaneous import check_stepwise
from .turn import decode

Entry = str | tuple[str, ...]
"""A tower to decode, or several to decode simultaneously."""

Policy = Callable[[Example], Entry | None]
"""Takes an example so far; returns what to decode next, or None when it is complete."""

Decoded = list[list[Segment | tuple[Segment, ...]]]


@torch.no_grad()
def generate(
    model: Fusion,
    examples: Sequence[Example],
    output: Sequence[Entry] | Policy,
    options: Options,
    *,
    continues: bool = False,
) -> Decoded:
    """Decode a segment for each entry of ``output``; see ``FusedModel.generate``."""
    check_given(examples, {name: model.tower(name).vocab_size for name in model.towers})
    targets = list(model.towers) if callable(output) else _names(output)
    rows = [Row().then(example, number) for number, example in enumerate(examples)]
    became = go_on(
        Keeping(model, targets, targets), rows, output, options, lasting=False, continues=continues
    )
    copies = len(became) // len(rows)
    return [list(row.history[len(examples[number // copies]) :]) for number, row in enumerate(became)]


def go_on(
    keeping: Keeping,
    rows: Sequence[Row],
    output: Sequence[Entry] | Policy,
    options: Options,
    *,
    lasting: bool,
    continues: bool,
) -> list[Row]:
    """Decode a segment for each entry of ``output``; return the rows with these added.

    ``lasting``: whether more may be decoded or appended afterwards, so that caches must be complete.
    ``continues``: whether to continue a segment that has not ended, instead of starting a new one.
    """
    model, rows = keeping.model, list(rows)
    check_named(options, model.graph.towers)
    plan = {} if callable(output) else _plan(model, output, options, len(rows), continues)
    _check_plan(keeping, plan, lasting)
    going, step = list(range(len(rows))), 0
    with evaluated(model):
        while wanted := _ask(output, step, rows, going):
            going, step = sorted(row for chosen in wanted.values() for row in chosen), step + 1
            check_batches(len(wanted) + (len(going) < len(rows)), options)
            keep = lasting or callable(output) or step < len(output)
            for entry, chosen in wanted.items():
                if entry not in plan:
                    plan |= _plan(model, [entry], options, len(rows), continues, several=True)
                    _check_plan(keeping, plan, lasting)
                became = decode(keeping, {row: rows[row] for row in chosen}, entry, plan[entry], keep=keep)
                if len(became[0]) > 1:
                    return [copy for copies in became for copy in copies]
                for row, (new,) in zip(chosen, became, strict=True):
                    rows[row] = new
    return rows


def _ask(
    output: Sequence[Entry] | Policy, step: int, rows: Sequence[Row], going: Sequence[int]
) -> dict[Entry, list[int]]:
    """Return the entries to decode next, each with its rows."""
    if not callable(output):
        return {entry: list(going) for entry in output[step : step + 1]}
    wanted: dict[Entry, list[int]] = {}
    for row in going:
        entry = output(list(rows[row].history))
        if entry is not None:
            wanted.setdefault(entry, []).append(row)
    return wanted


def _plan(
    model: Fusion,
    output: Sequence[Entry],
    options: Options,
    examples: int,
    continues: bool,
    *,
    several: bool = False,
) -> dict[Entry, dict[str, Settings]]:
    """Return the checked settings of each entry's towers; ``several`` if more entries may follow."""
    if (
        isinstance(output, str)
        or not output
        or not all(each and isinstance(each, str | tuple) for each in output)
    ):
        raise ValueError(f"output must be a list of towers to decode, as in output=['text'], not {output!r}")
    names = list(dict.fromkeys(_names(output)))
    for name in names:
        check_name(name, model.graph.towers)
    check_shared(options, names)
    plan = {}
    for entry in output:
        together = not isinstance(entry, str)
        if together and len(set(entry)) < len(entry):
            raise ValueError(f"a tower occurs twice in {entry}: at one time it can take only one token")
        own = {**dict.fromkeys(FOR_SPEED), **options} if together else options
        settings = {
            name: replace(settle(name, model.tower(name), own), continues=continues)
            for name in _names([entry])
        }
        for name, each in settings.items():
            _check_call(each, model.tower(name).vocab_size, several or len(output) > 1 or together, examples)
        if together:
            check_stepwise(options, settings)
        plan[entry] = settings
    return plan


def _check_plan(keeping: Keeping, plan: Mapping[Entry, Mapping[str, Settings]], lasting: bool) -> None:
    for name, settings in ((name, each) for towers in plan.values() for name, each in towers.items()):
        if lasting:
            check_single(settings, "a row of a session continues in one way; decode in several forks")
        if name not in keeping.outputs:
            raise ValueError(
                f"tower {name!r} is not among the outputs of this session, which are "
                f"{', '.join(keeping.outputs)}; name it in model.session(outputs=...)"
            )


def _check_call(settings: Settings, vocabulary: int, several: bool, examples: int) -> None:
    """Check the settings of a tower; ``several`` if it is not the only one to decode."""
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


def check_given(examples: Sequence[Example], vocabularies: Mapping[str, int]) -> None:
    """Check that examples can serve as prompts, with these vocabulary sizes."""
    if len(examples) == 0:
        raise ValueError("there are no examples to decode from")
    check_examples(examples)
    for number, example in enumerate(examples):
        for segment, _ in place_in_time(example, number):
            check_name(segment.tower, vocabularies)
            if segment.target:
                raise ValueError(
                    f"example {number} contains a target segment: pass generate only what is known, without "
                    "answers"
                )
            low, high = map(int, torch.as_tensor(segment.tokens).aminmax())
            size = vocabularies[segment.tower]
            if low < 0 or high >= size:
                raise ValueError(
                    f"example {number} contains token {low if low < 0 else high} of {segment.tower!r}, which "
                    f"has a vocabulary of {size} (ids 0 to {size - 1}); was it encoded for another tower?"
                )


def _names(output: Sequence[Entry]) -> list[str]:
    return [name for entry in output for name in ((entry,) if isinstance(entry, str) else entry)]


def check_name(name: str, towers: Collection[str]) -> None:
    """Check that a tower exists."""
    if name not in towers:
        raise ValueError(f"there is no tower {name!r}; the towers are {', '.join(towers)}")
