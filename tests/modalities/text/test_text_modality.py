"""The text modality: bytes, and small tokenizers of transformers."""

import builtins
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import multitower as mt
from multitower_text import TextModality
from text_tokenizers import byte_level_bpe as make_tokenizer

TEXTS = ["", " ", "two towers", "hé wörld, it 's\n\ttwo  spaces ", "日本語 🗼", "\x00"]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.fixture(params=["bytes", "tokenizer"])
def text(request):
    if request.param == "bytes":
        return TextModality()
    return TextModality(request.getfixturevalue("tokenizer"))


def test_is_a_modality(text):
    assert isinstance(text, mt.Modality)
    assert text.name == "text"


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
    with pytest.raises(TypeError, match=r"not bytes: decode them first"):
        text.encode(b"two")
    with pytest.raises(TypeError, match="not int"):
        text.encode_batch(["two", 2])


@pytest.mark.parametrize("raw", ["two \ud800", "\udc00", "\ud83d\ude00"])
def test_encode_refuses_halves_of_surrogate_pairs(text, raw):
    with pytest.raises(ValueError, match=r"U\+D|U\+d") as caught:
        text.encode(raw)
    assert "surrogatepass" in str(caught.value)


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
    for option in ({"begin": 0}, {"end": "x"}, {"split_special_tokens": False}):
        with pytest.raises(ValueError, match="256 and end with 257"):
            TextModality(**option)


def test_pad_is_the_tokenizers_or_else_the_end(tokenizer):
    assert TextModality(tokenizer).pad == 2
    assert TextModality(make_tokenizer(bos_token="<s>", eos_token="</s>")).pad == 1
    assert TextModality().pad == 257


def test_accepts_chats_only_with_a_template(tokenizer):
    assert TextModality().accepts == TextModality(tokenizer).accepts == (str,)


def test_refuses_what_is_no_tokenizer(tokenizer):
    with pytest.raises(TypeError, match=r"is a Tokenizer: give one of transformers.*tokenizer_object="):
        TextModality(tokenizer.backend_tokenizer)


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


ANY_TEXT = st.text() | st.lists(
    st.sampled_from(["</s>", "<s>", "<pad>", "<", "two", " ", "\u0301", "\u05e9", "\U0001f5fc"])
).map("".join)


@pytest.fixture(scope="module")
def both(tokenizer):
    return [TextModality(), TextModality(tokenizer)]


@given(ANY_TEXT)
def test_every_text_comes_back(both, raw):
    for text in both:
        tokens = text.encode(raw)
        assert text.decode(tokens) == raw
        assert {text.begin, text.end, text.pad}.isdisjoint(tokens[1:-1].tolist())


@given(st.lists(ANY_TEXT, max_size=4))
def test_a_batch_is_its_texts_one_by_one(both, raws):
    for text in both:
        rows = text.encode_batch(raws)
        assert [row.tolist() for row in rows] == [text.encode(raw).tolist() for raw in raws]
        assert text.decode_batch(rows) == raws


@given(ANY_TEXT)
def test_the_text_of_growing_prefixes_only_grows(both, raw):
    for text in both:
        tokens = text.encode(raw)
        shown = [text.decode(tokens[:n]).rstrip("\ufffd") for n in range(len(tokens) + 1)]
        assert all(after.startswith(before) for before, after in pairwise(shown))
        assert shown[-1] == raw.rstrip("\ufffd")


@given(st.lists(st.integers(0, 300)))
def test_decode_takes_whatever_a_tower_emits(both, ids):
    for text in both:
        assert not {"<s>", "</s>", "<pad>"} & {text.decode([token]) for token in ids}
        assert text.decode(text.encode(text.decode(ids))) == text.decode(ids)


def test_what_stands_between_is_dropped(tokenizer):
    text = TextModality(tokenizer)
    two = text.encode("two")[1:-1].tolist()
    assert text.decode([2, 2, 0, *two, 1, 2, 0, *two, 1, 2, 2]) == "twotwo"


def test_transformers_can_stream_from_a_modality(text, capsys):
    streamers = pytest.importorskip(
        "transformers", reason="the streamer needs transformers"
    ).generation.streamers
    streamer = streamers.TextStreamer(text)
    for token in text.encode("two h\xe9 \U0001f5fc towers"):
        streamer.put(token[None])
    streamer.end()
    assert capsys.readouterr().out == "two h\xe9 \U0001f5fc towers\n"


def test_long_texts_are_neither_cut_nor_complained_about(caplog):
    tokenizer = make_tokenizer(bos_token="<s>", eos_token="</s>", model_max_length=8)
    tokenizer.backend_tokenizer.enable_truncation(4)
    text = TextModality(tokenizer)
    raw = "two towers " * 1000
    assert text.decode(text.encode(raw)) == raw
    assert not caplog.records


def test_a_decoder_without_a_tokenizer_says_what_to_use(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"has no tokenizer: .* plain bytes, .*'modality: text'"):
        TextModality(str(tmp_path))
