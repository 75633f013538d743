"""Changes to the graph of a model, which may be trained already.

Each function returns a new model that shares its modules with the old one, which stays usable. Nothing is
copied.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

from torch import nn

from ..compile.modules import load_towers
from ..declare.graph import FusionGraph, redeclared
from ..declare.spec import LinkSpec, TowerSpec
from ..errors import GraphError, TowerError
from ..tower import Tower
from ..tower.load import merged
from ..tower.peft_tower import base_model, merged_into
from ..tower.rollback import unchanged_on_error
from .fusion import Fusion

if TYPE_CHECKING:
    from peft import PeftConfig

F = TypeVar("F", bound=Fusion)


def extend(model: F, graph: FusionGraph) -> F:
    """Return the model of a graph that contains the model's own; see ``FusedModel.extend``."""
    modules = graph.modules
    for kind, before, after in (
        ("tower", model.graph.towers, graph.towers),
        ("link", model.graph.links, graph.links),
    ):
        for name, spec in before.items():
            if name not in after:
                raise GraphError(
                    f"the graph lacks the {kind} {name!r} of the model; begin with graph = model.graph and "
                    f"add to it, or take the {kind} out with model.drop({name!r})"
                )
            _check_same(kind, spec, after[name])
    towers = {name: model.tower(name) for name in model.towers}
    for name, tower in towers.items():
        if name in modules and not _is_made_of(tower, modules[name]):
            raise GraphError(
                f"tower {name!r} is declared with another module than the model has; begin with "
                f"graph = model.graph and add to it, or exchange the tower with model.swap({name!r}, ...)"
            )
    return type(model)(graph, load_towers(graph.towers, modules, towers), model)


def drop(model: F, names: Sequence[str]) -> F:
    """Return the model without some towers, including all their links, or without some links.

    >>> from multitower.testing import tiny_model
    >>> model = tiny_model()
    >>> print(model.drop("speech->text").graph)
    FusionGraph: 2 towers, 1 link
      tower speech: a module, train=all
      tower text: a module, train=none
      link text->speech: interleave 1
    >>> speech, model = model.unimodal("speech"), model.drop("speech")
    >>> list(model.towers), list(model.links)
    (['text'], [])

    The logits of the rest do not change by a bit on batches without the dropped towers. A dropped tower keeps
    what it learnt, and nothing else of the fusion. A frozen one stays frozen, because other fused models may
    use it: call ``requires_grad_()`` to train it alone; in another fusion, ``train=...`` decides.

    Args:
        model: The model.
        names: Names of towers and links.

    Raises:
        KeyError: There is no tower or link of that name.
        GraphError: No tower would be left.
    """
    graph = model.graph
    for name in names:
        if name not in graph.towers and name not in graph.links:
            raise KeyError(
                f"there is no tower or link {name!r}; the towers are {', '.join(graph.towers)}, "
                f"the links {', '.join(graph.links) or 'none'}"
            )
    towers = {name: model.tower(name) for name in graph.towers if name not in names}
    if not towers:
        raise GraphError(f"without {', '.join(names)} the model has no tower; take unimodal(name) instead")
    left = {
        "towers": [spec for spec in graph.to_dict()["towers"] if spec["name"] in towers],
        "links": [
            spec
            for spec in graph.to_dict()["links"]
            if spec["name"] not in names and {spec["source"], spec["target"]} <= set(towers)
        ],
    }
    return type(model)(FusionGraph.from_dict(left), towers, model)


def swap(
    model: F,
    name: str,
    source: str | os.PathLike[str] | nn.Module,
    train: str | PeftConfig | None = None,
) -> F:
    """Return the model with another pretrained decoder, such as a later checkpoint, in place of a tower.

    >>> from multitower.testing import tiny_model, tiny_tower
    >>> model = tiny_model()
    >>> other = model.swap("text", tiny_tower(seed=9, vocab_size=30))
    >>> other.tower("text").vocab_size, other.tap(other.schedule.taps[0]) is model.tap(model.schedule.taps[0])
    (30, True)

    Links and the input adapter stay the same. If the depth differs, interleaved links keep their taps and are
    declared with these. Adapters of peft are created anew. The vocabulary may differ.

    Args:
        model: The model.
        name: The tower to replace.
        source: The new decoder, of the same width and deep enough for every tap; see
            ``FusionGraph.add_tower``.
        train: As in ``add_tower``; by default as declared for the old tower.

    Raises:
        KeyError: There is no tower of that name.
        GraphError: The width differs, or a tap names a layer that the new tower does not have.
        TowerError: The source cannot be used as a tower, or does not support its declared adapters.
        ImportError: The tower needs the extra "lora", which is not installed.

    Warns:
        UserWarning: Links or the input adapter were trained with the old tower, and should be trained
            further.
    """
    old, graph = model.tower(name), model.graph
    before = graph.towers[name]
    single = FusionGraph()
    single.add_tower(name, source, train=before.train if train is None else train, adapter=before.adapter)
    spec = single.towers[name]
    peft = before.peft if train is None else spec.peft
    graph = redeclared(graph, [name], source=spec.source, train=spec.train, peft=peft)
    modules = {name: source} if isinstance(source, nn.Module) else {}
    others = {each: model.tower(each) for each in graph.towers if each != name}
    towers = load_towers(graph.towers, modules, others)
    _check_width(model, name, old, towers[name])
    if towers[name].depth != old.depth:
        graph = _with_exact_taps(model, graph, name)
    swapped = type(model)(graph, towers, model)
    _warn_of_open_links(model, name)
    return swapped


def _check_same(kind: str, before: TowerSpec | LinkSpec, after: TowerSpec | LinkSpec) -> None:
    old, new = dataclasses.asdict(before), dataclasses.asdict(after)
    changes = [
        f"{field}={new[field]!r} instead of {old[field]!r}" for field in old if new[field] != old[field]
    ]
    if changes:
        remedy = "exchange it with model.swap" if kind == "tower" else "take it out with model.drop first"
        raise GraphError(
            f"{kind} {before.name!r} is declared otherwise than in the model ({', '.join(changes)}); begin "
            f"with graph = model.graph and add to it, or {remedy}"
        )


def _is_made_of(tower: Tower, module: nn.Module) -> bool:
    given = module.native if isinstance(module, Tower) else module
    return given is tower.native or given is base_model(tower.native)


def _check_width(model: Fusion, name: str, old: Tower, new: Tower) -> None:
    needed = [link.name for link in model.graph.links.values() if name in (link.source, link.target)]
    needed += [f"{name} adapter"] if name in model.adapters else []
    if needed and new.width != old.width:
        raise GraphError(
            f"tower {name!r} has width {old.width}, and {', '.join(needed)} were made for it, but the new "
            f"one has width {new.width}; drop the tower and extend the model by the new one instead"
        )


def _with_exact_taps(model: Fusion, graph: FusionGraph, name: str) -> FusionGraph:
    """Return a graph that declares a tower's links by their present taps, instead of by interleave."""
    for link in graph.links.values():
        if name in (link.source, link.target):
            taps = [
                (tap.source_layer, tap.target_layer) for tap in model.schedule.taps if tap.link == link.name
            ]
            graph = redeclared(graph, [link.name], interleave=None, embeddings=False, taps=sorted(taps))
    return graph


def _warn_of_open_links(model: Fusion, name: str) -> None:
    links = [link.name for link in model.graph.links.values() if name in (link.source, link.target)]
    trained = [link for link in links if model.is_open(link)]
    if model.is_open(name):
        trained.append(f"the input adapter of {name}")
    if trained:
        warnings.warn(
            f"{', '.join(trained)} learnt with the old tower {name!r}; train them with the new one before "
            "you rely on them",
            stacklevel=4,
        )


def merge_and_unload(model: Fusion, name: str) -> nn.Module:
    """Merge a tower's peft adapters into its weights, in place; see ``FusedModel.merge_and_unload``."""
    old = model.tower(name)
    try:
        with unchanged_on_error([old], merged_into(old.native)):
            tower = merged(old).requires_grad_(False).eval()
    except ValueError as error:
        raise TowerError(f"tower {name!r}: {error}") from error
    names = [each for each, other in model.towers.items() if other is old]
    model.towers.update(dict.fromkeys(names, tower))
    model._graph = redeclared(model._graph, names, source=None, train="none", peft=None)
    return tower.native
