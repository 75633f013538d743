"""The layers of the library: which imports are allowed, and how large files may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import networkx as nx

import multitower

ROOT = Path(multitower.__file__).parent
STOREYS = (
    "base",
    "errors",
    "batch",
    "storage",
    "link",
    "plugins",
    "declare",
    "tower",
    "compile",
    "run",
    "generate",
    "checkpoint",
    "inspect",
    "hub",
    "train",
    "export",
    "baseline",
    "model",
    "pipeline",
    "testing",
    "cli",
    "__main__",
    "__init__",
)
"""From the bottom up: a file imports only from its own layer and those before it."""

UPWARD = {("declare.graph", "model")}
"""For the user's convenience, ``graph.compile()`` imports the model when it is called."""

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}


def imports(module: str) -> Iterator[str]:
    """Yield the library's modules that a module imports: at the top, lazily, or only for types."""
    path = MODULES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    package = [] if module == "__init__" else package
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or (not node.level and node.module != "multitower"):
            continue
        base = package[: len(package) - node.level + 1] if node.level else []
        base = [*base, *(node.module or "").split(".")] if node.level and node.module else base
        for name in node.names:
            longer = ".".join([*base, name.name])
            yield longer if longer in MODULES else ".".join(base) or "__init__"


EDGES = sorted({(module, other) for module in MODULES for other in imports(module)})


def storey(module: str) -> str:
    return module.split(".")[0]


def test_every_part_has_its_storey() -> None:
    assert {storey(module) for module in MODULES} == set(STOREYS)


def test_no_import_runs_up() -> None:
    height = {name: place for place, name in enumerate(STOREYS)}
    upward = {edge for edge in EDGES if height[storey(edge[0])] < height[storey(edge[1])]}
    assert upward == UPWARD


def test_only_the_strategies_need_hypothesis() -> None:
    needing = {
        name for name, path in MODULES.items() if "hypothesis import" in path.read_text(encoding="utf-8")
    }
    assert needing == {"testing.strategies"}
    assert not [module for module, other in EDGES if other in needing]


def test_no_files_import_each_other() -> None:
    graph = nx.DiGraph(edge for edge in EDGES if edge not in UPWARD)
    packages = [module for module in graph if MODULES[module].name == "__init__.py"]
    graph.remove_nodes_from(packages)  # they only re-export names
    assert not [circle for circle in nx.strongly_connected_components(graph) if len(circle) > 1]


def test_the_listing_is_short() -> None:
    top = [entry for entry in ROOT.iterdir() if entry.name != "__pycache__"]
    assert len(top) <= 24
    long = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in MODULES.items()}
    assert {module: lines for module, lines in long.items() if lines > 350} == {}


def test_the_face_is_small() -> None:
    assert len(multitower.__all__) <= 13
    assert set(multitower.__all__) < set(dir(multitower))
    assert not [name for name in dir(multitower) if name.startswith("_") and name != "__version__"]
