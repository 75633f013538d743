"""Files of kept states: the rows of each tower, found by their tokens.

folder/  kept.json                    by tower: fingerprint, layers, number of files
         <tower>-00001.safetensors    "layer 2", of shape (tokens, width), for each layer; "keys" of rows,
                                      and how many tokens each of them has, "lengths"
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..batch.collate import EXAMPLES, STATES, Stream
from ..checkpoint.assign import whole
from ..errors import CheckpointError
from ..run.fusion import Fusion
from ..storage.atomic import current
from ..storage.files import read_json
from ..storage.fingerprint import fingerprint
from ..storage.tensors import mapped_tensors
from ..tower.weights import whole_state

FORMAT_VERSION = 1
INDEX = "kept.json"
KEY = 16
"""How many bytes the key of a row has."""


class TowerRows:
    """The rows of one tower: mapped files, and where in them the states of each row are."""

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
    """Collects the rows of one tower, and writes a file whenever they are many."""

    def __init__(self, model: Fusion, folder: Path, name: str, layers: list[int], limit: int) -> None:
        self.model, self.folder, self.name, self.layers, self.limit = model, folder, name, layers, limit
        self._seen: set[bytes] = set()
        self._waiting: list[tuple[bytes, Stream]] = []
        self._bytes = self._files = 0

    def add(self, stream: Stream) -> None:
        """Run the tower over a stream that has new rows, and keep these."""
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
        """Write what is left; return what the index says of the tower."""
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
    """Write what is left of the rows of each tower, and of which towers there are states."""
    records = {writer.name: writer.finish() for writer in writers}
    towers = {name: record for name, record in records.items() if record["files"]}
    if not towers:
        names = ", ".join(map(repr, records))
        raise ValueError(f"there are no states to keep: the batches have no tokens of tower {names}")
    document = {"format_version": FORMAT_VERSION, "towers": towers}
    (folder / INDEX).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    for file in folder.glob("*.safetensors"):  # safetensors lets none but their owner read them
        file.chmod((folder / INDEX).stat().st_mode)


def open_rows(folder: Path, document: Mapping[str, Any]) -> dict[str, TowerRows]:
    """Map the files that an index speaks of; return what is in them by tower."""
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
    """Return a digest of all tensors of a tower, adapters of peft included."""
    return fingerprint(whole_state(whole(model.tower(name))))


def _rows(stream: Stream) -> list[tuple[int, Tensor]]:
    """Return the tokens of each row that has some, without padding, and its number."""
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
