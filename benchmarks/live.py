"""Measure delay and accuracy of simultaneous transcription under several policies.

python benchmarks/live.py runs/speech_text/fused runs/speech_text/audio/*-original.wav

Clips are fed in pieces, as fast as they are processed. The words are compared with a transcription of the
whole clip. "Delay" is average lagging (arXiv 1810.08398) in seconds of audio, without computing time; the
last column is the computing time as a fraction of the clips' duration.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

import numpy as np
import soundfile
import torch
from tqdm import tqdm

import multitower as mt
from multitower.pipeline.live import Agreement, AtEnd, LivePolicy

POLICIES: list[LivePolicy] = [Agreement(2), Agreement(2, hold=9), Agreement(3), AtEnd()]


class Heard:
    """Yields a clip in pieces, and records how many seconds of it were consumed."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def pieces(self, samples: np.ndarray, rate: int, seconds: float) -> Iterator[np.ndarray]:
        """Yield pieces of ``seconds`` seconds."""
        size = round(seconds * rate)
        for start in range(0, len(samples), size):
            self.seconds = min(start + size, len(samples)) / rate
            yield samples[start : start + size]


def main() -> None:
    """Measure all policies and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="the fused checkpoint")
    parser.add_argument("clips", nargs="+", help="sound files")
    parser.add_argument("--pieces", type=float, nargs="+", default=[0.4], help="seconds in a piece")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    pipe = mt.Pipeline.from_pretrained(chosen.folder)
    speech, options = pipe.modalities["speech"], {"do_sample": False, "max_new_tokens": 200}
    clips = [soundfile.read(file, dtype="float32", always_2d=True) for file in chosen.clips]
    wholes = [pipe([("speech", file)], "text", **options).split() for file in chosen.clips]
    print("| pieces, s | policy | clips with the same words as offline | delay, s | computing / audio time |")
    print("|---:|---|---:|---:|---:|")
    for seconds in chosen.pieces:
        for policy in POLICIES:
            same, behind, began = 0, [], time.perf_counter()
            for (samples, rate), whole in zip(tqdm(clips, leave=False), wholes, strict=True):
                heard, text, times = Heard(), "", list[float]()
                pieces = speech.encode_stream(heard.pieces(samples.mean(1), rate, seconds), rate)
                for new in pipe.session(outputs=["text"]).listen("speech", pieces, "text", policy, **options):
                    text += new
                    times += [heard.seconds] * (len(text.split()) - len(times))
                same += text.split() == whole
                each = heard.seconds / max(1, len(times))
                behind.append(np.mean([when - place * each for place, when in enumerate(times)] or [0.0]))
            length = sum(len(samples) / rate for samples, rate in clips)
            computed = (time.perf_counter() - began) / length
            found = f"{same} of {len(clips)} | {np.mean(behind):.2f} | {computed:.2f}"
            print(f"| {seconds:g} | {policy} | {found} |")


if __name__ == "__main__":
    main()
