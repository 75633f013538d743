"""The fused module: towers, links and adapters, and the loop that runs them by the schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..batch.collate import EXAMPLES, Streams, check_streams
from ..batch.places import run_begins
from ..compile.freeze import parameter_groups, set_trained
from ..compile.modules import load_towers, make_adapters, make_links
from ..compile.schedule import Schedule, Tap, make_schedule
from ..declare.graph import FusionGraph
from ..errors import GraphError
from ..link.attention import FLEX, SDPA, Visibility
from ..link.cross_attention import GatedCrossAttention, add, is_open
from ..tower import Tower
from .embed import embed
from .output import FusedOutput, States, score
from .request import (
    brings_states,
    brought_states,
    check_counts,
    check_wanted,
    trains_in_parallel,
    with_all,
    with_labels,
)
from .tables import Rotations, visibilities
from .transformers_api import Familiar


class Fusion(Familiar):
    """Towers, links and input adapters as one module; the base of ``FusedModel``.

    >>> from multitower.testing import tiny_model
    >>> import multitower as mt
    >>> batch = mt.collate([[mt.Segment("speech", [1, 5, 2]), mt.Segment("text", [1, 7, 2], target=True)]])
    >>> tiny_model()(**batch).logits["text"].shape
    torch.Size([1, 3, 16])

    Args:
        graph: The declaration.
        towers: A tower for each name in the graph.
        kept: A model whose towers, input adapters and taps to share, where the graph has them too.
        empty: Whether to create new input adapters and links on the meta device.

    Raises:
        GraphError: A tower is missing or cannot forget, heads do not fit, the layers cannot be scheduled, or
            two towers share weights but are trained differently.
        TowerError: A tower with train="lora" has no trainable adapters.
    """

    def __init__(
        self,
        graph: FusionGraph,
        towers: Mapping[str, Tower],
        kept: Fusion | None = None,
        *,
        empty: bool = False,
    ) -> None:
        super().__init__()
        if set(towers) != set(graph.towers):
            raise GraphError(f"the graph has the towers {list(graph.towers)}, but got {list(towers)}")
        self._graph = FusionGraph.from_dict(graph.to_dict())
        for name, spec in graph.towers.items():
            if spec.memory == "segment" and not towers[name].packs:
                raise GraphError(
                    f"tower {name!r}: memory='segment' needs a tower that tells examples in one row apart by "
                    f"their positions, which {type(towers[name].native).__name__} does not"
                )
        depths = {name: tower.depth for name, tower in towers.items()}
        self.schedule: Schedule = make_schedule(depths, graph.links.values())
        self.towers = nn.ModuleDict(dict(towers))
        with torch.device("meta") if empty else nullcontext():
            adapters = {} if kept is None else dict(kept.adapters.items())
            self.adapters: nn.ModuleDict = nn.ModuleDict(make_adapters(graph.towers, towers, adapters))
            links = make_links(graph.links, self.schedule, towers, {} if kept is None else kept.taps())
        self.links = nn.ModuleDict({name: nn.ModuleDict(taps) for name, taps in links.items()})
        if kept is None:
            set_trained(graph, towers)
        else:
            set_trained(graph, towers, kept._graph, {name: kept.tower(name) for name in kept.towers})
        self.attn_implementation: str = SDPA if kept is None else kept.attn_implementation
        modes = {} if kept is None else {module: module.training for module in kept.modules()}
        self.train(kept is None or kept.training)
        for module, training in modes.items():
            module.training = training

    @classmethod
    def from_graph(cls, graph: FusionGraph) -> Self:
        """Load the towers of a graph and build the model; see ``FusionGraph.compile``."""
        return cls(graph, load_towers(graph.towers, graph.modules))

    @property
    def graph(self) -> FusionGraph:
        """A copy of the model's declaration, which can be extended for ``FusedModel.extend``."""
        return self._graph.copy()

    def forward(
        self,
        streams: Streams,
        *,
        output_attentions: bool = False,
        logits: bool = True,
        num_items_in_batch: Mapping[str, Tensor | int] | None = None,
        run_all: bool | None = None,
    ) -> FusedOutput:
        """Run a batch that ``collate`` made; towers that are not in it do not run.

        Args:
            streams: For each tower in the batch "tokens", "times", "mask" and, for a loss, "labels". A tower
                with cached states in its stream (see ``KeptStates``) does not run and has no logits.
            output_attentions: Whether to return the attention weights of every tap.
            logits: Whether to return logits. If not, only what the losses depend on is computed: layers and
                taps that influence a label, and heads at positions where some row has a label. Parameters
                without influence get gradient None instead of zeros.
            num_items_in_batch: For each tower, the number of labels in all batches whose losses are summed,
                over accumulation steps and processes; each loss is the sum over its labels divided by this
                number. By default, it is the mean over the labels of this batch.
            run_all: Whether to run every tower and link even if the batch lacks it, with one padding token
                for each missing tower. Then every trained parameter gets a gradient, and all processes of a
                parallel training compute the same. None: if several processes train.

        Raises:
            ValueError: A stream belongs to no tower, is malformed, or has tokens outside the vocabulary; or
                ``num_items_in_batch`` lacks a tower with labels.
        """
        check_streams(streams, {name: self.tower(name).vocab_size for name in self.towers})
        if run_all is None:
            run_all = self.training and torch.is_grad_enabled() and trains_in_parallel()
        counts = num_items_in_batch
        if counts is not None:
            check_counts(counts, streams)
        if run_all:
            streams = with_all(streams, self.towers)
            counts = None if counts is None else {**dict.fromkeys(self.towers, 1), **counts}
        scored = streams if logits or run_all else with_labels(streams)
        scored = [name for name in scored if not brings_states(streams[name])]
        wanted = {name: self.tower(name).depth + 1 for name in scored}
        states = self._run(streams, wanted, output_attentions, run_all)
        towers = {name: self.tower(name) for name in streams}
        return score(towers, streams, states, scored, logits=logits, training=self.training, counts=counts)

    def run(
        self,
        streams: Streams,
        *,
        wanted: Mapping[str, int] | None = None,
        output_attentions: bool = False,
    ) -> States:
        """Run the schedule up to the heads; see ``forward``.

        Args:
            streams: See ``forward``.
            wanted: For each tower of interest, the layer whose output is needed, or ``depth + 1`` for the
                input of the head; only what these depend on is run. By default, all layers of all towers in
                the batch.
            output_attentions: See ``forward``.
        """
        check_streams(streams, {name: self.tower(name).vocab_size for name in self.towers})
        if wanted is None:
            wanted = {name: self.tower(name).depth + 1 for name in streams}
        return self._run(streams, wanted, output_attentions)

    def unimodal(self, name: str) -> nn.Module:
        """Return one tower's own model, a transformers model or PeftModel, without links and adapters."""
        return self.tower(name).native

    def tower(self, name: str) -> Tower:
        """Return one tower.

        Raises:
            KeyError: There is no tower of that name.
        """
        if name not in self.towers:
            raise KeyError(f"there is no tower {name!r}; the towers are {', '.join(self.towers)}")
        tower = self.towers[name]
        assert isinstance(tower, Tower)
        return tower

    def tap(self, tap: Tap) -> GatedCrossAttention:
        """Return the module of one tap of the schedule."""
        module = self._link(tap.link)[tap.key]
        assert isinstance(module, GatedCrossAttention)
        return module

    def taps(self) -> dict[Tap, GatedCrossAttention]:
        """Return the module of each tap of the schedule."""
        return {tap: self.tap(tap) for tap in self.schedule.taps}

    def adapt(self, name: str, embedded: Tensor) -> Tensor:
        """Apply a tower's input adapter, if it has one."""
        return self.adapters[name](embedded) if name in self.adapters else embedded

    def forgets(self, name: str) -> bool:
        """Whether a tower attends to its current segment alone (``memory="segment"``)."""
        return self._graph.towers[name].memory == "segment"

    def gates(self) -> dict[str, float]:
        """Return how far each gate is open: the tanh of its parameter, by a readable name.

        >>> import multitower as mt
        >>> from multitower.testing import tiny_tower
        >>> graph = mt.FusionGraph()
        >>> graph.add_tower("speech", tiny_tower(seed=0))
        >>> graph.add_tower("text", tiny_tower(seed=1))
        >>> graph.add_link("speech", "text", interleave=2, gate="tanh")
        >>> graph.compile().gates()
        {'speech->text 2-2 attention': 0.0}

        Only links with ``gate="tanh"`` and adapters of the form "gated" have gates. ``contributions``
        measures the effect of every form.
        """
        found: dict[str, Any] = {f"{name} adapter": each.gate for name, each in self.adapters.items()}
        for tap, module in self.taps().items():
            found[f"{tap.link} {tap.key} attention"] = module.attention_gate
            found[f"{tap.link} {tap.key} feed-forward"] = module.ffn_gate
        return {name: gate.detach().tanh().item() for name, gate in found.items() if gate is not None}

    def is_open(self, name: str) -> bool:
        """Whether a link, or a tower's input adapter, no longer is the identity.

        >>> from multitower.testing import tiny_model
        >>> tiny_model().is_open("speech->text")
        False

        Raises:
            KeyError: There is no link or tower of that name.
        """
        if name in self.links:
            return any(map(is_open, self._link(name).values()))
        self.tower(name)
        return name in self.adapters and is_open(self.adapters[name])

    def parameter_groups(
        self,
        lr: float,
        *,
        towers: float | Mapping[str, float] | None = None,
        links: float | Mapping[str, float] | None = None,
        adapters: float | Mapping[str, float] | None = None,
        gates: float | None = None,
    ) -> list[dict[str, Any]]:
        """Return parameter groups for an optimizer, with a learning rate for each part.

        >>> from multitower.testing import tiny_model
        >>> groups = tiny_model().parameter_groups(lr=3e-3, towers={"speech": 1e-3})
        >>> optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
        >>> [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
        [(0.001, 0.01), (0.001, 0.0), (0.003, 0.0), (0.003, 0.01)]

        Norms, biases and gates have no weight decay. Warns of trained parts in half precision.

        Args:
            lr: The default learning rate.
            towers: For trained parameters of towers, including peft's: one rate, or rates by tower.
            links: For links: one rate, or rates by link.
            adapters: For input adapters: one rate, or rates by tower.
            gates: For the gates of ``gate="tanh"`` and of "gated" adapters. By default ``10 * lr``, because
                they start at zero and scale the gradients of everything behind them.

        Raises:
            ValueError: A name has no trained parameters.
        """
        return parameter_groups(self, lr, {"towers": towers, "links": links, "adapters": adapters}, gates)

    def train(self, mode: bool = True) -> Self:
        """Set training mode; frozen towers stay in eval mode."""
        super().train(mode)
        for name, spec in self._graph.towers.items():
            if spec.train == "none":
                self.tower(name).eval()
        return self

    def set_attn_implementation(self, implementation: str) -> None:
        """Set the attention kernel of links: "sdpa" or "flex_attention".

        FlexAttention skips fully masked blocks, as in packed batches and with short windows. On the CPU and
        on MPS, where torch has no backward pass for it, links still use SDPA. For a tower, call
        ``unimodal(name).set_attn_implementation(...)``. Raises ValueError for any other name.
        """
        if implementation not in (SDPA, FLEX):
            raise ValueError(f"links attend by {SDPA!r} or {FLEX!r}, not by {implementation!r}")
        self.attn_implementation = implementation

    def _run(
        self, streams: Streams, wanted: Mapping[str, int], output_attentions: bool, run_all: bool = False
    ) -> States:
        towers = {name: self.tower(name) for name in streams}
        check_wanted(towers, streams, wanted)
        dtypes = {tap.link: self.tap(tap).query.weight.dtype for tap in self.schedule.taps}
        flex = self.attn_implementation == FLEX and not output_attentions
        seen = visibilities(self._graph.links.values(), dtypes, streams, flex=flex, blind=run_all)
        rotations = Rotations(streams)
        states = States({}, {}, brought_states(self._graph, towers, streams), {}, {})
        read_layers = self.schedule.read_layers
        for step in self.schedule.needed(wanted, seen, states.given):
            name, layer = step.tower, step.layer
            if step.taps:
                x = self._tapped(step.taps, states, rotations, seen, output_attentions)
            elif layer:
                x = towers[name].layer(layer, states.hidden[name], states.contexts[name])
            else:
                x, states.contexts[name] = self._embedded(name, towers[name], streams[name])
            if not step.taps and (name, layer) in read_layers:
                states.given[name, layer] = x
            states.hidden[name] = x
        return states

    def _embedded(self, name: str, tower: Tower, stream: Mapping[str, Tensor]) -> tuple[Tensor, Any]:
        """Return the input of a tower's first layer, input adapter included, and its layers' context."""
        if self.forgets(name):  # treat each segment as a packed example
            stream = {**stream, EXAMPLES: run_begins(stream).cumsum(1)}
        x, context = embed(name, tower, stream)
        if self._graph.towers[name].train == "none":
            x = x.detach()  # transformers' activation checkpointing makes embeddings require gradients
        return self.adapt(name, x), context

    def _tapped(
        self,
        taps: Sequence[Tap],
        states: States,
        rotations: Rotations,
        seen: Mapping[str, Visibility],
        output_attentions: bool,
    ) -> Tensor:
        """Return a tower's state after a layer plus its taps' updates, all computed from the same state."""
        x, updates = states.hidden[taps[0].target], []
        device = rotations.streams[taps[0].target]["times"].device
        for tap in taps:
            module = self.tap(tap)
            given = states.read(tap.source, tap.source_layer, device)
            source = module.read(given, rotations.of_keys(tap, module))
            turn = rotations.of_queries(tap, module)
            updates.append(module(x, source, seen[tap.link], turn))
            if output_attentions:
                weights = module.weights(x, source, seen[tap.link], turn)
                states.attentions.setdefault(tap.link, {})[tap.key] = weights
        return add(x, updates)

    def _link(self, name: str) -> nn.ModuleDict:
        link = self.links[name]
        assert isinstance(link, nn.ModuleDict)
        return link
