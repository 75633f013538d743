"""Compare the word errors of methods, by paired bootstrap over the sentences that all have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from summary import Run, table
from train import TASKS

from judge import RESAMPLES

FUSIONS = ("zipper", "zipper-frozen")
RIVALS = ("expansion", "expansion-8-clean", "expansion-lora", "expansion-new")
"""The methods that ``reductions`` compares each of ``FUSIONS`` with."""

Rows = Mapping[tuple[str, int, int], Sequence[Run]]
"""The seeds of each method, number of pairs and number of steps."""


def reductions(found: Rows) -> str:
    """Return the relative reduction in word errors of the fusion against each form of expansion."""
    rows = []
    for rival, pairs, steps in found:
        if rival in RIVALS:
            ours = [found.get((name, pairs, steps)) for name in FUSIONS]
            cells = [
                reduction(each, found[rival, pairs, steps], task) if each else ""
                for each in ours
                for task in TASKS
            ]
            rows.append([rival, str(pairs), str(steps), *cells])
    heads = (f"{name}, {task.upper()}" for name in FUSIONS for task in TASKS)
    return table(["than", "pairs", "steps", *heads], rows)


def against(base: str, found: Rows) -> str:
    """Return the relative reduction in word errors of each method against one of them."""
    rows = [
        [
            method,
            str(pairs),
            str(steps),
            *(reduction(seeds, found[base, pairs, steps], task) for task in TASKS),
        ]
        for (method, pairs, steps), seeds in found.items()
        if method != base and (base, pairs, steps) in found
    ]
    return table(["", "pairs", "steps", *map(str.upper, TASKS)], rows)


def reduction(ours: Sequence[Run], theirs: Sequence[Run], task: str) -> str:
    """Return the relative reduction in word errors, in per cent, with a 95 % interval by paired bootstrap.

    >>> ours, theirs = ([{"asr": {"errors": errors}}] for errors in ([1, 3], [2, 6]))
    >>> reduction(ours, theirs, "asr")
    '50.0 (50.0 to 50.0)'

    The same utterances are resampled for both, and the training runs of each on their own.
    """
    random = np.random.default_rng(0)
    errors = [np.array([run[task]["errors"] for run in each]) for each in (ours, theirs)]
    count = errors[0].shape[1]
    assert errors[1].shape[1] == count, "other sentences were judged"
    shares = []
    for _ in range(RESAMPLES):
        places = random.integers(count, size=count)
        drawn = [each[random.integers(len(each), size=len(each))][:, places].mean() for each in errors]
        shares.append(100 - 100 * drawn[0] / drawn[1])
    share = 100 - 100 * errors[0].mean() / errors[1].mean()
    return "{:.1f} ({:.1f} to {:.1f})".format(share, *np.percentile(shares, [2.5, 97.5]))
