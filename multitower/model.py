"""The fused model: the front door to all that is done with one."""

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

    A fused run of towers, links and adapters is what ``forward`` and ``generate`` do; ``unimodal`` gives a
    tower as it is without them. Frozen towers stay in eval mode and take no gradient.
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

        Towers in a tuple are decoded at the same time, a token of each a step, and so stand in the result:

        >>> (((text, speech),),) = model.generate([given], output=[("text", "speech")], max_new_tokens=4)
        >>> text.tower, speech.tower
        ('text', 'speech')

        A function may choose what comes next, by the end token of what came last, for instance:

        >>> def answer(row):
        ...     return {"speech": "text", "text": None}[row[-1].tower]
        >>> [[segment.tower for segment in row] for row in model.generate([given], answer, max_new_tokens=4)]
        [['text']]

        The beginning of a segment may be given, to be gone on with:

        >>> begun = [*given, mt.Segment("text", [1, 7])]
        >>> ((rest,),) = model.generate([begun], ["text"], continue_segment=True, max_new_tokens=4)

        Where FSDP2 has divided the model, all processes decode together, each what it is given.

        Decoding is done in eval mode, and the mode is given back; several threads may decode at once from a
        model that is in eval mode already.

        Args:
            examples: What is given, each a list of segments (none of them a target).
            output: The towers to decode, in this order; each reads all that came before. Or a function that
                is called with an example so far and gives the next tower, a tuple of towers, or None.
            continue_segment: Whether to go on with the last segment of a tower, where it has not ended, in
                place of beginning one. What is decoded then stands after all that was given, and what
                others said since the segment's last token is first read by what follows it.
            options: Options of transformers' ``generate``: ``max_new_tokens``, ``do_sample``, ... What is
                not the same for all towers is given by tower: ``max_new_tokens={"text": 40, "speech": 400}``.
                Where neither these nor a tower set a limit, a segment ends after 1,024 new tokens, or at the
                tower's last position.

        Returns:
            For each example (each returned sequence of it) what can be appended to it: the decoded segments,
            begin and end included, or what was added to one.

        Raises:
            ValueError: Nothing is to be decoded, a tower is unknown or has no begin token, an example
                holds a target, or an option cannot be passed on.
            ImportError: transformers is not installed.
        """
        with gathered(self):
            return generate(self, examples, output, options, continues=continue_segment)

    def session(self, rows: int = 1, *, outputs: Collection[str] | None = None) -> Session:
        """Begin a conversation, of which every turn runs only what is new; see ``Session``.

        >>> import multitower as mt
        >>> from multitower.testing import tiny_model
        >>> session = tiny_model().session()
        >>> session.append(mt.Segment("speech", [1, 5, 6, 2]))
        >>> ((answer,),) = session.generate(["text"], max_new_tokens=4)
        >>> [entry.tower for entry in session.history[0]]
        ['speech', 'text']

        Args:
            rows: How many examples go on side by side.
            outputs: The towers that are to be decoded; all unless given. Of others, layers above the last
                that is read never run.

        Raises:
            ValueError: There is no row, or no tower of a name.
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

        That is the norm of its update over the norm of the state to which it is added, over all tokens that
        see something; 0 at the start of training. A gate alone would not say it: an open one in front of
        small weights changes nothing.

        Args:
            streams: As in ``forward``. Taps that see nothing in them are left out.
        """
        return contributions(self, streams)

    def _repr_html_(self) -> str | None:
        """Return a drawing for notebooks; None, which stands for the text, where matplotlib is missing."""
        try:
            return as_svg(draw_graph(self))
        except ImportError:
            return None

    def extend(self, graph: FusionGraph) -> Self:
        """Return the model of a graph that has all that this one has, trained or not, and more.

        >>> from multitower.testing import tiny_model, tiny_tower
        >>> model = tiny_model()
        >>> graph = model.graph
        >>> graph.add_tower("music", tiny_tower(seed=5))
        >>> graph.add_link("music", "text", interleave=1)
        >>> bigger = model.extend(graph)
        >>> bigger.tower("text") is model.tower("text"), bigger.is_open("music->text")
        (True, False)

        Towers, input adapters and links of this model are the same modules in both, not copies, so that the
        model that is not used any further costs nothing. Until something is trained, the logits of the old
        towers stay as they are, bit for bit, also in batches that hold new towers. An optimizer of this
        model goes on as it was; new parameters are given to it, or all to a new one. New modules are where
        the tower is that they belong to, which is where it was loaded.

        Args:
            graph: What the model becomes: begin with ``graph = model.graph``, and add to it.

        Raises:
            GraphError: The graph lacks a tower or a link of the model, or declares it otherwise; or see
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
        """Fold a tower's peft adapters into its weights, as peft does; return the merged model.

        >>> import multitower as mt, peft
        >>> from multitower.testing import tiny_tower
        >>> graph = mt.FusionGraph()
        >>> graph.add_tower("text", tiny_tower(), train=peft.LoraConfig(target_modules=["attention"]))
        >>> model = graph.compile()
        >>> type(model.unimodal("text")).__name__, type(model.merge_and_unload("text")).__name__
        ('PeftModel', 'TinyTower')

        Logits stay the same up to rounding. The tower, and any that shares its weights, is then an ordinary
        frozen one, of no origin that ``graph`` names, and a checkpoint holds the merged model.

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
        modalities: Mapping[str, Modality] | None = None,
        max_shard_size: int | str = MAX_SHARD_SIZE,
    ) -> None:
        """Write a checkpoint; see ``checkpoint.save``.

        Where FSDP2 has divided the model, all processes call this together: the model is whole on each of
        them meanwhile, and the first one writes. Otherwise one of them alone does.
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
        """Load a folder or "owner/name"; see ``checkpoint.load_fusion`` and ``storage.find_checkpoint``."""
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
        """Return the model of a training checkpoint, which ``save_training`` wrote, to save as a fused model.

        Args:
            folder: The training checkpoint.
            towers: Where to take towers from: a path, a Hub id or a module. Needed for those that were
                declared with a module; what was trained of them is loaded into it.

        Raises:
            CheckpointError: See ``load_training``.
            TowerError: A tower cannot be had.
        """
        return rebuild(cls, folder, towers or {})
