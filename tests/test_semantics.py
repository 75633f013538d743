"""What every fused model promises, whatever its graph."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import multitower as mt
from models import EXAMPLES, causal_lm, pair, segment
from multitower.testing import open_gates, tiny_tower

VOCABULARY = 12


@st.composite
def models(draw: st.DrawFn) -> mt.FusedModel:
    """Two to four towers of unlike sizes, linked at random."""
    names = "abcd"[: draw(st.integers(2, 4))]
    graph = mt.FusionGraph()
    for number, name in enumerate(names):
        tower = tiny_tower(
            number, depth=draw(st.integers(1, 3)), width=4 * draw(st.integers(1, 3)), vocab_size=VOCABULARY
        )
        graph.add_tower(name, tower, train=draw(st.sampled_from(["none", "all"])))
    pairs = st.sampled_from(list(itertools.permutations(names, 2)))
    for source, target in draw(st.lists(pairs, unique=True, min_size=1, max_size=6)):
        graph.add_link(
            source,
            target,
            interleave=1,
            projection=draw(st.sampled_from(["mlp", "linear", "relu"])),
            position=draw(st.sampled_from(["rotary", None])),
            window=draw(st.one_of(st.none(), st.integers(1, 4))),
        )
    return graph.compile().eval()


@st.composite
def examples(draw: st.DrawFn, names: list[str], least: int = 1) -> list[list[mt.Segment]]:
    tokens = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=4)
    piece = st.builds(mt.Segment, st.sampled_from(names), tokens, st.booleans())
    return draw(st.lists(st.lists(piece, min_size=least, max_size=4), min_size=1, max_size=3))


def logits_by_time(model: mt.FusedModel, example: list[mt.Segment]) -> dict[tuple[str, int], torch.Tensor]:
    batch = mt.collate([example])
    logits = model(**batch).logits
    return {
        (name, int(time)): logits[name][0, place]
        for name, stream in batch["streams"].items()
        for place, time in enumerate(stream["times"][0])
    }


@given(st.data())
def test_closed_gates_leave_every_tower_as_it_was(data: st.DataObject) -> None:
    model = data.draw(models())
    batch = mt.collate(data.draw(examples(list(model.towers))))
    for name, logits in model(**batch).logits.items():
        assert torch.equal(logits, model.unimodal(name)(batch["streams"][name]["tokens"]))


@given(st.data())
def test_no_logit_depends_on_a_later_token(data: st.DataObject) -> None:
    model = open_gates(data.draw(models()), seed=1)
    example = data.draw(examples(list(model.towers), least=2))[0]
    lengths = [len(segment.tokens) for segment in example]
    changed = data.draw(st.integers(0, sum(lengths) - 1))
    before = logits_by_time(model, example)
    start = 0
    altered = []
    for segment_, length in zip(example, lengths, strict=True):
        tokens = list(segment_.tokens)
        if start <= changed < start + length:
            tokens[changed - start] = (tokens[changed - start] + 1) % VOCABULARY
        altered.append(mt.Segment(segment_.tower, tokens))
        start += length
    after = logits_by_time(model, altered)
    for (name, time), logits in before.items():
        if time < changed:
            assert torch.equal(logits, after[name, time])


@given(st.data())
def test_a_batch_is_its_rows_one_by_one(data: st.DataObject) -> None:
    model = open_gates(data.draw(models()), seed=1)
    rows = data.draw(examples(list(model.towers)))
    together = model(**mt.collate(rows)).logits
    for number, row in enumerate(rows):
        for name, alone in model(**mt.collate([row])).logits.items():
            torch.testing.assert_close(together[name][number, : alone.shape[1]], alone[0])


@given(st.data())
def test_gradients_reach_exactly_what_is_trained_and_are_finite(data: st.DataObject) -> None:
    model = open_gates(data.draw(models()), seed=1).train()
    model(**mt.collate(data.draw(examples(list(model.towers))))).loss.backward()
    for name, parameter in model.named_parameters():
        if name.startswith("towers."):
            trained = model.graph.towers[name.split(".")[1]].train == "all"
            assert parameter.requires_grad == trained
        assert parameter.grad is None or (parameter.requires_grad and bool(parameter.grad.isfinite().all()))


def test_causality_would_be_seen_along_every_path() -> None:
    """The counterpart: later tokens of other towers do change when an earlier token does."""
    model = pair(gates=True)
    example = [segment("speech", 5, 6), segment("text", 4, 5), segment("speech", 7)]
    altered = [segment("speech", 5, 7), *example[1:]]
    before, after = logits_by_time(model, example), logits_by_time(model, altered)
    assert all(not torch.equal(before[key], after[key]) for key in before if key[1] >= 4)


def test_tokens_of_the_same_time_do_not_see_each_other() -> None:
    model = pair(gates=True)
    row, clock = torch.arange(2, 7)[None], torch.arange(5)[None]

    def logits(speech: torch.Tensor) -> torch.Tensor:
        streams = {
            name: {"tokens": tokens, "times": clock, "mask": torch.ones_like(tokens, dtype=torch.bool)}
            for name, tokens in (("speech", speech), ("text", row))
        }
        return model(streams=streams).logits["text"][0]

    changed = row.clone()
    changed[0, 2] = 9
    before, after = logits(row), logits(changed)
    assert torch.equal(before[:3], after[:3])
    assert not torch.isclose(before[3:], after[3:]).all(-1).any()


def test_a_row_of_one_modality_gets_exactly_zero_from_links() -> None:
    model = pair(gates=True)
    for adapter in model.adapters.values():
        adapter.gate.data.zero_()
    batch = mt.collate([[segment("text", 4, 5)], [segment("speech", 3), segment("text", 6)]])
    logits = model(**batch).logits["text"]
    native = model.unimodal("text")(batch["streams"]["text"]["tokens"])
    assert torch.equal(logits[0], native[0])
    assert not torch.equal(logits[1, :3], native[1, :3])


def test_links_into_one_layer_add_up_in_any_order() -> None:
    def build(order: list[tuple[str, str]]) -> mt.FusedModel:
        graph = mt.FusionGraph()
        for number, name in enumerate("abc"):
            graph.add_tower(name, tiny_tower(number), adapter=None)
        for source, target in order:
            graph.add_link(source, target, taps=[(1, 1)])
        return graph.compile().eval()

    order = [("a", "c"), ("b", "c"), ("c", "a")]
    first, second = build(order), build(order[::-1])
    open_gates(first)
    second.load_state_dict(first.state_dict())
    batch = mt.collate([[segment("a", 3), segment("b", 4), segment("c", 5), segment("a", 6)]])
    for name in "abc":
        assert torch.equal(first(**batch).logits[name], second(**batch).logits[name])

    kept = first(**batch).logits["c"]
    only_a, only_b = build([("a", "c")]), build([("b", "c")])
    for part in (only_a, only_b):
        part.load_state_dict(first.state_dict(), strict=False)
    states = {model: model.run(batch["streams"]).hidden["c"] for model in (first, only_a, only_b)}
    assert kept.isfinite().all()
    assert not torch.equal(states[only_a], states[only_b])


def test_both_directions_read_the_state_from_before() -> None:
    """At a pair, what a tower gives does not depend on what it takes there."""
    both = pair(gates=True)
    batch = mt.collate([[segment("speech", 5, 6), segment("text", 4, 5), segment("speech", 7)]])
    given = both.run(batch["streams"]).given
    for tap in both.schedule.taps:
        if tap.target == "speech" and tap.target_layer == 2:
            torch.nn.init.zeros_(both.tap(tap).attention_gate)
            torch.nn.init.zeros_(both.tap(tap).ffn_gate)
    assert torch.equal(both.run(batch["streams"]).given["speech", 2], given["speech", 2])


def test_links_that_see_nothing_do_not_run() -> None:
    model = pair(gates=True)
    ran = set()
    for tap in model.schedule.taps:
        model.tap(tap).register_forward_hook(lambda *_, link=tap.link: ran.add(link))
    model(**mt.collate([[segment("speech", 3), segment("text", 4)]] * 2))
    assert ran == {"speech->text"}


def test_padding_changes_nothing() -> None:
    model = pair(gates=True)
    batch = mt.collate(EXAMPLES)
    filled = {
        name: {**stream, "tokens": torch.where(stream["mask"], stream["tokens"], 7)}
        for name, stream in batch["streams"].items()
    }
    plain, noisy = model(**batch), model(streams=filled)
    for name, stream in batch["streams"].items():
        assert torch.equal(plain.logits[name][stream["mask"]], noisy.logits[name][stream["mask"]])
    assert torch.equal(plain.loss, noisy.loss)


@pytest.mark.parametrize("train", ["none", "all"])
def test_frozen_towers_stay_bit_equal_while_the_rest_learns(train: str) -> None:
    text = causal_lm("llama")
    tokens = torch.tensor([[0, 5, 6, 7, 1]])
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
    assert any(gate != 0 for gate in model.gates().values())
    assert model.unimodal("text") is text
    assert torch.equal(text(tokens).logits, before)
    assert all(torch.equal(value, weights[key]) for key, value in text.state_dict().items())
    assert torch.equal(speech_weight, model.tower("speech").table.weight) == (train == "none")
    fused = model(**mt.collate([[segment("speech", 5), segment("text", 5, 6, 7)]])).logits["text"]
    assert not torch.equal(fused, before)


def test_frozen_towers_stay_in_eval_mode_and_out_of_autograd() -> None:
    graph = mt.FusionGraph()
    graph.add_tower("speech", tiny_tower(0), adapter=None)
    graph.add_tower("text", tiny_tower(1), adapter=None)
    graph.add_link("speech", "text", taps=[(1, 2)])
    model = graph.compile().train()
    assert model.training
    assert not any(model.tower(name).training for name in model.towers)
    assert model.links["speech->text"]["1-2"].training
    states = model.run(mt.collate(EXAMPLES)["streams"])
    assert not states.hidden["speech"].requires_grad
    assert not states.given["speech", 1].requires_grad
    assert states.hidden["text"].requires_grad


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
    with pytest.raises(mt.GraphError, match="link 'speech->text': 3 heads do not divide the target width 8"):
        graph.compile()


def test_rotary_positions_need_pairs_of_channels() -> None:
    graph = mt.FusionGraph()
    graph.add_tower("speech", tiny_tower(0))
    graph.add_tower("text", tiny_tower(1, width=6))
    graph.add_link("speech", "text", interleave=1, heads=2, position="rotary")
    with pytest.raises(mt.GraphError, match="link 'speech->text': rotary positions need an even head width"):
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
    open_gates(model)(**batch).loss.backward()


def test_a_window_says_how_far_back_a_link_sees() -> None:
    speech = tiny_tower(1, depth=1, width=12)
    speech.layers[0].forward = lambda x: x  # or states would tell of tokens before the window
    graph = mt.FusionGraph()
    graph.add_tower("speech", speech)
    graph.add_tower("text", tiny_tower(2))
    graph.add_link("speech", "text", taps=[(1, 2)], window=3)
    model = open_gates(graph.compile().eval())

    def logits(*speech: int) -> torch.Tensor:
        example = [mt.Segment("speech", speech), mt.Segment("text", [2, 3, 4])]
        return model(**mt.collate([example])).logits["text"][0]

    before = logits(5, 6, 7)
    for changed, seeing in (((9, 6, 7), 1), ((5, 9, 7), 2), ((5, 6, 9), 3)):
        differ = (logits(*changed) != before).any(-1)
        assert differ.tolist() == [place < seeing for place in range(3)]
