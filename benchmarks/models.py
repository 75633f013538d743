"""Fused models with random weights, their parts, and batches for the benchmarks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import multitower as mt
from multitower.compile.schedule import Tap
from multitower.link.attention import visibility
from multitower.run.tables import Rotations

SIZES = {
    "tiny": {
        "vocab_size": 500,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "smollm2": {  # the shape of SmolLM2-135M
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
}
INTERLEAVE = {"tiny": 2, "smollm2": 6}

ZIPPER: dict[str, Any] = {
    "gate": "tanh",
    "projection": "mlp",
    "feed_forward": True,
    "position": None,
    "relative": False,
}
"""The link options that the benchmarks measure: those of the paper, with the most parameters."""


@functools.cache
def make_tower(size: str, seed: int) -> LlamaForCausalLM:
    """Return a random model of one of ``SIZES``; cached, so used in one fused model at a time."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **SIZES[size], tie_word_embeddings=True, max_position_embeddings=8192, bos_token_id=1, eos_token_id=2
    )
    return LlamaForCausalLM(config).eval()


def make_model(
    size: str, towers: int, *, train: str = "none", adapter: str | None = None, interleave: int | None = None
) -> mt.FusedModel:
    """Return a model of towers in a ring, each linked to the next; with two, in both directions."""
    graph = mt.FusionGraph()
    names = [f"tower{number}" for number in range(towers)]
    for number, name in enumerate(names):
        graph.add_tower(name, make_tower(size, number), train=train, adapter=adapter)
    step = interleave or INTERLEAVE[size]
    for source, target in zip(names, [*names[1:], names[0]], strict=True):
        graph.add_link(source, target, interleave=step, **ZIPPER)
    return graph.compile()


def make_reader(
    size: str,
    taps: Iterable[tuple[int, int]],
    *,
    sources: int = 1,
    source_size: str | None = None,
    train: str = "none",
    adapter: str | None = None,
) -> mt.FusedModel:
    """Return a model of frozen towers "source0", ..., and a tower "text" that reads each at these taps."""
    graph = mt.FusionGraph()
    names = [f"source{number}" for number in range(sources)]
    for number, name in enumerate(names):
        graph.add_tower(name, make_tower(source_size or size, number), adapter=adapter)
    graph.add_tower("text", make_tower(size, sources), train=train, adapter=adapter)
    for name in names:
        graph.add_link(name, "text", taps=list(taps), **ZIPPER)
    return graph.compile()


def make_batch(
    model: mt.FusedModel,
    rows: int,
    length: int | Mapping[str, int],
    targets: str = "all",
    *,
    turning: bool = True,
) -> mt.batch.Batch:
    """Return rows of one segment of each tower.

    Args:
        model: The model.
        rows: Number of rows.
        length: Tokens per segment, or by tower.
        targets: "all" segments are targets, or only those of the "last" tower.
        turning: Whether the order of segments rotates from row to row; otherwise it is that of the towers.
    """
    names = list(model.towers)
    lengths = length if isinstance(length, Mapping) else dict.fromkeys(names, length)
    wanted = names if targets == "all" else names[-1:]
    examples = []
    for row in range(rows):
        turn = row % len(names) if turning else 0
        examples.append(
            [
                mt.Segment(name, random_tokens(model, name, lengths[name]), target=name in wanted)
                for name in names[turn:] + names[:turn]
            ]
        )
    batch = mt.collate(examples)
    for stream in batch["streams"].values():
        for key in stream:
            stream[key] = stream[key].to(model.tower(names[0]).device)
    return batch


def random_tokens(model: mt.FusedModel, name: str, length: int) -> Tensor:
    """Return random tokens of a tower, without begin and end tokens."""
    return torch.randint(3, model.tower(name).vocab_size, (length,))


class Given(NamedTuple):
    """The inputs of a tap or adapter in a fused run: states of source and target."""

    source: Tensor | None
    target: Tensor


class Parts:
    """The native towers alone, and the links and adapters alone, on their inputs in a fused run.

    Each part does the same work as in the whole: a frozen tower propagates gradients down to its first layer
    with a trained input, and links propagate them to inputs that require gradients.

    Args:
        model: The fused model.
        batch: The batch to run it on.
    """

    def __init__(self, model: mt.FusedModel, batch: mt.batch.Batch) -> None:
        self.model, self.streams = model, batch["streams"]
        self.taps: dict[Tap, Given] = {}
        self.adapters: dict[str, Given] = {}
        self._record()

    def towers(self, backward: bool) -> None:
        """Run each native model, including its loss, one after the other."""
        for loss in self._losses(backward):
            if backward and loss.requires_grad:
                loss.backward()

    def links(self, backward: bool) -> None:
        """Run each tap and each adapter on detached states."""
        for update in self._updates():
            if backward:
                update.backward(torch.ones_like(update))

    def at_once(self) -> None:
        """Run all forwards, then all backwards, so that saved tensors of all parts coexist."""
        outputs = [each for each in (*self._losses(True), *self._updates()) if each.requires_grad]
        torch.autograd.backward(outputs, [torch.ones_like(each) for each in outputs])

    def _losses(self, backward: bool) -> Iterator[Tensor]:
        for name, stream in self.streams.items():
            native, fed = self.model.unimodal(name), self._first_fed(name)
            handle = None if fed is None or not backward else fed.register_forward_hook(_leaf)
            output = native(input_ids=stream["tokens"], labels=stream["labels"], use_cache=False)
            if handle is not None:
                handle.remove()
            yield output.loss

    def _updates(self) -> Iterator[Tensor]:
        specs, seen = self.model.graph.links, {}
        rotations = Rotations(self.streams)
        for name in {tap.link for tap in self.taps}:
            source, target = (self.streams[each] for each in (specs[name].source, specs[name].target))
            seen[name] = visibility(target["times"], source["times"], source["mask"], specs[name].window)
        for tap, (states, x) in self.taps.items():
            module = self.model.tap(tap)
            source = module.read(_like(states), rotations.of_keys(tap, module))
            yield module(_like(x), source, seen[tap.link], rotations.of_queries(tap, module))
        for name, (_, embedded) in self.adapters.items():
            yield self.model.adapt(name, _like(embedded))

    def _record(self) -> None:
        """Record the inputs of each tap and adapter in a fused run."""
        targets: dict[Tap, Tensor] = {}
        handles = [
            self.model.tap(tap).register_forward_pre_hook(_note(targets, tap))
            for tap in self.model.schedule.taps
        ]
        embedded: dict[str, Tensor] = {}
        handles += [
            adapter.register_forward_pre_hook(_note(embedded, name))
            for name, adapter in self.model.adapters.items()
        ]
        given = self.model.run(self.streams).given
        for handle in handles:
            handle.remove()
        self.taps = {tap: Given(given[tap.source, tap.source_layer], x) for tap, x in targets.items()}
        self.taps = {tap: Given(_like(each.source), _like(each.target)) for tap, each in self.taps.items()}
        self.adapters = {name: Given(None, _like(x)) for name, x in embedded.items()}

    def _first_fed(self, name: str) -> nn.Module | None:
        """Return the first module of a frozen tower whose output is updated by something trained, if any."""
        native: Any = self.model.unimodal(name)
        if self.model.graph.towers[name].train != "none":
            return None
        if name in self.model.adapters:
            return native.get_input_embeddings()
        first = min((tap.target_layer for tap in self.taps if tap.target == name), default=None)
        return None if first is None else native.model.layers[first - 1]


def _note(noted: dict[Any, Tensor], key: Any) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        noted[key] = args[0]

    return hook


def _leaf(module: nn.Module, args: object, output: Tensor) -> Tensor:
    return output.detach().requires_grad_()


def _like(states: Tensor) -> Tensor:
    return states.detach().requires_grad_(states.requires_grad)
