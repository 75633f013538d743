"""Modalities and tower loaders of installed packages, found by their entry points.

A package registers them in its ``pyproject.toml``::

    [project.entry-points."multitower.modalities"]
    music = "my_package:MusicModality"

    [project.entry-points."multitower.towers"]
    mine = "my_package:load_tower"

A plugin is imported when it is first used.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version
from typing import Any

from torch import nn

from ..errors import PluginError
from .modality import Modality

MODALITIES, TOWERS = "multitower.modalities", "multitower.towers"
KINDS = {MODALITIES: "modality", TOWERS: "tower loader"}


@dataclass(frozen=True)
class Plugin:
    """An entry point of an installed package.

    Attributes:
        name: The name of the entry point.
        package: The distribution name of the package.
        version: The version of the package.
        value: The ``Modality`` subclass, or the function that loads towers; None if it is unusable.
        error: Why it is unusable, else None.
    """

    name: str
    package: str
    version: str
    value: Any
    error: str | None


def installed(group: str = MODALITIES) -> list[Plugin]:
    """Import all plugins of a group; return them, also broken ones, sorted by name and package.

    >>> for plugin in installed():                      # doctest: +SKIP
    ...     print(plugin.name, plugin.package, plugin.version, plugin.error or "")
    speech multitower 0.1.0
    speech_codec multitower 0.1.0
    speech_hubert multitower 0.1.0
    text multitower 0.1.0

    Args:
        group: ``MODALITIES`` or ``TOWERS``.
    """
    plugins = []
    for rivals in _by_name(group).values():
        for entry in rivals:
            value = error = None
            try:
                _check_single(group, rivals)
                value = _load(group, entry)
            except PluginError as problem:
                error = str(problem)
            plugins.append(Plugin(entry.name, *_package(entry), value, error))
    return sorted(plugins, key=lambda plugin: (plugin.name, plugin.package))


def modality_class(name: str, package: str | None = None) -> type[Modality]:
    """Return the modality class of a name.

    >>> modality_class("smell", package="multitower-smell")
    Traceback (most recent call last):
    multitower.errors.PluginError: modality 'smell' is not installed: pip install multitower-smell

    Args:
        name: The name of its entry point.
        package: The package that provides it, if known; named in the error.

    Raises:
        PluginError: No package or several packages provide it; or it cannot be imported, or is not a
            ``Modality`` of that name.
    """
    found: type[Modality] = _get(MODALITIES, name, package)
    return found


def as_modality(given: Any) -> Any:
    """Wrap a transformers tokenizer in the modality "text"; return anything else unchanged."""
    transformers = sys.modules.get("transformers")  # imported already if this is one of its tokenizers
    if transformers is None or not isinstance(given, transformers.PreTrainedTokenizerBase):
        return given
    text: Any = modality_class("text")
    try:
        return text(given)
    except ValueError as error:
        error.add_note(f"give {text.__name__}(tokenizer, begin=..., end=...) in place of the tokenizer")
        raise


def tower_loader(name: str) -> Callable[[str], nn.Module]:
    """Return the function that loads towers from ``name://...``; its argument is the part after ``://``.

    >>> tower_loader("rwkv")
    Traceback (most recent call last):
    multitower.errors.PluginError: no installed package offers the tower loader 'rwkv'...

    Raises:
        PluginError: No package or several packages provide it; or it cannot be imported or called.
    """
    loader: Callable[[str], nn.Module] = _get(TOWERS, name, None)
    return loader


def describe(modality: Modality) -> dict[str, str | None]:
    """Return a modality's record in a checkpoint, by which ``modality_class`` finds its class again.

    >>> class Letters(Modality):
    ...     name = "letters"
    ...     encode = decode = None
    >>> describe(Letters())                             # a class that no package offers
    {'modality': 'letters', 'package': None, 'version': None}

    Returns:
        Its name, and the package that provides its class, with its version.
    """
    for entry in _by_name(MODALITIES).get(modality.name, []):
        try:
            found = _load(MODALITIES, entry)
        except PluginError:
            continue
        if type(modality) is found:
            package, release = _package(entry)
            return {"modality": modality.name, "package": package, "version": release}
    return {"modality": modality.name, "package": None, "version": None}


def _by_name(group: str) -> dict[str, list[EntryPoint]]:
    found: dict[str, list[EntryPoint]] = {}
    for entry in entry_points(group=group):
        found.setdefault(entry.name, []).append(entry)
    return found


def _get(group: str, name: str, package: str | None) -> Any:
    found = _by_name(group)
    if name not in found:
        raise PluginError(_absent(f"{KINDS[group]} {name!r}", package, sorted(found)))
    _check_single(group, found[name])
    return _load(group, found[name][0])


def _absent(what: str, package: str | None, others: Sequence[str]) -> str:
    if package is None:
        return f"no installed package offers the {what}; there are: {', '.join(others) or 'none'}"
    try:
        release = version(package)
    except PackageNotFoundError:
        return f"{what} is not installed: pip install {package}"
    return f"{what} is not in {package} {release}, which is installed: pip install --upgrade {package}"


def _check_single(group: str, rivals: Sequence[EntryPoint]) -> None:
    if len(rivals) > 1:
        packages = " and ".join(sorted(_package(entry)[0] for entry in rivals))
        raise PluginError(
            f"{packages} both offer the {KINDS[group]} {rivals[0].name!r}: pip uninstall one of them"
        )


def _load(group: str, entry: EntryPoint) -> Any:
    what = f"{KINDS[group]} {entry.name!r} of package {' '.join(_package(entry))}"
    try:
        value = entry.load()
    except Exception as error:  # an import may raise anything
        raise PluginError(f"{what} cannot be imported: {type(error).__name__}: {error}") from error
    if group == TOWERS and not callable(value):
        raise PluginError(f"{what} is {value!r}, not a function that loads a tower")
    if group == MODALITIES:
        if not (isinstance(value, type) and issubclass(value, Modality)):
            raise PluginError(f"{what} is {value!r}, not a subclass of multitower.Modality")
        own = getattr(value, "name", None)
        if own != entry.name:
            raise PluginError(f"{what} calls itself {own!r}: its name and its entry point must be the same")
    return value


def _package(entry: EntryPoint) -> tuple[str, str]:
    """Return name and version of the package of an entry point."""
    try:
        name, release = entry.dist.name, entry.dist.version  # type: ignore[union-attr]  # caught below
    except Exception:  # without metadata, the exception depends on the version of Python
        name = release = None
    return name or "(damaged installation)", release or "?"
