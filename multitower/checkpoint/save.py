"""Save a fused model to a folder."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from torch import Tensor, nn

from ..base.logs import logger
from ..compile.modules import shared_with
from ..errors import CheckpointError
from ..plugins.entry_points import as_modality
from ..plugins.modality import Modality
from ..run.fusion import Fusion
from ..storage.atomic import check_free, copy_others, replacing
from ..storage.files import FUSION, is_part, write_manifest
from ..storage.find import is_path
from ..storage.fingerprint import fingerprint, sampled_fingerprint
from ..storage.tensors import inventory, size_in_bytes, write_tensors
from ..tower import Tower
from ..tower.load import revision_of
from ..tower.peft_tower import base_model, base_state, is_peft_model
from ..tower.weights import can_be_stored, is_offloaded, quantisation_of
from .assign import check_names, fusion_state, ties, whole
from .manifest import ADAPTER, LINKS, MAX_SHARD_SIZE, TOWERS, WEIGHTS, Records, parts_of
from .modalities import check_modalities, keep_modalities, write_modalities
from .towers import is_to_be_stored, save_adapters, write_proof

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def save_pretrained(
    model: Fusion,
    folder: str | os.PathLike[str],
    *,
    embed_towers: bool = False,
    modalities: Mapping[str, Modality | PreTrainedTokenizerBase] | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> None:
    """Write a fused model to a folder.

    >>> import multitower as mt, tempfile, torch
    >>> from multitower.testing import tiny_model, tiny_tower
    >>> model = tiny_model()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     model.save_pretrained(folder + "/fused")
    ...     towers = {"speech": tiny_tower(depth=3, width=12), "text": tiny_tower(depth=2, width=8)}
    ...     again = mt.FusedModel.from_pretrained(folder + "/fused", towers=towers)
    >>> all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))
    True

    A checkpoint contains all weights, except frozen towers from the Hub (stored as id and commit) or from a
    plugin, if loading them again gives identical tensors. Which towers are stored and which are referred to
    is logged at level INFO.

    The save is atomic: if it is interrupted, either the old or the new checkpoint is there, complete; see
    ``atomic.replacing``.

    Args:
        model: The model.
        folder: A new or empty folder, or an older checkpoint, which is replaced; its files that are not part
            of a checkpoint are kept, and so are its modalities unless new ones are given.
        embed_towers: Whether to also store frozen towers from the Hub or a plugin.
        modalities: Modalities or transformers tokenizers by tower, for ``Pipeline.from_pretrained``.
        max_shard_size: Size above which weights are split into several files with an index, in bytes or as in
            "5GB"; peft always writes adapters to one file.

    Raises:
        CheckpointError: The folder contains something else, is not writable, or the disk is full; adapters
            are merged; or a layer was replaced by ``torch.compile(layer)``.
        ValueError: A modality's tower is unknown or has a smaller vocabulary; or the size is invalid.
        TypeError: Something given as a modality is not one.
    """
    codecs = {name: as_modality(each) for name, each in (modalities or {}).items()}
    check_names(model)
    check_modalities(model, codecs)
    limit = size_in_bytes(max_shard_size)
    target = Path(folder).absolute()
    check_free(target, FUSION)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as fresh:
            records = write_modalities(codecs, fresh)
            if target.exists():
                copy_others(target, fresh, lambda name: name == FUSION or is_part(name))
                records = keep_modalities(target, fresh, model.graph.towers) | records
            towers = _write(model, fresh, embed_towers, records, limit)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot save to {target}, which is as it was: {error}") from error
    logger.info("saved to %s: %s", target, "; ".join(_described(model, towers)))


def _described(model: Fusion, records: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield, for the log, where each tower's weights are."""
    for name, record in records.items():
        source, revision = model.graph.towers[name].source, record.get("revision")
        if "shared_with" in record:
            yield f"{name} is {record['shared_with']}"
        elif record["embedded"]:
            yield f"{name} is stored"
        elif source is None or is_path(source):
            yield f"{name} is left out"
        else:
            yield f"{name} is referred to, {source}" + (f" at {revision}" if revision else "")


def _write(model: Fusion, folder: Path, embed_towers: bool, modalities: Records, limit: int) -> Records:
    records: Records = {}
    shared = shared_with({name: model.tower(name) for name in model.graph.towers})
    for name in model.graph.towers:
        if name in shared:
            records[name] = {"shared_with": shared[name]}
            continue
        native, place = whole(model.tower(name)), folder / TOWERS / name
        state = base_state(native)
        embedded = is_to_be_stored(model, name, embed_towers)
        if embedded and not can_be_stored(base_model(native)):
            _leave_out(name, base_model(native), embed_towers)
            embedded = False
        records[name] = {
            "class": type(base_model(native)).__name__,
            "depth": model.tower(name).depth,
            "width": model.tower(name).width,
            "revision": revision_of(base_model(native)),
            "embedded": embedded,
            "fingerprint": sampled_fingerprint(state),
            "values": fingerprint(state),
            "proof": write_proof(model.tower(name)),
        }
        if embedded:
            _save_model(base_model(native), state, place, limit)
        if is_peft_model(native):
            records[name] |= save_adapters(name, native, place / ADAPTER)
    write_tensors(fusion_state(model), folder / LINKS, limit)
    document = {
        "graph": model.graph.to_dict(),
        "schedule": {"fingerprint": model.schedule.fingerprint},
        "towers": records,
        "modalities": modalities,
        "tensors": {part: inventory(folder / part) for part in [LINKS, *parts_of(records, records)]},
    }
    write_manifest(folder, document)
    _let_read(folder)
    return records


def _let_read(folder: Path) -> None:
    """Give tensor files the manifest's permissions; safetensors makes them readable only by the owner."""
    mode = (folder / FUSION).stat().st_mode
    for file in folder.rglob("*.safetensors"):
        if not file.is_symlink():
            file.chmod(mode)


def _leave_out(name: str, model: nn.Module, embed_towers: bool) -> None:
    why = (
        f"tower {name!r} is quantised ({quantisation_of(model)}) in a way that cannot be written to a "
        "checkpoint and read back"
    )
    if embed_towers:
        raise CheckpointError(f"{why}; save without embed_towers, and keep the tower yourself")
    warnings.warn(
        f"{why}; it is left out, so load with from_pretrained(folder, towers={{{name!r}: module}})",
        stacklevel=5,
    )


def _save_model(model: Any, state: dict[str, Tensor], folder: Path, limit: int) -> None:
    if isinstance(model, Tower):
        folder.mkdir(parents=True)
        tied = ties(state)
        write_tensors({key: each for key, each in state.items() if key not in tied}, folder / WEIGHTS, limit)
    else:
        own = not is_offloaded(model) and state.keys() == model.state_dict().keys()
        model.save_pretrained(folder, state_dict=None if own else state, max_shard_size=limit)
