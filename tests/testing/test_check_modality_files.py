"""Messages of check_modality about modalities that save or load wrongly."""

from __future__ import annotations

import json
import pickle
import warnings
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from safetensors.torch import load_file

import multitower as mt
from broken import Breakage, Breakages
from broken_modalities import SAMPLES, Cipher, built
from multitower.testing import check_modality, modality_report

BROKEN = Breakages()


@BROKEN.of("saved", "that is loaded differs in the tokens of sample 1, the tokens of sample 2")
class ForgetsItsShift(Cipher):
    def config(self) -> dict[str, Any]:
        return {}


@BROKEN.of("saved", "save_pretrained of what was loaded fails with FileNotFoundError", alone=True)
class ForgetsLater(Cipher):
    """When loaded, cannot be saved again once the folder that it was loaded from is gone."""

    source: Path | None = None

    @classmethod
    def from_pretrained(cls, folder: Any) -> Self:
        loaded = super().from_pretrained(folder)
        loaded.source = Path(folder)
        return loaded

    def save_pretrained(self, folder: Any) -> None:
        if self.source is not None:
            (self.source / "modality.json").read_text()
        super().save_pretrained(folder)


@BROKEN.of("saved", "writes outside its folder: saved.log")
class WritesBeside(Cipher):
    def save_pretrained(self, folder: Any) -> None:
        super().save_pretrained(folder)
        Path(f"{folder}.log").write_text("saved")


@BROKEN.of("saved", "writes outside its folder: elsewhere.cipher.log", alone=True)
class WritesHere(Cipher):
    def save_pretrained(self, folder: Any) -> None:
        super().save_pretrained(folder)
        Path("cipher.log").write_text("saved")


@BROKEN.of("saved", "writes table, a pickle, which runs code when it is loaded", alone=True)
class WritesAPickle(Cipher):
    def save_pretrained(self, folder: Any) -> None:
        super().save_pretrained(folder)
        Path(folder, "table").write_bytes(pickle.dumps([1]))


@BROKEN.of("saved", "writes table.data, a pickle")
class WritesForTorch(Cipher):
    def save_pretrained(self, folder: Any) -> None:
        super().save_pretrained(folder)
        torch.save(self.table, Path(folder, "table.data"))


@BROKEN.of("saved", "writes model.bin, a pickle")
class WritesAModel(Cipher):
    def save_pretrained(self, folder: Any) -> None:
        super().save_pretrained(folder)
        Path(folder, "model.bin").write_bytes(b"")


@BROKEN.of("saved", "from_pretrained fails with CheckpointError: .*modality.json is missing")
class RemembersWhere(Cipher):
    def save_pretrained(self, folder: Any) -> None:
        super().save_pretrained(folder)
        Path(folder, "place.json").write_text(json.dumps(str(folder)))

    @classmethod
    def from_pretrained(cls, folder: Any) -> Self:
        file = Path(folder, "place.json")
        return super().from_pretrained(json.loads(file.read_text()) if file.exists() else folder)


@BROKEN.of("damage", "from_pretrained of a folder that is nowhere gives .*; expected a mult", alone=True)
class TakesAnyFolder(Cipher):
    @classmethod
    def from_pretrained(cls, folder: Any) -> Self:
        try:
            return super().from_pretrained(folder)
        except mt.errors.CheckpointError:
            return cls(torch.arange(256))


@BROKEN.of("damage", "from_pretrained of a folder that is nowhere fails with FileNotFoundError", alone=True)
class ReadsByItself(Cipher):
    @classmethod
    def from_pretrained(cls, folder: Any) -> Self:
        json.loads(Path(folder, "modality.json").read_text())
        return super().from_pretrained(folder)


@BROKEN.of("damage", "from_pretrained of a folder without extra.json gives .*; expected a mult", alone=True)
class HasAFileOfItsOwn(Cipher):
    """Reads an additional file, and ignores that it is missing or damaged."""

    harmless: tuple[type[Exception], ...] = (OSError, ValueError)

    def save_pretrained(self, folder: Any) -> None:
        super().save_pretrained(folder)
        Path(folder, "extra.json").write_text(json.dumps({"shift": self.shift}))

    @classmethod
    def from_pretrained(cls, folder: Any) -> Self:
        loaded = super().from_pretrained(folder)
        try:
            loaded.shift = json.loads(Path(folder, "extra.json").read_text())["shift"]
        except cls.harmless:
            warnings.warn("a modality without its shift", stacklevel=2)
            loaded.shift = 0
        except OSError as error:
            raise mt.errors.CheckpointError(str(error)) from error
        return loaded


@BROKEN.of("damage", "from_pretrained of a folder with half of extra.json gives ")
class TakesHalves(HasAFileOfItsOwn):
    harmless = (ValueError,)


@BROKEN.of("damage", "a folder with half of modality.safetensors fails with SafetensorError")
class ReadsTensorsByItself(Cipher):
    @classmethod
    def from_pretrained(cls, folder: Any) -> Self:
        config, file = cls.read_config(Path(folder)), Path(folder, "modality.safetensors")
        if not file.exists():
            raise mt.errors.CheckpointError(f"{file} is missing")
        return cls.restore(config, load_file(file))


@BROKEN.of("damage", "from_pretrained of a folder that is another's gives ", alone=True)
class IsAnyones(Cipher):
    @classmethod
    def read_config(cls, folder: Path) -> dict[str, Any]:
        try:
            return super().read_config(folder)
        except mt.errors.CheckpointError as error:
            if "is that of modality" in str(error):
                return {}
            raise

    @classmethod
    def restore(cls, config: Any, tensors: Any) -> Self:
        return cls(tensors.get("table", torch.arange(256)), config.get("shift", 0))


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@BROKEN.each()
def test_what_is_broken_is_named(broken: Breakage) -> None:
    with pytest.raises(AssertionError, match=broken.report):
        check_modality(built(broken.kind), SAMPLES, promises=[broken.promise])


@BROKEN.each(alone=True)
def test_what_is_whole_is_not_blamed(broken: Breakage) -> None:
    report = modality_report(built(broken.kind), SAMPLES)
    assert {name for name, reason in report.items() if reason} == {broken.promise}
