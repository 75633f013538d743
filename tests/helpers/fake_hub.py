"""A fake of the Hub in a folder, without network, with the calls that this library makes."""

from __future__ import annotations

import fnmatch
import hashlib
import inspect
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

COMMIT = "0123456789abcdef" * 2 + "01234567"
Download = Callable[[str, Any], Path]
REAL = huggingface_hub.HfApi()


class NoRepositoryError(RepositoryNotFoundError):
    def __init__(self, message: str) -> None:
        Exception.__init__(self, message)


class NoRevisionError(RevisionNotFoundError):
    def __init__(self, message: str) -> None:
        Exception.__init__(self, message)


def checked(real: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Make a fake refuse arguments that the real function would not accept."""

    def call(*args: Any, **kwargs: Any) -> Any:
        inspect.signature(real).bind(*args, **kwargs)
        return fake(*args, **kwargs)

    return call


class FakeHub:
    """Repositories as folders of revisions; like the Hub's, its download cache holds links to blobs."""

    def __init__(self, root: Path) -> None:
        self.root, self.commits, self.tokens = root, 0, []
        self.licenses: dict[str, str] = {}
        self.private: dict[str, bool | None] = {}

    def head(self, repo_id: str, revision: str | None = None) -> Path:
        if repo_id not in self.private:
            raise NoRepositoryError(f"no repository {repo_id}")
        folder = self.root / repo_id / (revision or "main")
        if not folder.exists():
            raise NoRevisionError(f"no revision {revision}")
        return folder

    def files(self, repo_id: str, revision: str | None = None) -> set[str]:
        folder = self.head(repo_id, revision)
        return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}

    def api(self, token: str | None = None) -> Any:
        self.tokens.append(token)
        return SimpleNamespace(
            create_repo=checked(REAL.create_repo, self.create_repo),
            create_commit=checked(REAL.create_commit, self.create_commit),
            list_repo_files=checked(
                REAL.list_repo_files, lambda repo_id, revision: sorted(self.files(repo_id, revision))
            ),
            hf_hub_download=checked(
                REAL.hf_hub_download, lambda repo_id, name, revision: str(self.head(repo_id, revision) / name)
            ),
            model_info=checked(REAL.model_info, self.model_info),
        )

    def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> Any:
        assert exist_ok
        self.private.setdefault(repo_id, private)
        (self.root / repo_id / "main").mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(
        self,
        repo_id: str,
        operations: list[Any],
        *,
        commit_message: str,
        revision: str | None,
        create_pr: bool,
    ) -> Any:
        self.commits += 1
        folder = self.head(repo_id, revision)
        if create_pr:
            shutil.copytree(folder, folder := self.root / repo_id / "refs-pr-1")
        for operation in operations:
            place = folder / operation.path_in_repo
            if isinstance(operation, huggingface_hub.CommitOperationDelete):
                place.unlink()
            else:
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(operation.path_or_fileobj, place)
        url = f"https://huggingface.co/{repo_id}"
        return SimpleNamespace(commit_url=f"{url}/commit/1", pr_url=f"{url}/pr/1" if create_pr else None)

    def model_info(self, repo_id: str) -> Any:
        if repo_id not in self.licenses:
            self.head(repo_id)
        return SimpleNamespace(card_data=huggingface_hub.ModelCardData(license=self.licenses.get(repo_id)))

    def snapshot_download(
        self,
        repo_id: str,
        *,
        revision: str | None,
        token: str | None,
        cache_dir: str | None,
        allow_patterns: list[str],
    ) -> str:
        self.tokens.append(token)
        cache = Path(cache_dir or self.root / "cache") / f"models--{repo_id.replace('/', '--')}"
        snapshot = cache / "snapshots" / (revision or "main")
        (cache / "blobs").mkdir(parents=True, exist_ok=True)
        for name in self.files(repo_id, revision):
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                content = (self.head(repo_id, revision) / name).read_bytes()
                blob = cache / "blobs" / hashlib.sha256(content).hexdigest()
                blob.write_bytes(content)
                place = snapshot / name
                place.parent.mkdir(parents=True, exist_ok=True)
                place.unlink(missing_ok=True)
                place.symlink_to(os.path.relpath(blob, place.parent))
        return str(snapshot)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.HfApi", fake.api)
    download = checked(huggingface_hub.snapshot_download, fake.snapshot_download)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return fake


@pytest.fixture
def downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Download:
    """Go offline; return a function that puts a model into the Hub's cache, as if downloaded."""
    cache = tmp_path / "hub-cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def download(repo_id: str, model: Any) -> Path:
        place = cache / f"models--{repo_id.replace('/', '--')}"
        (place / "refs").mkdir(parents=True)
        (place / "refs/main").write_text(COMMIT)
        model.save_pretrained(place / "snapshots" / COMMIT)
        return place / "snapshots" / COMMIT

    return download
