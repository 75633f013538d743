"""Examples of what fused models do; ``test_properties`` tests what holds for all graphs."""

from __future__ import annotations

import pytest
import torch

import multitower as mt
from models import EXAMPLES, causal_lm, pair, segment
from multitower.testing import open_links, tiny_tower


def logits_by_time(model: mt.FusedModel, example: list[mt.Segment]) -> dict[tuple[str, int], torch.Tensor]:
    batch = mt.collate([example])
    logits = model(**batch).logits
    return {
        (name, int(time)): logits[name][0, place]
        for name, stream in batch["streams"].items()
        for place, time in enumerate(stream["times"][0])
    }


def test_causality_would_be_seen_along_every_path() -> None:
    """Check the opposite of causality: a changed token changes later logits of all towers."""
    model = pair(gates=True)
    example = [segment("speech", 5, 6), segment("text", 4, 5), segment("speech", 7)]
    altered = [segment("speech", 5, 7), *example[1:]]
    before, after = logits_by_time(model, example), logits_by_time(model, altered)
    assert all(not torch.equal(before[key], after[key]) for key in before if key[1] >= 4)


def test_links_that_see_nothing_do_not_run() -> None:
    model = pair(gates=True)
    ran = set()
    for tap in model.schedule.taps:
        model.tap(tap).register_forward_hook(lambda *_, link=tap.link: ran.add(link))
    model(**mt.collate([[segment("speech", 3), segment("text", 4)]] * 2))
    assert ran == {"speech->text"}


@pytest.mark.parametrize("train", ["none", "all"])
def test_frozen_towers_stay_bit_equal_while_the_rest_learns(train: str) -> None:
    text = causal_lm("llama")
    tokens = torch.tensor([[1, 5, 6, 7, 2]])
    before = text(tokens).logits.detach()
    weights = {key: value.clone() for key, value in text.state_dict().items()}
    model = pair(text, train=train).train()
    speech_weight = model.tower("speech").table.weight.clone()
    optimizer = torch.optim.AdamW(model.parameter_groups(lr=1e-2))
    batch = mt.collate(EXAMPLES)
    losses = []
    for _ in range(30):
        out = model(**batch)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(map(model.is_open, model.links))
    assert model.unimodal("text") is text
    assert torch.equal(text(tokens).logits, before)
    assert all(torch.equal(value, weights[key]) for key, value in text.state_dict().items())
    assert torch.equal(speech_weight, model.tower("speech").table.weight) == (train == "none")
    fused = model(**mt.collate([[segment("speech", 5), segment("text", 5, 6, 7)]])).logits["text"]
    assert not torch.equal(fused, before)


def test_losses_are_means_over_labels() -> None:
    model = pair(gates=True)
    batch = mt.collate(EXAMPLES)
    out = model(**batch)
    labels = batch["streams"]["text"]["labels"][:, 1:]
    every = torch.nn.functional.cross_entropy(
        out.logits["text"][:, :-1].flatten(0, 1), labels.flatten(), ignore_index=-100
    )
    torch.testing.assert_close(out.losses["text"], every)
    torch.testing.assert_close(out.loss, sum(out.losses.values()))
    unlabelled = model(**mt.collate([[segment("speech", 5)]]))
    assert unlabelled.loss.item() == 0
    without = {key: value for key, value in batch["streams"]["text"].items() if key != "labels"}
    assert model(streams={"text": without}).loss is None


def test_attention_weights_sum_to_one_where_something_is_seen() -> None:
    model = pair(gates=True)
    attentions = model(**mt.collate(EXAMPLES), output_attentions=True).attentions
    assert set(attentions) == {"speech->text", "text->speech"}
    assert set(attentions["speech->text"]) == {"2-1", "4-2"}
    weights = attentions["speech->text"]["2-1"]
    assert weights.shape == (3, 1, 10, 6)
    sums = weights.sum(-1)[:, 0]
    torch.testing.assert_close(sums[0, :4], torch.ones(4))
    assert not sums[1, :7].any()
    torch.testing.assert_close(sums[1, 7:], torch.ones(3))
    assert not sums[2].any()


def test_rotary_positions_see_distances_in_time() -> None:
    """Moving a whole example in time changes nothing; moving its parts apart does."""
    model = pair(gates=True, position="rotary")
    streams = mt.collate([[segment("speech", 5, 6, 7), segment("text", 4, 5)]])["streams"]

    def moved(by: dict[str, int]) -> torch.Tensor:
        shifted = {name: {**stream, "times": stream["times"] + by[name]} for name, stream in streams.items()}
        return model(streams=shifted).logits["text"]

    here = moved({"speech": 0, "text": 0})
    torch.testing.assert_close(moved({"speech": 50, "text": 50}), here)
    assert not torch.allclose(moved({"speech": 0, "text": 50}), here)


def test_positions_in_segments_see_no_distances_in_time() -> None:
    """A gap in time changes nothing; a different pace does."""
    model = pair(gates=True, position="segment")
    assert [link.pace for link in model.graph.links.values()] == [2.5, 0.4]
    speech, text = segment("speech", 5, 6, 7), segment("text", 4, 5)
    streams = mt.collate([[speech, text]])["streams"]
    moved = {name: {**each, "times": each["times"] + 50} for name, each in streams.items()}
    here = model(streams=streams).logits["text"]
    torch.testing.assert_close(model(streams=moved).logits["text"], here)
    later = {**streams, "text": {**streams["text"], "times": streams["text"]["times"] + 50}}
    torch.testing.assert_close(model(streams=later).logits["text"], here)
    graph = model.graph.to_dict()
    graph["links"][0]["pace"] = 1.0
    paced = mt.FusedModel(mt.FusionGraph.from_dict(graph), {name: model.tower(name) for name in model.towers})
    paced.load_state_dict(model.state_dict())
    assert not torch.allclose(paced.eval()(streams=streams).logits["text"], here)


def test_paper_adapter_is_not_the_identity() -> None:
    graph = mt.FusionGraph()
    graph.add_tower("text", tiny_tower(), adapter="paper")
    model = graph.compile()
    batch = mt.collate([[segment("text", 3, 4)]])
    native = model.unimodal("text")(batch["streams"]["text"]["tokens"])
    assert not torch.allclose(model(**batch).logits["text"], native)


def test_heads_that_do_not_fit_are_named() -> None:
    graph = mt.FusionGraph()
    graph.add_tower("speech", tiny_tower(0))
    graph.add_tower("text", tiny_tower(1, width=8))
    graph.add_link("speech", "text", interleave=1, heads=3)
    with pytest.raises(
        mt.errors.GraphError, match="link 'speech->text': 3 heads do not divide the target width 8"
    ):
        graph.compile()


def test_rotary_positions_need_pairs_of_channels() -> None:
    graph = mt.FusionGraph()
    graph.add_tower("speech", tiny_tower(0))
    graph.add_tower("text", tiny_tower(1, width=6))
    graph.add_link("speech", "text", interleave=1, heads=2)
    with pytest.raises(
        mt.errors.GraphError, match="link 'speech->text': rotary positions need an even head width"
    ):
        graph.compile()


def test_unknown_tower_is_named() -> None:
    with pytest.raises(KeyError, match="no tower 'music'; the towers are speech, text"):
        pair().unimodal("music")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    text = causal_lm("llama").to(dtype)
    model = pair(text)
    batch = mt.collate(EXAMPLES)
    assert torch.equal(model(**batch).logits["text"], text(batch["streams"]["text"]["tokens"]).logits)
    open_links(model)(**batch).loss.backward()


def test_a_window_says_how_far_back_a_link_sees() -> None:
    speech = tiny_tower(1, depth=1, width=12)
    speech.layers[0].forward = lambda x, mask: x  # otherwise states would depend on tokens before the window
    graph = mt.FusionGraph()
    graph.add_tower("speech", speech)
    graph.add_tower("text", tiny_tower(2))
    graph.add_link("speech", "text", taps=[(1, 2)], window=3)
    model = open_links(graph.compile().eval())

    def logits(*speech: int) -> torch.Tensor:
        example = [mt.Segment("speech", speech), mt.Segment("text", [2, 3, 4])]
        return model(**mt.collate([example])).logits["text"][0]

    before = logits(5, 6, 7)
    for changed, seeing in (((9, 6, 7), 1), ((5, 9, 7), 2), ((5, 6, 9), 3)):
        differ = (logits(*changed) != before).any(-1)
        assert differ.tolist() == [place < seeing for place in range(3)]
