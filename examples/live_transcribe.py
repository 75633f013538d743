"""Transcribe speech while it is spoken, from a microphone or from a file in real time.

python examples/live_transcribe.py runs/speech_text/fused --file clip.wav
python examples/live_transcribe.py runs/speech_text/fused                       # needs the extra live
python examples/live_transcribe.py runs/speech_text/fused --file clip.wav --policy wait-k --pieces 4

For a file, it prints the average lagging of the words (arXiv 1810.08398), the delay of the last after the
end, the fraction of time spent computing, and whether the words equal a transcription of the whole clip.
"""

from __future__ import annotations

import argparse
import json
import queue
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import soundfile
import torch
import transformers

import multitower as mt
from multitower.base.extras import require
from multitower.pipeline.live import Agreement, AtEnd, AtPauses, LivePolicy, WaitK

POLICIES = ("agreement", "wait-k", "at-pauses", "at-end")


class Clock:
    """Passes on pieces of sound; records the duration heard and the time spent waiting."""

    def __init__(self) -> None:
        self.begun, self.waited, self.heard = time.perf_counter(), 0.0, 0.0

    def now(self) -> float:
        return time.perf_counter() - self.begun

    def timed(self, chunks: Iterator[np.ndarray], rate: int) -> Iterator[np.ndarray]:
        while True:
            asked = time.perf_counter()
            chunk = next(chunks, None)
            self.waited += time.perf_counter() - asked
            if chunk is None:
                return
            self.heard += len(chunk) / rate
            yield chunk


def from_file(samples: np.ndarray, rate: int, seconds: float, speed: float) -> Iterator[np.ndarray]:
    """Yield chunks of a clip in real time, times ``speed``; 0 yields them without waiting."""
    begun, size = time.perf_counter(), round(seconds * rate)
    for start in range(0, len(samples), size):
        if speed:
            spoken = min(start + size, len(samples)) / rate / speed
            time.sleep(max(0.0, begun + spoken - time.perf_counter()))
        yield samples[start : start + size]


def from_microphone(rate: int, seconds: float) -> Iterator[np.ndarray]:
    """Yield chunks from the microphone until Ctrl-C."""
    heard: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()
    sounddevice = require("sounddevice", "live")

    def note(samples: np.ndarray, *_: Any) -> None:
        heard.put(samples[:, 0].copy())

    with sounddevice.InputStream(rate, round(seconds * rate), channels=1, dtype="float32", callback=note):
        try:
            while True:
                yield heard.get()
        except KeyboardInterrupt:
            return


def average_lagging(times: list[float], duration: float) -> float:
    """Return the mean delay of words, in seconds, behind a speaker with a constant word rate."""
    return sum(when - place * duration / len(times) for place, when in enumerate(times)) / max(1, len(times))


def policy_of(options: argparse.Namespace, speech: Any) -> LivePolicy:
    if options.policy == "wait-k":
        return WaitK(options.pieces, options.tokens)
    if options.policy == "at-pauses":
        second = speech.encode(np.zeros(speech.sample_rate, dtype=np.float32))[1:-1]
        return AtPauses(frozenset(second.tolist()), round(options.pause * len(second)))
    return AtEnd() if options.policy == "at-end" else Agreement()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="the fused checkpoint")
    parser.add_argument("--file", help="a sound file in place of the microphone")
    parser.add_argument("--chunk", type=float, default=0.4, help="seconds of sound in a piece")
    parser.add_argument("--speed", type=float, default=1.0, help="of a file; 0 does not wait for it")
    parser.add_argument("--policy", choices=POLICIES, default="agreement")
    parser.add_argument("--pieces", type=int, default=3, help="wait-k: pieces that are heard before a token")
    parser.add_argument("--tokens", type=float, default=1.0, help="wait-k: tokens for each further piece")
    parser.add_argument("--pause", type=float, default=0.3, help="at-pauses: seconds of silence")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="how long the text may grow")
    parser.add_argument("--json", action="store_true", help="print one line of JSON in the end")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    pipe = mt.Pipeline.from_pretrained(options.folder)
    speech: Any = pipe.modalities["speech"]
    policy = policy_of(options, speech)
    if options.file is None:
        rate, chunks = 16_000, from_microphone(16_000, options.chunk)
    else:
        samples, rate = soundfile.read(options.file, dtype="float32", always_2d=True)
        chunks = from_file(samples.mean(1), rate, options.chunk, options.speed)
    limits: dict[str, Any] = {"max_new_tokens": options.max_new_tokens, "do_sample": False}
    pipe([("speech", np.zeros(rate // 2, dtype=np.float32))], "text", do_sample=False, max_new_tokens=2)

    clock, words, text = Clock(), list[float](), ""
    pieces = speech.encode_stream(clock.timed(chunks, rate), rate)
    session = pipe.session(outputs=["text"])
    for new in session.listen("speech", pieces, "text", policy, **limits):
        text += new
        words += [clock.now()] * (len(text.split()) - len(words))
        print(new, end="", flush=True)
    print()
    if options.file is None:
        return
    whole = pipe([("speech", options.file)], "text", **limits)
    found = {
        "seconds": round(clock.heard, 2),
        "average lagging": round(average_lagging(words, clock.heard), 2),
        "after the end": round(clock.now() - clock.heard, 2) if options.speed else None,
        "computed": round((clock.now() - clock.waited) / clock.heard, 3),
        "same words": text.split() == whole.split(),
    }
    if options.json:
        print(json.dumps({**found, "text": text.strip(), "whole": whole.strip()}))
    else:
        print("; ".join(f"{name}: {value}" for name, value in found.items()))


if __name__ == "__main__":
    main()
