from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import multitower as mt
from models import BEGIN, END, causal_lm, pair
from multitower.errors import ExportError
from multitower.export import DecoderPrograms, export_decoder
from multitower.link.attention import visibility
from multitower.testing import open_links, tiny_tower
from pages import DOCS, blocks

# torch.export uses deprecated parts of torch.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:torch", "ignore::DeprecationWarning:torch")

LONGEST = 24

ELSEWHERE = """
import sys
sys.modules.update(dict.fromkeys(("multitower", "transformers", "peft")))     # none can be imported

import torch
from safetensors.torch import load_file, save_file

given, streams = load_file("given.safetensors"), {}
for key, tensor in given.items():
    tower, part = key.split(".")
    streams.setdefault(tower, {})[part] = tensor
"""


def streams_of(examples: Any) -> dict[str, dict[str, Tensor]]:
    keys = ("tokens", "times", "mask")
    streams = mt.collate(examples)["streams"]
    return {name: {key: stream[key] for key in keys} for name, stream in streams.items()}


def small(text: nn.Module, **link: Any) -> mt.FusedModel:
    """Link speech to text, with one layer each, so that tracing is quick."""
    graph = mt.FusionGraph()
    graph.add_tower("speech", tiny_tower(1, depth=1))
    graph.add_tower("text", text)
    graph.add_link("speech", "text", interleave=1, **link)
    return open_links(graph.compile().eval())


def the_loop() -> str:
    """Return the greedy loop of the documentation."""
    (loop,) = [block.code for block in blocks(DOCS / "hub_and_export.md") if "step(tokens" in block.code]
    return loop


def decoded_elsewhere(
    programs: DecoderPrograms, streams: dict[str, dict[str, Tensor]], folder: Path
) -> tuple[Tensor, Tensor]:
    """Run the documentation's loop in a process with only torch; return the text and the last logits."""
    for name, program in programs._asdict().items():
        torch.export.save(program, folder / f"{name}.pt2")
    given = {f"{name}.{key}": value for name, stream in streams.items() for key, value in stream.items()}
    save_file(given, folder / "given.safetensors")
    script = ELSEWHERE + the_loop() + '\nsave_file({"text": text, "logits": logits}, "decoded.safetensors")\n'
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", script], env=environment, cwd=folder, check=True)
    decoded = load_file(folder / "decoded.safetensors")
    return decoded["text"], decoded["logits"]


def to_the_end(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(END) + 1] if END in tokens else tokens


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_programs_decode_without_this_library(tmp_path: Path, family: str) -> None:
    model = pair(
        causal_lm(family), gates=True, position="segment" if family == "llama" else "rotary", window=12
    )
    programs = export_decoder(model, "text", max_length=LONGEST)
    given = [[mt.Segment("speech", [1, 5, 6, 7, 8, 2])], [mt.Segment("speech", [1, 9, 2])]]
    expected = model.generate(given, output=["text"], max_new_tokens=20, do_sample=False)
    streams = streams_of([[*row, mt.Segment("text", [BEGIN])] for row in given])
    text, logits = decoded_elsewhere(programs, streams, tmp_path)
    found = [to_the_end(row) for row in text.tolist()]
    assert found == [segment.tokens[1:].tolist() for (segment,) in expected]
    told = [[BEGIN, *row[:-1]] for row in text.tolist()]
    streams = streams_of([[*row, mt.Segment("text", each)] for row, each in zip(given, told, strict=True)])
    whole = model(streams).logits["text"][:, -1:]
    torch.testing.assert_close(logits, whole)
    alone = model.unimodal("text")(torch.tensor(told)).logits[:, -1:]
    assert not torch.allclose(whole, alone, atol=1e-2)
    for name in programs._fields:
        with zipfile.ZipFile(tmp_path / f"{name}.pt2") as archive:
            contents = [archive.read(each) for each in archive.namelist()]
        assert not [content for content in contents if content[:2] in (b"PK", b"\x80\x02")]


@pytest.mark.slow
def test_prompts_and_windows_are_those_of_the_model() -> None:
    mistral = causal_lm("mistral", config={"sliding_window": 3})
    model = pair(mistral, gates=True, position="rotary")
    encode, step = (program.module() for program in export_decoder(model, "text", max_length=16))
    text = list(range(3, 12))
    streams = streams_of(
        [
            [mt.Segment("text", [1, 4]), mt.Segment("speech", [1, 5, 6, 2]), mt.Segment("text", text)],
            [mt.Segment("speech", [1, 9, 2]), mt.Segment("text", text)],
        ]
    )
    whole = model(streams).logits["text"]
    early = {**streams, "text": {key: each[:, :5] for key, each in streams["text"].items()}}
    state = encode(early)
    tokens, times = (
        torch.stack([streams["text"][key][0], streams["text"][key][1].roll(2)]) for key in ("tokens", "times")
    )
    found = [step(tokens[:, :6], times[:, :6], state)]
    assert state["cache"]["length"] == 6
    assert (state["cache"]["times"] >= 0).sum(1).tolist() == [6, 4]
    found += [
        step(tokens[:, place : place + 1], times[:, place : place + 1], state) for place in range(6, 11)
    ]
    logits = torch.cat(found, 1)
    torch.testing.assert_close(logits[0], whole[0])
    torch.testing.assert_close(logits[1, 2:], whole[1, :9])


def test_a_tower_that_reads_nothing_is_decoded_alone() -> None:
    model = pair(causal_lm("gpt2"), gates=True).drop("speech->text")
    encode, step = (program.module() for program in export_decoder(model, "text", max_length=5))
    streams = streams_of([[mt.Segment("text", [1, 5, 6, 7])]])
    state = encode(streams)
    assert state["taps"] == state["sources"] == {}
    text = streams["text"]
    found = [step(text["tokens"][:, part], text["times"][:, part], state) for part in (slice(3), slice(3, 4))]
    torch.testing.assert_close(torch.cat(found, 1), model(streams).logits["text"])


@pytest.mark.slow
def test_the_step_holds_the_tower_alone() -> None:
    text = causal_lm("gpt2", depth=1)
    encode, step = export_decoder(small(text), "text", max_length=5)
    held = sum(each.numel() for each in step.state_dict.values())
    taps = sum(each.numel() for name, each in step.state_dict.items() if name.startswith("taps."))
    assert held == text.num_parameters() + taps
    of_the_text = [each for name, each in encode.state_dict.items() if ".towers.text." in name]
    assert of_the_text
    assert not any(each.numel() for each in of_the_text)


class Looks(nn.Module):
    """Adds an operation that torch.export cannot trace."""

    def forward(self, x: Tensor) -> Tensor:
        return x if bool(x.sum() > 1000) else x + 1


def test_what_cannot_be_traced_is_refused() -> None:
    text = causal_lm("gpt2", depth=1)
    text.transformer.ln_f = nn.Sequential(text.transformer.ln_f, Looks())
    with pytest.raises(ExportError, match=r"cannot trace towers 'speech' \(TinyTower\), 'text' \(GPT2LM"):
        export_decoder(small(text), "text", max_length=8)


def test_what_keeps_no_keys_and_values_is_refused() -> None:
    with pytest.raises(
        ExportError, match=r"'text' \(TinyTower\) cannot .* not made of a transformers model; ex"
    ):
        export_decoder(pair(), "text", max_length=8)
    mamba = causal_lm("mamba")
    with pytest.raises(ExportError, match=r"'text' \(MambaForCausalLM\) cannot go on from kept keys"):
        export_decoder(pair(mamba), "text", max_length=8)


def test_lengths_without_positions_are_refused() -> None:
    model = pair(causal_lm("gpt2", config={"n_positions": 12}))
    with pytest.raises(ValueError, match="max_length=13, but tower 'text' has positions for 12 tokens"):
        export_decoder(model, "text", max_length=13)
    with pytest.raises(ValueError, match="max_length=2: a cache must hold at least 3 tokens of tower 'text'"):
        export_decoder(model, "text", max_length=2)
    with pytest.raises(KeyError, match="there is no tower 'txt'"):
        export_decoder(model, "txt", max_length=8)


@pytest.mark.slow
def test_programs_that_differ_from_the_model_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_window(*args: Any) -> Any:
        *between, _, dtype = args
        return visibility(*between, None, dtype)

    monkeypatch.setattr("multitower.export.decoder.visibility", without_window)
    model = small(causal_lm("gpt2", depth=1), window=2)
    with pytest.raises(ExportError, match="give other logits than the model for streams"):
        export_decoder(model, "text", max_length=8)
