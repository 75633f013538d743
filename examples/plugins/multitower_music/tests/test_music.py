from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from multitower.testing import check_modality
from multitower_music import MusicModality
from multitower_music.modality import read

JIG = """X: 1
T: The Two Towers
C: Trad.
R: jig
Q: 3/8=120
M: 6/8
L: 1/8
K: Ador
% a comment, with notes: A2 B2
|: E | "Am"A2B c>BA | "G"^F2G {a}!trill!g3 | [K:G] (3GAB =c/d'/e,, z2 :|1 A6 :|2 [A,CE]6 |]
w: la la-la * d\u00e9j\u00e0 vu
"""
REEL = "X:2\r\nT:\u00c9ire\r\nM:C|\r\nL:1/8\r\nK:D\r\nd2fd Adfd||~a3f \\\r\n::_b2gf e2d2:|\r\n"
MUSIC = MusicModality.fit([JIG, REEL])


def test_it_is_a_modality():
    check_modality(MUSIC, ["", "z", JIG, REEL])
    check_modality(MusicModality.fit([JIG], signs=20), [REEL, "\U0001d11e\0"])


@settings(max_examples=50, derandomize=True, deadline=None)
@given(st.text() | st.text("X:T|[]\"!%(3^A,b'/2<z\n\r "))
def test_whatever_is_written_comes_back(text):
    assert MUSIC.decode(MUSIC.encode(text)) == text
    assert "".join(read(text)) == text


@pytest.mark.parametrize(
    ("music", "signs"),
    [
        ("^^F,,3/2", ["^^F,,3/2"]),
        ("c'<d/", ["c'", "<", "d/"]),
        ("A|B ||: c :|", ["A", "|", "B", " ||: ", "c", " :|"]),
        ("A|]", ["A", "|]"]),
        ("|1 d :|2 e", ["|1 ", "d", " :|2 ", "e"]),
        ("[M:3/4][CE]", ["[M:3/4]", "[", "C", "E", "]"]),
        ('"D7"!f!~d', ['"D7"', "!f!", "~", "d"]),
        ("(3:2:2AB", ["(3:2:2", "A", "B"]),
        ("K:F#m\n", ["K:", "F#m", "\n"]),
        ("A:|\n", ["A", ":|", "\n"]),
        ("M: 6/8", ["M:", " 6/8"]),
        ("%%scale", ["%%", "scale"]),
    ],
)
def test_a_sign_is_what_a_musician_reads_as_one(music, signs):
    assert list(read(music)) == signs


def test_frequent_signs_are_tokens_and_others_bytes():
    music = MusicModality.fit(["K:C\nA2A2A2B"], signs=1)
    assert (music.signs, music.vocab_size) == (("A2",), 259)
    assert music.encode("A2B2").tolist() == [257, 256, ord("B"), ord("2"), 258]
    assert music.decode(torch.tensor([0xC3, 256, 999])) == "\ufffdA2"


def test_what_is_unfit_is_refused():
    with pytest.raises(TypeError, match="must be a str in ABC notation, not bytes"):
        MUSIC.encode(b"X:1")
    with pytest.raises(ValueError, match="surrogates not allowed"):
        MUSIC.encode("\ud800")
    with pytest.raises(ValueError, match="hold no musical tokens"):
        MusicModality.fit([""])
    with pytest.raises(ValueError, match="1 signs are given twice"):
        MusicModality(["A2", "A2"])
    with pytest.raises(ValueError, match="empty or no text"):
        MusicModality(["A2", ""])
