"""Several towers decoded at the same time, a token of each a step, on the clock that they share."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..batch.collate import Segment
from ..compile.schedule import Tap
from ..run.fusion import Fusion
from ..run.room import bounded
from ..tower import Tower
from ..tower.decode_transformers import FOR_SPEED
from .options import as_ids, is_by_tower, setting
from .tap_cache import TapCache, TapReader

STEPWISE = (
    "bad_words_ids",
    "begin_suppress_tokens",
    "bos_token_id",
    "do_sample",
    "eos_token_id",
    "epsilon_cutoff",
    "eta_cutoff",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "logits_processor",
    "max_new_tokens",
    "min_length",
    "min_new_tokens",
    "min_p",
    "no_repeat_ngram_size",
    "remove_invalid_values",
    "renormalize_logits",
    "repetition_penalty",
    "sequence_bias",
    "suppress_tokens",
    "temperature",
    "top_h",
    "top_k",
    "top_p",
    "typical_p",
    "use_cache",
)
"""Options of ``generate`` that mean the same token by token."""

ONLY_ALONE = {
    "constraints": None,
    "dola_layers": None,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1,
    "exponential_decay_length_penalty": None,
    "force_words_ids": None,
    "max_time": None,
    "num_beams": 1,
    "num_return_sequences": 1,
    "penalty_alpha": None,
    "stop_strings": None,
    "watermarking_config": None,
}
"""Settings of a tower itself that have no meaning token by token, with what turns them off."""


def check_stepwise(options: Mapping[str, Any], towers: Mapping[str, Tower]) -> None:
    """Check that all options make sense for towers that are decoded together, and what they set themselves.

    Raises:
        ValueError: Some need a tower to be decoded by itself.
    """
    others = sorted(set(options) - set(STEPWISE))
    if others:
        raise ValueError(
            f"{', '.join(others)}: towers that are decoded at the same time advance token by token, for "
            f"which only {', '.join(STEPWISE)} have a meaning; decode one tower at a time, or leave it out"
        )
    if is_by_tower("max_new_tokens", options.get("max_new_tokens")):
        raise ValueError(
            "max_new_tokens: towers that are decoded at the same time share one limit; give a number"
        )
    for name, tower in towers.items():
        for key, neutral in ONLY_ALONE.items():
            value = setting(tower, {}, key)
            if value not in (None, False, neutral):
                raise ValueError(
                    f"tower {name!r} has {key}={value!r} in its generation_config, which has no meaning "
                    "where towers are decoded at the same time, token by token; decode it by itself, or set "
                    f"model.unimodal({name!r}).generation_config.{key} = {neutral}"
                )


class Lane:
    """One of the towers: its rows so far, and transformers' generate for one more token of each.

    Args:
        model: The model.
        name: The tower.
        cache: What its taps and those of the others read.
        tokens: The prompts, int64, shape (batch, length), padded on the left, the begin token last. Some
            processors of scores see no mask, so padding is by a token of the row: the begin token.
        times: When they stand, -1 at padding.
        options: Options of ``generate`` for this tower, those in ``STEPWISE``.
        limit: How many tokens each row may get.
    """

    def __init__(
        self,
        model: Fusion,
        name: str,
        cache: TapCache,
        tokens: Tensor,
        times: Tensor,
        options: Mapping[str, Any],
        limit: int,
    ) -> None:
        tower = model.tower(name)
        self.name, self.tower, self.options, self.limit = name, tower, options, limit
        self.ends = as_ids(options["eos_token_id"]) if "eos_token_id" in options else tower.end
        self.tokens, self.prompt = tokens.to(tower.device), tokens.shape[1]
        self.mask = (times >= 0).long().to(tower.device)
        self.attended = self.mask
        self.end_tokens = torch.tensor(self.ends, dtype=torch.long, device=tower.device)
        self.ended = torch.zeros(len(tokens), dtype=torch.bool, device=tower.device)
        self.reader = GrowingReader(model, name, cache, times.to(tower.device), self)
        self.decoder = bounded(tower.decoder(self.reader), name, tower)
        self.past: Any = None
        self.all_ended = self.finished = False

    def step(self) -> None:
        """Decode one more token of each row; rows that have ended get padding.

        The row itself may attend to that, for it comes last; no other reads it, as ``mask`` says. One step
        more is made after the last row has ended, so that others can read how it did.
        """
        past = {} if self.past is None else {"past_key_values": self.past}
        padding = self.ends[0] if self.ends else 0
        decoded = self.decoder.generate(
            self.tokens,
            attention_mask=self.attended,
            **{
                **self.options,
                **self._of_this_step(),
                **dict.fromkeys(FOR_SPEED),
                "eos_token_id": list(self.ends) or None,
                "max_new_tokens": 1,
                "pad_token_id": padding,
                "return_dict_in_generate": True,
            },
            **past,
        )
        self.past = _reusable(decoded, self.tokens.shape[1])
        alive = ~self.ended
        new = torch.where(alive, decoded.sequences[:, -1], padding)
        self.tokens = torch.cat([self.tokens, new[:, None]], 1)
        self.mask = torch.cat([self.mask, alive[:, None].long()], 1)
        self.attended = torch.cat([self.attended, torch.ones_like(new[:, None])], 1)
        self.ended = self.ended | torch.isin(new, self.end_tokens)
        self.finished, self.all_ended = self.all_ended, bool(self.ended.all())

    def _of_this_step(self) -> dict[str, Any]:
        """Return what holds for some steps alone, the first, the last or a number of them."""
        told = partial(setting, self.tower, self.options)
        length = self.tokens.shape[1]
        new = length - self.prompt
        # As transformers has it, a forced first token of a row is no place for what is suppressed.
        first = int(self.prompt == 1 and told("forced_bos_token_id") is not None)
        more = new < (told("min_new_tokens") or 0) or length < (told("min_length") or 0)
        return {
            "begin_suppress_tokens": told("begin_suppress_tokens") if new == first else None,
            "forced_eos_token_id": told("forced_eos_token_id") if new == self.limit - 1 else None,
            "min_length": 0,
            "min_new_tokens": 1 if more else None,
        }

    def segments(self) -> list[Segment]:
        """Return what was decoded for each row, from its begin token on."""
        rows = self.tokens[:, self.prompt - 1 : self.prompt + self.limit].cpu()
        real = self.mask[:, self.prompt - 1 : self.prompt + self.limit].bool().cpu()
        return [Segment(self.name, row[mask]) for row, mask in zip(rows, real, strict=True)]


class GrowingReader(TapReader):
    """A ``TapReader`` that also lets others read the tower, from its begin token on."""

    def __init__(self, model: Fusion, name: str, cache: TapCache, times: Tensor, lane: Lane) -> None:
        super().__init__(model, name, cache, times)
        self.lane, self.settled = lane, False
        self.readers: dict[int, list[Tap]] = {}
        for tap in cache.readers(name):
            self.readers.setdefault(tap.source_layer, []).append(tap)

    def update(self, layer: int, x: Tensor, positions: Tensor) -> Tensor:
        """Note what the layer gave for new tokens; then as ``TapReader``, with what there is by now."""
        if layer == 0:
            self.reads = self.reads_now()
        begin, length = self.lane.prompt - 1, self.lane.tokens.shape[1]
        start = max(begin, length - x.shape[1])  # x is the states of the last tokens, of which these are new
        new = slice(start - length, None)
        for tap in self.readers.get(layer, []):
            stream = {"times": self.times_of(positions[new]), "mask": self.lane.mask[:, new].bool()}
            self.cache.grow(tap, x[:, new], stream, start - begin)
        return super().update(layer, x, positions)


def decode_together(
    model: Fusion,
    cache: TapCache,
    prompts: Mapping[str, tuple[Tensor, Tensor]],
    options: Mapping[str, Mapping[str, Any]],
    limit: int,
) -> list[tuple[Segment, ...]]:
    """Decode several towers, all of which begin at the same time.

    At each step every tower takes a token, having read of the others what they gave before: a token never
    sees those of the same time, so that the order of the towers cannot matter.

    Args:
        model: The model.
        cache: What was given before; it grows.
        prompts: For each tower its tokens so far and their times, as ``Lane`` takes them.
        options: For each tower the options of ``generate``, those in ``STEPWISE``.
        limit: How many tokens each may get.

    Returns:
        For each row a tuple of segments, in the order of ``prompts``.
    """
    lanes = [
        Lane(model, name, cache, tokens, times, options[name], limit)
        for name, (tokens, times) in prompts.items()
    ]
    for _ in range(limit):
        for lane in lanes:
            if not lane.finished:
                lane.step()
        if all(lane.all_ended for lane in lanes):
            break
    return list(zip(*(lane.segments() for lane in lanes), strict=True))


def _reusable(decoded: Any, length: int) -> Any:
    """Return the cache that a step left, if a next one can go on from it."""
    past = getattr(decoded, "past_key_values", None)
    try:
        return past if past is not None and int(past.get_seq_length()) == length else None
    except (AttributeError, ValueError, TypeError):
        return None
