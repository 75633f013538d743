"""Declare which pretrained decoders attend to which others: plain data; no torch module is run."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import networkx as nx
from torch import nn

from ..errors import GraphError
from ..storage.find import as_declared
from .mermaid import flowchart
from .peft_config import is_peft_config, plain_config
from .spec import LinkSpec, TowerSpec

if TYPE_CHECKING:
    from peft import PeftConfig

    from ..model import FusedModel


OPTIONS = ("gate", "projection", "heads", "position", "pace", "window", "feed_forward", "relative")
"""Options of a link that determine what its taps are, not where."""


class FusionGraph:
    """A directed graph of pretrained decoders (towers) and cross-attentions (links).

    >>> import multitower as mt
    >>> graph = mt.FusionGraph()
    >>> graph.add_tower("speech", "path/to/speech-decoder", train="all")
    >>> graph.add_tower("text", "path/to/text-decoder")
    >>> graph.add_link("speech", "text", interleave=(1, 2))
    >>> graph.add_link("text", "speech", taps=[(2, 1), (4, 2)])
    >>> print(graph)
    FusionGraph: 2 towers, 2 links
      tower speech: path/to/speech-decoder, train=all
      tower text: path/to/text-decoder, train=none
      link speech->text: interleave (1, 2)
      link text->speech: taps (2, 1), (4, 2)
    >>> mt.FusionGraph.from_json(graph.to_json()) == graph
    True

    Source: Zayats et al., "Zipper" (arXiv 2405.18669), there for two towers and both directions.
    """

    def __init__(self) -> None:
        self._towers: dict[str, TowerSpec] = {}
        self._links: dict[str, LinkSpec] = {}
        self._modules: dict[str, nn.Module] = {}

    @property
    def towers(self) -> Mapping[str, TowerSpec]:
        """The towers by name, in the order in which they were added."""
        return dict(self._towers)

    @property
    def links(self) -> Mapping[str, LinkSpec]:
        """The links by name, in the order in which they were added."""
        return dict(self._links)

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """The modules that were given as sources, by tower."""
        return dict(self._modules)

    def add_tower(
        self,
        name: str,
        source: str | os.PathLike[str] | nn.Module,
        *,
        train: str | PeftConfig = "none",
        adapter: str | None = None,
        memory: str = "all",
    ) -> None:
        """Add a pretrained decoder.

        Args:
            name: The tower's name in links, segments and outputs.
            source: A folder or Hub id of a transformers causal LM, such a model itself, or a ``Tower``; or
                "loader://...", which calls the plugin of that name (``multitower.plugins``). A module is not
                copied: compiling sets ``requires_grad`` on its parameters. Checkpoints store Hub ids and
                loaders by reference, and the weights of everything else. Towers that are given the same
                module share its weights, adapters of peft included, and must be trained alike. The same path
                or Hub id is loaded once for all towers with ``train="none"``, and separately for each trained
                tower.
            train: "none" freezes the tower; "all" trains it; "lora" trains LoRA adapters of peft on all
                linear layers, or the adapters of a PeftModel given as source; a ``peft.PeftConfig`` trains
                other adapters of peft. The model is changed in place.
            adapter: An input adapter between the embedding h and layer 1, for fused runs only: None;
                "residual" for ``h + mlp(h)``, whose last layer is zero at the start; "gated" for
                ``h + tanh(g) * mlp(h)`` with g = 0 at the start; "paper" for ``relu(mlp(h))`` as printed in
                Zipper (not the identity at the start). With an adapter, every training step backpropagates
                through the whole tower, frozen or not, and its states cannot be cached (``KeptStates``).
            memory: What the tower attends to of its own past: "all", or "segment" for the current segment
                alone, at whose start its positions begin anew. Links read all of it either way.

        Raises:
            GraphError: The name is taken or not a name, an option is unknown, or the adapters of a config
                have no place in a tower.
        """
        if name in self._towers:
            raise GraphError(f"there is a tower {name!r} already; give this one another name")
        if name in self._links:
            raise GraphError(f"there is a link {name!r}; give the tower another name")
        if not isinstance(source, str | os.PathLike | nn.Module):
            raise GraphError(
                f"tower {name!r}: expected a folder, a Hub id or a module, not {type(source).__name__}"
            )
        origin = None if isinstance(source, nn.Module) else as_declared(source)
        peft = None
        if is_peft_config(train):
            try:
                train, peft = "lora", plain_config(train)
            except ValueError as error:
                raise GraphError(f"tower {name!r}: {error}") from error
        self._towers[name] = TowerSpec(name, origin, train, adapter, peft, memory)  # type: ignore[arg-type]  # TowerSpec checks train
        if isinstance(source, nn.Module):
            self._modules[name] = source

    def add_link(
        self,
        source: str,
        target: str,
        *,
        interleave: int | tuple[int, int] | None = None,
        taps: Iterable[tuple[int, int]] | None = None,
        embeddings: bool = False,
        gate: str | None = None,
        projection: str = "none",
        heads: int | None = None,
        position: str | None = "segment",
        pace: float = 1.0,
        window: int | None = None,
        feed_forward: bool = False,
        relative: bool = True,
        name: str | None = None,
    ) -> None:
        """Add cross-attention from the target tower to the source tower.

        Args:
            source: Name of the tower that provides keys and values.
            target: Name of the tower that provides queries and is updated.
            interleave: ``(i, j)`` connects source layer n*i to target layer n*j for n = 1, 2, ... (Zipper);
                ``j`` connects every j-th target layer to the source layer at the same relative depth.
            taps: Exactly these pairs (source layer, target layer), counted from 1, instead of interleave.
                Layer 0 is the input of layer 1: the embedded tokens, after the input adapter if there is one.
            embeddings: Whether ``interleave`` also includes n = 0, the tap (0, 0): the target then attends to
                the source's token embeddings before its first layer.
            gate: How a tap starts as the identity. None: the last linear layers of its attention and
                feed-forward are zero (as B in LoRA, arXiv 2106.09685). "tanh": each update is multiplied by
                ``tanh`` of a learned scalar that starts at zero (Flamingo and Zipper).
            projection: Layers between the source's states and the key and value projections: "mlp" (three
                layers, Zipper), "linear", "relu" (a linear layer and a ReLU), or "none".
            heads: Number of attention heads; must divide the target's width. Default: such that each has 32
                to 64 dimensions.
            position: "segment" gives queries and keys rotary positions of their place in the segment and of
                the segment's number, so that corresponding tokens of two segments, such as a word and its
                sound, have the same distance throughout. "rotary" uses positions in the shared time. Both
                need an even head dimension. None, as in Zipper, uses no positions.
            pace: With "segment": how many source tokens correspond to one target token, on average;
                ``batch.measure_pace`` measures it.
            window: How many ticks of the shared time a query can look back; None for all.
            feed_forward: Whether a feed-forward follows the attention, as in Flamingo and Zipper; a tap then
                has about three times as many parameters.
            relative: Whether each update is multiplied by the root mean square of the state that it is added
                to, token by token. In large pretrained decoders, states grow to many times the size of a new
                link's updates. With False, as in Flamingo and Zipper, towers that were not trained together
                may combine better.
            name: Needed only for several links between the same pair; "source->target" by default.

        Raises:
            GraphError: A tower is unknown, the name is taken, or an option is malformed.
        """
        name = f"{source}->{target}" if name is None else name
        for tower in (source, target):
            if tower not in self._towers:
                raise GraphError(
                    f"link {name!r}: there is no tower {tower!r}; towers so far: "
                    f"{', '.join(self._towers) or 'none'}. Call add_tower({tower!r}, ...) first"
                )
        if name in self._links or name in self._towers:
            what = "link" if name in self._links else "tower"
            raise GraphError(f"there is a {what} {name!r} already; give this link a name=... of its own")
        pairs: Any = None if taps is None else tuple(tuple(tap) for tap in taps)
        self._links[name] = LinkSpec(
            source,
            target,
            name,
            interleave=interleave,
            taps=pairs,
            embeddings=embeddings,
            gate=gate,
            projection=projection,
            heads=heads,
            position=position,
            pace=pace,
            window=window,
            feed_forward=feed_forward,
            relative=relative,
        )

    def to_networkx(self) -> nx.MultiDiGraph[str]:
        """Convert to networkx: nodes have a TowerSpec, edges (keyed by name) a LinkSpec, as ``spec``."""
        graph: nx.MultiDiGraph[str] = nx.MultiDiGraph()
        for tower in self._towers.values():
            graph.add_node(tower.name, spec=tower)
        for link in self._links.values():
            graph.add_edge(link.source, link.target, key=link.name, spec=link)
        return graph

    def to_dict(self) -> dict[str, Any]:
        """Return the declaration as plain data for ``from_dict`` and JSON."""
        return {
            "towers": [dataclasses.asdict(tower) for tower in self._towers.values()],
            "links": [dataclasses.asdict(link) for link in self._links.values()],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FusionGraph:
        """Rebuild a graph from ``to_dict``.

        Raises:
            GraphError: The data do not have this format.
        """
        graph = cls()
        try:
            for entry in data["towers"]:
                tower = TowerSpec(**entry)
                if tower.name in graph._towers:
                    raise GraphError(f"tower {tower.name!r} occurs twice")
                graph._towers[tower.name] = tower
            for entry in data["links"]:
                stride = entry.get("interleave")
                stride = tuple(stride) if isinstance(stride, list) else stride
                graph.add_link(**{**entry, "interleave": stride})
        except (TypeError, KeyError, AttributeError) as error:
            raise GraphError(f"this is not a fusion graph as to_dict writes it: {error!r}") from error
        return graph

    def to_json(self) -> str:
        """Return the declaration as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> FusionGraph:
        """Rebuild a graph from ``to_json``.

        Raises:
            GraphError: The text is not JSON, or does not have this format.
        """
        try:
            return cls.from_dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise GraphError(f"this is not JSON: {error}") from error

    def to_mermaid(self) -> str:
        """Return the graph as a Mermaid flowchart, which GitHub and notebooks display.

        >>> graph = FusionGraph()
        >>> for name in ("speech", "text"):
        ...     graph.add_tower(name, "path/to/decoder")
        >>> graph.add_link("speech", "text", interleave=(1, 2))
        >>> print(graph.to_mermaid())                                   # doctest: +ELLIPSIS
        flowchart LR
            t0["speech<br/>frozen"]:::frozen
            t1["text<br/>frozen"]:::frozen
            t0 -- "speech-#gt;text<br/>interleave (1, 2)" --> t1
        ...
        """
        words = {"none": "frozen", "all": "trained", "lora": "adapters trained"}
        return flowchart(
            {name: (each, [words[each.train]]) for name, each in self._towers.items()},
            [(each, [_crossing(each)]) for each in self._links.values()],
        )

    def _repr_mimebundle_(self, **_: object) -> dict[str, str]:
        return {"text/plain": repr(self), "text/vnd.mermaid": self.to_mermaid()}

    def compile(self) -> FusedModel:
        """Load the towers and build the fused model.

        Raises:
            GraphError: There is no tower, a tap names a layer out of range, or layers wait for each other.
            TowerError: A source cannot be used as a tower, or does not support its declared adapters.
            ImportError: A tower needs the extra "lora", which is not installed.
        """
        from ..model import FusedModel  # the one upward import, for the user's convenience

        if not self._towers:
            raise GraphError("the graph has no towers; call add_tower first")
        return FusedModel.from_graph(self)

    def copy(self) -> FusionGraph:
        """Return a copy that can be extended without changing this graph; it has the same modules."""
        twin = FusionGraph()
        twin._towers, twin._links, twin._modules = dict(self._towers), dict(self._links), dict(self._modules)
        return twin

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FusionGraph) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]  # a graph can still grow

    def __repr__(self) -> str:
        towers, links = (
            f"{len(each)} {what}{'' if len(each) == 1 else 's'}"
            for each, what in ((self._towers, "tower"), (self._links, "link"))
        )
        lines = [f"FusionGraph: {towers}, {links}"]
        for tower in self._towers.values():
            kind = f" ({tower.peft['peft_type']})" if tower.peft else ""
            kind += f", adapter={tower.adapter}" if tower.adapter else ""
            kind += f", memory={tower.memory}" if tower.memory != "all" else ""
            lines.append(f"  tower {tower.name}: {tower.source or 'a module'}, train={tower.train}{kind}")
        for link in self._links.values():
            options = "".join(f", {each}" for each in _unlike_default(link))
            lines.append(f"  link {link.name}: {_crossing(link)}{options}")
        return "\n".join(lines)


def _crossing(link: LinkSpec) -> str:
    """Describe the layers that a link connects."""
    taps = "taps " + ", ".join(map(str, link.taps)) if link.taps else f"interleave {link.interleave}"
    return f"{taps} and embeddings" if link.embeddings else taps


def _unlike_default(link: LinkSpec) -> list[str]:
    """Describe the options of a link's taps that are not the default."""
    options = [(each, getattr(link, each.name)) for each in dataclasses.fields(link) if each.name in OPTIONS]
    return [f"{each.name}={value}" for each, value in options if value != each.default]


def redeclared(graph: FusionGraph, names: Iterable[str], **changes: Any) -> FusionGraph:
    """Return a graph with some options of towers or links changed; it has no modules."""
    names = set(names)
    data = graph.to_dict()
    for spec in (*data["towers"], *data["links"]):
        if spec["name"] in names:
            spec.update(changes)
    return FusionGraph.from_dict(data)
