"""The text modality: bytes, and tokenizers of transformers made on the spot."""

import builtins
import json

import pytest
import torch

from multitower.modality import Modality
from multitower_text import TextModality

TEXTS = ["", " ", "two towers", "hé wörld, it 's\n\ttwo  spaces ", "日本語 🗼", "\x00"]


def make_tokenizer(**special):
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(["two towers, two words"], trainer)
    # A template that adds its own special tokens, to show that encode does not use it.
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.fixture(params=["bytes", "tokenizer"])
def text(request):
    if request.param == "bytes":
        return TextModality()
    return TextModality(request.getfixturevalue("tokenizer"))


def test_satisfies_the_protocol(text):
    assert isinstance(text, Modality)


@pytest.mark.parametrize("raw", TEXTS)
def test_round_trip(text, raw):
    tokens = text.encode(raw)
    assert tokens.dtype == torch.int64
    assert tokens.ndim == 1
    assert tokens[0] == text.begin
    assert tokens[-1] == text.end
    assert tokens.max() < text.vocab_size
    assert text.decode(tokens) == raw
    assert text.decode(tokens[1:]) == raw
    assert text.decode(tokens[:-1]) == raw
    assert text.decode(tokens[1:-1]) == raw


def test_encode_adds_begin_and_end_once(text):
    tokens = text.encode("two").tolist()
    assert tokens.count(text.begin) == tokens.count(text.end) == 1


def test_decode_any_tokens(text):
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        tokens = torch.randint(text.vocab_size + 5, (30,), generator=generator)
        assert isinstance(text.decode(tokens), str)
    assert text.decode(torch.tensor([], dtype=torch.int64)) == ""
    assert text.decode([text.begin, text.begin, text.end]) == ""


def test_bytes_that_are_no_utf8():
    assert TextModality().decode(torch.tensor([104, 0xC3, 105])) == "h\ufffdi"


def test_padding_after_the_end_is_dropped(tokenizer):
    text = TextModality(tokenizer)
    padded = torch.cat([text.encode("two"), torch.full((3,), tokenizer.pad_token_id)])
    assert text.decode(padded) == "two"


@pytest.mark.parametrize(
    ("tokens", "message"),
    [(torch.zeros(2, 3, dtype=torch.int64), r"\(2, 3\)"), (torch.zeros(3), "float32"), ([-100, 3], "-100")],
)
def test_decode_refuses(text, tokens, message):
    with pytest.raises(ValueError, match=message):
        text.decode(tokens)


def test_encode_refuses_what_is_no_str(text):
    with pytest.raises(TypeError, match="list"):
        text.encode(["two", "towers"])


def test_begin_may_equal_end():
    text = TextModality(make_tokenizer(bos_token="</s>", eos_token="</s>"))
    assert text.begin == text.end == 1
    assert text.decode(text.encode("two")) == "two"
    assert text.decode(text.encode("")) == ""


def test_vocab_size_counts_added_tokens():
    tokenizer = make_tokenizer(bos_token="<s>", eos_token="</s>")
    before = TextModality(tokenizer).vocab_size
    tokenizer.add_tokens(["<speech>"])
    text = TextModality(tokenizer, begin="<speech>")
    assert text.vocab_size == before + 1
    assert text.begin == before


def test_a_missing_begin_or_end_is_never_guessed():
    tokenizer = make_tokenizer(eos_token="</s>")
    tokenizer.name_or_path = "lab/no-bos"
    with pytest.raises(ValueError, match=r"'lab/no-bos' has no bos token: pass begin="):
        TextModality(tokenizer)
    with pytest.raises(ValueError, match=r"has no eos token: pass end="):
        TextModality(make_tokenizer(bos_token="<s>"))
    assert TextModality(tokenizer, begin="</s>").begin == 1
    assert TextModality(tokenizer, begin=0).begin == 0


@pytest.mark.parametrize("begin", ["<nowhere>", -1, 10_000])
def test_begin_outside_the_vocabulary(tokenizer, begin):
    with pytest.raises(ValueError, match="not in the vocabulary"):
        TextModality(tokenizer, begin=begin)


def test_begin_and_end_are_fixed_for_bytes():
    with pytest.raises(ValueError, match="256 and 257"):
        TextModality(begin=0)


def test_save_and_load(text, tmp_path):
    text.save_pretrained(tmp_path / "deep" / "text")
    loaded = TextModality.from_pretrained(tmp_path / "deep" / "text")
    assert (loaded.begin, loaded.end, loaded.vocab_size) == (text.begin, text.end, text.vocab_size)
    for raw in TEXTS:
        assert torch.equal(loaded.encode(raw), text.encode(raw))


def test_save_and_load_keeps_begin_and_end(tmp_path):
    TextModality(make_tokenizer(eos_token="</s>"), begin="<pad>").save_pretrained(tmp_path)
    assert TextModality.from_pretrained(tmp_path).begin == 2
    assert TextModality(tmp_path, begin=0).begin == 0


def test_load_names_the_missing_file(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"modality\.json"):
        TextModality.from_pretrained(tmp_path)
    TextModality(tokenizer).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer_config\.json"):
        TextModality.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", json.dumps({"format": 2, "type": "text"})])
def test_load_names_the_damaged_file(tmp_path, content):
    (tmp_path / "modality.json").write_text(content)
    with pytest.raises(ValueError, match=r"modality\.json"):
        TextModality.from_pretrained(tmp_path)


def test_missing_transformers(monkeypatch):
    real = builtins.__import__

    def fail(name, *rest):
        if name == "transformers":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", fail)
    assert TextModality().decode(TextModality().encode("two")) == "two"
    with pytest.raises(ImportError, match=r"pip install multitower\[text\]"):
        TextModality("gpt2")
