"""The YAML recipe of ``multitower train``."""

from __future__ import annotations

import csv
import inspect
import random
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ..base.extras import require
from ..declare.graph import FusionGraph
from ..plugins.entry_points import modality_class
from ..plugins.modality import CONFIG, Modality
from ..storage.files import read_json

METADATA = "metadata.csv"
T = TypeVar("T")


@dataclass(frozen=True)
class Data:
    """The data set of a recipe; give either ``folder`` or ``dataset``.

    Attributes:
        columns: The tower of each column, in the order of an example.
        tasks: The target columns of each task; every row is used for all tasks.
        folder: A folder with ``metadata.csv``; columns of towers that do not take text name files in it.
        dataset: Keyword arguments of ``datasets.load_dataset``.
        held_out: Number of rows held out for evaluation.
    """

    columns: Mapping[str, str]
    tasks: Collection[Collection[str]]
    folder: str | None = None
    dataset: Mapping[str, Any] | None = None
    held_out: int = 0


@dataclass(frozen=True)
class Recipe:
    """A fusion, its data, and its training.

    Attributes:
        output: The output folder, for checkpoints of the run and the trained model.
        towers: By name, the arguments of ``FusionGraph.add_tower``, and "modality": a folder written by
            ``Modality.save_pretrained``, or the name of an installed modality. By default, the tower's
            modality is text with the tokenizer of its source.
        links: The arguments of ``FusionGraph.add_link`` for each link.
        data: See ``Data``.
        trainer: The arguments of ``transformers.TrainingArguments``.
        rates: Learning rates by part; see ``train.Trainer``.
        history_noise: See there.
        source_noise: See there.
        seed: Random seed for new links, the held-out split and the trainer.
    """

    output: str
    towers: Mapping[str, Mapping[str, Any]]
    links: Collection[Mapping[str, Any]]
    data: Data
    trainer: Mapping[str, Any] = field(default_factory=dict)
    rates: Mapping[str, Any] = field(default_factory=dict)
    history_noise: Mapping[str, float] = field(default_factory=dict)
    source_noise: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0


def read_recipe(path: Path) -> Recipe:
    """Read and validate a recipe."""
    yaml: Any = require("yaml", "cli")
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    data = _made(Data, document.get("data") if isinstance(document, dict) else None, f"{path}, data")
    recipe = _made(Recipe, {**document, "data": data}, str(path))
    if (data.folder is None) == (data.dataset is None):
        raise ValueError(f"{path}, data: give either folder or dataset")
    for task in data.tasks:
        unknown = [column for column in task if column not in data.columns]
        if isinstance(task, str) or unknown:
            raise ValueError(
                f"{path}, data: the task {task!r} is no list of columns among {', '.join(data.columns)}"
            )
    unknown = [tower for tower in data.columns.values() if tower not in recipe.towers]
    if unknown:
        raise ValueError(f"{path}, data: columns are for {', '.join(map(repr, unknown))}, which is no tower")
    return recipe


def make_graph(recipe: Recipe) -> FusionGraph:
    """Declare the graph of a recipe."""
    graph = FusionGraph()
    for name, tower in recipe.towers.items():
        options = {key: value for key, value in tower.items() if key != "modality"}
        _made(graph.add_tower, {"name": name, **options}, f"tower {name!r}")
    for link in recipe.links:
        options, stride = dict(link), link.get("interleave")
        if isinstance(stride, list):  # YAML has no pairs
            options["interleave"] = tuple(stride)
        _made(graph.add_link, options, f"link {link.get('source')!r} to {link.get('target')!r}")
    return graph


def make_modalities(recipe: Recipe) -> dict[str, Modality]:
    """Return the modality of each tower that has a column in the data."""
    return {
        name: _modality(name, recipe.towers[name]) for name in dict.fromkeys(recipe.data.columns.values())
    }


def read_rows(recipe: Recipe, modalities: Mapping[str, Modality]) -> tuple[Any, Any]:
    """Return training and held-out rows, as lists or ``datasets`` objects."""
    data = recipe.data
    if data.dataset is not None:
        rows = require("datasets", "train").load_dataset(**data.dataset)
        if not data.held_out:
            return rows, []
        parts = rows.train_test_split(test_size=data.held_out, seed=recipe.seed)
        return parts["train"], parts["test"]
    folder = Path(data.folder or "")
    with (folder / METADATA).open(newline="", encoding="utf-8") as file:
        table = csv.DictReader(file)
        lacking = [column for column in data.columns if column not in (table.fieldnames or ())]
        if lacking:
            raise ValueError(
                f"{folder / METADATA} has no column {', '.join(map(repr, lacking))}; its first line names "
                f"{', '.join(table.fieldnames or ())}"
            )
        rows = [{column: row[column] for column in data.columns} for row in table]
    files = [name for name, tower in data.columns.items() if modalities[tower].media != "text"]
    for row in rows:
        for column in files:
            path = folder / row[column]
            if not path.is_file():
                raise FileNotFoundError(f"{folder / METADATA} names {path}, which is not there")
            row[column] = modalities[data.columns[column]].read_file(path)
    if len(rows) <= data.held_out:
        raise ValueError(f"{folder / METADATA} has {len(rows)} rows, of which {data.held_out} are held out")
    random.Random(recipe.seed).shuffle(rows)
    return rows[data.held_out :], rows[: data.held_out]


def _made(make: Callable[..., T], given: Any, where: str) -> T:
    """Call ``make`` with a mapping from YAML; raise errors that name the place and the valid entries."""
    known = inspect.signature(make).parameters
    if not isinstance(given, dict):
        raise ValueError(f"{where}: expected the entries {', '.join(known)}")
    problems = [f"there is no entry {name!r}" for name in map(str, given) if name not in known]
    needed = (name for name, each in known.items() if each.default is each.empty)
    problems += [f"{name!r} is missing" for name in needed if given.get(name) is None]
    if problems:
        raise ValueError(f"{where}: {'; '.join(problems)}; the entries are {', '.join(known)}")
    try:
        return make(**given)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from error


def _modality(name: str, tower: Mapping[str, Any]) -> Modality:
    given = tower.get("modality")
    if given is None:
        text: Any = modality_class("text")
        made: Modality = text(tower.get("source"))
        return made
    folder = Path(given)
    if (folder / CONFIG).is_file():
        kind = read_json(folder / CONFIG).get("modality")
        return modality_class(str(kind)).from_pretrained(folder)
    if folder.exists():
        raise ValueError(f"tower {name!r}: {folder} holds no modality; Modality.save_pretrained writes one")
    return modality_class(given)()
