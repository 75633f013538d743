"""Measure the music modality on the 12,762 tunes in ABC notation that come with music21.

pip install --no-deps music21==10.5.1
python examples/plugins/multitower_music/measure_music.py
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Sequence, Sized
from pathlib import Path

from multitower_music import MusicModality
from multitower_music.modality import FIELD

COLLECTIONS = ("essenFolksong", "oneills1850", "airdsAirs", "ryansMammoth")


def corpus() -> Path:
    """Return the path of music21's corpus, without importing music21."""
    found = importlib.util.find_spec("music21")
    if found is None or found.origin is None:
        sys.exit("music21 is not installed: pip install --no-deps music21==10.5.1")
    return Path(found.origin).parent / "corpus"


def tunes_in(folder: Path) -> list[str]:
    """Read the tunes of every file, each from its ``X:`` to the next."""
    files = [file.read_bytes().decode() for file in sorted(folder.glob("*.abc"))]
    return [tune for file in files for tune in re.split(r"^(?=X:)", file, flags=re.M) if tune[:2] == "X:"]


def without_fields(tune: str) -> str:
    """Remove the lines that are not music."""
    return "".join(line for line in tune.splitlines(keepends=True) if not FIELD.match(line))


def mean_length(pieces: Sequence[Sized]) -> float:
    return sum(map(len, pieces)) / len(pieces)


def main() -> None:
    tunes = [tune for name in COLLECTIONS for tune in tunes_in(corpus() / name)]
    held_out = tunes[::10]
    rest = [tune for index, tune in enumerate(tunes) if index % 10]
    bare = [without_fields(tune) for tune in held_out]
    print(f"{len(tunes)} tunes; fitted on {len(rest)}, measured on the other {len(held_out)}")
    print(f"characters per tune: {mean_length(held_out):.0f}, without fields {mean_length(bare):.0f}\n")
    print("| signs | tunes unchanged | tokens per tune | without fields | thereof bytes |")
    print("|------:|----------------:|----------------:|---------------:|--------------:|")
    for signs in (0, 64, 256, 1024, 4096):
        music = MusicModality.fit(rest, signs=signs)
        exact = sum(music.decode(music.encode(tune)) == tune for tune in tunes)
        whole = [music.encode(tune)[1:-1] for tune in held_out]
        notes = [music.encode(tune)[1:-1] for tune in bare]
        spelt = sum(int((tokens < 256).sum()) for tokens in notes) / sum(map(len, notes))
        lengths = f"{mean_length(whole):.0f} | {mean_length(notes):.0f}"
        print(f"| {len(music.signs)} | {exact} | {lengths} | {spelt:.1%} |")


if __name__ == "__main__":
    main()
