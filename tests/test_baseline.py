from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import multitower as mt
from models import causal_lm


class Codec:
    """A fake modality with the attributes that vocabulary expansion uses."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.begin, self.end = 1, 2


@pytest.fixture
def native() -> torch.nn.Module:
    return causal_lm("llama")


@pytest.fixture
def model(native: torch.nn.Module) -> mt.baseline.VocabularyExpansion:
    return mt.baseline.VocabularyExpansion(native, {"text": Codec(20), "speech": Codec(14)}).eval()


EXAMPLES = [
    [mt.Segment("speech", [1, 5, 6, 2]), mt.Segment("text", [1, 9, 3, 2], target=True)],
    [mt.Segment("text", [1, 4, 2]), mt.Segment("speech", [1, 9, 2], target=True), mt.Segment("text", [1, 2])],
]
ROWS = [[21, 25, 26, 22, 1, 9, 3, 2], [1, 4, 2, 21, 29, 22, 1, 2]]


def test_streams_become_one_row(model: mt.baseline.VocabularyExpansion, native: torch.nn.Module) -> None:
    out = model(**mt.collate(EXAMPLES))
    logits = native(torch.tensor(ROWS)).logits
    assert logits.shape[-1] == 34
    torch.testing.assert_close(out.logits["row"], logits)
    log = logits.log_softmax(-1)
    text = -(log[0, 4, 9] + log[0, 5, 3] + log[0, 6, 2]) / 3
    speech = -(log[1, 3, 29] + log[1, 4, 22]) / 2
    torch.testing.assert_close(out.losses, {"speech": speech, "text": text})
    torch.testing.assert_close(out.loss, text + speech)


def test_the_models_own_words_keep_their_places() -> None:
    before = causal_lm("llama")
    rows = before.get_input_embeddings().weight.detach().clone()
    expanded = mt.baseline.VocabularyExpansion(before, {"text": Codec(20), "speech": Codec(14)})
    assert torch.equal(expanded.model.get_input_embeddings().weight[:20], rows)
    assert all(parameter.requires_grad for parameter in expanded.parameters())


def test_decoding_stays_within_the_modality(
    model: mt.baseline.VocabularyExpansion, native: torch.nn.Module
) -> None:
    given = [EXAMPLES[0][:1], EXAMPLES[1][:1]]
    decoded = model.generate(given, output=["speech", "text"], max_new_tokens=4, do_sample=False)
    for row, start in zip(decoded, ([21, 25, 26, 22], [1, 4, 2]), strict=True):
        speech, text = (segment.tokens.tolist() for segment in row)
        tokens = [*start, 21]
        for token in speech[1:]:
            logits = native(torch.tensor([tokens])).logits[0, -1]
            assert token + 20 == 20 + int(logits[20:].argmax())
            tokens.append(token + 20)
        assert speech[0] == text[0] == 1
        assert max(text) < 20


def test_a_training_loop_of_fused_models_runs_it_too(model: mt.baseline.VocabularyExpansion) -> None:
    batch = mt.collate(EXAMPLES)
    whole = model(**batch)
    counts = mt.batch.count_targets([batch])
    lean = model(**batch, logits=False, num_items_in_batch={name: 2 * each for name, each in counts.items()})
    assert not lean.logits
    torch.testing.assert_close(lean.loss, whole.loss / 2)
    with pytest.raises(ValueError, match="num_items_in_batch"):
        model(**batch, num_items_in_batch={})
    for stream in batch["streams"].values():
        del stream["labels"]
    without = model(**batch)
    assert (without.loss, without.losses) == (None, {})
    torch.testing.assert_close(without.logits["row"], whole.logits["row"])


def test_bad_streams_are_refused(model: mt.baseline.VocabularyExpansion) -> None:
    with pytest.raises(ValueError, match="a stream for 'music'"):
        model(**mt.collate([[mt.Segment("music", [1])]]))
    with pytest.raises(ValueError, match="vocabulary of 14"):
        model(**mt.collate([[mt.Segment("speech", [1, 14])]]))
    with pytest.raises(ValueError, match="the batch is packed"):
        model(**mt.pack(mt.collate([[mt.Segment("speech", [1, 2])]])))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"suppress_tokens": [3]}, "suppress_tokens means tokens of one modality"),
        ({"eos_token_id": 1}, "eos_token_id means tokens"),
        ({"num_return_sequences": 2, "num_beams": 2}, "give the examples several times"),
        (
            {
                "generation_config": {
                    "text": transformers.GenerationConfig(num_return_sequences=2, num_beams=2)
                }
            },
            "give the examples several times",
        ),
        ({"output_scores": True}, "score them with"),
        ({"input_ids": torch.tensor([[1]])}, "comes from the examples"),
    ],
)
def test_options_that_cannot_be_passed_on_are_refused(
    model: mt.baseline.VocabularyExpansion, options: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate([[]], output=["text"], **options)
    with pytest.raises(ValueError, match="no modality 'music'; they are"):
        model.generate([[]], output=["music"])


def test_the_mode_comes_back_whatever_happens(model: mt.baseline.VocabularyExpansion) -> None:
    model.train()
    with pytest.raises(ValueError, match="temperature"):
        model.generate([[mt.Segment("text", [3])]], ["text"], do_sample=True, temperature=-1.0)
    assert model.training
    model.generate([[mt.Segment("text", [3])]], ["text"], max_new_tokens=1)
    assert model.training


def test_a_first_modality_of_more_ids_than_the_model_is_refused(native: torch.nn.Module) -> None:
    with pytest.raises(ValueError, match="vocabulary of 20, but its own modality 'text' one of 21"):
        mt.baseline.VocabularyExpansion(native, {"text": Codec(21), "speech": Codec(14)})


@pytest.mark.parametrize(
    ("examples", "output", "message"),
    [
        ([], ["text"], "no examples"),
        ([[mt.Segment("text", [20])]], ["text"], "token 20 of 'text', which has a vocabulary of 20"),
        ([[mt.Segment("music", [2])]], ["text"], "there is no tower 'music'"),
        ([[mt.Segment("text", [2], target=True)]], ["text"], "example 0 contains a target"),
        ([[mt.Segment("text", [2])]], [], "must be a list of names"),
        ([[mt.Segment("text", [2])]], "text", "must be a list of names"),
    ],
)
def test_bad_examples_are_refused(
    model: mt.baseline.VocabularyExpansion, examples: list, output: list, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate(examples, output)


@pytest.mark.parametrize(
    ("family", "limit"),
    [
        *((family, {}) for family in ("llama", "gpt2", "opt", "mamba")),
        ("llama", {"max_length": 14}),
        ("llama", {"max_new_tokens": 6}),
    ],
)
def test_a_batch_is_its_rows_one_by_one(family: str, limit: dict) -> None:
    config = {"gpt2": {"n_positions": 24}, "opt": {"max_position_embeddings": 24, "word_embed_proj_dim": 16}}
    limit = limit or ({"max_new_tokens": 9} if family in ("llama", "mamba") else {})
    native = causal_lm(family, config=config.get(family))
    model = mt.baseline.VocabularyExpansion(native, {"text": Codec(20), "speech": Codec(14)}).eval()
    rows = [[mt.Segment("text", range(3, 3 + length))] for length in (2, 9, 2)]

    def lengths(examples: list) -> list[list[int]]:
        return [row[0].tokens.tolist() for row in model.generate(examples, ["speech"], **limit)]

    assert lengths(rows) == [tokens for row in rows for tokens in lengths([row])]


@pytest.mark.parametrize(("family", "tied"), [("gpt2", True), ("llama", False)])
def test_tied_weights_are_saved_once_and_loaded(family: str, tied: bool, tmp_path: Path) -> None:
    model, other = (
        mt.baseline.VocabularyExpansion(causal_lm(family), {"text": Codec(20), "speech": Codec(14)})
        for _ in range(2)
    )
    assert ("model.lm_head.weight" in model.state_dict()) != tied
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    batch = mt.collate(EXAMPLES)
    assert torch.equal(other(**batch).logits["row"], model(**batch).logits["row"])
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({})
