"""Training checkpoints: trained weights, optimizer, scheduler and random state, to resume a run.

    folder/  training.json       graph, step, settings of the optimizer and scheduler, shape and dtype of each
                                 tensor, fingerprints of frozen tensors
             *.safetensors       the tensors, written by torch.distributed.checkpoint, each process its shard:
                                 "model.<name>", "optimizer.<key>.<name>", "random.<device>.<rank>"

Nothing is pickled. Frozen towers are not stored: build the model as for the first run.
"""

from __future__ import annotations

import json
import operator
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..checkpoint.assign import check_names
from ..compile.modules import load_towers
from ..declare.graph import redeclared
from ..declare.stored import stored_graph, unlike_options
from ..errors import CheckpointError
from ..run.fusion import Fusion
from ..run.parallel import on_first
from ..run.request import trains_in_parallel
from ..storage.atomic import check_free, copy_others, current, replacing
from ..storage.files import read_json
from ..storage.find import as_declared
from ..storage.json_data import from_json, to_json
from .optimizer_state import (
    described,
    expected_tensors,
    frozen_fingerprints,
    load_optimizer,
    load_random_state,
    optimizer_state,
    random_state,
    trained_state,
    unlike_settings,
)

T = TypeVar("T")
F = TypeVar("F", bound=Fusion)
Source = str | os.PathLike[str] | nn.Module
TRAINING, VERSION = "training.json", 1


def save_training(
    folder: str | os.PathLike[str],
    model: Fusion,
    optimizer: Optimizer,
    *,
    scheduler: LRScheduler | None = None,
    step: int = 0,
) -> None:
    """Write a training checkpoint, from which a run resumes bit for bit.

    >>> import tempfile
    >>> from multitower.testing import tiny_model
    >>> def start():
    ...     model = tiny_model()
    ...     return model, torch.optim.AdamW(model.parameter_groups(lr=1e-3))
    >>> with tempfile.TemporaryDirectory() as place:
    ...     save_training(place + "/run", *start(), step=200)
    ...     load_training(place + "/run", *start())
    200

    It contains links, input adapters, towers with ``train="all"`` and peft adapters; the optimizer's state;
    and torch's random state. Save the state of the data loader yourself. With several processes
    (``torch.distributed``, FSDP2), all call this and each writes its shard; if one fails, all raise. An
    interrupted save leaves the older checkpoint unchanged.

    Args:
        folder: A new folder, or an older training checkpoint, which is replaced; its other files are kept.
            Shared by all processes.
        model: The model.
        optimizer: Its optimizer.
        scheduler: Its learning rate scheduler, if any.
        step: The number of steps taken.

    Raises:
        CheckpointError: The folder contains something else or is not writable; the state of the optimizer or
            scheduler is not only tensors and plain data; or a layer was replaced by ``torch.compile(layer)``.
        ValueError: The optimizer trains a parameter that is not the model's.
        ImportError: torch is too old to write distributed checkpoints as safetensors.
    """
    target, step = Path(folder).absolute(), operator.index(step)
    check_names(model)
    on_first(lambda: check_free(target, TRAINING))
    tensors, settings = optimizer_state(model, optimizer)
    tensors |= {f"model.{name}": tensor.detach() for name, tensor in trained_state(model).items()}
    try:
        document = {
            "training_version": VERSION,
            "graph": model.graph.to_dict(),
            "step": step,
            "optimizer": to_json(settings),
            "scheduler": None if scheduler is None else to_json(scheduler.state_dict()),
            "scheduler_class": None if scheduler is None else type(scheduler).__name__,
            "tensors": {name: described(tensor) for name, tensor in tensors.items()},
            "frozen": frozen_fingerprints(model),
        }
    except TypeError as error:
        raise CheckpointError(f"the optimizer or the scheduler cannot be saved: {error}") from error
    try:
        with _replacing(target) as fresh, _distributed_checkpoint() as checkpoint:
            text = json.dumps(document, indent=1, allow_nan=False) + "\n"
            on_first(lambda: (fresh / TRAINING).write_text(text, encoding="utf-8"))
            checkpoint.save(
                tensors | random_state(),
                storage_writer=checkpoint.HuggingFaceStorageWriter(str(fresh), save_distributed=True),
                no_dist=not trains_in_parallel(),
            )
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot save to {target}, which is as it was: {error}") from error


def load_training(
    folder: str | os.PathLike[str],
    model: Fusion,
    optimizer: Optimizer | None = None,
    *,
    scheduler: LRScheduler | None = None,
) -> int:
    """Load a training checkpoint into a model that was built in the same way; return the step.

    Everything is read and compared before anything is changed. The number of processes may differ; a warning
    then says that random numbers will differ, too.

    Args:
        folder: The checkpoint.
        model: A model of the same graph.
        optimizer: An optimizer of the same class and parameters; None to load only the model.
        scheduler: Required with the optimizer if one was saved, otherwise not allowed.

    Raises:
        ValueError: There is a scheduler without an optimizer.
        CheckpointError: A file is missing or damaged; the model, optimizer or scheduler does not match the
            saved one (the message lists all differences); or a frozen tower has changed.
    """
    root = current(Path(folder))
    document = _read(root)
    problems = _unlike(document, model)
    if optimizer is None and scheduler is not None:
        raise ValueError("a scheduler is loaded with its optimizer: give both, or neither")
    if optimizer is not None:
        problems += unlike_settings(model, optimizer, document["optimizer"])
        kind, saved = (None if scheduler is None else type(scheduler).__name__), document["scheduler_class"]
        if kind != saved:
            problems.append(f"the scheduler is {kind}; {saved} was saved")
    if problems:
        raise CheckpointError(f"{root} does not fit:\n  " + "\n  ".join(problems))
    trained = trained_state(model)
    wanted = {f"model.{name}": tensor for name, tensor in trained.items()}
    if optimizer is not None:
        wanted |= expected_tensors(model, document["tensors"]) | random_state()
    try:
        with _distributed_checkpoint() as checkpoint:
            source = checkpoint.HuggingFaceStorageReader(str(root))
            there = source.read_metadata().state_dict_metadata
            loaded = {
                name: torch.empty_like(tensor)
                for name, tensor in wanted.items()
                if name in there or not name.startswith("random.")
            }
            checkpoint.load(loaded, storage_reader=source, no_dist=not trains_in_parallel())
    except (OSError, SafetensorError, ValueError, RuntimeError, KeyError, AssertionError) as error:
        raise CheckpointError(f"{root} is damaged, or not wholly copied: {error}") from error
    with torch.no_grad():
        for name, tensor in trained.items():
            tensor.copy_(loaded[f"model.{name}"])
    if optimizer is not None:
        load_optimizer(optimizer, document["optimizer"], loaded)
        load_random_state(loaded)
        if scheduler is not None:
            scheduler.load_state_dict(document["scheduler"])
    step: int = document["step"]
    return step


def rebuild(cls: type[F], folder: str | os.PathLike[str], towers: Mapping[str, Source]) -> F:
    """Rebuild the model of a training checkpoint; see ``FusedModel.from_training``."""
    graph, given = _read(current(Path(folder)))["graph"], dict(towers)
    unknown = set(given) - set(graph.towers)
    if unknown:
        raise CheckpointError(f"towers={sorted(unknown)}: the model has the towers {', '.join(graph.towers)}")
    for name, tower in given.items():
        graph = redeclared(graph, [name], source=None if isinstance(tower, nn.Module) else as_declared(tower))
    modules = {name: tower for name, tower in given.items() if isinstance(tower, nn.Module)}
    model = cls(graph, load_towers(graph.towers, modules))
    load_training(folder, model)
    return model.eval()


def _unlike(document: dict[str, Any], model: Fusion) -> list[str]:
    """List the differences between a model and that of a training checkpoint."""
    saved = {name: each for name, each in document["tensors"].items() if name.startswith("model.")}
    mine = {f"model.{name}": described(tensor) for name, tensor in trained_state(model).items()}
    problems = unlike_options(document["graph"], model.graph)
    problems += [
        f"{name} is {saved.get(name, 'not there')}, but the model has {mine.get(name, 'none')}"
        for name in {**mine, **saved}
        if saved.get(name) != mine.get(name)
    ]
    frozen = frozen_fingerprints(model)
    return problems + [
        f"tower {name!r}: what is not trained of it is not what it was"
        for name in {**frozen, **document["frozen"]}
        if frozen.get(name) != document["frozen"].get(name)
    ]


def _read(root: Path) -> dict[str, Any]:
    document, file = read_json(root / TRAINING), root / TRAINING
    version = document.get("training_version")
    if version != VERSION:
        raise CheckpointError(
            f"{file} has version {version!r}; this release reads {VERSION}: upgrade multitower"
        )
    try:
        document["optimizer"] = from_json(document["optimizer"])
        document["scheduler"] = from_json(document["scheduler"])
        document["graph"] = stored_graph(document["graph"])
        for key, kind in {"step": int, "tensors": dict, "frozen": dict}.items():
            if not isinstance(document[key], kind):
                raise ValueError(f"{key} is {document[key]!r}")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged: {error!r}") from error
    return document


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """Run ``atomic.replacing`` on the first process; yield the new folder to all."""
    with ExitStack() as stack:

        def begin() -> Path:
            target.parent.mkdir(parents=True, exist_ok=True)
            fresh = stack.enter_context(replacing(target))
            copy_others(target, fresh, lambda name: name == TRAINING or name.endswith(".safetensors"))
            return fresh

        yield on_first(begin)
        on_first(stack.pop_all().close)


@contextmanager
def _distributed_checkpoint() -> Iterator[Any]:
    """Yield ``torch.distributed.checkpoint``; convert its errors and silence its single-process warning."""
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.checkpoint.api import CheckpointException

    if not hasattr(checkpoint, "HuggingFaceStorageWriter"):
        raise ImportError(f"training checkpoints need torch 2.9 or newer; this is torch {torch.__version__}")
    try:
        with warnings.catch_warnings():
            # One process needs no group.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield checkpoint
    except CheckpointException as error:
        raise OSError("; ".join(str(each) for each, _ in error.failures.values())) from error
