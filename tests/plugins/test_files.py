"""How modalities read and write files."""

from __future__ import annotations

from pathlib import Path

import pytest

from letters import Letters, Tune


def test_text_is_read_and_written_as_it_stands(tmp_path: Path) -> None:
    class Words(Letters):
        media = "text"

    Words().write_file("grün", tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_bytes() == "grün".encode()
    assert Words().read_file(tmp_path / "a.txt") == "grün"


def test_other_data_are_read_by_path_or_bytes(tmp_path: Path) -> None:
    class Octets(Letters):
        accepts = (bytes,)

    (tmp_path / "a").write_bytes(b"\x00\xff")
    assert Octets().read_file(tmp_path / "a") == b"\x00\xff"
    assert Letters().read_file(tmp_path / "a") == str(tmp_path / "a")
    Octets().write_file(b"\x01", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"\x01"


def test_what_cannot_be_read_or_written_says_so(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="modality 'tune' does not say how it reads files"):
        Tune().read_file(tmp_path)
    with pytest.raises(TypeError, match="modality 'tune' does not say how it writes list"):
        Tune().write_file([1, 2], tmp_path / "a")
