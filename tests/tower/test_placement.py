"""Models that accelerate places on devices, offloads or leaves on the meta device, as towers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import accelerate
import pytest
import torch
import transformers
from torch import nn

import multitower as mt
from models import EXAMPLES, causal_lm, pair
from multitower.storage.fingerprint import fingerprint
from multitower.testing import open_links
from multitower.tower.peft_tower import base_state

BATCH = mt.collate(EXAMPLES)
TEXT = BATCH["streams"]["text"]["tokens"]
FAMILIES = ("llama", "gpt2", "gemma3_text", "mamba")


def mapped_whole(model: nn.Module, folder: Path) -> nn.Module:
    model.save_pretrained(folder / "model")
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "model", device_map={"": "cpu"})


def mapped_by_name(model: nn.Module, folder: Path) -> nn.Module:
    model.save_pretrained(folder / "model")
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "model", device_map="cpu")


def dispatched(model: nn.Module, folder: Path) -> nn.Module:
    return accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)


def offloaded_to_memory(model: nn.Module, folder: Path) -> nn.Module:
    return accelerate.cpu_offload(model)


def offloaded_to_disk(model: nn.Module, folder: Path) -> nn.Module:
    return accelerate.disk_offload(model, folder / "offloaded")


def offloaded_in_part(model: nn.Module, folder: Path) -> nn.Module:
    names = [name for name, _ in model.named_children()]
    places = {name: "disk" if name == names[0] else "cpu" for name in names}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder / "offloaded")


PLACEMENTS = (
    mapped_whole,
    mapped_by_name,
    dispatched,
    offloaded_to_memory,
    offloaded_to_disk,
    offloaded_in_part,
)
OFFLOADS = PLACEMENTS[3:]

everywhere = pytest.mark.parametrize("place", PLACEMENTS)
in_each_family = pytest.mark.parametrize(
    ("family", "place"),
    [
        *((FAMILIES[0], place) for place in PLACEMENTS),
        *((family, place) for family in FAMILIES[1:] for place in (dispatched, offloaded_in_part)),
    ],
)
offloaded = pytest.mark.parametrize("place", OFFLOADS)


@in_each_family
def test_placed_models_are_bit_equal_towers(
    family: str, place: Callable[[nn.Module, Path], nn.Module], tmp_path: Path
) -> None:
    model = causal_lm(family, seed=3)
    expected = model(TEXT, use_cache=False).logits
    placed = place(model, tmp_path)
    assert torch.equal(placed(TEXT, use_cache=False).logits, expected)
    tower = mt.TransformersTower(placed)
    assert torch.equal(tower(TEXT), expected)
    assert tower.device == torch.device("cpu")
    assert torch.equal(pair(placed)(**BATCH).logits["text"], expected)


@offloaded
def test_offloaded_weights_stay_away_between_runs(
    place: Callable[[nn.Module, Path], nn.Module], tmp_path: Path
) -> None:
    fused = pair(place(causal_lm("llama"), tmp_path), gates=True)
    fused(**BATCH).loss.backward()
    fused.generate([[EXAMPLES[0][0]]], ["text"], max_new_tokens=2)
    layers = fused.unimodal("text").model.layers
    assert {parameter.device.type for parameter in layers.parameters()} == {"meta"}


@everywhere
def test_links_of_placed_towers_train(place: Callable[[nn.Module, Path], nn.Module], tmp_path: Path) -> None:
    whole = pair(causal_lm("llama"), gates=True)
    placed = pair(place(causal_lm("llama"), tmp_path), gates=True)
    for fused in (whole, placed):
        fused(**BATCH).loss.backward()
    expected = dict(whole.named_parameters())
    for name, parameter in placed.named_parameters():
        if name.startswith(("links.", "adapters.")):
            assert parameter.device == torch.device("cpu")
            assert torch.equal(parameter.grad, expected[name].grad)


@in_each_family
def test_placed_towers_generate(
    family: str, place: Callable[[nn.Module, Path], nn.Module], tmp_path: Path
) -> None:
    given = [[EXAMPLES[0][0]], [EXAMPLES[1][0]]]
    options = {"max_new_tokens": 5, "min_new_tokens": 5}
    expected = pair(causal_lm(family), gates=True).generate(given, ["text"], **options)
    found = pair(place(causal_lm(family), tmp_path), gates=True).generate(given, ["text"], **options)
    assert [row[0].tokens.tolist() for row in found] == [row[0].tokens.tolist() for row in expected]


@everywhere
def test_decoders_of_placed_towers_show_what_their_forward_takes(
    place: Callable[[nn.Module, Path], nn.Module], tmp_path: Path
) -> None:
    model = place(causal_lm("llama"), tmp_path)
    decoder = mt.TransformersTower(model).decoder(lambda layer, state, positions: state)
    assert "logits_to_keep" in inspect.signature(decoder.forward).parameters


@everywhere
def test_placed_towers_are_saved_whole(place: Callable[[nn.Module, Path], nn.Module], tmp_path: Path) -> None:
    whole = causal_lm("gpt2")
    placed = place(causal_lm("gpt2"), tmp_path)
    assert fingerprint(base_state(placed)) == fingerprint(whole.state_dict())
    fused = pair(placed, gates=True)
    if hasattr(placed, "hf_device_map"):
        with pytest.warns(UserWarning, match="save a model with offloaded modules"):
            fused.save_pretrained(tmp_path / "fused")
    else:
        fused.save_pretrained(tmp_path / "fused")
    again = mt.FusedModel.from_pretrained(tmp_path / "fused", towers={"speech": fused.tower("speech")})
    assert {parameter.device.type for parameter in again.parameters()} == {"cpu"}
    assert torch.equal(again(**BATCH).logits["text"], fused(**BATCH).logits["text"])


@offloaded
def test_training_an_offloaded_tower_is_refused(
    place: Callable[[nn.Module, Path], nn.Module], tmp_path: Path
) -> None:
    graph = mt.FusionGraph()
    graph.add_tower("text", place(causal_lm("llama"), tmp_path), train="all")
    with pytest.raises(mt.errors.TowerError, match="tower 'text' is offloaded by accelerate"):
        graph.compile()


def test_training_a_placed_tower() -> None:
    graph = mt.FusionGraph()
    graph.add_tower(
        "text", accelerate.dispatch_model(causal_lm("llama"), {"": "cpu"}, force_hooks=True), train="all"
    )
    fused = graph.compile()
    fused(**mt.collate([[EXAMPLES[0][1]]])).loss.backward()
    gradients = [parameter.grad for parameter in fused.unimodal("text").parameters()]
    assert all(gradient is not None and gradient.any() for gradient in gradients)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tower_on_the_meta_device(family: str) -> None:
    config = causal_lm(family, depth=3).config
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    tower = mt.TransformersTower(model)
    assert (tower.depth, tower.width, tower.vocab_size) == (3, 16, 20)
    assert tower.device == torch.device("meta")
    fused = pair(model)
    assert {parameter.device.type for parameter in fused.links["speech->text"].parameters()} == {"meta"}


def test_a_tower_on_the_meta_device_works_once_it_has_weights() -> None:
    whole = causal_lm("llama")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(whole.config)
    tower = mt.TransformersTower(model)
    model.load_state_dict(whole.state_dict(), assign=True)
    model.model.rotary_emb.inv_freq = whole.model.rotary_emb.inv_freq
    assert torch.equal(tower(TEXT), whole(TEXT, use_cache=False).logits)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rest", ["cpu", "disk"])
def test_a_tower_half_on_a_gpu(rest: str, tmp_path: Path) -> None:
    model = causal_lm("llama", depth=4)
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 0, "lm_head": 0}
    places |= {f"model.layers.{layer}": 0 if layer < 2 else rest for layer in range(4)}
    placed = accelerate.dispatch_model(model, places, offload_dir=tmp_path)
    tower = mt.TransformersTower(placed)
    assert tower.device == torch.device("cuda", 0)
    assert torch.equal(tower(TEXT.cuda()), placed(TEXT.cuda(), use_cache=False).logits)
    streams = {name: {k: v.cuda() for k, v in part.items()} for name, part in BATCH["streams"].items()}
    fused = pair(placed, causal_lm("gpt2", depth=4, vocab_size=14).cuda())
    open_links(fused)(streams).loss.backward()
    for name, parameter in fused.named_parameters():
        if name.startswith(("links.", "adapters.")):
            assert parameter.device == torch.device("cuda", 0)
            assert parameter.grad.isfinite().all()
    fused.generate([[EXAMPLES[0][0]]], ["text"], max_new_tokens=3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_tower_on_two_gpus() -> None:
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    places |= {f"model.layers.{layer}": int(layer > 1) for layer in range(4)}
    placed = accelerate.dispatch_model(causal_lm("llama", depth=4), places)
    fused = open_links(pair(placed, causal_lm("gpt2", depth=4, vocab_size=14).cuda()))
    streams = {name: {k: v.cuda() for k, v in part.items()} for name, part in BATCH["streams"].items()}
    fused(streams).loss.backward()
    assert all(parameter.grad is not None for parameter in fused.links.parameters())
