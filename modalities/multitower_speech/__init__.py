"""Speech for `multitower`: 16 kHz waveforms to discrete units fitted on your own audio, and back."""

from .modality import SpeechModality

__all__ = ["SpeechModality"]
