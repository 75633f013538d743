"""What the files of a checkpoint are called, and which version of the format is written."""

import re

FORMAT_VERSION = 2
LINKS, TOWERS, WEIGHTS = "links.safetensors", "towers", "model.safetensors"
ADAPTER, ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter", "adapter_config.json", "adapter_model.safetensors"
MAX_SHARD_SIZE = "5GB"


def is_links(name: str) -> bool:
    """Return whether a file holds links, or is the index of those that do.

    >>> [is_links(name) for name in (LINKS, "links-00001-of-00002.safetensors", "links.txt")]
    [True, True, False]
    """
    return re.fullmatch(r"links(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?", name) is not None


def adapter_folder(name: str) -> str:
    """Return the folder in ``towers/<name>/`` where peft keeps the adapters of a name."""
    return ADAPTER if name == "default" else f"{ADAPTER}/{name}"
