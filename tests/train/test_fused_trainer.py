"""The library's Trainer: transformers' own, with losses by tower and fused checkpoints."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import multitower as mt
from fused_training import EXAMPLES, arguments, assert_same, make, trainer
from models import causal_lm, pair, segment
from multitower.testing import tiny_tower
from multitower_text import TextModality

transformers = pytest.importorskip("transformers", reason="the Trainer needs transformers")
pytest.importorskip("accelerate", reason="the Trainer needs accelerate")

from multitower.train import Collator, Trainer  # an extra


def test_accumulated_batches_are_one_batch(tmp_path: Path) -> None:
    whole, parts = make(), make()
    settings = {"optim": "sgd", "learning_rate": 0.1}
    trainer(tmp_path, whole, per_device_train_batch_size=8, **settings).train()
    trainer(tmp_path, parts, per_device_train_batch_size=1, gradient_accumulation_steps=8, **settings).train()
    assert_same(whole, parts, rtol=1e-4, atol=1e-5)


def test_counts_do_not_depend_on_the_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an evaluation the model is in eval mode when the batches of the next step are counted."""
    run, reduced = trainer(tmp_path, make()), []
    monkeypatch.setattr(run.accelerator, "reduce", lambda table: reduced.append(table) or 2 * table)
    batch = Collator()(EXAMPLES)
    counts = [
        run._get_num_items_in_batch([batch], torch.device("cpu")) for run.model.training in (True, False)
    ]
    assert counts[0] == counts[1]
    assert len(reduced) == 2


def test_losses_are_logged_by_tower(tmp_path: Path) -> None:
    model = make()
    run = trainer(tmp_path, model)
    before = run.evaluate()
    batch = mt.collate(EXAMPLES)
    with torch.no_grad():
        losses = model.eval()(**batch).losses
    assert before["eval_text_loss"] == pytest.approx(losses["text"].item(), rel=1e-4)
    assert before["eval_speech_loss"] == pytest.approx(losses["speech"].item(), rel=1e-4)
    assert before["eval_loss"] == pytest.approx(sum(losses.values()).item(), rel=1e-4)
    run.train()
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    assert any("loss_text" in entry for entry in logged)
    assert any("loss_speech" in entry for entry in logged)
    assert run.evaluate()["eval_loss"] < before["eval_loss"]


def test_logits_are_computed_for_metrics_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = make(), []
    forward = type(model).forward

    def noted(self: mt.FusedModel, streams: Any, *, logits: bool = True, **options: Any) -> Any:
        asked.append(logits)
        return forward(self, streams, logits=logits, **options)

    monkeypatch.setattr(type(model), "forward", noted)
    run = trainer(tmp_path, model, max_steps=1)
    run.train()
    run.evaluate()
    assert asked
    assert not any(asked)
    trainer(tmp_path, model, compute_metrics=lambda prediction: {}).evaluate()
    assert asked[-1]


def test_metrics_where_batches_hold_unlike_towers(tmp_path: Path) -> None:
    def shares(prediction: Any) -> dict[str, float]:
        found = {}
        for name, labels in prediction.label_ids.items():
            given = labels[:, 1:] != -100
            hits = prediction.predictions[name][:, :-1].argmax(-1) == labels[:, 1:]
            found[f"{name}_hits"], found[f"{name}_tokens"] = hits[given].mean(), given.sum()
        return found

    model = make()
    found = trainer(tmp_path, model, compute_metrics=shares, per_device_eval_batch_size=1).evaluate()
    batch = mt.collate(EXAMPLES)
    for name, stream in batch["streams"].items():
        assert found[f"eval_{name}_tokens"] == int((stream["labels"][:, 1:] != -100).sum())
    assert np.isfinite([found["eval_text_hits"], found["eval_speech_hits"]]).all()


def test_a_run_is_resumed_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    whole, first, second = make(), make(), make()
    trainer(tmp_path / "whole", whole, max_steps=6).train()
    trainer(tmp_path / "parts", first, max_steps=6, save_strategy="steps", save_steps=3).train()
    trainer(tmp_path / "parts", second, max_steps=6).train(str(tmp_path / "parts" / "checkpoint-3"))
    assert_same(whole, first)
    assert_same(whole, second)


def test_checkpoints_are_fused_checkpoints_and_the_best_is_loaded(tmp_path: Path) -> None:
    model = make()
    run = trainer(
        tmp_path,
        model,
        max_steps=4,
        learning_rate=0.5,
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=1,
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_text_loss",
        greater_is_better=False,
    )
    run.train()
    losses = {
        entry["step"]: entry["eval_text_loss"] for entry in run.state.log_history if "eval_text_loss" in entry
    }
    best = min(losses, key=losses.__getitem__)
    assert_same(mt.FusedModel.from_pretrained(tmp_path / f"checkpoint-{best}"), model)
    run.save_model()
    run.save_model()
    assert_same(mt.FusedModel.from_pretrained(tmp_path), model)
    assert (tmp_path / f"checkpoint-{best}").is_dir()


def test_adapters_tied_and_shared_towers_are_saved_and_resumed(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="adapters need the lora extra")

    def three() -> mt.FusedModel:
        torch.manual_seed(0)
        graph, tied = mt.FusionGraph(), causal_lm("llama", config={"tie_word_embeddings": True})
        graph.add_tower("speech", tied, train="all")
        graph.add_tower("again", tied, train="all")
        graph.add_tower("text", causal_lm("llama"), train=peft.LoraConfig(target_modules=["q_proj"]))
        for source, target in (("speech", "text"), ("text", "speech"), ("text", "again")):
            graph.add_link(source, target, interleave=1)
        return graph.compile()

    whole, second = three(), three()
    trainer(tmp_path, whole, max_steps=4, save_strategy="steps", save_steps=2).train()
    trainer(tmp_path, second, max_steps=4).train(str(tmp_path / "checkpoint-2"))
    assert_same(whole, second)


def test_plain_towers_are_resumed(tmp_path: Path) -> None:
    def plain() -> mt.FusedModel:
        torch.manual_seed(0)
        return pair(tiny_tower(1), tiny_tower(2, vocab_size=14), train="all")

    whole, second = plain(), plain()
    trainer(tmp_path, whole, max_steps=4, save_strategy="steps", save_steps=2).train()
    trainer(tmp_path, second, max_steps=4).train(str(tmp_path / "checkpoint-2"))
    assert_same(whole, second)


def test_a_checkpoint_of_another_graph_is_not_resumed(tmp_path: Path) -> None:
    trainer(tmp_path, make(), max_steps=2, save_strategy="steps", save_steps=2).train()
    other = make().drop("speech->text")
    with pytest.raises(mt.errors.CheckpointError, match="is of another graph"):
        trainer(tmp_path, other, max_steps=4).train(str(tmp_path / "checkpoint-2"))
    adapted = pair(causal_lm("llama"), causal_lm("qwen3", depth=4, vocab_size=14), train="lora")
    with pytest.raises(
        mt.errors.CheckpointError, match=r"the peft adapters \[\], and this model's has \['default"
    ):
        trainer(tmp_path, adapted, max_steps=4).train(str(tmp_path / "checkpoint-2"))


def test_a_checkpoint_of_other_links_is_not_resumed(tmp_path: Path) -> None:
    trainer(tmp_path, pair(), max_steps=1, save_strategy="steps", save_steps=1).train()
    with pytest.raises(mt.errors.CheckpointError, match="with window=None, and the model's has window=3"):
        trainer(tmp_path, pair(window=3), max_steps=2).train(str(tmp_path / "checkpoint-1"))


def test_parts_have_rates_of_their_own(tmp_path: Path) -> None:
    run = trainer(tmp_path, make(), rates={"towers": {"speech": 1e-4}, "links": 2e-2})
    optimizer = run.create_optimizer()
    assert {group["lr"] for group in optimizer.param_groups} == {1e-2, 1e-4, 2e-2, 0.1}  # gates: ten times


def test_answers_are_decoded_and_scored(tmp_path: Path) -> None:
    seen: list[Any] = []

    def score(given: list[Any], answers: list[Any], examples: list[Any]) -> dict[str, float]:
        seen.extend(zip(given, answers, examples, strict=True))
        return {"answers": float(len(answers))}

    model = make()
    found = trainer(tmp_path, model, score=score, decoding={"max_new_tokens": 3}).evaluate()
    assert found["eval_answers"] == len(EXAMPLES) == len(seen)
    for given, answer, example in seen:
        assert [each.tower for each in (*given, *answer)] == [each.tower for each in example]


def test_simultaneous_answers_are_decoded_and_scored(tmp_path: Path) -> None:
    seen: list[Any] = []

    def score(given: list[Any], answers: list[Any], examples: list[Any]) -> dict[str, float]:
        seen.extend(zip(given, answers, strict=True))
        return {}

    both = (segment("text", 3, target=True), segment("speech", 4, target=True))
    heard = (segment("text", 3), segment("speech", 4))
    run = trainer(tmp_path, make(), score=score, decoding={"max_new_tokens": 3})
    run.evaluate([[heard, both], [segment("text", 5), both]])
    assert [len(given) for given, _ in seen] == [1, 1]
    for _, (answer,) in seen:
        assert [each.tower for each in answer] == ["text", "speech"]


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ([segment("text", 3, target=True), segment("speech", 4)], "a segment of 'speech' that is no target"),
        (
            [(segment("text", 3, target=True), segment("speech", 4))],
            "a segment of 'speech' that is no target",
        ),
        ([segment("text", 3)], "needs examples with a target"),
    ],
)
def test_examples_that_cannot_be_scored_are_told(tmp_path: Path, example: Any, message: str) -> None:
    run = trainer(tmp_path, make(), score=lambda *_: {})
    with pytest.raises(ValueError, match=message):
        run._decoded([example])


def test_scored_answers_end_where_the_modality_does(tmp_path: Path) -> None:
    model, lengths = make(), set()
    size, end = model.tower("text").vocab_size, 5
    assert end not in model.tower("text").end
    modality = TextModality()
    modality.begin, modality.end, modality.vocab_size = model.tower("text").begin, end, size

    def score(given: list[Any], answers: list[Any], examples: list[Any]) -> dict[str, float]:
        lengths.update(len(each.tokens) for answer in answers for each in answer)
        return {}

    options = {"max_new_tokens": 6, "suppress_tokens": [token for token in range(size) if token != end]}
    data = [example for example in EXAMPLES if example[-1].tower == "text"]
    run = trainer(tmp_path, model, score=score, decoding=options, modalities={"text": modality})
    run.evaluate(data)
    assert lengths == {2}  # begin and end


@pytest.mark.parametrize("option", [{"neftune_noise_alpha": 5.0}, {"label_smoothing_factor": 0.1}])
def test_what_knows_one_vocabulary_alone_is_refused(tmp_path: Path, option: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(option))} is for models of one vocabulary"):
        trainer(tmp_path, make(), **option)


def test_divided_models_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multitower.train.arguments.is_divided", lambda model: True)
    with pytest.raises(ValueError, match=r"divide the model by multitower\.train\.shard"):
        trainer(tmp_path, make())
    monkeypatch.undo()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # as accelerate's launcher does, even for DDP
    with pytest.raises(ValueError, match=r"whole on each process"):
        trainer(tmp_path, make())


def test_other_models_are_refused() -> None:
    with pytest.raises(TypeError, match="takes a FusedModel, not a LlamaForCausalLM"):
        Trainer(causal_lm("llama"))


def test_packed_batches_train_alike(tmp_path: Path) -> None:
    padded, packed = make(), make()
    batch = copy.deepcopy(EXAMPLES)
    settings = arguments(tmp_path, optim="sgd", learning_rate=0.1)
    Trainer(padded, settings, train_dataset=batch).train()
    Trainer(packed, settings, train_dataset=batch, data_collator=Collator(packed=True)).train()
    assert_same(padded, packed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["history_noise", "source_noise"])
def test_noise_is_for_training_alone(kind: str, tmp_path: Path) -> None:
    whole = {"per_device_train_batch_size": 8}
    plain, noisy = (trainer(tmp_path, make(), **whole, **{kind: noise}) for noise in (None, {"text": 1.0}))
    assert plain.evaluate()["eval_loss"] == noisy.evaluate()["eval_loss"]
    for each in (plain, noisy):
        each.train()
    one, other = ([log["loss"] for log in each.state.log_history if "loss" in log] for each in (plain, noisy))
    assert one != other
    with pytest.raises(ValueError, match="noise for tower 'smell': the towers are speech, text"):
        trainer(tmp_path, make(), **{kind: {"smell": 0.1}})


def test_a_model_card_says_how_it_was_trained(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub", reason="model cards need huggingface_hub")
    each = trainer(tmp_path, make(), history_noise={"text": 0.25}, rates={"towers": {"speech": 1e-3}})
    each.train()
    loss = each.evaluate()["eval_loss"]
    each.create_model_card(license="apache-2.0")
    card = (tmp_path / "README.md").read_text()
    for expected in (
        "license: apache-2.0",
        "| steps | 4 |",
        "| examples in a step | 2 |",
        "| noise in the past of text | 0.25 |",
        f"| `eval_loss` | {loss:.4g} |",
    ):
        assert expected in card, card
    assert "runtime" not in card


def test_one_process_does_not_drive_several_gpus(tmp_path: Path) -> None:
    settings = arguments(tmp_path)
    assert settings.n_gpu <= 1
    settings._n_gpu = 2
    with pytest.raises(ValueError, match="torchrun --nproc-per-node 2"):
        Trainer(make(), settings, train_dataset=EXAMPLES)
