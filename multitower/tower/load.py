"""Load towers from the sources that users declare."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from ..base.extras import require
from ..errors import PluginError, TowerError
from ..plugins.entry_points import tower_loader
from .base import Tower
from .peft_tower import PeftTower, base_model, check_mergeable, check_whole, is_peft_model
from .probe import Proof
from .transformers import TransformersTower

KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
"""Settings for which transformers would download compiled code; saved models do not have them."""
LOADER = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*://")
"""The prefix of a source that a plugin loads."""


def as_tower(
    name: str,
    source: str | nn.Module | None,
    prepare: Callable[[nn.Module], nn.Module] | None = None,
    *,
    revision: str | None = None,
    empty: bool = False,
    proof: Proof | None = None,
) -> Tower:
    """Return the tower for a folder, Hub id, plugin source, transformers causal LM or ``Tower``.

    >>> as_tower("text", None)
    Traceback (most recent call last):
    multitower.errors.TowerError: tower 'text' was declared with a module, which ... does not hold; ...

    Args:
        name: The tower's name, for errors.
        source: The source as declared; None raises an error.
        prepare: Changes the model before it becomes a tower, for instance by adding adapters; returns it.
        revision: The commit of a Hub id; None for the latest.
        empty: Whether to create models from folders and Hub ids on the meta device, without reading weights.
        proof: See ``TransformersTower``.

    Raises:
        TowerError: The source cannot be loaded, or is not a decoder that can be run layer by layer.
        PluginError: The source is ``loader://...``, and there is no working plugin of that name.
    """
    if source is None:
        raise TowerError(
            f"tower {name!r} was declared with a module, which this graph does not hold; pass it anew, "
            f"as in from_pretrained(folder, towers={{{name!r}: module}})"
        )
    if isinstance(source, str):
        source = from_source(name, source, revision=revision, empty=empty)
    model = source.native if isinstance(source, TransformersTower | PeftTower) else source
    layers = source.path if isinstance(source, TransformersTower) else None
    try:
        if not isinstance(base_model(model), Tower) and not hasattr(model, "config"):
            raise ValueError(
                f"{type(model).__name__} is neither a transformers causal LM nor a multitower.Tower; write a "
                "small multitower.Tower around it"
            )
        check_whole(model)
        if prepare is None and isinstance(source, Tower):
            return source
        model = model if prepare is None else prepare(model)
        inner = base_model(model)
        if isinstance(inner, Tower):
            return inner if inner is model else PeftTower(model)
        return TransformersTower(model, layers=layers, proof=proof)
    except ValueError as error:
        raise TowerError(f"tower {name!r}: {error}") from error


def from_source(
    name: str, source: str, *, revision: str | None = None, empty: bool = False, cached: bool = False
) -> nn.Module:
    """Load the model of a path, Hub id or "loader://..."; see ``as_tower``.

    If ``cached``, use only files that are already downloaded.
    """
    if LOADER.match(source):
        return _from_plugin(name, source)
    return _from_transformers(name, source, revision, empty, cached)


def _from_plugin(name: str, source: str) -> nn.Module:
    loader, _, rest = source.partition("://")
    try:
        load = tower_loader(loader)
    except PluginError as error:
        raise PluginError(f"tower {name!r}: cannot load {source!r}: {error}") from error
    where = f"tower {name!r}: the tower loader {loader!r}"
    try:
        model = load(rest)
    except Exception as error:  # a loader may raise anything
        raise TowerError(f"{where} cannot load {rest!r}: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise TowerError(
            f"{where} returned a {type(model).__name__} for {rest!r}; it must return a multitower.Tower "
            "or a model"
        )
    return model


def revision_of(model: nn.Module) -> str | None:
    """Return the Hub commit from which a model was loaded, if known."""
    commit = getattr(getattr(model, "config", None), "_commit_hash", None)
    return commit if isinstance(commit, str) else None


def _from_transformers(name: str, source: str, revision: str | None, empty: bool, cached: bool) -> nn.Module:
    transformers = require("transformers", "transformers")
    try:
        settings, _ = transformers.PreTrainedConfig.get_config_dict(
            source, revision=revision or "main", local_files_only=cached
        )
        if kernels := kernels_in(settings):
            raise TowerError(
                f"tower {name!r}: the config of {source!r} asks for the kernels {kernels!r}, which may be "
                "code of others; load the model yourself, and give that module instead"
            )
        if empty:
            return _from_config(name, source, revision)
        model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
            source,
            dtype="auto",
            trust_remote_code=False,
            use_safetensors=True,
            revision=revision or "main",
            local_files_only=cached,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if "trust_remote_code" in str(error):
            raise TowerError(
                f"tower {name!r}: {source!r} brings code of its own, which is never run unasked; read "
                "it, load the model yourself with trust_remote_code=True, and give that module instead"
            ) from error
        where = "" if os.path.isdir(source) else " (there is no folder of this name)"
        why, _, _ = str(error).partition("\nModel type should be one of")  # a list of all families
        raise TowerError(f"tower {name!r}: cannot load {source!r}{where} as a causal LM: {why}") from error
    config: Any = model.config
    config._commit_hash = _commit(source, revision)
    return model


def _from_config(name: str, source: str, revision: str | None) -> nn.Module:
    transformers = require("transformers", "transformers")
    config = transformers.AutoConfig.from_pretrained(
        source, trust_remote_code=False, revision=revision or "main"
    )
    if getattr(config, "quantization_config", None) is not None:
        raise TowerError(
            f"tower {name!r}: {source!r} is quantised, which its config does not show in full; load the "
            "model, and give that module instead"
        )
    with torch.device("meta"):
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(
            config, dtype=config.dtype or torch.float32, trust_remote_code=False
        )
    return model.eval()


def kernels_in(config: Any) -> Any:
    """Return a setting in a config, however nested, for which transformers would download code; else None."""
    if isinstance(config, dict):
        asked = [config[key] for key in KERNELS if config.get(key) is not None]
        return next(iter(asked), None) or kernels_in(list(config.values()))
    deeper = map(kernels_in, config) if isinstance(config, list) else ()
    return next((found for found in deeper if found is not None), None)


def _commit(source: str, revision: str | None) -> str | None:
    """Return the commit of a revision in the Hub's cache; None for a folder."""
    if os.path.isdir(source):
        return None
    hub = require("huggingface_hub", "transformers")
    cached = hub.try_to_load_from_cache(source, "config.json", revision=revision)
    found = re.search(r"[/\\\\]snapshots[/\\\\]([0-9a-f]{40})[/\\\\]", str(cached))
    return found[1] if found else revision


def merged(tower: Tower) -> Tower:
    """Return a tower with its peft adapters merged; the old tower can no longer be used.

    If this fails, the model may be half merged; see ``unchanged_on_error``.
    """
    native: Any = tower.native
    if not is_peft_model(native):
        raise ValueError("it has no peft adapters to merge")
    check_mergeable(native)
    try:
        model: nn.Module = native.merge_and_unload()
    except Exception as error:  # adapter types raise different errors
        raise ValueError(f"peft cannot merge these adapters: {error}") from error
    if isinstance(tower, TransformersTower):
        return TransformersTower(model, layers=tower.path)
    assert isinstance(model, Tower)
    return model
