"""Upload fused models to the Hugging Face Hub."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..base.extras import require
from ..checkpoint.save import save_pretrained
from ..declare.graph import redeclared
from ..errors import CheckpointError
from ..plugins.modality import Modality
from ..run.fusion import Fusion
from ..storage.files import is_part
from ..storage.find import hub_id, is_path
from ..tower.peft_tower import base_model, is_peft_model
from .card import is_generated, model_card

CARD = "README.md"


def push_to_hub(
    model: Fusion,
    repo_id: str,
    *,
    modalities: Mapping[str, Modality] | None = None,
    embed_towers: bool = False,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload a fused model",
    revision: str | None = None,
    create_pr: bool = False,
    license: str | None = None,  # noqa: A002  # what the Hub calls it
    max_shard_size: int | str = "5GB",
) -> str:
    """Upload a checkpoint and its model card to the Hub, in one commit.

    >>> from multitower.testing import tiny_model
    >>> push_to_hub(tiny_model(), "me/tiny", private=True)                        # doctest: +SKIP
    'https://huggingface.co/me/tiny/commit/...'

    The same commit deletes files that only the older checkpoint had. Other files are unchanged, as is a model
    card that was written or edited by hand. Local paths of towers are not published.

    Args:
        model: The model.
        repo_id: The repository, "owner/name"; created if it does not exist.
        modalities: Modalities by tower, as for ``save_pretrained``.
        embed_towers: Whether to also store frozen towers, as for ``save_pretrained``.
        private: Whether a new repository is private; by default the owner's setting.
        token: Access token with write permission; by default that of the machine's login.
        commit_message: The commit message.
        revision: An existing branch; by default the main branch.
        create_pr: Whether to open a pull request with the commit.
        license: The licence of the fused model for its card, as a Hub id such as "apache-2.0".
        max_shard_size: As for ``save_pretrained``.

    Returns:
        The URL of the commit or the pull request.

    Raises:
        CheckpointError: A frozen tower comes from a local folder, and would be published; or see
            ``save_pretrained``.
        ImportError: huggingface_hub is not installed.
        huggingface_hub.errors.HfHubHTTPError: The Hub rejects the request.
    """
    check_reachable(model, embed_towers)
    hub = require("huggingface_hub", "hub")
    api = hub.HfApi(token=token)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "checkpoint"
        with without_paths(model) as nameless:
            save_pretrained(
                nameless,
                folder,
                embed_towers=embed_towers,
                modalities=modalities,
                max_shard_size=max_shard_size,
            )
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        there = set(api.list_repo_files(repo_id, revision=revision))
        if CARD not in there or is_generated(_read(api, repo_id, revision)):
            card = model_card(
                model,
                repo_id,
                embed_towers=embed_towers,
                modalities=modalities,
                license=license,
                tower_licenses=_licenses(model, hub, api),
            )
            (folder / CARD).write_text(card, encoding="utf-8")
        files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        stale = filter(is_part, there - set(files))
        commit = api.create_commit(
            repo_id,
            [
                *(hub.CommitOperationAdd(name, path) for name, path in sorted(files.items())),
                *(hub.CommitOperationDelete(name) for name in sorted(stale)),
            ],
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )
    return str(commit.pr_url or commit.commit_url)


def check_reachable(model: Fusion, embed_towers: bool) -> None:
    """Raise if a frozen tower from a local path would be published without ``embed_towers``."""
    local = [
        f"{name!r} ({spec.source})"
        for name, spec in model.graph.towers.items()
        if is_path(spec.source) and not embed_towers and spec.train != "all"
    ]
    if local:
        raise CheckpointError(
            f"towers {', '.join(local)} come from paths that others do not have, so that they would be "
            "published with the checkpoint; if they may be, call model.push_to_hub(..., embed_towers=True); "
            "otherwise load the model with their ids on the Hub: from_pretrained(folder, towers={name: id})"
        )


@contextmanager
def without_paths(model: Fusion) -> Iterator[Fusion]:
    """Yield the model without local paths in its graph and configs; towers from such paths are all stored."""
    local = [name for name, spec in model.graph.towers.items() if is_path(spec.source)]
    graph = redeclared(model.graph, local, source=None)
    named: list[tuple[Any, str]] = []
    for native in map(model.unimodal, model.towers):
        inner = base_model(native)
        named += [(getattr(inner, "config", None), "_name_or_path"), (inner, "name_or_path")]
        if is_peft_model(native):
            configs: Any = native.peft_config
            named += [(config, "base_model_name_or_path") for config in configs.values()]
    named = [each for each in named if hub_id(getattr(*each, None) or "?") is None and hasattr(*each)]
    before = [getattr(*each) for each in named]
    try:
        for each in named:
            setattr(*each, "")
        yield type(model)(graph, {name: model.tower(name) for name in model.towers}, model)
    finally:
        for each, value in zip(named, before, strict=True):
            setattr(*each, value)


def _read(api: Any, repo_id: str, revision: str | None) -> str:
    with open(api.hf_hub_download(repo_id, CARD, revision=revision), encoding="utf-8", newline="") as card:
        return card.read()


def _licenses(model: Fusion, hub: Any, api: Any) -> dict[str, str]:
    """Return the licences of towers that their own model cards state."""
    found: dict[str, Any] = {}
    for name, spec in model.graph.towers.items():
        origin = hub_id(spec.source)
        if origin is not None:
            found[name] = _card_on_hub(name, origin, hub, api)
        elif spec.source is not None and (Path(spec.source) / CARD).is_file():
            found[name] = hub.ModelCard.load(Path(spec.source) / CARD, ignore_metadata_errors=True).data
    return {name: data.license for name, data in found.items() if data and isinstance(data.license, str)}


def _card_on_hub(name: str, origin: str, hub: Any, api: Any) -> Any:
    try:
        return api.model_info(origin).card_data
    except hub.errors.RepositoryNotFoundError:
        warnings.warn(
            f"tower {name!r} comes from {origin!r}, which the Hub does not have, or not for everyone: unless "
            "the tower is stored with embed_towers=True, others may not be able to load this checkpoint",
            stacklevel=4,
        )
        return None
