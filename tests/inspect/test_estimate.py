from __future__ import annotations

import resource

import accelerate
import peft
import pytest
import torch
import transformers
from hypothesis import Phase, given, settings
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import multitower as mt
from broken_towers import Caches
from models import EXAMPLES, causal_lm, pair, segment
from multitower import FusionGraph
from multitower.batch.collate import Batch
from multitower.generate.tap_cache import TapCache
from multitower.testing.strategies import cases

FAMILIES = ("llama", "gpt2", "qwen3", "gemma3_text")
QUICK = {("llama", "lora"), ("gpt2", "all")}


def saved(model: mt.FusedModel, batch: Batch) -> int:
    """Return the bytes that a real forward on the CPU saves for its backward."""
    given = [tensor for stream in batch["streams"].values() for tensor in stream.values()]
    known = {each.untyped_storage().data_ptr() for each in [*model.parameters(), *model.buffers(), *given]}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**batch)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def flops(model: mt.FusedModel, batch: Batch, *, backward: bool) -> int:
    """Return the FLOPs of a real run, including attention on the CPU."""
    aten = torch.ops.aten
    formulas = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: (
            sdpa_backward_flop_count(g, q, k, v)
        ),
    }
    formulas[aten._grouped_mm] = lambda one, other, *_, **__: 2 * one[-2] * one[-1] * other[-1]
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    with counter:
        loss = model(**batch).loss
        if backward and loss is not None and loss.requires_grad:
            loss.backward()
    model.zero_grad()
    return counter.get_total_flops()


def check(model: mt.FusedModel, batch: Batch) -> mt.inspect.Estimate:
    """Compare an estimate with measurements."""
    found = model.estimate(batch)
    total = found.total
    assert total.parameters == sum(each.numel() for each in model.parameters())
    assert total.trained == sum(each.numel() for each in model.parameters() if each.requires_grad)
    assert total.parameter_bytes == sum(each.nbytes for each in model.parameters())
    assert total.saved_bytes == saved(model, batch)
    assert total.forward_flops == flops(model, batch, backward=False)
    assert total.step_flops == flops(model, batch, backward=True)
    return found


@settings(max_examples=3, phases=(Phase.generate,))
@given(cases(most_towers=4))
def test_an_estimate_is_what_is_measured(case):
    batch = mt.collate(case.examples)
    found = check(case.model.eval(), batch)  # in training mode a batch without targets has no backward
    cache = TapCache.fill(case.model, batch["streams"], list(case.model.towers))
    for name, cost in found.links.items():
        entries = [entry.source for tap, entry in cache.entries.items() if tap.link == name]
        assert cost.cache_bytes == sum(part.nbytes for entry in entries for part in entry)


@pytest.mark.parametrize(
    ("family", "train"),
    [
        pytest.param(family, train, marks=() if (family, train) in QUICK else pytest.mark.slow)
        for family in FAMILIES
        for train in ("none", "all", "lora")
    ],
)
def test_towers_from_transformers(family, train):
    text, speech = causal_lm(family), causal_lm(family, depth=4, seed=3)
    check(pair(text, speech, train=train, gates=True).train(), mt.collate(EXAMPLES))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "gemma3_text"])
def test_a_folder_is_estimated_by_its_config_alone(family, tmp_path):
    causal_lm(family).save_pretrained(tmp_path)
    graph = FusionGraph()
    for name, train in (("speech", "lora"), ("text", "none"), ("words", "all")):
        graph.add_tower(name, tmp_path, train=train)
    graph.add_link("speech", "text", interleave=1)
    graph.add_link("text", "words", interleave=1, position="rotary")
    batch = mt.collate(three(EXAMPLES))
    expected = graph.compile().estimate(batch)
    for weights in tmp_path.glob("*.safetensors"):
        weights.unlink()
    assert mt.inspect.estimate(graph, batch) == expected


def test_nothing_takes_the_memory_of_weights(tmp_path):
    transformers.LlamaConfig(
        vocab_size=100_000, hidden_size=8192, intermediate_size=30_000, num_hidden_layers=2
    ).save_pretrained(tmp_path)
    graph = FusionGraph()
    graph.add_tower("text", tmp_path, train="all")
    batch = mt.collate([[mt.Segment("text", [1, 5, 2], target=True)]])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = mt.inspect.estimate(graph, batch).total
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert found.parameter_bytes > 10 << 30
    assert grown < found.parameter_bytes // 100


def test_a_model_is_left_as_it_is():
    model = pair(causal_lm("llama"), train="all", gates=True).train()
    before = {name: (id(each), each.clone()) for name, each in model.state_dict(keep_vars=True).items()}
    state = torch.get_rng_state()
    model.estimate(mt.collate(EXAMPLES))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(
        module.training == (not name.startswith("towers.text")) for name, module in model.named_modules()
    )
    for name, each in model.state_dict(keep_vars=True).items():
        assert id(each) == before[name][0]
        assert torch.equal(each, before[name][1])
        assert each.grad is None


def test_a_given_module_is_left_as_it_is():
    module = causal_lm("llama")
    graph = FusionGraph()
    graph.add_tower("text", module, train="lora")
    mt.inspect.estimate(graph, mt.collate([[mt.Segment("text", [1, 5, 2], target=True)]]))
    assert type(module).__name__ == "LlamaForCausalLM"
    assert all(each.requires_grad and not each.is_meta for each in module.parameters())
    assert not any("lora" in name for name, _ in module.named_parameters())


def test_weights_that_are_shared_or_tied_count_once():
    module = causal_lm("llama", config={"tie_word_embeddings": True})
    graph = FusionGraph()
    graph.add_tower("question", module)
    graph.add_tower("answer", module)
    graph.add_link("question", "answer", interleave=1)
    found = mt.inspect.estimate(
        graph, mt.collate([[segment("question", 4), segment("answer", 5, target=True)]])
    )
    assert found.towers["question"].parameters == sum(each.numel() for each in module.parameters())
    assert found.towers["answer"].parameters == 0
    assert found.towers["answer"].forward_flops == found.towers["question"].forward_flops > 0


def test_each_part_has_its_own_flops():
    """Compare with a count by hand: two FLOPs per matrix weight and token, and attention."""
    width, inner, vocabulary, rows, length = 16, 32, 20, 2, 5
    graph = FusionGraph()
    graph.add_tower("speech", causal_lm("llama"), adapter=None)
    graph.add_tower("text", causal_lm("llama", seed=1), adapter="residual")
    link = {"projection": "mlp", "feed_forward": True, "position": None}
    graph.add_link("speech", "text", taps=[(1, 2)], heads=2, **link)
    speech, text = (mt.Segment(name, [3] * length, target=name == "text") for name in ("speech", "text"))
    found = mt.inspect.estimate(graph, mt.collate([[speech, text]] * rows))
    tokens, pairs = rows * length, rows * length**2
    tower = 2 * tokens * (2 * (3 * width**2 + 3 * width * inner) + width * vocabulary) + 2 * 4 * pairs * width
    tap = 2 * tokens * (3 + 4 + 8) * width**2 + 4 * pairs * width
    assert found.towers["speech"].forward_flops == found.towers["speech"].step_flops == tower
    assert found.towers["text"].forward_flops == tower
    assert found.adapters["text"].forward_flops == 2 * tokens * 4 * width**2
    assert found.links["speech->text"].forward_flops == tap
    # frozen tower: gradients of states, not of weights; attention is recomputed
    assert found.towers["text"].backward_flops == tower + 2 * 6 * pairs * width
    # trained tap: gradients of weights and states, down to the norms
    assert found.links["speech->text"].backward_flops == 2 * tap + 2 * pairs * width


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_of_a_tower(family):
    config = {"sliding_window": 4} if family == "gemma3_text" else {}
    model = pair(causal_lm(family, config=config))
    examples = [[segment("text", *range(2, 12))], [segment("text", 5)]]
    found = model.estimate(mt.collate(examples))
    tokens = mt.collate(examples)["streams"]["text"]["tokens"]
    cache = model.unimodal("text")(tokens, use_cache=True).past_key_values
    held = [part for layer in cache.layers for part in (layer.keys, layer.values)]
    keys_values = sum(part.untyped_storage().nbytes() for part in held)
    assert found.towers["text"].cache_bytes == pytest.approx(keys_values, rel=0.01)  # allows for a counter
    assert found.towers["speech"].cache_bytes == 0  # a Tower in plain PyTorch decodes without a cache


def test_what_is_not_run_costs_nothing():
    model = pair(causal_lm("llama"), causal_lm("gpt2", depth=4), gates=True)
    text, speech = segment("text", 4, 5, target=True), segment("speech", 6)
    found = model.estimate(mt.collate([[text, speech]]))
    assert found.links["speech->text"].forward_flops == 0  # text sees no speech: it comes first
    assert found.links["text->speech"].forward_flops > 0
    assert found.links["speech->text"].cache_bytes > 0  # later text will see it
    only = model.estimate(mt.collate([[text, speech]]), logits=False)
    assert only.towers["speech"].forward_flops == only.links["text->speech"].forward_flops == 0
    assert only.towers["text"].step_flops == found.towers["text"].step_flops > 0


def test_a_batch_without_labels_has_no_backward():
    batch = mt.collate([[segment("text", 4)]])
    assert pair().estimate(batch).total.backward_flops > 0  # the loss is 0
    del batch["streams"]["text"]["labels"]
    found = pair().estimate(batch).total
    assert found.forward_flops == found.step_flops > 0


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_a_mixture_of_experts(dtype):
    check(pair(causal_lm("mixtral").to(dtype), train="all", gates=True).train(), mt.collate(EXAMPLES))


def test_experts_chosen_by_values_are_refused():
    model = pair(causal_lm("mixtral", config={"experts_implementation": "eager"}))
    with pytest.raises(ValueError, match=r"towers text: it decides by values.*experts_implementation"):
        model.estimate(mt.collate(EXAMPLES))


def test_offloaded_weights_are_refused():
    model = pair(accelerate.cpu_offload(causal_lm("llama")))
    with pytest.raises(ValueError, match="offloaded"):
        model.estimate(mt.collate(EXAMPLES))


def test_a_quantised_folder_is_refused(tmp_path):
    config = transformers.LlamaConfig(quantization_config={"quant_method": "gptq", "bits": 4})
    config.save_pretrained(tmp_path)
    graph = FusionGraph()
    graph.add_tower("text", tmp_path)
    with pytest.raises(mt.errors.TowerError, match=r"tower 'text': .* is quantised"):
        mt.inspect.estimate(graph, mt.collate([[segment("text", 4)]]))


def test_a_batch_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="contains token 99"):
        pair().estimate(mt.collate([[segment("text", 99)]]))


@pytest.mark.parametrize("reentrant", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_recomputed_activations_are_not_saved(reentrant):
    model = pair(causal_lm("llama"), gates=True).train()
    batch = mt.collate(EXAMPLES)
    whole = check(model, batch).total
    native, older = model.unimodal("text"), "gradient_checkpointing_enable"
    getattr(native, "activation_checkpointing_enable", getattr(native, older))({"use_reentrant": reentrant})
    native.train()
    assert check(model, batch).total.saved_bytes < whole.saved_bytes


def three(examples: list[mt.batch.Example]) -> list[mt.batch.Example]:
    return [[*row, segment("words", 3, 4, target=True)] for row in examples]


@pytest.mark.parametrize("train", ["none", "lora"])
def test_a_head_that_runs_at_labels_alone_is_its_towers(train: str) -> None:
    graph = FusionGraph()
    graph.add_tower("text", causal_lm("llama"), train=train, adapter=None)
    model = graph.compile()
    batch = mt.collate([[segment("text", 6), mt.Segment("text", [1, 5, 2], target=True)]])
    whole, lean = model.estimate(batch), model.estimate(batch, logits=False)
    skipped = batch["streams"]["text"]["tokens"].numel() - 2
    head = model.unimodal("text").get_output_embeddings().weight.numel()
    assert whole.towers["text"].forward_flops - lean.towers["text"].forward_flops == 2 * skipped * head
    assert lean.loss.forward_flops == whole.loss.forward_flops == 0


@pytest.mark.parametrize("train", ["none", peft.LoraConfig(target_modules=["attention"])])
def test_a_tower_in_plain_pytorch_that_caches_has_a_cache(train: str | peft.PeftConfig) -> None:
    graph = FusionGraph()
    graph.add_tower("text", Caches(2, 8, 16), train=train, adapter=None)
    batch = mt.collate([[segment("text", 6)], [segment("text", 4)]])
    tokens = batch["streams"]["text"]["tokens"].numel()
    found = graph.compile().estimate(batch)
    assert found.towers["text"].cache_bytes == 2 * 2 * 8 * 4 * tokens  # keys and values, layers, width, bytes
