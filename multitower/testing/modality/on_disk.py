"""Checks of a modality on disk: loading restores it, and damaged files are refused."""

from __future__ import annotations

import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError
from ...plugins.modality import Modality
from ..report import call
from .case import ModalityCase, same

PICKLES = {".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth"}


def check_files(case: ModalityCase) -> None:
    """Check that loading restores a saved modality, and that its files are safe to load.

    It is loaded from another folder than it was saved to, and from a second copy.
    """
    modality = case.modality
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        folder, elsewhere = work / "saved", work / "elsewhere"
        elsewhere.mkdir()
        with chdir(elsewhere):
            call("save_pretrained", modality.save_pretrained, folder)
        stray = [str(path.relative_to(work)) for path in work.rglob("*") if folder not in path.parents]
        outside = sorted(set(stray) - {"saved", "elsewhere"})
        assert not outside, f"save_pretrained writes outside its folder: {', '.join(outside)}"
        for file in _files(folder):
            assert not _is_pickle(file), (
                f"save_pretrained writes {file.relative_to(folder)}, a pickle, which runs code when it is "
                "loaded; write JSON and safetensors"
            )
        expected = _behaviour(case, modality)
        for generation in ("loaded", "loaded, saved and loaded again"):
            folder = folder.rename(work / "moved")
            modality = call("from_pretrained", type(modality).from_pretrained, folder)
            found = _behaviour(case, modality)
            others = [key for key, value in expected.items() if not same(value, found[key])]
            assert not others, f"a modality that is {generation} differs in {', '.join(others)}"
            shutil.rmtree(folder)
            folder = work / "saved"
            call("save_pretrained of what was loaded", modality.save_pretrained, folder)


def check_damage(case: ModalityCase) -> None:
    """Check that from_pretrained raises a CheckpointError for missing, damaged or foreign files."""
    modality = case.modality
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        (work / "empty").mkdir()
        _Stranger(f"{modality.name}_too").save_pretrained(work / "another's")
        for name in ("nowhere", "empty", "another's"):
            _check_not_loaded(case, work / name, f"a folder that is {name}")
        modality.save_pretrained(work / "saved")
        for file in _files(work / "saved"):
            part = file.relative_to(work / "saved")
            damages: dict[str, Callable[[Path], Any]] = {f"a folder without {part}": Path.unlink}
            if file.suffix in (".json", ".safetensors"):
                damages[f"a folder with half of {part}"] = _halve
                damages[f"a folder with an empty {part}"] = _empty
            for what, damage in damages.items():
                folder = shutil.copytree(work / "saved", work / "damaged")
                damage(folder / part)
                _check_not_loaded(case, folder, what, unless_same=True)
                shutil.rmtree(folder)


class _Stranger(Modality):
    """Another modality, to save its files."""

    accepts, vocab_size, begin, end = (str,), 2, 0, 1

    def __init__(self, name: str) -> None:
        self.name = name

    def encode(self, raw: str) -> Tensor:
        return torch.tensor([0, 1])

    def decode(self, tokens: Tensor) -> str:
        return ""


def _behaviour(case: ModalityCase, modality: Modality) -> dict[str, Any]:
    """Return all observable behaviour of a modality."""
    keys = ("name", "accepts", "vocab_size", "begin", "end", "pad", "default_tower")
    seen: dict[str, Any] = {key: getattr(modality, key) for key in keys}
    for place in range(len(case.samples)):
        tokens = seen[f"the tokens of sample {place}"] = modality.encode(case.raw(place))
        seen[f"what sample {place} is decoded to"] = modality.decode(tokens.clone())
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(modality.vocab_size, (20,), generator=generator)
    try:
        seen["what random tokens are decoded to"] = modality.decode(tokens)
    except ValueError:
        seen["what random tokens are decoded to"] = ValueError
    return seen


def _check_not_loaded(case: ModalityCase, folder: Path, what: str, unless_same: bool = False) -> None:
    kind = type(case.modality)
    try:
        with warnings.catch_warnings(action="ignore"):  # only errors matter here
            loaded = kind.from_pretrained(folder)
            fine = unless_same and same(_behaviour(case, loaded), _behaviour(case, case.modality))
    except CheckpointError:
        return
    except Exception as error:
        raise AssertionError(
            f"from_pretrained of {what} fails with {type(error).__name__}: {error}; expected a "
            "multitower.errors.CheckpointError that names the file"
        ) from error
    assert fine, f"from_pretrained of {what} gives {loaded!r}; expected a multitower.errors.CheckpointError"


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _halve(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def _empty(file: Path) -> None:
    file.write_bytes(b"")


def _is_pickle(file: Path) -> bool:
    """Whether a file is a pickle, by its name, its protocol header, or as a zip file of torch.save."""
    if file.suffix.lower() in PICKLES:
        return True
    with file.open("rb") as opened:
        start = opened.read(2)
    if start[:1] == b"\x80" and start[1:] in (b"\2", b"\3", b"\4", b"\5"):
        return True
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith(".pkl") for name in archive.namelist())
