"""Check, save and load the modalities of a fused model."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from ..errors import CheckpointError, PluginError
from ..plugins.entry_points import describe, modality_class
from ..plugins.modality import Modality
from ..run.fusion import Fusion
from ..storage.files import check_files
from .manifest import MODALITIES, Checkpoint, Records, open_checkpoint


def check_modalities(model: Fusion, modalities: Mapping[str, Modality]) -> None:
    """Check that modalities fit a model's towers.

    A tower's vocabulary may be larger than its modality's, because embeddings are often padded.
    """
    for name, modality in modalities.items():
        if name not in model.towers:
            raise ValueError(
                f"modalities: there is no tower {name!r}; the towers are {', '.join(model.towers)}"
            )
        if not isinstance(modality, Modality):
            raise TypeError(
                f"tower {name!r}: expected a multitower.Modality, not {type(modality).__name__}; make it a "
                "subclass"
            )
        vocabulary = model.tower(name).vocab_size
        if modality.vocab_size > vocabulary:
            raise ValueError(
                f"tower {name!r} has a vocabulary of {vocabulary}, but its modality {modality.name!r} one of "
                f"{modality.vocab_size}: give the modality that the tower was trained with"
            )


def write_modalities(modalities: Mapping[str, Modality], folder: Path) -> Records:
    """Write each modality into a checkpoint; return their records for ``fusion.json``."""
    for name, modality in modalities.items():
        modality.save_pretrained(folder / MODALITIES / name)
    return {name: describe(modality) for name, modality in modalities.items()}


def keep_modalities(old: Path, new: Path, towers: Collection[str]) -> Records:
    """Copy the modalities of an old checkpoint that a new one does not replace; return their records.

    Modalities of removed towers are dropped. Files without a record are copied, too.
    """
    if not (old / MODALITIES).is_dir():
        return {}
    records = open_checkpoint(old).modalities
    gone = set(records) - set(towers)
    for entry in (old / MODALITIES).iterdir():
        place = new / MODALITIES / entry.name
        if entry.name in gone or place.exists():
            continue
        if entry.is_dir():
            shutil.copytree(entry, place, symlinks=True)
        else:
            place.parent.mkdir(exist_ok=True)
            shutil.copy2(entry, place, follow_symlinks=False)
    return {name: record for name, record in records.items() if name in towers}


def load_modalities(
    checkpoint: Checkpoint, but: Collection[str] = (), *, verify: bool = False
) -> dict[str, Modality]:
    """Load the modalities of a checkpoint by the installed plugins, except for towers in ``but``."""
    loaded: dict[str, Modality] = {}
    folder = checkpoint.root
    for name, record in checkpoint.modalities.items():
        if name in but:
            continue
        check_files(folder, checkpoint.files, (f"{MODALITIES}/{name}/",), verify=verify)
        try:
            kind = modality_class(record["modality"], record["package"])
        except PluginError as error:
            raise PluginError(
                f"{folder}, tower {name!r}: {error}; or give a modality yourself, with "
                f"modalities={{{name!r}: ...}}"
            ) from error
        try:
            loaded[name] = kind.from_pretrained(folder / MODALITIES / name)
        except (CheckpointError, ImportError):
            raise
        except Exception as error:  # a plugin may raise anything on damaged files
            raise CheckpointError(
                f"{folder / MODALITIES / name} is damaged: {type(error).__name__}: {error}"
            ) from error
    return loaded
