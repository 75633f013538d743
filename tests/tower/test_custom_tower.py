from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import multitower as mt
from multitower.testing import check_decoding, check_tower, open_links

with warnings.catch_warnings():
    # x-transformers calls it on import.
    warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")
    pytest.importorskip("x_transformers", reason="the example needs x-transformers")

from x_transformers import Decoder, Encoder, TransformerWrapper

from custom_tower import GPT, GPTTower, XTransformersTower, examples, fuse, main, phrases, towers, translated


def wrapper(around: dict, layers: dict, kind: type[nn.Module] = Decoder) -> TransformerWrapper:
    sizes = {"dim": 32, "depth": 2, "heads": 2, "attn_dim_head": 16, "verbose": False}
    torch.manual_seed(0)
    return TransformerWrapper(
        num_tokens=14, max_seq_len=32, attn_layers=kind(**{**sizes, **layers}), **around
    ).eval()


DONE = {
    "as it comes": ({}, {}),
    "rotary": ({}, {"rotary_pos_emb": True, "attn_flash": True}),
    "xpos": ({}, {"rotary_xpos": True}),
    "alibi": ({}, {"alibi_pos_bias": True}),
    "buckets": ({}, {"rel_pos_bias": True}),
    "polar": ({}, {"polar_pos_emb": True}),
    "sinusoids": ({"scaled_sinu_pos_emb": True}, {}),
    "no positions": ({"use_abs_pos_emb": False}, {}),
    "narrow embedding": ({"emb_dim": 16, "post_emb_norm": True, "l2norm_embed": True}, {}),
    "post-norm": ({}, {"pre_norm": False}),
    "sandwich norm": ({}, {"sandwich_norm": True, "use_rmsnorm": True}),
    "both norms": ({}, {"pre_and_post_norm": True, "use_scalenorm": True}),
    "gated": ({}, {"gate_residual": True, "ff_glu": True, "use_layerscale": True}),
    "grouped keys": ({}, {"attn_kv_heads": 1, "attn_qk_norm": True, "attn_num_mem_kv": 2}),
    "macaron": ({}, {"macaron": True, "softclamp_output": True, "scale_residual": True}),
    "only attention": ({}, {"only_attn": True, "shift_tokens": 1}),
    "sandwich": ({}, {"depth": 3, "sandwich_coef": 1}),
    "an order of its own": ({}, {"depth": None, "custom_layers": ("a", "f", "f", "a")}),
    "tied layers": ({}, {"weight_tie_layers": True}),
    "zeros at first": ({}, {"zero_init_branch_output": True}),
}
LAYERS, CAUSAL = "carries more than the state|cannot be run layer by layer", "is not causal"
REFUSED = {
    "value residual": ({}, {"add_value_residual": True}, LAYERS),
    "attention residual": ({}, {"residual_attn": True}, LAYERS),
    "reinjected input": ({}, {"reinject_input": True}, LAYERS),
    "skips": ({}, {"depth": 4, "unet_skips": True}, LAYERS),
    "integrated layers": ({}, {"integrate_layers": True}, LAYERS),
    "streams": ({}, {"num_residual_streams": 2}, LAYERS),
    "cross-attention": ({}, {"cross_attend": True}, LAYERS),
    "conditions": ({}, {"use_adaptive_layernorm": True}, LAYERS),
    "zeros at first": ({}, {"add_value_residual": True, "zero_init_branch_output": True}, LAYERS),
    "a residual of the whole row": ({}, {"orthog_residual": True}, CAUSAL),
    "memory": ({"num_memory_tokens": 2}, {}, LAYERS),
    "a softmax of many": ({"mixture_of_softmax": True}, {}, LAYERS),
    "deep embeddings": ({"ff_deep_embed": True}, {}, LAYERS),
    "recycling": ({"recycling": True}, {}, LAYERS),
    "an average": ({"average_pool_embed": True}, {}, LAYERS),
    "several heads": ({"num_output_heads": 2}, {}, LAYERS),
    "a part of the gradient": ({"emb_frac_gradient": 0.1}, {}, LAYERS),
    "other logits": ({"logits_dim": 20}, {}, "scores 20 tokens, but embeds 14"),
}


@pytest.mark.parametrize("name", DONE)
def test_x_transformers_give_every_promise(name: str) -> None:
    model = wrapper(*DONE[name])
    tower = XTransformersTower(model)
    assert tower.caches == (name != "only attention")  # it shifts tokens, so it would need the previous state
    tokens = torch.randint(14, (3, 11))
    assert torch.equal(tower(tokens), model(tokens))
    check_tower(tower)


@pytest.mark.parametrize("name", REFUSED)
def test_other_options_are_refused(name: str) -> None:
    around, layers, message = REFUSED[name]
    with pytest.raises(mt.errors.TowerError, match=message):
        XTransformersTower(wrapper(around, layers))


def test_an_encoder_is_refused() -> None:
    with pytest.raises(mt.errors.TowerError, match=CAUSAL):
        XTransformersTower(wrapper({}, {}, kind=Encoder))


def test_looking_leaves_the_model_and_the_random_numbers_alone() -> None:
    model = wrapper({}, {}).train()
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    XTransformersTower(model)
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_plain_pytorch_gives_every_promise() -> None:
    torch.manual_seed(0)
    model = GPT(vocabulary=14, length=32, width=16, depth=3, heads=2).eval()
    tower = GPTTower(model)
    tokens = torch.randint(14, (3, 32))
    assert torch.equal(tower(tokens), model(tokens))
    check_tower(tower)


@pytest.mark.parametrize("output", [["letters"], ["signs"], [("letters", "signs")]])
def test_segments_grow_no_longer_than_the_positions(output: list) -> None:
    torch.manual_seed(0)
    letters, signs = towers()
    letters.end = signs.end = ()
    model = fuse(letters, signs)
    (row,) = model.generate([[mt.Segment("letters", [0, 5, 1])]], output)
    segments = row[0] if isinstance(row[0], tuple) else row
    longest = max(len(each.tokens) + (3 if each.tower == "letters" else 0) for each in segments)
    assert longest == letters.max_length == signs.max_length


def opened(caches: bool) -> mt.FusedModel:
    torch.manual_seed(0)
    letters, signs = towers()
    if not caches:
        letters.caches = signs.caches = False
    return open_links(fuse(letters, signs), scale=3.0)


GIVEN = [
    [mt.Segment("letters", [0, 5, 9, 7, 1])],
    [mt.Segment("signs", [0, 3, 1]), mt.Segment("letters", [0, 5, 1])],
    [mt.Segment("signs", [0, 6, 4, 9, 1])],
]
OPTIONS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "samples": {"do_sample": True},
    "samples of beams": {"do_sample": True, "num_beams": 2, "num_return_sequences": 2},
    "chunks": {"prefill_chunk_size": 2},
    "lookup": {"prompt_lookup_num_tokens": 2},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize(
    ("name", "output"), [*((name, "letters") for name in OPTIONS), ("greedy", "signs"), ("beams", "signs")]
)
def test_cached_decoding_equals_uncached(name: str, output: str) -> None:
    options = OPTIONS[name]
    only_cached = name in ("chunks", "lookup", "no cache")
    for given in GIVEN:
        decoded = []
        for caches, chosen in ((True, options), (False, {} if only_cached else options)):
            torch.manual_seed(3)
            rows = opened(caches).generate([given], [output], max_new_tokens=8, **chosen)
            decoded.append([row[0].tokens.tolist() for row in rows])
        assert decoded[0] == decoded[1]


@pytest.mark.parametrize("output", [["letters", "signs"], [("letters", "signs")]])
def test_cached_rows_decode_as_alone_and_as_without_cache(output: list) -> None:
    together = opened(True).generate(GIVEN, output, max_new_tokens=8)
    alone = [opened(True).generate([given], output, max_new_tokens=8)[0] for given in GIVEN]
    assert str(together) == str(alone) == str(opened(False).generate(GIVEN, output, max_new_tokens=8))


def test_decoding_gives_the_logits_of_a_forward() -> None:
    check_decoding(opened(True), GIVEN)


def test_each_step_runs_only_the_new_token() -> None:
    model, lengths = opened(True), []
    block = model.unimodal("letters").blocks[0]
    block.register_forward_hook(lambda module, args, output: lengths.append(output.shape[1]))
    model.generate(GIVEN[2:], ["letters"], max_new_tokens=5, min_new_tokens=5)
    assert lengths == [1] * 5


def test_a_static_cache_is_refused() -> None:
    with pytest.raises(ValueError, match="decodes with a DynamicCache, not with a StaticCache"):
        opened(True).generate(GIVEN[:1], ["letters"], cache_implementation="static")


def test_padding_in_a_cache_is_refused() -> None:
    decoder = towers()[0].decoder(lambda layer, state, positions: state)
    with pytest.raises(ValueError, match="decode rows of unlike length one length after the other"):
        decoder.generate(torch.tensor([[0, 5], [0, 0]]), attention_mask=torch.tensor([[1, 1], [0, 1]]))


def test_pairs_mean_the_same() -> None:
    letters = phrases(6)
    assert letters.shape == (6, 10)
    for number, (given, answer) in enumerate(examples(letters)):
        assert answer.target
        assert not given.target
        assert {given.tower, answer.tower} == {"letters", "signs"}
        both = {each.tower: each.tokens for each in (given, answer)}
        assert torch.equal(both["letters"], letters[number])
        assert torch.equal(both["signs"], translated(both["letters"]))


@pytest.mark.slow
def test_links_learn_and_are_saved(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr("sys.argv", ["custom_tower.py", "--steps", "50"])
    main()
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    before, after = (
        [float(part.split()[1]) for part in lines[key].split(", ")]
        for key in ("fused, before training", "fused, links trained")
    )
    assert max(after) < 0.5 * min(before)
    assert lines["saved and loaded"] == lines["read as signs"]
    assert len(lines["read as signs"]) == len(lines["in letters"])
