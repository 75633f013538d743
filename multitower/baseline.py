"""The baseline: one decoder whose vocabulary is expanded by the tokens of other modalities."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .base.extras import require
from .batch.collate import EXAMPLES, IGNORE, Example, Segment, check_streams, place_in_time
from .generate.generate import check_given
from .generate.options import (
    OF_ONE_VOCABULARY,
    Settings,
    check_named,
    check_single,
    given,
    groups,
    options_of,
    settle,
)
from .generate.turn import decode_rows, pad_left
from .plugins.modality import Modality
from .run.output import FusedOutput, token_loss
from .run.request import check_counts
from .tower.abilities import why_not_faithful
from .tower.probe import LENGTH, evaluated, last_position
from .tower.weights import execution_device

if TYPE_CHECKING:
    from peft import PeftConfig


class VocabularyExpansion(nn.Module):
    """One transformers causal LM with tokens of other modalities added to its vocabulary.

    >>> import multitower as mt
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from multitower_text import TextModality
    >>> config = LlamaConfig(vocab_size=258, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    ...                      num_attention_heads=2, bos_token_id=256, eos_token_id=257)
    >>> text = TextModality()
    >>> model = VocabularyExpansion(LlamaForCausalLM(config), {"text": text, "other": text})
    >>> model.model.config.vocab_size
    516
    >>> tokens = text.encode("hi")
    >>> batch = mt.collate([[mt.Segment("text", tokens), mt.Segment("other", tokens, target=True)]])
    >>> sorted(model(**batch).losses)
    ['other', 'text']

    It takes the same batches and examples as ``FusedModel``, so that the two can be compared on the same
    data. With ``train="all"`` this is the "Single Decoder" of Zipper (arXiv 2405.18669).

    Args:
        model: The decoder, whose embeddings are resized in place.
        modalities: The modality of each stream. The first one is the model's own and keeps its ids; those of
            the others follow the model's vocabulary.
        train: What to train: "all" parameters; "new", the embedding and head rows of the new tokens; or a
            ``peft.PeftConfig`` without ``trainable_token_indices``, such as ``LoraConfig()``, for adapters
            and these rows. The last two need the extra "lora".
    """

    def __init__(
        self, model: nn.Module, modalities: Mapping[str, Modality], *, train: str | PeftConfig = "all"
    ) -> None:
        super().__init__()
        native: Any = model
        self.model = native
        self.modalities = dict(modalities)
        self.offsets: dict[str, int] = {}
        own = size = int(native.config.get_text_config().vocab_size)
        first = next(iter(modalities), "")
        if first and modalities[first].vocab_size > size:
            raise ValueError(
                f"the model has a vocabulary of {size}, but its own modality {first!r} one of "
                f"{modalities[first].vocab_size}: give first the modality that the model was trained with"
            )
        for number, (name, modality) in enumerate(modalities.items()):
            self.offsets[name] = size if number else 0
            size += modality.vocab_size if number else 0
        native.resize_token_embeddings(size)
        if train == "all":
            native.requires_grad_(True)
        else:
            self.model = _with_new_rows(native, list(range(own, size)), train)
        hooked: Any = self  # torch does not annotate these
        hooked.register_state_dict_post_hook(_without_ties)
        hooked.register_load_state_dict_pre_hook(_with_ties)

    def forward(
        self,
        streams: Mapping[str, Mapping[str, Tensor]],
        *,
        logits: bool = True,
        num_items_in_batch: Mapping[str, Tensor | int] | None = None,
    ) -> FusedOutput:
        """Interleave the streams to one row by their times, and run the decoder.

        Args:
            streams: See ``FusedModel.forward``.
            logits: Whether to return logits. Without them nothing is saved: one head computes all losses.
            num_items_in_batch: See ``FusedModel.forward``.

        Returns:
            Losses by stream as from ``FusedModel``; logits under "row", over the expanded vocabulary.

        Raises:
            ValueError: See ``FusedModel.forward``; or the batch is packed, or has simultaneous tokens.
        """
        check_streams(streams, {name: modality.vocab_size for name, modality in self.modalities.items()})
        _check_one_at_a_time(streams)
        counts = num_items_in_batch or {}
        if num_items_in_batch is not None:
            check_counts(counts, streams)
        length = 1 + max(int(stream["times"].max()) for stream in streams.values())
        row = self._interleave(streams, "tokens", length, 0)
        scores: Tensor = self.model(input_ids=row, use_cache=False).logits
        labelled = {
            name: self._interleave({name: stream}, "labels", length, IGNORE)
            for name, stream in streams.items()
            if "labels" in stream
        }
        losses = {name: token_loss(scores, labels, counts.get(name)) for name, labels in labelled.items()}
        loss = torch.stack(list(losses.values())).sum() if losses else None
        return FusedOutput(loss, losses, {"row": scores} if logits else {}, {})

    def generate(
        self, examples: Sequence[Example], output: Sequence[str], **options: Any
    ) -> list[list[Segment]]:
        """Decode one segment for each name in ``output``, only from that modality's tokens.

        Takes and returns what ``FusedModel.generate`` does, with a list of names only, and one segment for
        each example and name.

        Raises:
            ValueError: An example has a target or an unknown token or modality, or an option is not
                supported.
        """
        self._check(examples, output, options)
        settings = {name: self._settle(name, options) for name in output}
        rows = [list(example) for example in examples]
        decoded: list[list[Segment]] = [[] for _ in rows]
        with evaluated(self):
            for name in output:
                segments = self._decode(rows, settings[name])
                decoded = [[*before, segment] for before, segment in zip(decoded, segments, strict=True)]
                rows = [[*row, segment] for row, segment in zip(rows, segments, strict=True)]
        return decoded

    def _settle(self, name: str, options: Mapping[str, Any]) -> Settings:
        """Resolve the options for one modality; other modalities' tokens are suppressed."""
        modality, offset = self.modalities[name], self.offsets[name]
        own = range(offset, offset + modality.vocab_size)
        vocabulary = self.model.config.get_text_config().vocab_size
        others = [token for token in range(vocabulary) if token not in own]
        decodable = _Native(self.model, offset + modality.begin, (offset + modality.end,))
        settings = settle(name, decodable, {"suppress_tokens": others, **options_of(name, options)})
        check_single(settings, "give the examples several times")
        return settings

    def _decode(self, rows: Sequence[Example], settings: Settings) -> list[Segment]:
        name, decoded = settings.name, dict[int, Segment]()
        prompts = [self._flatten(row, settings.begin) for row in rows]
        for group in groups([(settings, [len(prompt) for prompt in prompts])]):
            tokens = pad_left([prompts[row] for row in group], settings.begin)
            mask = pad_left([torch.ones_like(prompts[row]) for row in group], 0).bool()
            device = settings.tower.device
            starts = [tokens.shape[1] - 1] * len(group)
            sequences = decode_rows(self.model, tokens.to(device), mask.to(device), starts, settings)
            segments = (Segment(name, each - self.offsets[name]) for each in sequences)
            decoded |= zip(group, segments, strict=True)
        return [decoded[row] for row in range(len(rows))]

    def _check(self, examples: Sequence[Example], output: Sequence[str], options: Mapping[str, Any]) -> None:
        check_named(options, self.modalities)
        check_given(examples, {name: each.vocab_size for name, each in self.modalities.items()})
        if isinstance(output, str) or not output:
            raise ValueError(f"output must be a list of names, as in output=['text'], not {output!r}")
        for name in output:
            if name not in self.modalities:
                raise ValueError(f"there is no modality {name!r}; they are {', '.join(self.modalities)}")
        for key in OF_ONE_VOCABULARY:
            if given(options, key) is not None:
                raise ValueError(f"{key} means tokens of one modality, but here all share one vocabulary")

    def _interleave(
        self, streams: Mapping[str, Mapping[str, Tensor]], key: str, length: int, fill: int
    ) -> Tensor:
        first = next(iter(streams.values()))["tokens"]
        row = torch.full((len(first), length + 1), fill, dtype=torch.long, device=first.device)
        for name, stream in streams.items():
            values = torch.where(stream[key] == IGNORE, IGNORE, stream[key] + self.offsets[name])
            row.scatter_(1, torch.where(stream["mask"], stream["times"], length), values)
        return row[:, :length]

    def _flatten(self, row: Example, begin: int) -> Tensor:
        timed = place_in_time(row)
        if len({time for _, time in timed}) < len(timed):
            raise ValueError(SIMULTANEOUS)
        pieces = [torch.as_tensor(segment.tokens) + self.offsets[segment.tower] for segment, _ in timed]
        return torch.cat([*pieces, torch.tensor([begin])])


def _with_new_rows(model: Any, new: list[int], train: str | PeftConfig) -> Any:
    """Make peft train the new tokens' rows in the embedding and, unless it is tied, in the head."""
    peft = require("peft", "lora")
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    tied = tables[1] is None or tables[0].weight is tables[1].weight
    names = [name for name, module in model.named_modules() if module in tables[: 1 if tied else 2]]
    if train == "new":
        return peft.get_peft_model(model, peft.TrainableTokensConfig(token_indices=new, target_modules=names))
    if not hasattr(train, "trainable_token_indices"):
        raise ValueError(f"train must be 'all', 'new' or a peft config as LoraConfig(), not {train!r}")
    config = copy.deepcopy(train)
    config.trainable_token_indices = dict.fromkeys(names, new)
    return peft.get_peft_model(model, config)


def _ties(model: nn.Module) -> dict[str, str]:
    """Return the first name of each parameter that has several, by the others."""
    names: dict[int, str] = {}
    each = model.named_parameters(remove_duplicate=False)
    firsts = {name: names.setdefault(id(parameter), name) for name, parameter in each}
    return {name: first for name, first in firsts.items() if name != first}


def _without_ties(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Keep tied weights once, as safetensors and so ``transformers.Trainer`` need them."""
    for name in _ties(module):
        state.pop(prefix + name, None)


def _with_ties(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, first in _ties(module).items():
        if prefix + first in state:
            state.setdefault(prefix + name, state[prefix + first])


class _Native:
    """The attributes of a tower that ``settle`` needs."""

    def __init__(self, model: Any, begin: int, end: tuple[int, ...]) -> None:
        self.native, self.begin, self.end = model, begin, end

    @property
    def device(self) -> torch.device:
        return execution_device(self.native)

    @property
    def max_length(self) -> int | None:
        return last_position(self.native)

    @property
    def pads_left(self) -> bool:
        return not why_not_faithful(self.native, length=LENGTH, padding=LENGTH - 1)


SIMULTANEOUS = "segments run at the same time, for which one row of tokens has no place; give them in turn"


def _check_one_at_a_time(streams: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Check that rows are not packed, and (on the CPU) that no two tokens of a row have the same time."""
    if any(EXAMPLES in stream for stream in streams.values()):
        raise ValueError("the batch is packed, for which one row has no place; leave out multitower.pack")
    times = torch.cat([stream["times"] for stream in streams.values()], 1)
    if times.device.type == "cpu":
        times = times.sort(1).values
        if ((times[:, 1:] == times[:, :-1]) & (times[:, 1:] >= 0)).any():
            raise ValueError(SIMULTANEOUS)
