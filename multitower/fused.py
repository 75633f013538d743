"""The fused model: towers, links and adapters, run by the schedule."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import publish
from .attention import FLEX, SDPA
from .contributions import contributions
from .familiar import Familiar
from .frozen import brings_states
from .graph import FusionGraph
from .hub import find_checkpoint
from .link import GatedCrossAttention, is_open
from .output import FusedOutput, States
from .parts import make_adapters, make_links
from .run import run, score, with_labels
from .schedule import Schedule, Tap, make_schedule
from .spec import GraphError
from .stream import Batch, Example, check_streams
from .tower import Tower
from .training import named_gates, parameter_groups, set_trained

if TYPE_CHECKING:
    from peft import PeftConfig

    from .checkpoint import DeviceMap
    from .cost import Estimate
    from .generate import Decoded, Entry, Policy
    from .modality import Modality


class FusedModel(Familiar):
    """Several decoders fused into one module; ``FusionGraph.compile`` makes it.

    >>> import multitower as mt
    >>> from multitower.testing import tiny_tower
    >>> graph = mt.FusionGraph()
    >>> graph.add_tower("speech", tiny_tower(seed=0), train="all")
    >>> graph.add_tower("text", tiny_tower(seed=1))
    >>> graph.add_link("speech", "text", interleave=1)
    >>> model = graph.compile()
    >>> batch = mt.collate([[mt.Segment("speech", [0, 5, 1]), mt.Segment("text", [0, 7, 1], target=True)]])
    >>> out = model(**batch)
    >>> out.logits["text"].shape
    torch.Size([1, 3, 16])
    >>> out.loss.backward()

    A fused run of towers, links and adapters is what ``forward`` and ``generate`` do; ``unimodal`` gives a
    tower as it is without them. Frozen towers stay in eval mode and take no gradient.

    Args:
        graph: The declaration.
        towers: A tower for each that the graph names.
        kept: A model that this one continues: towers, input adapters and taps of it that the graph has too
            are the same modules in both.
        empty: Whether new input adapters and links are left on the meta device, without values.

    Raises:
        GraphError: A tower is missing, heads do not fit, the layers cannot be scheduled, or a tower shares
            weights with one that is trained in another way.
        TowerError: A tower with train="lora" has no adapters that can be trained.
    """

    def __init__(
        self,
        graph: FusionGraph,
        towers: Mapping[str, Tower],
        kept: FusedModel | None = None,
        *,
        empty: bool = False,
    ) -> None:
        super().__init__()
        if set(towers) != set(graph.towers):
            raise GraphError(f"the graph has the towers {list(graph.towers)}, but got {list(towers)}")
        self._graph = FusionGraph.from_dict(graph.to_dict())
        depths = {name: tower.depth for name, tower in towers.items()}
        self.schedule: Schedule = make_schedule(depths, graph.links.values())
        self.towers = nn.ModuleDict(dict(towers))
        with torch.device("meta") if empty else nullcontext():
            self.adapters = nn.ModuleDict(make_adapters(graph.towers, towers, kept))
            links = make_links(graph.links, self.schedule, towers, kept)
        self.links = nn.ModuleDict({name: nn.ModuleDict(taps) for name, taps in links.items()})
        set_trained(graph, towers, kept)
        self.attn_implementation: str = SDPA if kept is None else kept.attn_implementation
        self.train(kept is None or kept.training)

    @property
    def graph(self) -> FusionGraph:
        """What the model was declared to be: a copy, to add to and hand to ``FusionGraph.extend``."""
        return self._graph.copy()

    def forward(
        self,
        streams: Mapping[str, Mapping[str, Tensor]],
        *,
        output_attentions: bool = False,
        logits: bool = True,
    ) -> FusedOutput:
        """Run the batch that ``collate`` made; towers that it does not mention do not run.

        Args:
            streams: For each tower in the batch its "tokens", "times", "mask" and, for a loss, "labels". A
                tower whose states are there too (see ``KeptStates``) does not run, and gives no logits.
            output_attentions: Whether to give the attention weights of every tap as well.
            logits: Whether to give logits. Without, only what the losses depend on is run: no head, layer or
                tap that no label needs, and heads only where a row has a label. Parameters of these get no
                gradient, instead of one of zeros.

        Raises:
            ValueError: A stream belongs to no tower, is malformed, or holds tokens beyond the vocabulary.
        """
        check_streams(streams, {name: self.tower(name).vocab_size for name in self.towers})
        scored = streams if logits else with_labels(streams)
        scored = [name for name in scored if not brings_states(streams[name])]
        wanted = {name: self.tower(name).depth + 1 for name in scored}
        states = run(self, streams, wanted, output_attentions=output_attentions)
        return score(self, streams, states, scored, logits=logits)

    def run(
        self,
        streams: Mapping[str, Mapping[str, Tensor]],
        *,
        wanted: Mapping[str, int] | None = None,
        output_attentions: bool = False,
    ) -> States:
        """Run the schedule up to the heads; see ``forward``.

        Args:
            streams: As in ``forward``.
            wanted: For each tower in question the layer whose output is wanted, ``depth + 1`` for the state
                that enters the head; only what these depend on is run. All of every tower unless given.
            output_attentions: As in ``forward``.
        """
        check_streams(streams, {name: self.tower(name).vocab_size for name in self.towers})
        if wanted is None:
            wanted = {name: self.tower(name).depth + 1 for name in streams}
        return run(self, streams, wanted, output_attentions=output_attentions)

    def generate(
        self,
        examples: Sequence[Example],
        output: Sequence[Entry] | Policy,
        **options: Any,
    ) -> Decoded:
        """Decode one segment for each tower in ``output``, each until its end token.

        >>> import multitower as mt
        >>> from multitower.testing import tiny_model
        >>> model, given = tiny_model(), [mt.Segment("speech", [0, 5, 6, 1])]
        >>> ((text, speech),) = model.generate([given], output=["text", "speech"], max_new_tokens=4)
        >>> text.tower, speech.tower
        ('text', 'speech')

        Towers in a tuple are decoded at the same time, a token of each a step, and so stand in the result:

        >>> (((text, speech),),) = model.generate([given], output=[("text", "speech")], max_new_tokens=4)
        >>> text.tower, speech.tower
        ('text', 'speech')

        A function may choose what comes next, by the end token of what came last, for instance:

        >>> def answer(row):
        ...     return {"speech": "text", "text": None}[row[-1].tower]
        >>> [[segment.tower for segment in row] for row in model.generate([given], answer, max_new_tokens=4)]
        [['text']]

        Decoding is done in eval mode, and the mode is given back; several threads may decode at once from a
        model that is in eval mode already.

        Args:
            examples: What is given, each a list of segments (none of them a target).
            output: The towers to decode, in this order; each reads all that came before. Or a function that
                is called with an example so far and gives the next tower, a tuple of towers, or None.
            options: Options of transformers' ``generate``: ``max_new_tokens``, ``do_sample``, ... What is
                not the same for all towers is given by tower: ``max_new_tokens={"text": 40, "speech": 400}``.
                Where neither these nor a tower set a limit, a segment ends after 1,024 new tokens, or at the
                tower's last position.

        Returns:
            For each example (each returned sequence of it) what can be appended to it: the decoded segments,
            begin and end included.

        Raises:
            ValueError: Nothing is to be decoded, a tower is unknown or has no begin token, an example
                holds a target, or an option cannot be passed on.
            ImportError: transformers is not installed.
        """
        from .generate import generate

        return generate(self, examples, output, options)

    def estimate(self, batch: Batch, *, logits: bool = True) -> Estimate:
        """Estimate parameters, FLOPs and memory, part by part; see ``estimate.estimate``.

        >>> from multitower import Segment, collate
        >>> from multitower.testing import tiny_model
        >>> tiny_model().estimate(collate([[Segment("text", [0, 7, 1])]])).towers["text"].forward_flops
        6720
        """
        from .estimate import estimate

        return estimate(self, batch, logits=logits)

    def unimodal(self, name: str) -> nn.Module:
        """Give one tower without links and input adapters: the transformers model or the PeftModel."""
        return self.tower(name).native

    def tower(self, name: str) -> Tower:
        """Give one tower.

        Raises:
            KeyError: There is no tower of that name.
        """
        if name not in self.towers:
            raise KeyError(f"there is no tower {name!r}; the towers are {', '.join(self.towers)}")
        tower = self.towers[name]
        assert isinstance(tower, Tower)
        return tower

    def tap(self, tap: Tap) -> GatedCrossAttention:
        """Give the module of one tap of the schedule."""
        module = self._link(tap.link)[tap.key]
        assert isinstance(module, GatedCrossAttention)
        return module

    def adapt(self, name: str, embedded: Tensor) -> Tensor:
        """Apply a tower's input adapter, if it has one."""
        return self.adapters[name](embedded) if name in self.adapters else embedded

    def gates(self) -> dict[str, float]:
        """Return how far each gate is open: tanh of its parameter, by readable name.

        >>> import multitower as mt
        >>> from multitower.testing import tiny_tower
        >>> graph = mt.FusionGraph()
        >>> graph.add_tower("speech", tiny_tower(seed=0))
        >>> graph.add_tower("text", tiny_tower(seed=1))
        >>> graph.add_link("speech", "text", interleave=2, gate="tanh")
        >>> graph.compile().gates()
        {'speech->text 2-2 attention': 0.0}

        Only links with ``gate="tanh"`` and adapters of the form "gated" have gates. ``contributions`` says
        for every form how much it changes.
        """
        return {name: gate.detach().tanh().item() for name, gate in named_gates(self).items()}

    def contributions(self, streams: Mapping[str, Mapping[str, Tensor]]) -> dict[str, float]:
        """Return how much each tap and input adapter changes the states of its tower on a batch.

        >>> import multitower as mt
        >>> from multitower.testing import tiny_model
        >>> batch = mt.collate([[mt.Segment("speech", [0, 5, 1]), mt.Segment("text", [0, 7])]])
        >>> tiny_model().contributions(**batch)
        {'speech->text 1-1': 0.0, 'speech->text 3-2': 0.0}

        That is the norm of its update over the norm of the state to which it is added, over all tokens that
        see something; 0 at the start of training. A gate alone would not say it: an open one in front of
        small weights changes nothing.

        Args:
            streams: As in ``forward``. Taps that see nothing in them are left out.
        """
        return contributions(self, streams)

    def is_open(self, name: str) -> bool:
        """Whether a link, or the input adapter of a tower, has left the identity that it was at the start.

        >>> from multitower.testing import tiny_model
        >>> tiny_model().is_open("speech->text")
        False

        Raises:
            KeyError: There is no link of that name, nor a tower.
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
        """Return what an optimizer should train, with a learning rate for each part.

        >>> from multitower.testing import tiny_model
        >>> groups = tiny_model().parameter_groups(lr=3e-3, towers={"speech": 1e-3})
        >>> optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
        >>> [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
        [(0.001, 0.01), (0.001, 0.0), (0.003, 0.0), (0.003, 0.01)]

        Norms, biases and gates come without weight decay.

        Args:
            lr: For all that is not named below.
            towers: For the trained parameters of towers, peft's among them: one rate, or rates by tower.
            links: For links: one rate, or rates by link.
            adapters: For input adapters: one rate, or rates by tower.
            gates: For the gates of ``gate="tanh"`` and of "gated" adapters. They begin at zero and scale the
                gradients of all behind them, so they learn at ten times ``lr`` unless this is given.

        Raises:
            ValueError: A name is that of no part which is trained.
        """
        return parameter_groups(self, lr, {"towers": towers, "links": links, "adapters": adapters}, gates)

    def train(self, mode: bool = True) -> FusedModel:
        """Set training mode; frozen towers stay in eval mode."""
        super().train(mode)
        for name, spec in self._graph.towers.items():
            if spec.train == "none":
                self.tower(name).eval()
        return self

    def set_attn_implementation(self, implementation: str) -> None:
        """Choose how links attend when a batch is run: by "sdpa", or by "flex_attention".

        The latter leaves out blocks of which nothing is seen, as in packed batches and with short windows;
        on the CPU and on MPS, where torch has no backward of it, links attend by sdpa all the same. Towers
        have their own: ``unimodal(name).set_attn_implementation(...)``. Raises a ValueError for any other.
        """
        if implementation not in (SDPA, FLEX):
            raise ValueError(f"links attend by {SDPA!r} or {FLEX!r}, not by {implementation!r}")
        self.attn_implementation = implementation

    def drop(self, *names: str) -> FusedModel:
        """Give the model without some towers or links; see ``surgery.drop``."""
        from .surgery import drop

        return drop(self, names)

    def swap(
        self, name: str, source: str | os.PathLike[str] | nn.Module, *, train: str | PeftConfig | None = None
    ) -> FusedModel:
        """Give the model with another pretrained decoder in place of a tower; see ``surgery.swap``."""
        from .surgery import swap

        return swap(self, name, source, train)

    def merge_and_unload(self, name: str) -> nn.Module:
        """Fold a tower's peft adapters into its weights, as peft does; give the merged model.

        >>> import multitower as mt, peft
        >>> from multitower.testing import tiny_tower
        >>> graph = mt.FusionGraph()
        >>> graph.add_tower("text", tiny_tower(), train=peft.LoraConfig(target_modules=["attention"]))
        >>> model = graph.compile()
        >>> type(model.unimodal("text")).__name__, type(model.merge_and_unload("text")).__name__
        ('PeftModel', 'TinyTower')

        Logits stay the same up to rounding. The tower, and any that shares its weights, is then an ordinary
        frozen one, of no origin that ``graph`` names, and a checkpoint holds the merged model.

        Raises:
            KeyError: There is no tower of that name.
            TowerError: It has no peft adapters, or they cannot be merged.
        """
        from .surgery import merge_and_unload

        return merge_and_unload(self, name)

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        embed_towers: bool = False,
        modalities: Mapping[str, Modality] | None = None,
        max_shard_size: int | str = "5GB",
    ) -> None:
        """Write a checkpoint; see ``checkpoint.save_pretrained``."""
        from .checkpoint import save_pretrained as save

        save(self, folder, embed_towers=embed_towers, modalities=modalities, max_shard_size=max_shard_size)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        towers: Mapping[str, str | os.PathLike[str] | nn.Module] | None = None,
        allow_changed_towers: bool | Collection[str] = False,
        dtype: torch.dtype | str | None = None,
        device_map: DeviceMap | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> FusedModel:
        """Load a folder or "owner/name"; see ``checkpoint.from_pretrained`` and ``hub.find_checkpoint``."""
        from .checkpoint import from_pretrained as load

        return load(
            find_checkpoint(folder, revision=revision, token=token, cache_dir=cache_dir),
            towers=towers,
            allow_changed_towers=allow_changed_towers,
            dtype=dtype,
            device_map=device_map,
        )

    push_to_hub = publish.push_to_hub

    def _link(self, name: str) -> nn.ModuleDict:
        link = self.links[name]
        assert isinstance(link, nn.ModuleDict)
        return link
