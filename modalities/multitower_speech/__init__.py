"""Speech for `multitower`: waveforms to discrete units, and back.

`SpeechModality` fits its units on your own audio, `CodecModality` takes a neural codec of transformers, and
`HubertModality` clusters the hidden states of a self-supervised model.
"""

from .codec import CodecModality
from .hubert import HubertModality
from .layout import Layout
from .modality import SpeechModality

__all__ = ["CodecModality", "HubertModality", "Layout", "SpeechModality"]
