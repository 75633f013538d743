"""A loaded tower is probed again only if something has changed since it was saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import multitower as mt
from models import causal_lm, pair
from multitower.tower import transformers as towers
from tampering import rewrite_manifest
from test_checkpoint_format import assert_same, document


def unproved(proof: dict[str, Any]) -> dict[str, Any]:
    return {**proof, "versions": {**proof["versions"], "torch": "2.0"}}


@pytest.mark.parametrize(
    ("change", "options", "runs"),
    [
        (dict, {}, False),
        (dict, {"verify": True}, True),
        (unproved, {}, True),
        (lambda proof: None, {}, True),
        (lambda proof: {**proof, "beyond": -1}, {}, True),
        (lambda proof: {**proof, "width": "16"}, {}, True),
    ],
)
def test_what_was_proved_before_the_save_is_not_proved_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, options: dict[str, Any], runs: bool
) -> None:
    model = pair(causal_lm("qwen3"), causal_lm("gpt2", depth=4, vocab_size=14), gates=True, train="all")
    model.save_pretrained(tmp_path)
    said = document(tmp_path)
    for record in said["towers"].values():
        record["proof"] = change(record["proof"])
    rewrite_manifest(tmp_path, lambda saved: saved.update(said))
    asked, probe = [], towers.probe
    monkeypatch.setattr(towers, "probe", lambda *args: asked.append(args) or probe(*args))
    again = mt.FusedModel.from_pretrained(tmp_path, **options)
    assert len(asked) == 2 * runs
    assert_same(model, again)
    for name in model.towers:
        one, other = model.tower(name), again.tower(name)
        for key in ("path", "depth", "width", "vocab_size", "hard_limit", "proof"):
            assert getattr(one, key) == getattr(other, key), key


@pytest.mark.parametrize("path", ["model", "model.layers.0", "nothing", ""])
def test_a_proof_of_another_model_is_refused(tmp_path: Path, path: str) -> None:
    graph = mt.FusionGraph()
    graph.add_tower("text", causal_lm("llama"), train="all")
    graph.compile().save_pretrained(tmp_path)
    rewrite_manifest(tmp_path, lambda saved: saved["towers"]["text"]["proof"].update(path=path))
    with pytest.raises(mt.errors.CheckpointError, match="has no layers in"):
        mt.FusedModel.from_pretrained(tmp_path)
