"""Files of kept states: the rows of each tower, found by their tokens."""

from __future__ import annotations

import hashlib
import itertools
import json
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from ..batch.collate import EXAMPLES, STATES, Stream
from ..checkpoint.parts import whole
from ..errors import CheckpointError
from ..run.fusion import Fusion
from ..storage.atomic import current
from ..storage.files import read_json
from ..storage.fingerprint import fingerprint
from ..storage.tensors import mapped_tensors
from ..tower.offload import whole_state

FORMAT_VERSION = 1
INDEX, ROWS = "kept.json", "rows.safetensors"
KEY = 16
"""How many bytes the key of a row has."""


class TowerRows:
    """The rows of one tower: mapped files, and where in them the states of each row begin."""

    def __init__(
        self, folder: Path, name: str, record: Mapping[str, Any], rows: Mapping[str, Tensor]
    ) -> None:
        self.fingerprint, self.layers, self.width = record["fingerprint"], record["layers"], record["width"]
        self.dtype: torch.dtype = getattr(torch, record["dtype"])
        self.shards = []
        for number, tokens in enumerate(record["shards"], 1):
            file = _shard(folder, name, number)
            tensors = mapped_tensors(file)
            expected = {_name(layer): ((tokens, self.width), self.dtype) for layer in self.layers}
            if {key: (tuple(each.shape), each.dtype) for key, each in tensors.items()} != expected:
                raise CheckpointError(f"{file} is damaged: it does not hold what {INDEX} says")
            self.shards.append(tensors)
        self.begins = [0, *itertools.accumulate(record["shards"])]
        self.keys = rows[f"{name} keys"].numpy().reshape(-1).view(f"S{KEY}")
        self.starts = rows[f"{name} starts"].numpy()

    def states(self, stream: Stream, layers: Iterable[int]) -> Stream:
        """Return the states of rows, padded with zeros.

        Raises:
            LookupError: A row is not there; the message describes it.
        """
        rows = _rows(stream)
        length = stream["tokens"].shape[1]
        states = {
            _name(layer): torch.zeros(len(rows), length, self.width, dtype=self.dtype) for layer in layers
        }
        for number, (row, start) in enumerate(zip(rows, self._starts(rows, length), strict=True)):
            if not len(row):
                continue
            if start is None:
                first = ", ".join(map(str, row[:4].tolist()))
                raise LookupError(f"row {number} ({len(row)} tokens, the first of them {first})")
            shard = bisect_right(self.begins, start) - 1
            begin = start - self.begins[shard]
            for key, padded in states.items():
                padded[number, : len(row)] = self.shards[shard][key][begin : begin + len(row)]
        return states

    def _starts(self, rows: Sequence[Tensor], length: int) -> list[int | None]:
        """Find where the states of rows begin: those of this very batch, else those of the row."""
        alone = list(map(_key, rows))
        wanted = np.array([*_placed(alone, length), *alone], dtype=self.keys.dtype)
        places = np.searchsorted(self.keys, wanted).clip(max=len(self.keys) - 1)
        here, starts = self.keys[places] == wanted, self.starts[places]
        found = [int(start) if it else None for start, it in zip(starts, here, strict=True)]
        in_batch, first = found[: len(rows)], found[len(rows) :]
        return [first[row] if start is None else start for row, start in enumerate(in_batch)]


class RowWriter:
    """Collects the rows of one tower, and writes a file whenever they are many."""

    def __init__(self, model: Fusion, folder: Path, name: str, layers: list[int], limit: int) -> None:
        self.model, self.folder, self.name, self.layers, self.limit = model, folder, name, layers, limit
        self.tower = model.tower(name)
        self._starts: dict[bytes, int] = {}
        self._known: dict[bytes, int] = {}
        self._seen: set[bytes] = set()
        self._waiting: list[Stream] = []
        self._shards: list[int] = []
        self._total = self._bytes = 0
        self._dtype: torch.dtype | None = None

    def add(self, stream: Stream) -> None:
        """Run the tower over a stream, and keep what is new."""
        rows = _rows(stream)
        alone = list(map(_key, rows))
        placed = _placed(alone, stream["tokens"].shape[1])
        if not any(map(len, rows)) or placed[0] in self._seen:
            return
        self._seen.add(placed[0])
        states = self._run(stream)
        for number, row in enumerate(rows):
            if len(row):
                start = self._keep({key: each[number, : len(row)].clone() for key, each in states.items()})
                if self._starts.setdefault(alone[number], start) != start:
                    self._starts[placed[number]] = start

    def finish(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Write what is left; return what the index says of the tower, and its rows sorted by key."""
        self._flush()
        rows = sorted(self._starts.items())
        keys = torch.frombuffer(bytearray(b"".join(key for key, _ in rows)), dtype=torch.uint8)
        starts = torch.tensor([start for _, start in rows])
        record = {
            "fingerprint": tower_fingerprint(self.model, self.name),
            "layers": self.layers,
            "width": self.tower.width,
            "dtype": str(self._dtype).removeprefix("torch."),
            "shards": self._shards,
        }
        return record, {f"{self.name} keys": keys, f"{self.name} starts": starts}

    @property
    def is_empty(self) -> bool:
        """Whether there was no token of the tower."""
        return not self._starts

    @torch.no_grad()
    def _run(self, stream: Stream) -> Stream:
        moved = {key: stream[key].to(self.tower.device) for key in ("tokens", "times", "mask")}
        given = self.model.run({self.name: moved}, wanted={self.name: self.layers[-1]}).given
        states = {_name(layer): given[self.name, layer].cpu() for layer in self.layers}
        self._dtype = states[_name(self.layers[0])].dtype
        return states

    def _keep(self, states: Stream) -> int:
        """Return where the states of a row begin, counted in tokens; they are added unless they are there."""
        digest = hashlib.blake2b(digest_size=KEY)
        for each in states.values():
            digest.update(each.view(torch.uint8).numpy().data)
        start = self._known.setdefault(digest.digest(), self._total)
        if start == self._total:
            self._waiting.append(states)
            self._total += len(states[_name(self.layers[0])])
            self._bytes += sum(each.nbytes for each in states.values())
            if self._bytes >= self.limit:
                self._flush()
        return start

    def _flush(self) -> None:
        if self._waiting:
            states = {key: torch.cat([each[key] for each in self._waiting]) for key in self._waiting[0]}
            self._shards.append(self._total - sum(self._shards))
            save_file(states, _shard(self.folder, self.name, len(self._shards)), metadata={"format": "pt"})
            self._waiting, self._bytes = [], 0


def write_index(writers: Sequence[RowWriter], folder: Path) -> None:
    """Write where the rows of each tower are, and whose they are.

    Raises:
        ValueError: There are none.
    """
    towers: dict[str, Any] = {}
    rows: dict[str, Tensor] = {}
    for writer in writers:
        if not writer.is_empty:
            towers[writer.name], found = writer.finish()
            rows |= found
    if not towers:
        names = ", ".join(repr(writer.name) for writer in writers)
        raise ValueError(f"there are no states to keep: the batches have no tokens of tower {names}")
    save_file(rows, folder / ROWS, metadata={"format": "pt"})
    document = {"format_version": FORMAT_VERSION, "towers": towers, "rows": _sha256(folder / ROWS)}
    (folder / INDEX).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    for file in folder.glob("*.safetensors"):  # safetensors lets none but their owner read them
        file.chmod((folder / INDEX).stat().st_mode)


def open_rows(folder: Path, document: Mapping[str, Any]) -> dict[str, TowerRows]:
    """Map the files that an index speaks of; return what is in them by tower.

    Raises:
        CheckpointError: One is missing or damaged, or another index has taken the place of this one.
    """
    root = current(folder)
    version = document.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder / INDEX} has format version {version!r}, but this release reads {FORMAT_VERSION}; "
            "compute the states anew"
        )
    _check_same(root, document)
    try:
        rows = mapped_tensors(root / ROWS)
        damaged = _sha256(root / ROWS) != document["rows"]
        towers = {name: TowerRows(root, name, each, rows) for name, each in document["towers"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / INDEX} is damaged: {error!r}") from error
    _check_same(root, document)
    if damaged:
        raise CheckpointError(f"{folder / ROWS} is damaged: it is not as it was written")
    return towers


def _check_same(root: Path, document: Mapping[str, Any]) -> None:
    if read_json(root / INDEX) != document:
        raise CheckpointError(f"{root} was replaced by other states while it was in use; open it again")


def tower_fingerprint(model: Fusion, name: str) -> str:
    """Return a digest of all tensors of a tower, adapters of peft included."""
    return fingerprint(whole_state(whole(model.tower(name))))


def _rows(stream: Stream) -> list[Tensor]:
    """Return the tokens of each row without padding."""
    if EXAMPLES in stream:
        raise ValueError("the batch is packed; states are kept of padded batches: call multitower.pack after")
    lengths = stream["mask"].sum(1).tolist()
    return [row[:length] for row, length in zip(stream["tokens"].cpu(), lengths, strict=True)]


def _key(row: Tensor) -> bytes:
    return hashlib.blake2b(row.long().numpy().tobytes(), digest_size=KEY).digest()


def _placed(keys: Sequence[bytes], length: int) -> list[bytes]:
    """Return a key of each row in its place in a batch, from the keys that rows have alone."""
    batch = hashlib.blake2b(b"".join((length.to_bytes(8), *keys)), digest_size=KEY).digest()
    numbers = range(len(keys))
    return [hashlib.blake2b(batch + each.to_bytes(8), digest_size=KEY).digest() for each in numbers]


def _name(layer: int) -> str:
    return f"{STATES}{layer}"


def _shard(folder: Path, tower: str, number: int) -> Path:
    return folder / f"{tower}-{number:05}.safetensors"


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
