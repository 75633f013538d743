from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import pytest

import multitower as mt
from letters import Letters
from models import causal_lm, pair
from multitower.declare.mermaid import label
from multitower.hub.card import is_generated, mermaid, model_card
from multitower.testing import tiny_model, tiny_tower
from multitower_text import TextModality


def code(card: str) -> str:
    (found,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return found


def test_the_metadata_are_yaml_that_the_hub_reads() -> None:
    data = huggingface_hub.ModelCard(model_card(tiny_model(), "me/tiny", license="mit")).data
    assert (data.library_name, data.license, data.base_model) == ("multitower", "mit", None)
    assert data.tags == ["multitower", "model-fusion", "cross-attention"]


def test_the_code_on_a_card_runs(tmp_path: Path) -> None:
    model = pair(causal_lm("qwen3"), causal_lm("llama", depth=4, vocab_size=14))
    model.save_pretrained(tmp_path / "fused")
    found: dict[str, Any] = {}
    exec(code(model_card(model, str(tmp_path / "fused"))), found)
    assert found["model"].graph == model.graph


def test_what_has_to_be_given_is_said(tmp_path: Path) -> None:
    card = model_card(tiny_model(), "me/tiny", modalities={"text": Letters()})
    assert 'towers = {"speech": ..., "text": ...}  # for each: TinyTower, TinyTower' in code(card)
    assert 'modalities = {"text": ...}  # for each: Letters' in code(card)
    assert 'mt.Pipeline.from_pretrained("me/tiny", towers=towers, modalities=modalities)' in code(card)
    compile(code(card), "card", "exec")


def test_adapters_and_shared_towers_are_told() -> None:
    graph, one = mt.FusionGraph(), causal_lm("llama")
    graph.add_tower("text", causal_lm("llama"), train=peft.LoraConfig(r=2, target_modules=["q_proj"]))
    graph.add_tower("question", one)
    graph.add_tower("answer", one)
    graph.add_link("question", "text", interleave=1)
    model = graph.compile()
    card = model_card(model, "me/tiny")
    learnt = sum(each.numel() for each in model.tower("text").parameters() if each.requires_grad)
    assert f"frozen, with trained adapters (LORA: {learnt:,} parameters)" in card
    assert "| `answer` | the model of `question` |" in card
    assert "pip install 'multitower[transformers,lora]'" in card
    with_text = model_card(model, "me/tiny", modalities={"text": TextModality()})
    assert "pip install 'multitower[transformers,text,lora]'" in with_text


def test_words_that_mermaid_keeps_for_itself_are_only_labels() -> None:
    graph = mt.FusionGraph()
    graph.add_tower("end", tiny_tower(depth=12))
    graph.add_tower("graph", tiny_tower(depth=12))
    graph.add_link("end", "graph", interleave=1, name="subgraph->end")
    lines = mermaid(graph.compile()).splitlines()
    assert lines[1].startswith('    t0["end<br/>')
    assert lines[3] == (
        '    t0 -- "subgraph-#gt;end<br/>layers 1 to 1, 2 to 2, 3 to 3, ..., 12 to 12" --> t1'
    )
    assert label('a"b', "<c>&#") == '"a#quot;b<br/>#lt;c#gt;#amp;#35;"'


def test_what_others_wrote_does_not_become_markup() -> None:
    card = model_card(tiny_model(), "me/tiny", tower_licenses={"text": "mit | <b>\n# free"})
    assert r"mit \| \<b\> # free" in card


@pytest.mark.parametrize("change", [str.upper, lambda card: card + "\n", lambda card: ""])
def test_a_changed_card_is_not_generated(change: Any) -> None:
    assert not is_generated(change(model_card(tiny_model(), "me/tiny")))
