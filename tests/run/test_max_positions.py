"""Streams and decoding beyond the last position of a tower."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import families
import multitower as mt
from models import BEGIN, END, causal_lm, pair, segment
from multitower.testing import tiny_tower

LIMIT = 16
SIZES = {"gpt2": {"n_positions": LIMIT}, "opt": {"max_position_embeddings": LIMIT}}


def limited(family: str) -> nn.Module:
    return causal_lm(family, config=SIZES[family])


def fused(family: str) -> mt.FusedModel:
    return pair(text=limited(family), gates=True)


def text(length: int) -> mt.Segment:
    return mt.Segment("text", [BEGIN, *[5] * (length - 1)], target=True)


def given(length: int) -> mt.Segment:
    return mt.Segment("text", [BEGIN, *[5] * (length - 1)])


@pytest.mark.parametrize(
    ("family", "limit"),
    [
        ("gpt2", 128),
        ("opt", 128),
        ("roberta", 126),
        ("ctrl", 128),
        ("gptj", 128),
        ("codegen", 128),
        ("xglm", None),
        ("llama", None),
        ("bloom", None),
        ("gpt_neox", None),
    ],
)
def test_a_limit_is_that_of_the_model(family: str, limit: int | None) -> None:
    """All configs have 128 positions, but the limit is where the model itself fails."""
    model = families.tiny(family)
    tower = mt.TransformersTower(model)
    assert tower.hard_limit == limit
    tokens = torch.full((1, 129 if limit is None else limit), families.FIRST_TOKEN)
    assert tower(tokens).shape[1] == tokens.shape[1]
    if limit is not None:
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, limit + 1), families.FIRST_TOKEN), use_cache=False)


@pytest.mark.parametrize("family", SIZES)
def test_a_stream_beyond_the_last_position_is_refused(family: str) -> None:
    model = fused(family)
    model(**mt.collate([[text(LIMIT)]]))
    batch = mt.collate([[text(2)], [text(3), segment("speech", 4), text(LIMIT - 2)]])
    message = (
        r"row 1 of the batch has 17 tokens of tower 'text' \((GPT2LMHeadModel|OPTForCausalLM)\), which "
        r"has only 16 positions; its segment at time 19 goes beyond. Give it shorter"
    )
    with pytest.raises(ValueError, match=message):
        model(**batch)
    with pytest.raises(ValueError, match=message):
        model.estimate(mt.collate([[text(2)], [text(3), segment("speech", 4), text(LIMIT - 2)]]))


def test_padding_beyond_the_last_position_is_refused() -> None:
    model, streams = fused("gpt2"), mt.collate([[text(LIMIT)]])["streams"]
    streams["text"] = {
        key: nn.functional.pad(value, (0, 1), value={"times": -1, "labels": -100}.get(key, 0))
        for key, value in streams["text"].items()
    }
    with pytest.raises(
        ValueError, match=r"the stream of tower 'text' .* is 17 tokens long, padding included"
    ):
        model(streams)


def test_a_model_that_runs_on_is_not_refused() -> None:
    model = pair(text=causal_lm("llama", config={"max_position_embeddings": LIMIT}))
    model(**mt.collate([[text(LIMIT + 4)]]))
    ((decoded,),) = model.generate([[given(LIMIT + 4)]], ["text"], max_new_tokens=3, min_new_tokens=3)
    assert len(decoded.tokens) == 4


@pytest.mark.parametrize(
    "output", [["text"], [("text", "speech")], lambda row: None if len(row) > 2 else "text"]
)
def test_a_prompt_without_room_for_a_segment_is_refused(output: Any) -> None:
    model = fused("opt")
    examples = [[segment("speech", 4), given(2)], [segment("speech", 4), given(LIMIT)]]
    message = (
        r"example 1, with a further token, has 17 tokens of tower 'text' \(OPTForCausalLM\), .* time 19 goes"
    )
    with pytest.raises(ValueError, match=message):
        model.generate(examples, output, max_new_tokens=2)


def test_a_prompt_that_others_read_is_refused() -> None:
    with pytest.raises(ValueError, match=r"row 0 of the batch has 17 tokens of tower 'text'"):
        fused("opt").generate([[given(LIMIT + 1)]], ["speech"], max_new_tokens=2)


@pytest.mark.parametrize("entry", ["text", ("text", "speech")])
@pytest.mark.parametrize("own", [False, True])
def test_decoding_ends_at_the_last_position_or_says_so(entry: Any, own: bool) -> None:
    """The last token takes no position, because no step reads it; custom towers have no cache."""
    tower = tiny_tower(2, depth=2, width=8, vocab_size=20)
    tower.hard_limit = LIMIT
    model = pair(text=tower, gates=True) if own else fused("gpt2")
    examples = [[segment("speech", 4), given(3)], [given(1)]]
    room = LIMIT - 4 + 1

    def decode(new: int) -> Any:
        return model.generate(examples, [entry], max_new_tokens=new, min_new_tokens=new)

    decoded = decode(room)[0][0]
    segments = decoded if isinstance(decoded, tuple) else (decoded,)
    assert [len(each.tokens) for each in segments] == [room + 1] * len(segments)
    with pytest.raises(
        ValueError, match=r"tower 'text' \(\w+\) has positions for 16 tokens, all of which are"
    ):
        decode(room + 1)


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 2}, {"use_cache": False}])
def test_decoding_in_other_ways_says_so(options: dict) -> None:
    with pytest.raises(ValueError, match=r"tower 'text' \(GPT2LMHeadModel\) has positions for 16 tokens"):
        fused("gpt2").generate([[given(3)]], ["text"], max_new_tokens=20, min_new_tokens=20, **options)


def test_decoding_that_ends_by_itself_may_have_a_limit_beyond() -> None:
    model = fused("gpt2")
    ((decoded,),) = model.generate(
        [[given(3)]],
        ["text"],
        max_new_tokens=99,
        forced_bos_token_id=None,
        suppress_tokens=[token for token in range(20) if token != END],
    )
    assert decoded.tokens.tolist() == [BEGIN, END]


def test_where_nothing_is_said_decoding_ends_at_the_last_position() -> None:
    model = pair(text=families.tiny("roberta"))
    with pytest.warns(UserWarning, match="decodes without its cache"):
        ((decoded,),) = model.generate(
            [[mt.Segment("text", [40] * 120)]], ["text"], begin_suppress_tokens=None, bos_token_id=1
        )
    assert 120 + len(decoded.tokens) == 126


def test_text_that_was_decoded_to_the_last_position_is_not_read_beyond() -> None:
    """The last decoded token was not read yet; if another tower reads it, it takes one more position."""
    model = fused("gpt2")
    with pytest.raises(ValueError, match=r"row 0 of the batch has 17 tokens of tower 'text'"):
        model.generate(
            [[given(3)]],
            ["text", "speech"],
            max_new_tokens={"text": 13, "speech": 2},
            min_new_tokens={"text": 13, "speech": 1},
        )


def test_the_longest_example_of_a_packed_row_counts() -> None:
    model = fused("gpt2")
    speech = segment("speech", *[4] * 20)
    rows = [[text(LIMIT)], [text(5)], [speech]]
    packed = mt.pack(mt.collate(rows))
    assert packed["streams"]["text"]["tokens"].shape == (2, 21)  # only padding beyond the last position
    assert torch.allclose(model(**packed).loss, model(**mt.collate(rows)).loss)
    batch = mt.pack(mt.collate([[text(4)], [speech, text(LIMIT + 1)], [text(LIMIT)]]), one_row=True)
    with pytest.raises(ValueError, match=r"example 1 of the packed batch has 17 tokens of .* time 38 goes"):
        model(**batch)


def test_peft_leaves_the_limit() -> None:
    tower = tiny_tower(2, depth=2, width=8, vocab_size=20)
    tower.hard_limit = LIMIT
    peft = pytest.importorskip("peft", reason="needs peft")
    graph = mt.FusionGraph()
    graph.add_tower("own", tower, train=peft.LoraConfig(target_modules=["attention"]))
    graph.add_tower("text", limited("gpt2"), train="lora")
    model = graph.compile()
    assert [model.tower(name).hard_limit for name in model.towers] == [LIMIT, LIMIT]


@pytest.mark.slow
def test_a_program_is_told_the_limit() -> None:
    from multitower.export import export_tower

    program = export_tower(fused("gpt2"), "text")
    assert {int(each.upper) for each in program.range_constraints.values() if each.upper < 1000} == {LIMIT}
