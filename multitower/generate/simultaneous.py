"""Simultaneous decoding of several towers, one token of each per step, on their shared clock."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from ..batch.collate import Segment
from ..compile.schedule import Tap
from ..run.embed import bounded
from ..run.fusion import Fusion
from .options import OF_THE_BATCH, Options, Settings, is_by_tower
from .rows import Prompt
from .tap_cache import TapCache, TapReader

BESIDE_THE_CONFIG = (*OF_THE_BATCH, "stopping_criteria")
"""Arguments of ``generate``, not part of a ``GenerationConfig``, that work token by token."""


def check_stepwise(options: Options, settings: Mapping[str, Settings]) -> None:
    """Check that towers to decode simultaneously use greedy search or sampling."""
    if is_by_tower("max_new_tokens", options.get("max_new_tokens")):
        raise ValueError(
            "max_new_tokens: towers that are decoded at the same time share one limit; give a number"
        )
    for name, each in settings.items():
        others = sorted(set(each.options) - set(vars(each.config)) - set(BESIDE_THE_CONFIG))
        others += [key for key in ("prefill_chunk_size", "stop_strings") if each.get(key)]
        mode = each.config.get_generation_mode()
        others += [] if mode in ("greedy_search", "sample") else [mode.value]
        if others:
            raise ValueError(
                f"{', '.join(others)}: towers that are decoded at the same time advance token by token, "
                f"greedily or by sampling; decode {name!r} by itself, or change it, in this call or in "
                f"model.unimodal({name!r}).generation_config"
            )


class Lane:
    """One of the towers: its rows so far, and what transformers' ``generate`` prepared for decoding them.

    Ended rows are padded with the BOS token, because some logits processors ignore the mask. ``past`` is a
    cache of the first tokens of the prompts; decoding extends it.
    """

    def __init__(
        self,
        model: Fusion,
        cache: TapCache,
        prompt: Prompt,
        settings: Settings,
        limit: int,
        past: Any = None,
        notes: Collection[int] = (),
    ) -> None:
        self.name, tower = settings.name, model.tower(settings.name)
        self.tokens, self.prompt, self.starts = prompt.tokens, prompt.length, prompt.starts
        self.mask, self.padding = prompt.mask, settings.begin
        self.ended = torch.zeros(len(self.tokens), dtype=torch.bool, device=self.tokens.device)
        self.all_ended = self.finished = False
        self.reader = GrowingReader(model, self.name, cache, prompt, self, notes)
        self.decoder = bounded(tower.decoder(self.reader), self.name, tower)
        limits: dict[str, Any] = {"max_new_tokens": limit, "max_length": None}
        self.new = None if past is None else self.prompt - int(past.get_seq_length())
        limits |= {} if past is None else {"past_key_values": past}
        self.decoder.generate(
            self.tokens,
            attention_mask=self.mask.long(),
            **{**settings.options, **limits},
            custom_generate=self._prepare,
        )

    def _prepare(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **inputs: Any,
    ) -> Tensor:
        """Keep what ``generate`` passes to its decoding loop, which ``step`` replaces."""
        self.change_scores, self.stops, self.inputs = logits_processor, stopping_criteria, inputs
        self.samples = bool(generation_config.do_sample)
        return input_ids

    def step(self) -> None:
        """Decode one token of each row, as transformers' loop does; ended rows get padding.

        Only the ended row itself attends to this padding; ``mask`` hides it from others. One more step is
        made after all rows have ended, so that other towers can attend to their last tokens.
        """
        first = self.tokens.shape[1] == self.prompt
        new_alone = not first and self.inputs["use_cache"]
        inputs = self.decoder.prepare_inputs_for_generation(
            self.tokens,
            next_sequence_length=1 if new_alone else self.new,
            is_first_iteration=first,
            **self.inputs,
        )
        out = self.decoder(**inputs, return_dict=True)
        # Each model class updates its masks, positions and caches in its own way here.
        self.inputs = self.decoder._update_model_kwargs_for_generation(out, self.inputs)
        logits = out.logits[:, -1].to(copy=True, dtype=torch.float32, device=self.tokens.device)
        scores = self.change_scores(self.tokens, logits)
        best = scores.softmax(-1).multinomial(1)[:, 0] if self.samples else scores.argmax(-1)
        self.tokens = torch.cat([self.tokens, best.where(~self.ended, self.padding)[:, None]], 1)
        self.mask = torch.cat([self.mask, ~self.ended[:, None]], 1)
        self.ended = self.ended | self.stops(self.tokens, None)
        self.finished, self.all_ended = self.all_ended, bool(self.ended.all())

    def segments(self) -> list[Segment]:
        """Return each row's new segment."""
        rows = zip(self.tokens.cpu(), self.mask.cpu(), self.starts, strict=True)
        return [Segment(self.name, row[start:][mask[start:]]) for row, mask, start in rows]


class GrowingReader(TapReader):
    """A ``TapReader`` that also lets others read its tower, from the last token of the prompt on."""

    def __init__(
        self, model: Fusion, name: str, cache: TapCache, prompt: Prompt, lane: Lane, notes: Collection[int]
    ) -> None:
        super().__init__(model, name, cache, prompt.times, notes, prompt.places)
        self.lane, self.settled = lane, False
        self.readers: dict[int, list[Tap]] = {}
        for tap in cache.readers(name):
            self.readers.setdefault(tap.source_layer, []).append(tap)

    def update(self, layer: int, x: Tensor, positions: Tensor) -> Tensor:
        """Cache the states of new tokens for other towers, then run the taps on the current caches."""
        if layer == 0:
            self.reads = self.reads_now()
        last, length = self.lane.prompt - 1, self.lane.tokens.shape[1]
        start = max(last, length - x.shape[1])  # x is the states of the last tokens, of which these are new
        new = slice(start - length, None)
        for tap in self.readers.get(layer, []):
            stream = {**self.stream_of(positions[new]), "mask": self.lane.mask[:, new]}
            self.cache.grow(tap, x[:, new], stream, start - last)
        return super().update(layer, x, positions)


def decode_together(
    model: Fusion,
    cache: TapCache,
    prompts: Mapping[str, Prompt],
    settings: Mapping[str, Settings],
    pasts: Mapping[str, Any],
    notes: Mapping[str, Collection[int]],
) -> list[Lane]:
    """Decode several towers whose segments start at the same time.

    In each step, every tower predicts one token. It attends to the others' tokens of strictly earlier time,
    so the order of the towers does not matter.
    """
    limit = min(settings[name].limits(each.length)["max_new_tokens"] for name, each in prompts.items())
    lanes = [
        Lane(model, cache, prompt, settings[name], limit, pasts.get(name), notes.get(name, ()))
        for name, prompt in prompts.items()
    ]
    for _ in range(limit):
        for lane in lanes:
            if not lane.finished:
                lane.step()
        if all(lane.all_ended for lane in lanes):
            break
    return lanes
