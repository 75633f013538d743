from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import multitower as mt
from models import EXAMPLES, causal_lm, pair
from multitower.errors import ExportError
from multitower.export import export_tower
from multitower.testing import open_links, tiny_tower

# torch.export uses deprecated parts of torch.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:torch", "ignore::DeprecationWarning:torch")

ELSEWHERE = """
import sys
sys.modules.update(dict.fromkeys(("multitower", "transformers", "peft")))     # none can be imported

import torch
from safetensors.torch import load_file

program, given, expected = sys.argv[1:]
run = torch.export.load(program).module()
given, keys = load_file(given), ("tokens", "times", "mask")
streams = {tower: {key: given[f"{tower}.{key}"] for key in keys} for tower in ("speech", "text")}
assert torch.equal(run(streams), load_file(expected)["logits"])

# greedy decoding: the text begins when the speech has ended
row = {key: tensor[:1, :6] for key, tensor in streams["speech"].items()}
text = [1]
while len(text) < 6 and (len(text) == 1 or text[-1] != 2):
    tokens = torch.tensor([text])
    times = 6 + torch.arange(len(text))[None]
    logits = run({"speech": row, "text": {"tokens": tokens, "times": times, "mask": tokens >= 0}})
    text.append(int(logits[0, -1].argmax()))
assert text == load_file(expected)["decoded"].tolist(), text
"""


def streams_of(examples: Any) -> dict[str, dict[str, Tensor]]:
    streams = mt.collate(examples)["streams"]
    return {
        name: {key: tensor for key, tensor in stream.items() if key != "labels"}
        for name, stream in streams.items()
    }


@pytest.mark.parametrize(
    ("text", "speech"),
    [
        ("llama", "gpt2"),
        ("gpt2", "llama"),
        ("qwen3", "bloom"),
        (None, None),
    ],
)
@pytest.mark.slow
def test_a_program_runs_without_this_library(tmp_path: Path, text: str | None, speech: str | None) -> None:
    model = pair(
        None if text is None else causal_lm(text),
        None if speech is None else causal_lm(speech, depth=4, vocab_size=14),
        gates=True,
        position="segment",
        window=4,
    )
    torch.export.save(export_tower(model, "text"), tmp_path / "text.pt2")
    streams = streams_of(EXAMPLES)
    ((segment,),) = model.generate([EXAMPLES[0][:1]], output=["text"], max_new_tokens=5)
    save_file(
        {f"{name}.{key}": value for name, stream in streams.items() for key, value in stream.items()},
        tmp_path / "given.safetensors",
    )
    logits = model(streams).logits["text"].detach()
    save_file({"logits": logits, "decoded": segment.tokens}, tmp_path / "expected.safetensors")
    files = [str(tmp_path / name) for name in ("text.pt2", "given.safetensors", "expected.safetensors")]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", ELSEWHERE, *files], env=environment, cwd=tmp_path, check=True)


@pytest.mark.slow
def test_only_what_is_read_is_part_of_it(tmp_path: Path) -> None:
    graph = mt.FusionGraph()
    for number, name in enumerate(("music", "speech", "text", "dance")):
        graph.add_tower(name, tiny_tower(number, depth=2))
    graph.add_link("music", "speech", interleave=1)
    graph.add_link("speech", "text", interleave=1)
    graph.add_link("text", "dance", interleave=1)
    model = open_links(graph.compile())
    program = export_tower(model, "text")
    names = ("music", "speech", "text")
    streams = streams_of([[mt.Segment(name, [1, 4, 5]) for name in names], [mt.Segment("text", [1])]])
    assert torch.equal(program.module()(streams), model.eval()(streams).logits["text"])
    assert not any(".dance." in name for name in program.state_dict)
    assert program.state_dict["model.towers.speech.norm.weight"].numel() == 0
    torch.export.save(program, tmp_path / "text.pt2")
    with zipfile.ZipFile(tmp_path / "text.pt2") as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    assert not [name for name, content in contents.items() if content[:2] in (b"PK", b"\x80\x02")]


def test_a_tower_that_reads_nothing_is_exported_alone() -> None:
    model = pair(gates=True).drop("speech->text")
    streams = streams_of([[mt.Segment("text", [1, 5, 6])]])
    run = export_tower(model, "text").module()
    assert torch.equal(run(streams), model(streams).logits["text"])


@pytest.mark.slow
def test_adapters_dtype_and_mode_are_kept() -> None:
    graph = mt.FusionGraph()
    graph.add_tower("speech", tiny_tower(1).bfloat16())
    graph.add_tower("text", causal_lm("llama"), train=peft.LoraConfig(r=2, init_lora_weights=False))
    graph.add_link("speech", "text", interleave=1)
    model = open_links(graph.compile()).train()
    streams = streams_of([[mt.Segment("speech", [1, 5, 2]), mt.Segment("text", [1, 5, 6])]])
    run = export_tower(model, "text").module()
    assert model.training
    assert torch.equal(run(streams), model.eval()(streams).logits["text"])


class Looks(nn.Module):
    """Adds an operation that torch.export cannot trace, or traces wrongly."""

    def __init__(self, how: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return self.how(x)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            lambda x: x if bool(x.sum() > 1000) else x + 1,
            r"cannot trace towers 'speech' \(Tiny",
        ),
        pytest.param(
            lambda x: x[:, : int(x.shape[1])] if len(x) == 2 else x,
            "cannot trace towers",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            lambda x: x + float(torch.tensor(x.shape[1])),
            "cannot trace|other logits",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["values", "sizes", "constants"],
)
def test_what_cannot_be_exported_is_refused(how: Callable[[Tensor], Tensor], message: str) -> None:
    text = tiny_tower(2, depth=2, width=8, vocab_size=20)
    text.norm = nn.Sequential(text.norm, Looks(how))
    with pytest.raises(ExportError, match=message):
        export_tower(pair(text, gates=True), "text")


def test_an_unknown_tower_is_named() -> None:
    with pytest.raises(KeyError, match="there is no tower 'txt'"):
        export_tower(pair(), "txt")


@pytest.mark.slow
def test_towers_that_share_a_model_are_named_where_it_cannot_be_traced() -> None:
    graph, one = mt.FusionGraph(), causal_lm("llama")
    graph.add_tower("text", one)
    graph.add_tower("speech", one)
    graph.add_link("speech", "text", interleave=1)
    with pytest.raises(ExportError, match=r"'speech' and 'text' share one model.* a model of its own"):
        export_tower(graph.compile(), "text")
