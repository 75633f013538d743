"""Transcribe a clip while it is being heard."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("soundfile", reason="needs soundfile")
pytest.importorskip("librosa", reason="needs librosa")

import live_transcribe


@pytest.mark.parametrize("policy", ["agreement", "wait-k", "at-end"])
def test_words_come_while_the_clip_is_heard(
    parts: Path,
    fused: Path,
    policy: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clip = str(parts / "clips" / "0.wav")
    arguments = [str(fused), "--file", clip, "--chunk", "0.05", "--policy", policy, "--speed", "20"]
    arguments += ["--max-new-tokens", "12", "--json"]
    monkeypatch.setattr("sys.argv", ["live_transcribe.py", *arguments])
    threads = live_transcribe.torch.get_num_threads()
    live_transcribe.main()
    live_transcribe.torch.set_num_threads(threads)
    streamed, last = capsys.readouterr().out.rsplit("\n", 2)[:2]
    found = json.loads(last)
    assert streamed.strip() == found["text"]
    assert found["seconds"] == 0.25
    assert found["computed"] > 0
    assert policy != "at-end" or found["same words"]


def test_lagging_is_behind_a_speaker_who_says_words_evenly() -> None:
    assert live_transcribe.average_lagging([1.0, 2.0, 3.0], duration=3.0) == 1.0
    assert live_transcribe.average_lagging([3.0, 3.0, 3.0], duration=3.0) == 2.0
    assert live_transcribe.average_lagging([], duration=3.0) == 0.0
