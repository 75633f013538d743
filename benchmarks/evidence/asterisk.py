"""Human recordings for tests only: the prompts of the Asterisk telephone exchange, by one speaker."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import av
import numpy as np

from spoken_corpus import Utterance, clean_transcript

SOUNDS = "usr/share/asterisk/sounds/en_US_f_Allison"
TRANSCRIPTS = "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"


def read_asterisk(root: Path) -> list[Utterance]:
    """Return the clips whose transcript has 3 to 24 words and no digits; each transcript once.

    Args:
        root: The folder where Debian's ``asterisk-core-sounds-en`` and ``asterisk-core-sounds-en-g722`` are
            installed (``/``) or unpacked (``dpkg-deb -x``).

    Raises:
        ValueError: A file is missing.
    """
    listing = root / TRANSCRIPTS
    if not listing.is_file():
        raise ValueError(f"{listing} is missing: install or unpack Debian's asterisk-core-sounds-en")
    found: dict[str, Utterance] = {}
    for line in gzip.decompress(listing.read_bytes()).decode("utf-8", "replace").splitlines():
        name, colon, said = line.partition(": ")
        file = root / SOUNDS / f"{name}.g722"
        usable = colon and not line.startswith(";") and not re.search(r"[\[\]0-9<>]", said)
        transcript = clean_transcript(said)
        if usable and 3 <= len(transcript.split()) <= 24 and transcript not in found and file.is_file():
            found[transcript] = Utterance(transcript, _read(file))
    if not found:
        raise ValueError(f"{root / SOUNDS} has no recordings: install asterisk-core-sounds-en-g722")
    return list(found.values())


def _read(file: Path) -> np.ndarray:
    with av.open(str(file), format="g722") as stream:
        frames = [frame.to_ndarray().reshape(-1) for frame in stream.decode(audio=0)]
    return np.concatenate(frames).astype(np.float32) / 32768
