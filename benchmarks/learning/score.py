"""Count word errors: substituted, skipped, repeated and inserted words, with confidence intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jiwer

from judge import interval, normalise

KINDS = ("substituted", "skipped", "repeated", "inserted")


def score(truth: Sequence[str], found: Sequence[str]) -> dict[str, Any]:
    """Count word errors.

    >>> counts = score(["one two three"], ["one two two four"])
    >>> counts["wer"], {kind: counts[kind] for kind in KINDS}
    (66.7, {'substituted': 1, 'skipped': 0, 'repeated': 1, 'inserted': 0})

    Returns:
        Over all utterances: "wer" in per cent, its 95 % "interval" by bootstrap over utterances, and the
        number of errors of each kind. Per utterance: "words" and "errors".
    """
    output = jiwer.process_words([normalise(each) for each in truth], [normalise(each) for each in found])
    kinds = dict.fromkeys(KINDS, 0)
    errors = []
    for heard, chunks in zip(output.hypotheses, output.alignments, strict=True):
        wrong = 0
        for chunk in chunks:
            if chunk.type == "substitute":
                kinds["substituted"] += (size := chunk.ref_end_idx - chunk.ref_start_idx)
            elif chunk.type == "delete":
                kinds["skipped"] += (size := chunk.ref_end_idx - chunk.ref_start_idx)
            elif chunk.type == "insert":
                size = chunk.hyp_end_idx - chunk.hyp_start_idx
                for place in range(chunk.hyp_start_idx, chunk.hyp_end_idx):
                    beside = (heard[max(0, place - 1) : place], heard[place + 1 : place + 2])
                    kinds["repeated" if [heard[place]] in beside else "inserted"] += 1
            else:
                size = 0
            wrong += size
        errors.append(wrong)
    words = [len(reference) for reference in output.references]
    return {
        "wer": round(100 * sum(errors) / sum(words), 1),
        "interval": [round(each, 1) for each in interval(errors, words)],
        **kinds,
        "words": words,
        "errors": errors,
    }
