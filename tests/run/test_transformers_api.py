"""Methods and attributes that users of transformers and peft expect."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import multitower as mt
from letters import STEPS, simple_pipe
from models import EXAMPLES, causal_lm, pair, segment
from multitower.testing import tiny_tower


def test_device_dtype_and_parameters_are_those_of_the_model() -> None:
    model = pair(causal_lm("llama"), causal_lm("llama", depth=4, vocab_size=14), train="all")
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
    assert model.to(torch.bfloat16).dtype == torch.bfloat16
    assert model.to("meta").device == torch.device("meta")
    sizes = {each: each.numel() for each in model.parameters()}
    assert model.num_parameters() == sum(sizes.values())
    trained = sum(size for each, size in sizes.items() if each.requires_grad)
    assert 0 < trained == model.num_parameters(only_trainable=True) < model.num_parameters()


def test_trainable_parameters_are_printed_as_by_peft(capsys: pytest.CaptureFixture[str]) -> None:
    graph = mt.FusionGraph()
    graph.add_tower("text", causal_lm("llama"), train=peft.LoraConfig(target_modules=["q_proj"]))
    model = graph.compile()
    model.print_trainable_parameters()
    ours = capsys.readouterr().out
    model.unimodal("text").print_trainable_parameters()
    assert ours == capsys.readouterr().out


def test_towers_that_share_a_model_count_once() -> None:
    graph, tower = mt.FusionGraph(), tiny_tower()
    for name in ("question", "answer"):
        graph.add_tower(name, tower)
    assert graph.compile().num_parameters() == sum(each.numel() for each in tower.parameters())


def keeping(kept: list[torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    return keep


@pytest.mark.parametrize("train", ["all", "lora"])
@pytest.mark.parametrize("options", [None, {"use_reentrant": False}])
def test_gradients_are_the_same_under_checkpointing(train: str, options: dict[str, Any] | None) -> None:
    saved, gradients = [], []
    for checkpointed in (False, True):
        graph = mt.FusionGraph()
        graph.add_tower("speech", causal_lm("llama", depth=4, vocab_size=14), train=train)
        graph.add_tower(
            "text", causal_lm("gpt2", config={"resid_pdrop": 0, "attn_pdrop": 0, "embd_pdrop": 0})
        )
        graph.add_link("speech", "text", interleave=1, gate="tanh")
        torch.manual_seed(5)
        model = graph.compile().train()
        if checkpointed:
            model.gradient_checkpointing_enable(options)
        assert model.is_activation_checkpointing == checkpointed
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(keeping(kept), lambda each: each):
            loss = model(**mt.collate(EXAMPLES)).loss
        saved.append(sum(each.numel() for each in kept))
        loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    model.gradient_checkpointing_disable()
    assert not model.is_activation_checkpointing
    assert saved[1] < 0.7 * saved[0]
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_checkpointing_that_no_tower_can_is_refused() -> None:
    with pytest.raises(ValueError, match="no tower supports gradient checkpointing"):
        pair().gradient_checkpointing_enable()


def test_a_batch_is_moved_whole() -> None:
    batch = mt.pack(mt.collate(EXAMPLES))
    moved = mt.batch.to_device({**batch, "note": 3}, "meta")
    assert moved["note"] == 3
    assert list(moved["streams"]) == list(batch["streams"])
    for name, stream in moved["streams"].items():
        assert {key: each.shape for key, each in stream.items()} == {
            key: each.shape for key, each in batch["streams"][name].items()
        }
        assert {each.device.type for each in stream.values()} == {"meta"}
    assert batch["streams"]["text"]["tokens"].device.type == "cpu"


class Encoding(dict):
    """A fake BatchEncoding, a mapping with input_ids."""


@pytest.mark.parametrize(
    "tokens", ["words", b"words", Encoding(input_ids=[1, 2]), [[1, 2], [3]], ["a"], 2**70, None]
)
def test_tokens_of_another_kind_are_named_with_their_example(tokens: Any) -> None:
    with pytest.raises(ValueError, match=r"example 1, segment of tower 'text': .*input_ids"):
        mt.collate([[segment("text", 3)], [mt.Segment("text", tokens)]])


def test_a_batch_encoding_is_refused_by_name() -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    tokens = transformers.BatchEncoding({"input_ids": [3, 4]})
    with pytest.raises(ValueError, match=r"this BatchEncoding is not.* tokenizer\(text\).input_ids"):
        mt.collate([[mt.Segment("text", tokens)]])
    assert mt.collate([[mt.Segment("text", tokens.input_ids)]])


def test_a_printed_graph_shows_what_was_chosen() -> None:
    graph = mt.FusionGraph()
    graph.add_tower("speech", "path/to/speech", adapter="gated", train="all")
    graph.add_tower("text", tiny_tower())
    graph.add_link("speech", "text", interleave=1)
    zipper: Mapping[str, Any] = {"gate": "tanh", "projection": "mlp", "feed_forward": True, "position": None}
    graph.add_link(
        "text", "speech", interleave=2, embeddings=True, heads=2, window=5, relative=False, **zipper
    )
    assert str(graph).splitlines()[1:] == [
        "  tower speech: path/to/speech, train=all, adapter=gated",
        "  tower text: a module, train=none",
        "  link speech->text: interleave 1",
        "  link text->speech: interleave 2 and embeddings, gate=tanh, projection=mlp, heads=2, "
        "position=None, window=5, feed_forward=True, relative=False",
    ]


def test_a_graph_is_drawn_as_its_model_is(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the pictures need the draw extra")
    causal_lm("llama", depth=3).save_pretrained(tmp_path)
    weights = next(tmp_path.glob("*.safetensors"))
    graph = mt.FusionGraph()
    graph.add_tower("speech", tiny_tower(), train="all")
    graph.add_tower("text", tmp_path, adapter="residual")
    graph.add_link("speech", "text", interleave=1, embeddings=True)
    expected = texts(mt.inspect.draw_graph(graph.compile()))
    weights.unlink()
    assert texts(mt.inspect.draw_graph(graph)) == expected
    assert "speech->text: 4 taps" in expected
    with pytest.raises(mt.errors.GraphError, match="no towers to draw"):
        mt.inspect.draw_graph(mt.FusionGraph())


def texts(figure: Any) -> list[str]:
    (axes,) = figure.axes
    (legend,) = figure.legends
    return [each.get_text() for each in (*axes.texts, *legend.get_texts())]


def test_a_pipeline_moves_with_its_model() -> None:
    pipe = simple_pipe()
    assert pipe.to(torch.float64) is pipe
    assert (pipe.model.dtype, pipe.device) == (torch.float64, torch.device("cpu"))
    assert pipe([("speech", [5, 6])], "text", **STEPS)


def test_examples_are_decoded_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = simple_pipe()
    examples = [[("speech", [5, 6])], [("text", "abc")], [("text", "d"), ("speech", [3])]]
    expected, sizes = pipe(examples, ["text"], **STEPS), []
    generate = pipe.model.generate

    def counted(given: list, output: Any, **options: Any) -> Any:
        sizes.append(len(given))
        return generate(given, output, **options)

    monkeypatch.setattr(pipe.model, "generate", counted)
    assert pipe(examples, ["text"], batch_size=2, **STEPS) == expected
    assert sizes == [2, 1]
    beams = {"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 3}
    assert pipe(examples, "text", batch_size=2, **beams) == pipe(examples, "text", **beams)
    with pytest.raises(ValueError, match="batch_size=0 must be 1 or more"):
        pipe(examples, "text", batch_size=0)


def words(**special: str) -> Any:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers")
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2, "one": 3, "two": 4}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", **special)


def test_a_tokenizer_stands_for_the_text_modality() -> None:
    multitower_text = pytest.importorskip("multitower_text", reason="needs multitower_text")
    tokenizer = words(bos_token="<s>", eos_token="</s>")
    pipe = mt.Pipeline(pair(gates=True), {"text": tokenizer})
    whole = mt.Pipeline(pipe.model, {"text": multitower_text.TextModality(tokenizer)})
    assert isinstance(pipe.modalities["text"], multitower_text.TextModality)
    assert pipe([("text", "one two")], "text", **STEPS) == whole([("text", "one two")], "text", **STEPS)
    with pytest.raises(ValueError, match="has no bos token") as caught:
        mt.Pipeline(pipe.model, {"text": words(eos_token="</s>")})
    assert "give TextModality(tokenizer, begin=..., end=...)" in caught.value.__notes__[0]


def test_the_core_imports_neither_transformers_nor_modalities_for_it() -> None:
    script = """
import sys
import multitower as mt
from multitower.testing import tiny_model
try:
    mt.Pipeline(tiny_model(), {"text": "words"})
except TypeError:
    print(sorted({"transformers", "multitower_text"} & set(sys.modules)))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def test_what_accelerate_unties_is_tied_again() -> None:
    tied = causal_lm("llama", config={"tie_word_embeddings": True})
    model = pair(tied, causal_lm("gpt2", width=12, depth=4, vocab_size=14))
    assert model._no_split_modules == ["GPT2Block", "LlamaDecoderLayer"]
    tied.lm_head.weight = torch.nn.Parameter(tied.lm_head.weight.clone())
    model.tie_weights()
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
