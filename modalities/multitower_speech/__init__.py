"""Speech for `multitower`: discrete units from waveforms, and back.

`SpeechModality` fits units on your own audio, `CodecModality` uses a neural codec from transformers, and
`HubertModality` clusters the hidden states of a self-supervised model.
"""

from .codec import CodecModality
from .hubert import HubertModality
from .layout import Layout
from .modality import SpeechModality

__all__ = ["CodecModality", "HubertModality", "Layout", "SpeechModality"]
