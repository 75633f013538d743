"""Hidden states of frozen towers without incoming links, computed once for a data set and stored on disk.

folder/  kept.json                    by tower: fingerprint, layers, number of files
         <tower>-00001.safetensors    "layer 2", shape (tokens, width), for each layer; "keys" of the rows,
                                      and their "lengths" in tokens
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..batch.collate import EXAMPLES, STATES, Batch, Stream
from ..checkpoint.assign import whole
from ..errors import CheckpointError
from ..run.fusion import Fusion
from ..run.request import has_labels, why_not_constant
from ..storage.atomic import check_free, copy_others, current, replacing
from ..storage.files import read_json
from ..storage.fingerprint import fingerprint
from ..storage.tensors import mapped_tensors, size_in_bytes
from ..tower.weights import whole_state

FORMAT_VERSION = 1
INDEX = "kept.json"
KEY = 16
"""Size of a row's key, in bytes."""


class KeptStates:
    """Cached hidden states of frozen towers, read from a folder and added to batches, so towers need not run.

    >>> import multitower as mt, tempfile, torch
    >>> from multitower.testing import tiny_tower
    >>> graph = mt.FusionGraph()
    >>> graph.add_tower("speech", tiny_tower(seed=0))                       # frozen, and reads no other
    >>> graph.add_tower("text", tiny_tower(seed=1), train="all")
    >>> graph.add_link("speech", "text", interleave=1)
    >>> model = graph.compile()
    >>> batch = mt.collate([[mt.Segment("speech", [1, 5, 2]), mt.Segment("text", [1, 7, 2], target=True)]])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     kept = mt.train.KeptStates.compute(model, [batch], folder)
    ...     ready = kept(batch)
    >>> [(key, tuple(each.shape)) for key, each in ready["streams"]["speech"].items() if each.dim() == 3]
    [('layer 1', (1, 3, 8)), ('layer 2', (1, 3, 8))]
    >>> torch.equal(model(**ready).loss, model(**batch).loss)
    True

    Rows are looked up by their tokens, so batches may be shuffled and composed differently. States come from
    the first batch with that row; in another batch, they would differ at most by rounding. In a
    ``DataLoader``, apply it after ``collate``; it works in worker processes, because only the path is pickled
    and the files are mapped again.

    Args:
        folder: The folder written by ``compute``.
        model: The model to train.

    Raises:
        CheckpointError: The folder has no cached states or is damaged; or a tower has changed since, may
            change in training, or is read at a layer that was not cached.
    """

    def __init__(self, folder: str | os.PathLike[str], model: Fusion) -> None:
        self.folder = Path(folder).absolute()
        root = current(self.folder)
        if not (root / INDEX).is_file():
            raise CheckpointError(
                f"{self.folder} has no {INDEX}: it contains no states; see KeptStates.compute"
            )
        self._document = read_json(root / INDEX)
        self._towers = open_rows(self.folder, self._document)
        self._read = _read_layers(model)
        for name, tower in self._towers.items():
            self._check(model, name, tower)

    @classmethod
    def compute(
        cls,
        model: Fusion,
        batches: Iterable[Batch],
        folder: str | os.PathLike[str],
        *,
        max_shard_size: int | str = "1GB",
    ) -> KeptStates:
        """Run the frozen towers without incoming links on batches, and write the states that taps read.

        Padding and duplicate rows are not stored. The write is atomic: if interrupted, the folder is
        unchanged. Pass ``tqdm(batches)`` for a progress bar; use the same ``torch.autocast`` as in training.

        Args:
            model: The model. Cached are towers with train="none", adapter=None and no incoming links.
            batches: Batches made by ``collate``.
            folder: A new or empty folder, or older cached states, which are replaced; its other files are
                kept.
            max_shard_size: Size at which a tower's file is full, in bytes or as in "1GB"; about twice as
                much memory is needed per tower.

        Raises:
            ValueError: The model has no such tower, or the batches have no tokens for any.
            CheckpointError: The folder contains something else or is not writable, or the disk is full.
        """
        target = Path(folder).absolute()
        check_free(target, INDEX)
        reasons = {name: _why_not_kept(model, name) for name in model.towers}
        reads = {name: layers for name, layers in _read_layers(model).items() if not reasons[name]}
        if not reads:
            why = "; ".join(f"tower {name!r} {why or 'is read by no link'}" for name, why in reasons.items())
            raise ValueError(f"the model has no states to keep: {why}")
        limit = size_in_bytes(max_shard_size)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with replacing(target) as fresh:
                copy_others(target, fresh, lambda name: name == INDEX or name.endswith(".safetensors"))
                writers = [RowWriter(model, fresh, name, layers, limit) for name, layers in reads.items()]
                for batch in batches:
                    for writer in writers:
                        if writer.name in batch["streams"]:
                            writer.add(batch["streams"][writer.name])
                write_index(writers, fresh)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot keep states in {target}, which is as it was: {error}") from error
        return cls(target, model)

    def __call__(self, batch: Batch) -> Batch:
        """Add the cached states of its rows to a batch.

        A stream with labels is unchanged, because its tower has to run.

        Args:
            batch: A batch made by ``collate``.

        Returns:
            A batch in which the streams of cached towers have the output of each layer that a tap reads:
            "layer 2" of shape (batch, length, width), zero at padding.

        Raises:
            ValueError: A row has no cached states.
        """
        streams = {
            name: {**stream, **self._towers[name].states(stream, self._read.get(name, []))}
            if name in self._towers and not has_labels(stream)
            else stream
            for name, stream in batch["streams"].items()
        }
        return {**batch, "streams": streams}

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_towers"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._towers = open_rows(self.folder, self._document)

    def __repr__(self) -> str:
        towers = (f"{name} layers {', '.join(map(str, each.layers))}" for name, each in self._towers.items())
        return f"<KeptStates in {self.folder}: {'; '.join(towers)}>"

    def _check(self, model: Fusion, name: str, tower: TowerRows) -> None:
        what = f"{self.folder} keeps states of tower {name!r}"
        if name not in model.towers:
            raise CheckpointError(f"{what}, but the towers are {', '.join(model.towers)}")
        reason = _why_not_kept(model, name)
        if reason:
            raise CheckpointError(f"{what}, but in this model it {reason}; train without them")
        missing = [str(layer) for layer in self._read.get(name, []) if layer not in tower.layers]
        if missing:
            raise CheckpointError(
                f"{what} of layers {', '.join(map(str, tower.layers))}, but this model also reads "
                f"{', '.join(missing)}; compute them anew"
            )
        if tower_fingerprint(model, name) != tower.fingerprint:
            raise CheckpointError(
                f"{what}, but its weights or their dtype are others in this model; compute them anew"
            )


def _why_not_kept(model: Fusion, name: str) -> str:
    """Return why a tower's states may change, by its declaration or its present state; "" if they cannot."""
    tower, declared = model.tower(name), why_not_constant(model.graph, name)
    if not declared and any(parameter.requires_grad for parameter in tower.parameters()):
        return "has parameters with requires_grad=True"
    if not declared and any(module.training for module in tower.modules()):
        return "is in training mode"
    return declared


def _read_layers(model: Fusion) -> dict[str, list[int]]:
    """Return the layers that taps read, by tower."""
    read: dict[str, list[int]] = {}
    for name, layer in sorted(model.schedule.read_layers):
        read.setdefault(name, []).append(layer)
    return read


class TowerRows:
    """The mapped files of one tower, and the place of each row in them."""

    def __init__(self, folder: Path, name: str, record: Mapping[str, Any]) -> None:
        self.folder, self.name = folder, name
        self.fingerprint, self.layers = record["fingerprint"], record["layers"]
        self.files: list[Stream] = []
        self.places: dict[bytes, tuple[int, slice]] = {}
        for number in range(record["files"]):
            tensors = mapped_tensors(_file(folder, name, number))
            self.files.append({_name(layer): tensors[_name(layer)] for layer in self.layers})
            ends = itertools.accumulate(tensors["lengths"].tolist(), initial=0)
            for key, place in zip(tensors["keys"].numpy(), itertools.pairwise(ends), strict=True):
                self.places[key.tobytes()] = number, slice(*place)

    def states(self, stream: Stream, layers: Iterable[int]) -> Stream:
        """Return the states of rows, padded with zeros."""
        shape = stream["tokens"].shape
        like = {_name(layer): self.files[0][_name(layer)] for layer in layers}
        states = {key: each.new_zeros(*shape, each.shape[1]) for key, each in like.items()}
        for number, row in _rows(stream):
            if _key(row) not in self.places:
                first = ", ".join(map(str, row[:4].tolist()))
                raise ValueError(
                    f"{self.folder} keeps no states of row {number} ({len(row)} tokens, the first of them "
                    f"{first}) of stream {self.name!r}; compute them from all batches to be trained on"
                )
            file, place = self.places[_key(row)]
            for key, padded in states.items():
                padded[number, : len(row)] = self.files[file][key][place]
        return {key: each.to(stream["tokens"].device) for key, each in states.items()}


class RowWriter:
    """Collects the rows of one tower, and writes a file whenever they reach the size limit."""

    def __init__(self, model: Fusion, folder: Path, name: str, layers: list[int], limit: int) -> None:
        self.model, self.folder, self.name, self.layers, self.limit = model, folder, name, layers, limit
        self._seen: set[bytes] = set()
        self._waiting: list[tuple[bytes, Stream]] = []
        self._bytes = self._files = 0

    def add(self, stream: Stream) -> None:
        """Run the tower on a stream if it has new rows, and collect these."""
        new = {_key(row): (number, len(row)) for number, row in _rows(stream)}
        new = {key: place for key, place in new.items() if key not in self._seen}
        states = self._run(stream) if new else {}
        self._seen |= new.keys()
        for key, (number, length) in new.items():
            row = {layer: each[number, :length].clone() for layer, each in states.items()}
            self._waiting.append((key, row))
            self._bytes += sum(each.nbytes for each in row.values())
        if self._bytes >= self.limit:
            self._flush()

    def finish(self) -> dict[str, Any]:
        """Write the remaining rows; return the tower's record for the index."""
        if self._waiting:
            self._flush()
        digest = tower_fingerprint(self.model, self.name)
        return {"fingerprint": digest, "layers": self.layers, "files": self._files}

    @torch.no_grad()
    def _run(self, stream: Stream) -> Stream:
        device = self.model.tower(self.name).device
        moved = {key: stream[key].to(device) for key in ("tokens", "times", "mask")}
        given = self.model.run({self.name: moved}, wanted={self.name: self.layers[-1]}).given
        return {_name(layer): given[self.name, layer].cpu() for layer in self.layers}

    def _flush(self) -> None:
        keys, rows = zip(*self._waiting, strict=True)
        tensors = {layer: torch.cat([row[layer] for row in rows]) for layer in rows[0]}
        tensors["keys"] = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, KEY)
        tensors["lengths"] = torch.tensor([len(row[_name(self.layers[0])]) for row in rows])
        save_file(tensors, _file(self.folder, self.name, self._files), metadata={"format": "pt"})
        self._waiting, self._bytes, self._files = [], 0, self._files + 1


def write_index(writers: Iterable[RowWriter], folder: Path) -> None:
    """Write the remaining rows of each tower, and the index."""
    records = {writer.name: writer.finish() for writer in writers}
    towers = {name: record for name, record in records.items() if record["files"]}
    if not towers:
        names = ", ".join(map(repr, records))
        raise ValueError(f"there are no states to keep: the batches have no tokens of tower {names}")
    document = {"format_version": FORMAT_VERSION, "towers": towers}
    (folder / INDEX).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    for file in folder.glob("*.safetensors"):  # safetensors makes them readable only by the owner
        file.chmod((folder / INDEX).stat().st_mode)


def open_rows(folder: Path, document: Mapping[str, Any]) -> dict[str, TowerRows]:
    """Map the files listed in an index, by tower."""
    root = current(folder)
    version = document.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder / INDEX} has format version {version!r}, but this release reads {FORMAT_VERSION}; "
            "compute the states anew"
        )
    try:
        towers = {name: TowerRows(root, name, each) for name, each in document["towers"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder / INDEX} is damaged, or not of these files: {error!r}") from error
    if read_json(root / INDEX) != document:
        raise CheckpointError(f"{root} was replaced by other states while it was in use; open it again")
    return towers


def tower_fingerprint(model: Fusion, name: str) -> str:
    """Return a digest of all tensors of a tower, including peft adapters."""
    return fingerprint(whole_state(whole(model.tower(name))))


def _rows(stream: Stream) -> list[tuple[int, Tensor]]:
    """Return number and tokens, without padding, of each row that is not empty."""
    if EXAMPLES in stream:
        raise ValueError("the batch is packed; states are kept of padded batches: call multitower.pack after")
    lengths = stream["mask"].sum(1).tolist()
    rows = zip(stream["tokens"].cpu(), lengths, strict=True)
    return [(number, row[:length]) for number, (row, length) in enumerate(rows) if length]


def _key(row: Tensor) -> bytes:
    return hashlib.blake2b(row.long().numpy().tobytes(), digest_size=KEY).digest()


def _name(layer: int) -> str:
    return f"{STATES}{layer}"


def _file(folder: Path, tower: str, number: int) -> Path:
    return folder / f"{tower}-{number + 1:05}.safetensors"
