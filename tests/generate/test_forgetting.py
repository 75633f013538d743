"""Towers with ``memory="segment"`` attend only to their current segment, and cache only that."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import multitower as mt
from models import causal_lm, segment
from multitower.errors import ExportError, GraphError
from multitower.export import export_decoder
from multitower.testing import check_definition, check_identity, check_session, open_links
from multitower.train.state_cache import KeptStates
from sessions import counted

TURN = [segment("speech", 5, 6, 7), segment("text", 4, 5)]


def forgetful(family: str = "llama", *, train: str = "all") -> mt.FusedModel:
    """Link a speech tower that forgets and a text tower that does not, in both directions."""
    graph = mt.FusionGraph()
    speech = causal_lm(family, width=12, depth=3, vocab_size=14, seed=1)
    graph.add_tower("speech", speech, train=train, memory="segment")
    graph.add_tower("text", causal_lm("qwen3"), train=train)
    graph.add_link("speech", "text", interleave=1, embeddings=True)
    graph.add_link("text", "speech", interleave=1)
    torch.manual_seed(0)
    return open_links(graph.compile()).eval()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_a_conversation_is_what_a_forward_over_all_of_it_gives(family: str) -> None:
    model = forgetful(family)
    rows = [
        [segment("speech", 5, 6), segment("text", 4), segment("speech", 9, 3, 2), segment("speech", 7)],
        [segment("text", 4, 5), (segment("speech", 6), segment("text", 9, 3))],
        [segment("speech", 8, 9, 10, 11)],
    ]
    check_identity(model, rows)
    check_definition(model, rows)
    check_session(model, rows)


@torch.no_grad()
def test_a_later_segment_of_the_same_tower_changes_nothing_but_by_links() -> None:
    graph = mt.FusionGraph()
    graph.add_tower("speech", causal_lm("llama", vocab_size=14), memory="segment")
    graph.add_tower("text", causal_lm("qwen3"))
    model = graph.compile()
    rows = [[segment("speech", 5, 6), segment("text", 4), segment("speech", 9, 3)], [segment("speech", 9, 3)]]
    speech = model(**mt.collate(rows)).logits["speech"]
    torch.testing.assert_close(speech[0, 4:8], speech[1, :4])


def test_what_is_kept_is_of_one_segment() -> None:
    model = forgetful()
    session, lengths = model.session(), []
    for _ in range(4):
        session.append(TURN)
        session.generate(["speech"], max_new_tokens=4, eos_token_id=None)
        (row,) = session._rows
        lengths.append(row.of("speech").cache[0].keys.shape[2])
        assert row.of("text").cache[0].keys.shape[2] == len(row.of("text").tokens)
    assert lengths == [4] * 4  # the begin token and the decoded ones, of which the last did not run
    assert len(session._rows[0].of("speech").tokens) == 4 * (5 + 5)


def test_no_token_runs_twice() -> None:
    model = forgetful()
    model.session().generate(["speech"], max_new_tokens=1)  # runs one-time checks
    ran, session, totals = counted(model), model.session(), []
    for _ in range(4):
        ran.clear()
        session.append(TURN)
        session.generate(["speech"], max_new_tokens=4, eos_token_id=None)
        totals.append(dict(ran))
    speech = [[total[key] for key in sorted(total) if key[0] == "speech"] for total in totals]
    assert speech == [[5 + 4] * 3, *[[5 + 5] * 3] * 3]


def test_going_back_into_a_segment_that_was_forgotten_runs_it_again() -> None:
    model = forgetful()
    session = model.session()
    session.append(segment("text", 4, 5))
    session.append(mt.Segment("speech", [1, 5, 6]))
    mark = session.mark()
    session.append([segment("text", 9), segment("speech", 7)])
    session.rollback(mark)
    ((found,),) = session.generate(["speech"], continue_segment=True, max_new_tokens=4, do_sample=False)
    fresh = model.session()
    fresh.append(list(session.history[0][:2]))
    ((expected,),) = fresh.generate(["speech"], continue_segment=True, max_new_tokens=4, do_sample=False)
    assert found.tokens.tolist() == expected.tokens.tolist()


def test_a_segment_that_was_interrupted_cannot_go_on() -> None:
    session = forgetful().session()
    session.append([mt.Segment("speech", [1, 5]), segment("text", 4)])
    with pytest.raises(ValueError, match=r"example 0: tower 'speech' has memory='segment' and forgot.*begin"):
        session.generate(["speech"], continue_segment=True, max_new_tokens=2)


def test_packed_batches_have_the_losses_of_padded_ones() -> None:
    model = forgetful()
    rows = [
        [*TURN, segment("speech", 9, 3, target=True)],
        [segment("speech", 9, target=True)],
        [*TURN, *TURN],
    ]
    padded, packed = mt.collate(rows), mt.pack(mt.collate(rows), one_row=True)
    torch.testing.assert_close(model(**packed).losses["speech"], model(**padded).losses["speech"])


def test_a_checkpoint_remembers_that_a_tower_forgets(tmp_path: Path) -> None:
    model = forgetful()
    model.save_pretrained(tmp_path / "fused")
    assert mt.FusedModel.from_pretrained(tmp_path / "fused").graph.towers["speech"].memory == "segment"
    assert "memory=segment" in str(model.graph)


def test_what_it_cannot_do_is_refused(tmp_path: Path) -> None:
    graph = mt.FusionGraph()
    with pytest.raises(GraphError, match=r"tower 'speech': memory='turn' is unknown; .* 'all', 'segment'"):
        graph.add_tower("speech", causal_lm("llama"), memory="turn")
    graph.add_tower("speech", causal_lm("bloom"), memory="segment")
    with pytest.raises(GraphError, match=r"tower 'speech': memory='segment' .* BloomForCausalLM does not"):
        graph.compile()
    frozen = forgetful(train="none")
    with pytest.raises(ExportError, match="tower 'speech' has memory='segment'"):
        export_decoder(frozen, "speech", max_length=20)
    alone = frozen.drop("text->speech")
    with pytest.raises(ValueError, match="tower 'speech' forgets"):
        KeptStates.compute(alone, [mt.collate([TURN])], tmp_path / "kept")
