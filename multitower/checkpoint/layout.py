"""Which tensors of a fused model stand in which file, and what the files are called."""

from __future__ import annotations

from torch import Tensor, nn

from ..declare.graph import FusionGraph
from ..errors import CheckpointError
from ..run.fusion import Fusion
from ..tower import Tower, TransformersTower
from ..tower.peft_tower import is_peft_model

LINKS, TOWERS, MODALITIES, WEIGHTS = "links.safetensors", "towers", "modalities", "model.safetensors"
ADAPTER, ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter", "adapter_config.json", "adapter_model.safetensors"
MAX_SHARD_SIZE = "5GB"


def adapter_folder(name: str) -> str:
    """Return the folder in ``towers/<name>/`` where peft keeps the adapters of a name."""
    return ADAPTER if name == "default" else f"{ADAPTER}/{name}"


def fusion_state(model: Fusion) -> dict[str, Tensor]:
    """Return what belongs to no tower: links and input adapters."""
    return {key: value for key, value in model.state_dict().items() if not key.startswith("towers.")}


def check_names(model: Fusion) -> None:
    """Refuse a model in which layers stand under other names, by which no checkpoint could be loaded.

    Raises:
        CheckpointError: A module was replaced by what ``torch.compile`` gave for it.
    """
    for name in model.state_dict():
        if "._orig_mod." in name:
            module = name.partition("._orig_mod.")[0]
            raise CheckpointError(
                f"{module} was replaced by torch.compile(module), which renames its tensors; compile it in "
                "place, module.compile(), or the fused model as a whole"
            )


def whole(tower: Tower) -> nn.Module:
    """Return what a tower is made of: a PeftModel, a transformers model, or a ``Tower`` in plain PyTorch."""
    native = tower.native
    return native if is_peft_model(native) or isinstance(tower, TransformersTower) else tower


def tower_of(graph: FusionGraph, key: str) -> str:
    """Name the tower that a tensor of a link or an input adapter feeds.

    >>> graph = FusionGraph()
    >>> for name in ("speech", "text"):
    ...     graph.add_tower(name, "path/to/decoder")
    >>> graph.add_link("speech", "text", interleave=1)
    >>> tower_of(graph, "links.speech->text.1-1.norm.weight"), tower_of(graph, "adapters.speech.gate")
    ('text', 'speech')
    """
    kind, name, _ = key.split(".", 2)
    return graph.links[name].target if kind == "links" else name
