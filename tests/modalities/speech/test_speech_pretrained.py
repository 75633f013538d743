"""Codecs and self-supervised models of transformers as speech modalities: tiny ones with random weights."""

import json
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("librosa", reason="speech needs the speech extra")
pytest.importorskip("soundfile", reason="speech needs the speech extra")
pytest.importorskip("sklearn", reason="speech needs the speech extra")
transformers = pytest.importorskip("transformers", reason="codecs need transformers")

import multitower as mt
from melodies import melody, one_thread  # noqa: F401  # a fixture
from multitower_speech import CodecModality, HubertModality, pretrained
from multitower_speech.frontend import log_mel
from multitower_speech.hubert import _hidden


def mimi(**changes):
    config = transformers.MimiConfig(
        **{
            "num_filters": 4,
            "hidden_size": 16,
            "upsampling_ratios": [8, 5, 4],
            "codebook_size": 32,
            "codebook_dim": 8,
            "vector_quantization_hidden_dimension": 8,
            "num_quantizers": 4,
            "upsample_groups": 16,
            "num_hidden_layers": 1,
            "intermediate_size": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            **changes,
        }
    )
    return with_codebooks(transformers.MimiModel(config))


def encodec(**changes):
    settings = {"num_filters": 4, "hidden_size": 16, "upsampling_ratios": [8, 5, 4], "codebook_size": 32}
    rates = {"num_lstm_layers": 1, "target_bandwidths": [1.5, 3.0]}
    return with_codebooks(
        transformers.EncodecModel(transformers.EncodecConfig(**{**settings, **rates, **changes}))
    )


def dac():
    config = transformers.DacConfig(
        encoder_hidden_size=4,
        decoder_hidden_size=64,
        downsampling_ratios=[4, 5, 8],
        n_codebooks=3,
        codebook_size=32,
    )
    return transformers.DacModel(config)


def with_codebooks(model):
    """Randomise the codebooks, which are zero in a new model."""
    for name, buffer in model.named_buffers():
        if name.endswith((".embed", ".embed_sum")):
            buffer.normal_(std=0.3)
    return model


def hubert(kind="Hubert", **changes):
    settings = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    convolutions = {"conv_dim": [8] * 7, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    config = getattr(transformers, f"{kind}Config")(**{**settings, **convolutions, **changes})
    return getattr(transformers, f"{kind}Model")(config)


@pytest.fixture(scope="module", params=[mimi, encodec, dac], ids=lambda make: make.__name__)
def codec(request):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return request.param()


def fit_hubert(model, **options):
    clips = [melody(number) for number in range(4)]
    return HubertModality.fit(model, clips, **{"layer": 1, "units": 8, "refine_steps": 5, **options})


@pytest.fixture(scope="module")
def hubert_speech():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return fit_hubert(hubert())


@pytest.mark.parametrize("pattern", ["flattened", "delayed"])
@pytest.mark.parametrize("samples", [1, 16_001])
def test_encode_and_decode_shapes(codec, pattern, samples):
    speech = CodecModality(codec, codebooks=2, pattern=pattern)
    tokens = speech.encode((melody(0, 2)[:samples], speech.sample_rate))
    frames = -(-samples // speech.hop)
    assert tokens.dtype == torch.int64
    assert len(tokens) == 2 * (frames + (pattern == "delayed")) + 2
    audio = speech.decode(tokens)
    assert audio.dtype == np.float32
    assert audio.shape == (frames * speech.hop,)
    assert np.abs(audio).max() <= 1
    assert tokens.max() < speech.vocab_size


def test_units_and_sound_are_the_codecs_own(codec):
    speech = CodecModality(codec)
    clip = melody(1)
    codes = speech.layout.unweave(speech.encode((clip, speech.sample_rate)))
    output = codec(torch.from_numpy(clip).reshape(1, 1, -1), **whole(codec))
    assert torch.equal(codes.T.flatten(), output.audio_codes.flatten())
    assert len(set(codes.flatten().tolist())) > 3
    audio = speech.decode(speech.layout.weave(codes))
    values = output.audio_values.detach().flatten().numpy()[: len(audio)]
    np.testing.assert_allclose(audio[: len(values)], values.clip(-1, 1), atol=1e-5)


def whole(codec):
    bandwidths = getattr(codec.config, "target_bandwidths", None)
    return {"bandwidth": bandwidths[-1]} if bandwidths else {}


def test_fewer_codebooks_are_the_first_ones(codec):
    full, part = CodecModality(codec), CodecModality(codec, codebooks=1)
    codes = full.layout.unweave(full.encode(melody(1)))
    assert torch.equal(part.layout.unweave(part.encode(melody(1))), codes[:, :1])


def test_other_rates_are_resampled(codec):
    speech = CodecModality(codec, codebooks=1)
    frames = round(speech.rate)
    assert len(speech.encode(melody(1))) == frames + 2
    assert len(speech.encode((np.zeros(44_100), 44_100))) == frames + 2


def test_streams_are_the_whole_window_by_window(codec, hubert_speech):
    for speech in (CodecModality(codec, codebooks=2, window=0.3), hubert_speech):
        clip = melody(3, 2)
        chunks = np.split(clip, [100, 7000, 7001, 20_000])
        streamed = list(speech.encode_stream(chunks))
        assert torch.equal(torch.cat(streamed), speech.encode(clip))
    assert len(list(CodecModality(codec, window=0.3).encode_stream([melody(3, 2)]))) > 5


def test_long_sound_goes_back_window_by_window(codec):
    speech = CodecModality(codec, codebooks=1, window=0.5)
    tokens = speech.encode(melody(3, 2))
    assert len(speech.decode(tokens)) == (len(tokens) - 2) * speech.hop


@pytest.mark.parametrize("stored", [False, True])
def test_codecs_are_saved_by_id_or_stored(codec, stored, tmp_path, monkeypatch):
    clip, source = melody(2), tmp_path / "source"
    codec.save_pretrained(source)
    options = {"codebooks": 2, "pattern": "delayed", "window": 0.5}
    if stored:
        speech = CodecModality(source, **options)
    else:
        load = transformers.AutoModel.from_pretrained

        def hub(name: str, **rest: Any) -> Any:
            return load({"org/codec": source}.get(name, name), **rest)

        monkeypatch.setattr(transformers.AutoModel, "from_pretrained", hub)
        speech = CodecModality("org/codec", **options)
    speech.save_pretrained(tmp_path / "speech")
    kept = {path.name for path in (tmp_path / "speech").iterdir()}
    assert kept == ({"modality.json", "model"} if stored else {"modality.json"})
    loaded = CodecModality.from_pretrained(tmp_path / "speech")
    assert torch.equal(loaded.encode(clip), speech.encode(clip))
    assert loaded.layout == speech.layout
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(CodecModality.from_pretrained(tmp_path / "again").encode(clip), speech.encode(clip))


def test_what_is_damaged_is_named(codec, tmp_path):
    with pytest.raises(mt.errors.CheckpointError, match="nowhere cannot be loaded"):
        CodecModality(tmp_path / "nowhere")
    CodecModality(codec).save_pretrained(tmp_path)
    weights = tmp_path / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(mt.errors.CheckpointError, match=str(tmp_path)):
        CodecModality.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(mt.errors.CheckpointError, match=r"model cannot be loaded .*safetensors"):
        CodecModality.from_pretrained(tmp_path)
    document = json.loads((tmp_path / "modality.json").read_text())
    (tmp_path / "modality.json").write_text(json.dumps({**document, "modality": "speech"}))
    with pytest.raises(mt.errors.CheckpointError, match="that of modality 'speech', not of 'speech_codec'"):
        CodecModality.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (mimi, {"codebooks": 0}, "codebooks=0: this mimi has 1 to 4"),
        (mimi, {"codebooks": 5}, "codebooks=5"),
        (mimi, {"window": 0}, "window=0"),
        (mimi, {"pattern": "random"}, "pattern='random'"),
        (hubert, {}, "type hubert: CodecModality takes mimi, encodec and dac"),
        (lambda: encodec(chunk_length_s=1.0, overlap=0.1), {}, "not for mono sound in one piece"),
    ],
)
def test_codecs_that_are_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        CodecModality(make(), **options)


@pytest.mark.parametrize("kind", ["Hubert", "Wav2Vec2", "WavLM"])
def test_units_are_the_nearest_to_the_hidden_states(kind):
    model = hubert(kind)
    speech = fit_hubert(model, codebooks=2)
    clip = melody(5)
    codes = speech.layout.unweave(speech.encode(clip))
    assert codes.shape == (50, 2)
    scaled = (clip - clip.mean()) / np.sqrt(clip.var() + 1e-7)
    padded = torch.from_numpy(np.pad(scaled, 40)).unsqueeze(0)
    states = model(padded, output_hidden_states=True).hidden_states[1][0]
    assert torch.equal(codes[:, 0], torch.cdist(states, speech.codebooks[0]).argmin(1))


def test_hubert_units_go_back_to_sound(hubert_speech):
    assert hubert_speech.name == "speech_hubert"
    learned = fit_hubert(hubert_speech.model, units=16, refine_steps=80)
    clip = melody(0)
    audio = learned.decode(learned.encode(clip))
    assert audio.shape == clip.shape
    assert np.abs(audio).max() <= 1
    mean = log_mel([melody(1)]).mean(0)
    error = np.abs(log_mel([audio]) - log_mel([clip])).mean()
    assert error < 0.9 * np.abs(mean - log_mel([clip])).mean()


def test_hubert_is_deterministic_and_a_model_in_training_is_put_to_rest(hubert_speech):
    again = fit_hubert(hubert_speech.model.train())
    assert torch.equal(again.codebooks, hubert_speech.codebooks)
    assert torch.equal(again.encode(melody(9)), hubert_speech.encode(melody(9)))


def test_windows_are_normalised_if_asked():
    model, quiet = hubert().eval(), 0.01 * melody(6)
    scaled = (quiet - quiet.mean()) / np.sqrt(quiet.var() + 1e-7)
    for normalize, samples in ((True, scaled), (False, quiet)):
        padded = torch.from_numpy(np.pad(samples, 40)).unsqueeze(0)
        wanted = model(padded, output_hidden_states=True).hidden_states[0][0]
        states = [_hidden(model, quiet, 0, given) for given in (normalize, not normalize)]
        assert torch.equal(states[0], wanted)
        assert not torch.equal(states[1], wanted)


def test_hubert_saves_and_loads(hubert_speech, tmp_path):
    hubert_speech.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"modality.json", "modality.safetensors", "model"}
    loaded = HubertModality.from_pretrained(tmp_path)
    tokens = hubert_speech.encode(melody(4))
    assert torch.equal(loaded.encode(melody(4)), tokens)
    assert np.array_equal(loaded.decode(tokens), hubert_speech.decode(tokens))
    (tmp_path / "modality.safetensors").unlink()
    with pytest.raises(mt.errors.CheckpointError, match=r"modality\.safetensors"):
        HubertModality.from_pretrained(tmp_path)


def test_hubert_by_id_keeps_the_id(hubert_speech, tmp_path, monkeypatch):
    hubert_speech.model.save_pretrained(tmp_path / "source")
    load = transformers.AutoModel.from_pretrained

    def hub(name: str, **rest: Any) -> Any:
        return load({"org/hubert": tmp_path / "source"}.get(name, name), **rest)

    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", hub)
    speech = fit_hubert("org/hubert")
    speech.save_pretrained(tmp_path / "speech")
    assert not (tmp_path / "speech/model").exists()
    loaded = HubertModality.from_pretrained(tmp_path / "speech")
    assert torch.equal(loaded.encode(melody(4)), speech.encode(melody(4)))


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (mimi, {}, "type mimi: HubertModality takes hubert"),
        (hubert, {"layer": 3}, "layer=3: this hubert has 0 to 2"),
        (hubert, {"units": 1000}, "units=1000"),
        (hubert, {"refine_steps": 0}, "refine_steps=0"),
        (hubert, {"window": 0.001}, r"window=0\.001"),
        (lambda: hubert(conv_stride=(5, 2, 2, 2, 2, 2, 1)), {}, "multiple of 320"),
    ],
)
def test_hubert_refuses(make, options, message):
    with pytest.raises(ValueError, match=message):
        fit_hubert(make(), **options)


def test_hubert_says_which_waveform():
    with pytest.raises(ValueError, match="waveform 1: audio is empty"):
        HubertModality.fit(hubert(), [melody(0), np.zeros(0)], layer=1)
    with pytest.raises(ValueError, match="give a list"):
        HubertModality.fit(hubert(), melody(0), layer=1)
    with pytest.raises(ValueError, match="no waveforms"):
        HubertModality.fit(hubert(), [], layer=1)


def test_hubert_codebooks_of_a_wrong_shape(hubert_speech):
    with pytest.raises(ValueError, match=r"\(1, 8, 17\)"):
        HubertModality(hubert_speech.model, torch.zeros(1, 8, 17), hubert_speech.regressor, layer=1)


def test_missing_transformers(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ImportError, match="transformers"):
        pretrained.load_model("org/codec")
