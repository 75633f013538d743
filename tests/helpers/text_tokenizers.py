"""Tokenizers trained on a few lines, for tests of the text modality."""

from pathlib import Path

import pytest
import tokenizers
import transformers

LINES = ["two towers, two words", "the quick brown fox jumps over the lazy dog", "user: hello world"]
SPECIAL = ["<s>", "</s>", "<pad>"]
NAMED = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
CHATML = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{{ eos_token }}\n"
    "{% endfor %}"
)


def byte_level_bpe(**special):
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=SPECIAL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(LINES[:1], trainer)
    # A template that adds its own special tokens, to show that encode does not use it.
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def unigram():
    """Return a tokenizer whose special tokens are ordinary pieces of its model."""
    pieces = [("<s>", 0.0), ("</s>", 0.0), ("<pad>", 0.0), ("<unk>", 0.0)]
    letters = sorted(set("".join(LINES)) | set("\u2581</>"))
    pieces += [(letter, -5.0) for letter in letters]
    inner = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=3))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    inner.decoder = tokenizers.decoders.Metaspace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", **NAMED)


def byte_fallback():
    """Return a tokenizer like Llama's: pieces begin with a space, other characters become bytes."""
    names = [*SPECIAL, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"\u2581adeorstw"]
    vocab = {name: i for i, name in enumerate(names)}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    inner.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("\u2581"), tokenizers.normalizers.Replace(" ", "\u2581")]
    )
    parts = [tokenizers.decoders.Replace("\u2581", " "), tokenizers.decoders.ByteFallback()]
    parts += [tokenizers.decoders.Fuse(), tokenizers.decoders.Strip(" ", 1, 0)]
    inner.decoder = tokenizers.decoders.Sequence(parts)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", **NAMED)


def lower_casing(folder: Path):
    """Return a WordPiece tokenizer without BOS and EOS."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "two", "tow", "##ers", ","]
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    return transformers.BertTokenizer(str(folder / "vocab.txt"))


def sentencepiece(folder: Path):
    """Return a tokenizer in Python with a sentencepiece model."""
    trainer = pytest.importorskip("sentencepiece", reason="needs sentencepiece").SentencePieceTrainer
    lines = iter(LINES * 20)
    trainer.train(
        sentence_iterator=lines,
        model_prefix=str(folder / "spiece"),
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return transformers.BertGenerationTokenizer(str(folder / "spiece.model"))


def python_bytes():
    """Return a tokenizer in Python without BOS."""
    return transformers.ByT5Tokenizer()
