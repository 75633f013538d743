"""The YAML recipe of ``multitower train``."""

from __future__ import annotations

import csv
import inspect
import random
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from ..base.extras import require
from ..declare.graph import FusionGraph
from ..errors import PluginError
from ..plugins.entry_points import modality_class
from ..plugins.modality import CONFIG, Modality
from ..storage.files import read_json

METADATA = "metadata.csv"
FLOAT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+")
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


def read_yaml(path: Path) -> Any:
    """Read a YAML file, with the floats of YAML 1.2, such as 3e-3; refuse duplicate keys.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "recipe.yaml").write_text("learning_rate: 3e-3")
    ...     read_yaml(Path(folder, "recipe.yaml"))
    {'learning_rate': 0.003}
    """
    yaml: Any = require("yaml", "cli")

    class Loader(yaml.SafeLoader):  # type: ignore[misc]  # known only at run time
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [key.value for key, _ in node.value]
            if twice := [key for key in keys if keys.count(key) > 1]:
                raise yaml.YAMLError(f"{twice[0]!r} is there twice\n{node.start_mark}")
            return super().construct_mapping(node, deep)

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error


def read_recipe(path: Path) -> Recipe:
    """Read and validate a recipe."""
    document = read_yaml(path)
    if not isinstance(document, dict):
        raise ValueError(f"{path}: expected the entries {', '.join(each.name for each in fields(Recipe))}")
    document = {key: value for key, value in document.items() if value is not None}  # empty entries
    data = _made(Data, document.get("data"), f"{path}, data")
    recipe = _made(Recipe, {**document, "data": data}, str(path))
    for key in ("towers", "trainer", "rates", "history_noise", "source_noise"):
        if not isinstance(getattr(recipe, key), dict):
            raise ValueError(f"{path}: {key} is {getattr(recipe, key)!r}, and no mapping")
    if not isinstance(recipe.links, list):
        raise ValueError(f"{path}: links is {recipe.links!r}, and no list")
    for what in (*recipe.towers.items(), *enumerate(recipe.links, 1)):
        if not isinstance(what[1], dict):
            raise ValueError(f"{path}: tower or link {what[0]!r} is {what[1]!r}, and no mapping")
    if (data.folder is None) == (data.dataset is None):
        raise ValueError(f"{path}, data: give either folder or dataset")
    for task in data.tasks:
        unknown = [column for column in task if column not in data.columns]
        if isinstance(task, str) or unknown:
            raise ValueError(
                f"{path}, data: the task {task!r} is no list of columns among {', '.join(data.columns)}"
            )
    if not data.tasks:
        raise ValueError(f"{path}, data: give at least one task")
    if type(data.held_out) is not int or data.held_out < 0:
        raise ValueError(f"{path}, data: held_out is a number of rows, not {data.held_out!r}")
    if data.dataset is not None and "split" not in data.dataset:
        raise ValueError(f"{path}, data: dataset needs a split, as in split: train")
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
    with (folder / METADATA).open(newline="", encoding="utf-8-sig") as file:  # with a byte order mark or not
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
    try:
        return modality_class(given)()
    except PluginError as error:
        if not folder.exists():
            raise
        raise ValueError(
            f"tower {name!r}: {folder} contains no modality; Modality.save_pretrained writes one"
        ) from error
