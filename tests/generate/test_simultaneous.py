"""Towers decoded at the same time, and policies that choose what comes next."""

from __future__ import annotations

import pytest
import torch

import multitower as mt
from models import BEGIN, END, causal_lm, pair, segment
from multitower.testing import check_decoding, open_links, tiny_tower

GIVEN = [
    [segment("speech", 5, 6, 7, 8)],
    [segment("text", 4, 5), segment("speech", 9, 3), segment("text", 6)],
    [segment("text", 4)],
    [],
]


def fusion(kind: str) -> mt.FusedModel:
    if kind == "plain":
        return pair(gates=True, position="segment")
    speech = causal_lm("llama", depth=4, vocab_size=14, seed=1)
    return pair(causal_lm(kind), speech, gates=True, position="rotary")


@torch.no_grad()
def by_hand(model: mt.FusedModel, example: list, names: tuple[str, ...], steps: int) -> tuple[list[int], ...]:
    rows = {name: [BEGIN] for name in names}
    for _ in range(steps):
        batch = mt.collate([[*example, tuple(mt.Segment(name, row) for name, row in rows.items())]])
        out = model(**batch)
        for name, row in rows.items():
            if len(row) == 1 or row[-1] != END:
                last = int(batch["streams"][name]["mask"][0].sum()) - 1
                row.append(int(out.logits[name][0, last].argmax()))
        if all(row[-1] == END for row in rows.values()):
            break
    return tuple(rows.values())


@pytest.mark.parametrize("kind", ["plain", "llama", "gpt2", "gemma3_text"])
def test_towers_decoded_at_the_same_time_equal_uncached_row_by_row(kind: str) -> None:
    model = fusion(kind)
    decoded = model.generate(GIVEN, output=[("text", "speech")], max_new_tokens=7)
    for row, ((text, speech),) in zip(GIVEN, decoded, strict=True):
        assert (text.tower, speech.tower) == ("text", "speech")
        assert (text.tokens.tolist(), speech.tokens.tolist()) == by_hand(model, row, ("text", "speech"), 7)


def test_rows_and_towers_that_end_at_different_steps() -> None:
    model = fusion("llama")
    ends = {by_hand(model, row, ("text", "speech"), 7)[0][3] for row in GIVEN}
    assert END not in ends
    longest = model.generate(GIVEN, output=[("text", "speech")], max_new_tokens=7)
    model.unimodal("text").generation_config.eos_token_id = [END, *sorted(ends)[:2]]
    decoded = model.generate(GIVEN, output=[("text", "speech")], max_new_tokens=7)
    shorter = 0
    for ((text, speech),), ((long_text, _),), row in zip(decoded, longest, GIVEN, strict=True):
        tokens = text.tokens.tolist()
        assert tokens == long_text.tokens.tolist()[: len(tokens)]
        shorter += len(tokens) < len(long_text.tokens)
        again = [*row, (text, mt.Segment("speech", speech.tokens[:-1]))]
        batch = mt.collate([again])
        last = int(batch["streams"]["speech"]["mask"][0].sum()) - 1
        with torch.no_grad():
            logits = model(**batch).logits["speech"][0, last]
        assert int(logits.argmax()) == int(speech.tokens[-1])
    assert shorter


def test_the_order_of_the_towers_does_not_matter() -> None:
    model = fusion("llama")
    one = model.generate(GIVEN, output=[("text", "speech")], max_new_tokens=5)
    other = model.generate(GIVEN, output=[("speech", "text")], max_new_tokens=5)
    for ((text, speech),), ((other_speech, other_text),) in zip(one, other, strict=True):
        assert torch.equal(text.tokens, other_text.tokens)
        assert torch.equal(speech.tokens, other_speech.tokens)


def test_three_towers_one_of_them_new() -> None:
    graph = mt.FusionGraph()
    for number, name in enumerate("abc"):
        graph.add_tower(name, tiny_tower(number))
    for source, target in ("ab", "bc", "ca", "cb"):
        graph.add_link(source, target, interleave=1)
    model = open_links(graph.compile().eval(), seed=3)
    row = [mt.Segment("a", [BEGIN, 5, END]), mt.Segment("b", [BEGIN, 6, 7, END])]
    ((first, second),) = model.generate([row], output=["a", ("c", "b")], max_new_tokens=4)
    assert first.tokens.tolist() == by_hand(model, row, ("a",), 4)[0]
    assert tuple(each.tokens.tolist() for each in second) == by_hand(model, [*row, first], ("c", "b"), 4)


def test_sampling_at_the_same_time_follows_the_seed() -> None:
    model = fusion("llama")
    options = {"output": [("text", "speech")], "max_new_tokens": 6, "do_sample": True, "top_k": 5}
    seen = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        seen.append(
            str([[each.tokens.tolist() for each in row[0]] for row in model.generate(GIVEN, **options)])
        )
    assert seen[0] == seen[1] != seen[2]


def test_a_policy_chooses_by_the_end_token() -> None:
    model = fusion("llama")
    firsts = [model.generate([row], output=["text"], max_new_tokens=3)[0][0].tokens for row in GIVEN]
    turn = int(firsts[0][1])
    model.unimodal("text").generation_config.eos_token_id = [END, turn]

    def policy(row: list[mt.Segment]) -> str | tuple[str, str] | None:
        if len(row) == 0 or row[-1].tower == "speech":
            return "text"
        return "speech" if int(row[-1].tokens[-1]) == turn and len(row) < 6 else None

    decoded = model.generate(GIVEN[:3], policy, max_new_tokens=3)
    for row, new in zip(GIVEN, decoded, strict=False):
        done = list(row)
        while (name := policy(done)) is not None:
            assert isinstance(name, str)
            ((expected,),) = model.generate([done], output=[name], max_new_tokens=3)
            done.append(expected)
        assert [(each.tower, each.tokens.tolist()) for each in new] == [
            (each.tower, each.tokens.tolist()) for each in done[len(row) :]
        ]
    assert {len(new) for new in decoded} != {0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output": [("text", "text")]}, "a tower occurs twice"),
        ({"output": [()]}, "list of towers"),
        ({"output": [("text", "music")]}, "no tower 'music'"),
        (
            {"output": [("text", "speech")], "num_beams": 2},
            "beam_search: towers that are decoded at the same",
        ),
        ({"output": lambda row: "music"}, "no tower 'music'"),
        (
            {"output": lambda row: "text", "num_return_sequences": 2, "do_sample": True},
            r"needs a single output tower, as in output=\['text'\]",
        ),
    ],
)
def test_bad_calls_teach(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pair().generate(GIVEN, **{"max_new_tokens": 2, **arguments})


@pytest.mark.parametrize("seed", [6, 10, 57])
def test_a_row_that_has_ended_keeps_its_place_for_towers_without_a_cache(seed: int) -> None:
    graph = mt.FusionGraph()
    graph.add_tower("speech", tiny_tower(seed, width=6).double(), adapter=None)
    graph.add_tower("text", tiny_tower(seed + 1).double(), adapter=None)
    graph.add_link("speech", "text", interleave=1)
    graph.add_link("text", "speech", interleave=1)
    torch.manual_seed(seed)
    rows = [
        [mt.Segment("text", [3]), mt.Segment("speech", [9, 12, 8]), mt.Segment("speech", [8, 4])],
        [mt.Segment("text", [2, 0, 4, 3])],
    ]
    check_decoding(graph.compile(), rows)


@pytest.mark.parametrize("policy", [{"speech": "text", "text": "speech"}, {"speech": "text"}])
def test_functions_that_count_rows_are_refused_where_rows_part(policy: dict[str, str]) -> None:
    """They would get row numbers among the rows that are decoded together, not among all."""
    given = [[segment("speech", 5)], [segment("text", 4)]]
    options = {"prefix_allowed_tokens_fn": lambda row, tokens: [row + 5], "max_new_tokens": 2}
    with pytest.raises(ValueError, match="prefix_allowed_tokens_fn would see these examples in 2 batches"):
        pair().generate(given, lambda row: policy.get(row[-1].tower) if len(row) < 3 else None, **options)


@pytest.mark.parametrize("output", [["text"], [("text", "speech")]])
def test_every_module_gets_its_own_mode_back(output: list) -> None:
    model = pair(train="all").train()
    model.unimodal("speech").eval()
    modes = {name: each.training for name, each in model.named_modules()}
    assert set(modes.values()) == {False, True}
    model.generate(GIVEN, output, max_new_tokens=2)
    assert {name: each.training for name, each in model.named_modules()} == modes
