"""Use a fused checkpoint: transcribe a clip, or synthesise a line.

python examples/transcribe.py runs/speech_text/fused clip.wav
python examples/transcribe.py runs/speech_text/fused --say "four two nine" said.wav
"""

from __future__ import annotations

import argparse

import soundfile
import transformers

import multitower as mt


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="the fused checkpoint")
    parser.add_argument("clip", help="the sound file to read, or with --say to write")
    parser.add_argument("--say", help="a line to speak into the clip")
    parser.add_argument("--max-new-tokens", type=int, help="how long the answer may grow")
    options = parser.parse_args()
    limit = {} if options.max_new_tokens is None else {"max_new_tokens": options.max_new_tokens}
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    pipe = mt.Pipeline.from_pretrained(options.folder)
    if options.say is None:
        print(pipe([("speech", options.clip)], output="text", do_sample=False, **limit).strip())
    else:
        spoken = pipe([("text", options.say)], output="speech", do_sample=False, **limit)
        soundfile.write(options.clip, spoken, pipe.modalities["speech"].sample_rate)


if __name__ == "__main__":
    main()
