"""The fused model, with methods for everything that can be done with it."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from .batch.collate import Batch, Example, Streams
from .checkpoint.load import load_fusion
from .checkpoint.manifest import MAX_SHARD_SIZE, open_checkpoint
from .checkpoint.placement import DeviceMap
from .checkpoint.save import save_pretrained
from .declare.graph import FusionGraph
from .generate.generate import Decoded, Entry, Policy, generate
from .generate.session import Session
from .hub import push
from .inspect.cost import Estimate
from .inspect.draw import as_svg, draw_graph
from .inspect.estimate import estimate
from .inspect.openness import contributions
from .plugins.modality import Modality
from .run import surgery
from .run.fusion import Fusion
from .run.gathered import gathered, is_divided
from .run.parallel import on_first
from .storage.find import find_checkpoint
from .train.resume import rebuild

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedTokenizerBase


class FusedModel(Fusion):
    """Several decoders fused into one module; ``FusionGraph.compile`` makes it.

    >>> import multitower as mt
    >>> from multitower.testing import tiny_tower
    >>> graph = mt.FusionGraph()
    >>> graph.add_tower("speech", tiny_tower(seed=0), train="all")
    >>> graph.add_tower("text", tiny_tower(seed=1))
    >>> graph.add_link("speech", "text", interleave=1)
    >>> model = graph.compile()
    >>> batch = mt.collate([[mt.Segment("speech", [1, 5, 2]), mt.Segment("text", [1, 7, 2], target=True)]])
    >>> out = model(**batch)
    >>> out.logits["text"].shape
    torch.Size([1, 3, 16])
    >>> out.loss.backward()

    ``forward`` and ``generate`` run towers, links and adapters together; ``unimodal`` returns a tower's model
    without links. Frozen towers stay in eval mode and get no gradients.
    """

    def generate(
        self,
        examples: Sequence[Example],
        output: Sequence[Entry] | Policy,
        *,
        continue_segment: bool = False,
        **options: Any,
    ) -> Decoded:
        """Decode one segment for each tower in ``output``, each until its end token.

        >>> import multitower as mt
        >>> from multitower.testing import tiny_model
        >>> model, given = tiny_model(), [mt.Segment("speech", [1, 5, 6, 2])]
        >>> ((text, speech),) = model.generate([given], output=["text", "speech"], max_new_tokens=4)
        >>> text.tower, speech.tower
        ('text', 'speech')

        Towers in a tuple are decoded simultaneously, one token of each per step; the result has a tuple, too:

        >>> (((text, speech),),) = model.generate([given], output=[("text", "speech")], max_new_tokens=4)
        >>> text.tower, speech.tower
        ('text', 'speech')

        A function can choose what comes next, for instance by the last segment's end token:

        >>> def answer(row):
        ...     return {"speech": "text", "text": None}[row[-1].tower]
        >>> [[segment.tower for segment in row] for row in model.generate([given], answer, max_new_tokens=4)]
        [['text']]

        To continue a segment, pass its beginning:

        >>> begun = [*given, mt.Segment("text", [1, 7])]
        >>> ((rest,),) = model.generate([begun], ["text"], continue_segment=True, max_new_tokens=4)

        With FSDP2, all processes must call this together, each with its own examples.

        The model is in eval mode during decoding; its mode is restored. Several threads may decode at once
        from a model that is in eval mode already.

        Args:
            examples: The prompts, each a list of segments (none of them a target).
            output: The towers to decode, in this order; each attends to everything before. Or a function that
                takes an example so far and returns the next tower, a tuple of towers, or None.
            continue_segment: Whether to continue a tower's last segment, if it has not ended, instead of
                starting a new one. New tokens come after the whole prompt. The segment's last token was
                predicted without the segments that came after it, so these have an effect from the next
                token on.
            options: Options of transformers' ``generate``: ``max_new_tokens``, ``do_sample``, ... Each may be
                a mapping by tower: ``max_new_tokens={"text": 40, "speech": 400}``. Without any limit, a
                segment ends after 1,024 new tokens, or at the tower's last position.

        Returns:
            For each example (and each returned sequence of it) the decoded segments, including begin and end
            tokens; of a continued segment, only the new tokens.

        Raises:
            ValueError: ``output`` is empty, a tower is unknown or has no begin token, an example has a
                target, or an option is not supported.
            ImportError: transformers is not installed.
        """
        with gathered(self):
            return generate(self, examples, output, options, continues=continue_segment)

    def session(self, rows: int = 1, *, outputs: Collection[str] | None = None) -> Session:
        """Start a conversation in which each turn runs only new tokens; see ``Session``.

        >>> import multitower as mt
        >>> from multitower.testing import tiny_model
        >>> session = tiny_model().session()
        >>> session.append(mt.Segment("speech", [1, 5, 6, 2]))
        >>> ((answer,),) = session.generate(["text"], max_new_tokens=4)
        >>> [entry.tower for entry in session.history[0]]
        ['speech', 'text']

        Args:
            rows: Number of parallel examples.
            outputs: The towers that will be decoded; all by default. In other towers, layers above the last
                one that a link reads never run.

        Raises:
            ValueError: ``rows`` is below 1, or a tower is unknown.
        """
        return Session(self, rows, outputs)

    def estimate(self, batch: Batch, *, logits: bool = True) -> Estimate:
        """Estimate parameters, FLOPs and memory, part by part; see ``inspect.estimate``.

        >>> from multitower import Segment, collate
        >>> from multitower.testing import tiny_model
        >>> tiny_model().estimate(collate([[Segment("text", [1, 7, 2])]])).towers["text"].forward_flops
        6720
        """
        return estimate(self, batch, logits=logits)

    def contributions(self, streams: Streams) -> dict[str, float]:
        """Return how much each tap and input adapter changes the states of its tower on a batch.

        >>> import multitower as mt
        >>> from multitower.testing import tiny_model
        >>> batch = mt.collate([[mt.Segment("speech", [1, 5, 2]), mt.Segment("text", [1, 7])]])
        >>> tiny_model().contributions(**batch)
        {'speech->text 1-1': 0.0, 'speech->text 3-2': 0.0}

        This is the norm of a token's update divided by the norm of the state that it is added to, and of
        that the median over all tokens with visible source tokens; 0 before training. Gates alone do not show
        it: an open gate with small weights changes nothing.

        Args:
            streams: As in ``forward``. Taps without visible source tokens are left out.
        """
        return contributions(self, streams)

    def _repr_html_(self) -> str | None:
        """Return a drawing for notebooks; None without matplotlib, so that they show text."""
        try:
            return as_svg(draw_graph(self))
        except ImportError:
            return None

    def extend(self, graph: FusionGraph) -> Self:
        """Return a model with more towers or links, and all modules of this one.

        >>> from multitower.testing import tiny_model, tiny_tower
        >>> model = tiny_model()
        >>> graph = model.graph
        >>> graph.add_tower("music", tiny_tower(seed=5))
        >>> graph.add_link("music", "text", interleave=1)
        >>> bigger = model.extend(graph)
        >>> bigger.tower("text") is model.tower("text"), bigger.is_open("music->text")
        (True, False)

        Towers, input adapters and links are shared with this model, not copied. Before further training, the
        logits of the old towers do not change by a bit, even in batches with new towers. An existing
        optimizer keeps working: add the new parameters to it, or make a new one. New modules are on the
        device of their tower.

        Args:
            graph: The new graph: start with ``graph = model.graph``, and add to it.

        Raises:
            GraphError: The graph lacks a tower or a link of the model, or changes its options; or see
                ``FusionGraph.compile``.
            TowerError: See ``FusionGraph.compile``.
            ImportError: See ``FusionGraph.compile``.
        """
        return surgery.extend(self, graph)

    def drop(self, *names: str) -> Self:
        """Return the model without some towers or links; see ``surgery.drop``."""
        return surgery.drop(self, names)

    def swap(
        self, name: str, source: str | os.PathLike[str] | nn.Module, *, train: str | PeftConfig | None = None
    ) -> Self:
        """Return the model with another pretrained decoder in place of a tower; see ``surgery.swap``."""
        return surgery.swap(self, name, source, train)

    def merge_and_unload(self, name: str) -> nn.Module:
        """Merge a tower's peft adapters into its weights, and return the merged model.

        >>> import multitower as mt, peft
        >>> from multitower.testing import tiny_tower
        >>> graph = mt.FusionGraph()
        >>> graph.add_tower("text", tiny_tower(), train=peft.LoraConfig(target_modules=["attention"]))
        >>> model = graph.compile()
        >>> type(model.unimodal("text")).__name__, type(model.merge_and_unload("text")).__name__
        ('PeftModel', 'TinyTower')

        Logits stay the same up to rounding. The tower, and any that shares its weights, is then an ordinary
        frozen tower without a source in ``graph``; checkpoints store the merged model. Other models with the
        same tower, made by ``drop`` or ``extend``, can no longer train it; do not use them further.

        Raises:
            KeyError: There is no tower of that name.
            TowerError: It has no peft adapters, or they cannot be merged.
        """
        return surgery.merge_and_unload(self, name)

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        embed_towers: bool = False,
        modalities: Mapping[str, Modality | PreTrainedTokenizerBase] | None = None,
        max_shard_size: int | str = MAX_SHARD_SIZE,
    ) -> None:
        """Write a checkpoint; see ``checkpoint.save``.

        With FSDP2, all processes must call this together: the model is gathered on each of them, and the
        first one writes. Otherwise, only one process should call it.
        """
        how: dict[str, Any] = {"embed_towers": embed_towers, "modalities": modalities}
        how["max_shard_size"] = max_shard_size
        if not is_divided(self):
            save_pretrained(self, folder, **how)
            return
        with gathered(self):
            on_first(lambda: save_pretrained(self, folder, **how))

    push_to_hub = push.push_to_hub

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        towers: Mapping[str, str | os.PathLike[str] | nn.Module] | None = None,
        allow_changed_towers: bool | Collection[str] = False,
        dtype: torch.dtype | str | None = None,
        device_map: DeviceMap | None = None,
        verify: bool = False,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> Self:
        """Load a folder or "owner/name"; see ``checkpoint.load_fusion`` and ``storage.find_checkpoint``.

        ``revision``, ``token`` and ``cache_dir`` are for the checkpoint: towers that it only refers to are
        loaded with the machine's login (``hf auth login``), into the Hub's cache.
        """
        return load_fusion(
            cls,
            open_checkpoint(find_checkpoint(folder, revision=revision, token=token, cache_dir=cache_dir)),
            towers=towers,
            allow_changed_towers=allow_changed_towers,
            dtype=dtype,
            device_map=device_map,
            verify=verify,
        )

    @classmethod
    def from_training(
        cls,
        folder: str | os.PathLike[str],
        *,
        towers: Mapping[str, str | os.PathLike[str] | nn.Module] | None = None,
    ) -> Self:
        """Load the model from a training checkpoint of ``save_training``, for instance to save it fused.

        Args:
            folder: The training checkpoint.
            towers: A path, Hub id or module for each tower to load from elsewhere; required for towers
                declared with a module, into which the trained weights are loaded.

        Raises:
            CheckpointError: See ``load_training``.
            TowerError: A tower cannot be loaded.
        """
        return rebuild(cls, folder, towers or {})
