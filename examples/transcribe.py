"""Use a fused checkpoint: write down a clip, or say a line.

python examples/transcribe.py runs/speech_text/fused clip.wav
python examples/transcribe.py runs/speech_text/fused --say "four two nine" said.wav
"""

from __future__ import annotations

import argparse
from pathlib import Path

import soundfile
import transformers

import multitower as mt
from multitower_speech import SpeechModality
from multitower_text import TextModality


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="the fused checkpoint")
    parser.add_argument("clip", type=Path, help="the sound file to read, or with --say to write")
    parser.add_argument("--say", help="a line to speak into the clip")
    parser.add_argument("--max-new-tokens", type=int, help="how long the answer may grow")
    options = parser.parse_args()
    limit = {} if options.max_new_tokens is None else {"max_new_tokens": options.max_new_tokens}
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = mt.FusedModel.from_pretrained(options.folder)
    text = TextModality.from_pretrained(options.folder / "modalities/text")
    speech = SpeechModality.from_pretrained(options.folder / "modalities/speech")
    if options.say is None:
        given = [mt.Segment("speech", speech.encode(options.clip))]
        ((written,),) = model.generate([given], output=["text"], do_sample=False, **limit)
        print(text.decode(written.tokens).strip())
    else:
        given = [mt.Segment("text", text.encode(options.say))]
        ((spoken,),) = model.generate([given], output=["speech"], do_sample=False, **limit)
        soundfile.write(options.clip, speech.decode(spoken.tokens), speech.sample_rate)


if __name__ == "__main__":
    main()
