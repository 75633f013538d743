import numpy as np
import pytest
import torch

from multitower_speech import SpeechModality


def melody(seed, seconds=1.0):
    """A tone whose pitch changes every 100 ms, with a little noise."""
    rng = np.random.default_rng(seed)
    pitch = np.repeat(rng.choice([200, 300, 450, 700, 1000], int(seconds * 10)), 1600)
    wave = 0.3 * np.sin(2 * np.pi * np.cumsum(pitch) / 16_000)
    return (wave + rng.normal(scale=1e-3, size=len(wave))).astype(np.float32)


def fit(**options):
    return SpeechModality.fit([melody(i) for i in range(6)], **{"units": 16, "refine_steps": 5, **options})


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
