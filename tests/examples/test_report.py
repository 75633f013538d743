from __future__ import annotations

import json

import torch

from judge import WordErrors
from report import _steadiness, as_table, write_results

ROWS = [
    {"system": "true units", "TTS": WordErrors(2.3, 0.5, 4.0)},
    {
        "system": "zipper",
        "ASR": WordErrors(1.24, 0.4, 2.3),
        "TTS": WordErrors(11.2, 8.0, 14.6),
        "text before": 1.6949,
        "text after": 17.912,
    },
]


def test_the_table_can_be_read_as_text_and_as_markdown() -> None:
    lines = as_table(ROWS, count=100).splitlines()
    assert lines[:4] == [
        "| held-out utterances |        ASR WER % |          TTS WER % | text perplexity before | after |",
        "| ------------------- | ---------------: | -----------------: | ---------------------: | ----: |",
        "| true units          |                  |   2.3 (0.5 to 4.0) |                        |       |",
        "| zipper              | 1.2 (0.4 to 2.3) | 11.2 (8.0 to 14.6) |                   1.69 | 17.91 |",
    ]
    assert lines[4] == ""
    assert "95 % interval over 100 utterances" in " ".join(lines[5:])


def test_results_keep_numbers(tmp_path) -> None:
    write_results(tmp_path, {"seed": 0}, table=ROWS)
    (units, zipper) = json.loads((tmp_path / "results.json").read_text())["table"]
    assert units == {"system": "true units", "TTS": {"rate": 2.3, "low": 0.5, "high": 4.0}}
    assert zipper["ASR"]["rate"] == 1.24
    assert zipper["text before"] == 1.6949


def test_sharp_and_ordered_attention_is_preferred() -> None:
    ordered = torch.eye(6)
    assert (
        _steadiness(ordered) > _steadiness(0.5 * ordered + 0.5 / 6) > _steadiness(torch.full((6, 6), 1 / 6))
    )
    assert _steadiness(ordered.flip(0)) < 0


def test_faint_attention_is_no_error() -> None:
    assert 0 < _steadiness(0.01 * torch.eye(3)) < 0.011
    assert abs(_steadiness(torch.zeros(3, 4))) < 1e-5
