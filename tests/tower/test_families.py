from __future__ import annotations

import warnings

import pytest
import torch
import transformers
from torch._dynamo.testing import CompileCounter

import multitower as mt
from families import FIRST_TOKEN, VOCAB_SIZE, families, tiny
from multitower.testing import check_tower, open_links

REPRESENTATIVE = {
    "llama": "rotary positions, grouped keys",
    "gpt2": "learned positions, layers under another name",
    "bloom": "alibi",
    "bart": "a decoder from an encoder-decoder family, which cannot tell padding on the left",
    "gemma3": "composite, the text decoder deeper; sliding windows",
    "mixtral": "mixture of experts",
    "deepseek_v3": "latent attention",
    "mamba": "a state-space model",
    "qwen3_next": "hybrid of linear and full attention",
    "gemma3n_text": "several residual streams, before the batch; shared keys",
    "hy_v4": "layers that hand on more than a state",
    # docs/coverage.md lists the families that do.
    "xlnet": "length before batch; decodes without its cache",
    "falcon": "layers that return tuples",
    "bert": "no _no_split_modules",
}
"""Families of different structure, and what each represents."""

REPRESENTATIVE = {key: value for key, value in REPRESENTATIVE.items() if key in families()}
QUICK = ("llama",)
COMPILED = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
    for name in REPRESENTATIVE
    # Mamba's scan recompiles between even and odd lengths; XLNet has no static cache.
    if name not in ("mamba", "xlnet")
]
REFUSED = {
    "musicgen": "4 codebooks a step",
    "hrm_text": "expected one list of layers",
    "rwkv": "changes the state between its layers 2 and 3",
    "xlm": "expected one list of layers",
    "inkling2_text": "other logits than its own forward",
    "gemma4_unified_assistant": "does not run on tokens",
}


@pytest.mark.parametrize("family", REPRESENTATIVE)
def test_family_gives_every_promise(family: str) -> None:
    with warnings.catch_warnings():
        # docs/coverage.md lists the families that do.
        warnings.filterwarnings("ignore", message=".*decodes without its cache")
        check_tower(mt.TransformersTower(tiny(family)))


@pytest.mark.parametrize("family", [name for name in REFUSED if name in families()])
def test_family_is_refused_with_the_reason(family: str) -> None:
    try:
        model = tiny(family)
    except TypeError:
        pytest.skip("this version of transformers has no default configuration for the family")
    with pytest.raises(mt.errors.TowerError, match=REFUSED[family]):
        mt.TransformersTower(model)


def fused(family: str) -> mt.FusedModel:
    graph = mt.FusionGraph()
    graph.add_tower("speech", tiny("llama", seed=3), train="all")
    graph.add_tower("text", tiny(family))
    graph.add_link("speech", "text", interleave=2, position="rotary")
    graph.add_link("text", "speech", interleave=2)
    torch.manual_seed(5)
    return open_links(graph.compile())


def segment(tower: str, length: int, *, target: bool = False) -> mt.Segment:
    return mt.Segment(tower, torch.randint(FIRST_TOKEN, VOCAB_SIZE, (length,)), target=target)


# torch warns about its own code while it compiles.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("family", COMPILED)
@pytest.mark.slow
def test_a_step_of_training_compiles_once_for_all_lengths_and_numbers_of_rows(family: str) -> None:
    torch._dynamo.reset()
    model, graphs = fused(family), CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=graphs, dynamic=True)
    for speech, text, copies in ((5, 7, 1), (9, 4, 2), (3, 11, 1), (12, 12, 3), (6, 3, 2)):
        batch = mt.collate(
            [
                [segment("speech", speech), segment("text", text, target=True)],
                [segment("text", text + 1), segment("speech", speech + 2, target=True)],
            ]
            * copies
        )
        model.zero_grad()
        compiled(**batch).loss.backward()
        found = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
        model.zero_grad()
        model(**batch).loss.backward()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-3, atol=1e-4)
    assert graphs.frame_count == 1


# torch warns about its own code while it compiles.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("family", COMPILED)
@pytest.mark.slow
def test_a_step_of_decoding_compiles_as_often_as_the_models_own(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fused(family).eval()
    tower, make = model.tower("text"), mt.TransformersTower.decoder
    sources = [[segment("speech", 7)], [segment("speech", 4)]]
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "cache_implementation": "static"}
    eager = model.generate(sources, output=["text"], **options)

    def compiled(decoder: torch.nn.Module) -> tuple[torch.nn.Module, CompileCounter]:
        torch._dynamo.reset()
        graphs = CompileCounter()
        decoder.forward = torch.compile(decoder.forward, fullgraph=True, backend=graphs)
        return decoder, graphs

    native, expected = compiled(tiny(family))
    native.generate(torch.full((2, 1), 1), attention_mask=torch.ones(2, 1, dtype=torch.int64), **options)
    counters = []

    def decoder(self: mt.TransformersTower, inject: object) -> torch.nn.Module:
        shell, graphs = compiled(make(self, inject))
        counters.append(graphs)
        return shell

    monkeypatch.setattr(mt.TransformersTower, "decoder", decoder)
    for one, other in zip(eager, model.generate(sources, output=["text"], **options), strict=True):
        assert torch.equal(one[0].tokens, other[0].tokens)
    assert [graphs.frame_count for graphs in counters] == [expected.frame_count]
    assert tower.decodes_cached


@pytest.mark.slow
# torch warns about its own code while it compiles.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("family", COMPILED)
def test_later_calls_of_generate_compile_nothing(family: str) -> None:
    torch._dynamo.reset()
    model = fused(family).eval()
    config = transformers.CompileConfig(backend="eager", mode=None, fullgraph=True)
    config._compile_all_devices = True
    static = {"cache_implementation": "static", "compile_config": config}
    for number, (text, speech, new) in enumerate(
        ((2, 7, 12), (4, 3, 15), (3, 11, 18), (5, 8, 9), (6, 17, 11))
    ):
        source = [[segment("text", text), segment("speech", speech)]]
        options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None}
        with torch.compiler.set_stance("default" if number < 3 else "fail_on_recompile"):
            ((found,),) = model.generate(source, output=["text"], **options, **static)
        ((expected,),) = model.generate(source, output=["text"], **options)
        assert found.tokens.tolist() == expected.tokens.tolist()


@torch.no_grad()
def greedy_by_hand(model: mt.FusedModel, example: list[mt.Segment], steps: int) -> list[int]:
    tokens = [1]
    for _ in range(steps):
        logits = model(**mt.collate([[*example, mt.Segment("text", tokens)]])).logits["text"]
        tokens.append(int(logits[0, -1].argmax()))
    return tokens


# docs/coverage.md lists the families that do.
@pytest.mark.filterwarnings("ignore:.*decodes without its cache")
@pytest.mark.parametrize("family", REPRESENTATIVE)
def test_a_fused_family_decodes_rows_of_unlike_length_as_it_does_each_by_hand(family: str) -> None:
    model = fused(family).eval()
    torch.manual_seed(3)
    sources = [
        [segment("text", 3), segment("speech", 7)],
        [segment("speech", 4)],
        [segment("text", 3), segment("text", 2), segment("speech", 3)],
    ]
    decoded = model.generate(sources, output=["text"], max_new_tokens=4, eos_token_id=None)
    for (text,), source in zip(decoded, sources, strict=True):
        assert text.tokens.tolist() == greedy_by_hand(model, source, 4)
