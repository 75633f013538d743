"""Units of several codebooks in one stream, flattened and delayed."""

import pytest
import torch

pytest.importorskip("hypothesis", reason="needs the testing extra")

from hypothesis import given
from hypothesis import strategies as st

from multitower_speech import Layout

layouts = st.builds(Layout, st.integers(1, 5), st.integers(1, 7), st.sampled_from(["flattened", "delayed"]))


def draw_codes(layout, frames):
    generator = torch.Generator().manual_seed(frames)
    return torch.randint(layout.units, (frames, layout.codebooks), generator=generator)


@given(layouts, st.integers(0, 9))
def test_units_come_back(layout, frames):
    codes = draw_codes(layout, frames)
    tokens = layout.weave(codes)
    assert tokens[0] == layout.begin
    assert tokens[-1] == layout.end
    assert tokens.max() < layout.vocab_size
    delay = (layout.codebooks - 1) * (layout.pattern == "delayed")
    assert len(tokens) == (frames + delay) * layout.codebooks + 2
    assert torch.equal(layout.unweave(tokens), codes)
    assert torch.equal(layout.unweave(tokens[1:-1]), codes)


@given(layouts, st.integers(1, 9), st.lists(st.integers(0, 9), max_size=4))
def test_parts_are_the_whole(layout, frames, cuts):
    codes = draw_codes(layout, frames)
    parts = torch.tensor_split(codes, sorted(min(cut, frames) for cut in cuts))
    assert torch.equal(torch.cat(list(layout.weave_stream(parts))), layout.weave(codes))


@given(layouts, st.lists(st.integers(0, 45), max_size=40))
def test_any_tokens_give_units(layout, tokens):
    codes = layout.unweave(torch.tensor(tokens, dtype=torch.int64))
    assert codes.dtype == torch.int64
    assert codes.shape[1] == layout.codebooks
    assert len(codes) <= len(tokens)
    assert ((codes >= -1) & (codes < layout.units)).all()
    assert (codes[:, 0] >= 0).all()
    assert ((codes[:, 1:] < 0) | (codes[:, :-1] >= 0)).all()


def test_the_delay():
    codes = torch.tensor([[0, 1, 2], [3, 4, 5], [6, 7, 8], [0, 1, 2]])
    layout = Layout(3, 10, "delayed")
    steps = layout.weave(codes)[1:-1].reshape(6, 3)
    for step in range(6):
        for level in range(3):
            frame = step - level
            wanted = level * 10 + int(codes[frame, level]) if 0 <= frame < 4 else layout.blank
            assert steps[step, level] == wanted


def test_a_delayed_stream_that_stops_early_keeps_the_coarse_units():
    codes = torch.tensor([[0, 1], [2, 3], [4, 5]])
    tokens = Layout(2, 10, "delayed").weave(codes)[:7]
    assert Layout(2, 10, "delayed").unweave(tokens).tolist() == [[0, 1], [2, 3], [4, -1]]


def test_a_token_too_many_or_too_few_harms_one_frame_only():
    layout = Layout(2, 10)
    codes = draw_codes(layout, 6)
    tokens = layout.weave(codes)
    missing = layout.unweave(torch.cat([tokens[:6], tokens[7:]]))
    assert torch.equal(missing[:2], codes[:2])
    assert missing[2].tolist() == [int(codes[2, 0]), -1]
    assert torch.equal(missing[3:], codes[3:])
    doubled = layout.unweave(torch.cat([tokens[:7], tokens[6:]]))
    assert torch.equal(doubled, codes)


@pytest.mark.parametrize(
    ("options", "message"),
    [((2, 3, "parallel"), "flattened, delayed"), ((0, 3), "0 codebooks"), ((3, 0), "0 units")],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        Layout(*options)


@pytest.mark.parametrize("pattern", ["flattened", "delayed"])
@pytest.mark.parametrize(
    ("tokens", "message"),
    [(torch.zeros(2, 3, dtype=torch.int64), r"\(2, 3\)"), (torch.zeros(3), "float32"), ([-100, 3], "-100")],
)
def test_tokens_that_are_none(pattern, tokens, message):
    with pytest.raises(ValueError, match=message):
        Layout(2, 4, pattern).unweave(tokens)
