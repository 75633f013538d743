"""Options of transformers' ``generate``: resolved per tower, and refused where they make no sense.

An option may be a mapping from tower names to values.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..base.extras import require

Options = Mapping[str, Any]

MAX_NEW_TOKENS = 1024
"""Limit of new tokens per segment if neither the caller nor the tower sets one."""

RESERVED = (
    "input_ids",
    "inputs",
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "decoder_input_ids",
)
"""Arguments that are derived from the examples."""

NO_SCORES = (
    "generate gives segments of tokens; score them with "
    "model(**multitower.collate([[*example, segment]])).logits"
)
RETURNED = {
    "return_dict_in_generate": NO_SCORES,
    "output_scores": NO_SCORES,
    "output_logits": NO_SCORES,
    "output_hidden_states": "generate gives segments of tokens; model.run gives the states of a batch",
    "output_attentions": "generate gives segments of tokens; model(..., output_attentions=True) gives the "
    "attention of the links",
}
"""Outputs of ``generate`` besides tokens, and how to get them instead. A tower's own setting is ignored."""

ANOTHER_PROMPT = "it runs the tower on a prompt of its own, outside of the fusion; leave it out"
UNSUPPORTED = {
    "guidance_scale": ANOTHER_PROMPT,
    "negative_prompt_ids": ANOTHER_PROMPT,
    "assistant_early_exit": "it takes layers from the tower while it decodes, and where that fails leaves "
    "them out for good; take prompt_lookup_num_tokens or assistant_model",
    "token_healing": "it rewrites the last token of the prompt, here the one that begins the segment; heal "
    "the tokens before they become a multitower.Segment",
}
"""Options that never work, and what to do instead."""

OF_ONE_VOCABULARY = (
    "assistant_model",
    "bad_words_ids",
    "begin_suppress_tokens",
    "bos_token_id",
    "eos_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "pad_token_id",
    "sequence_bias",
    "stop_strings",
    "streamer",
    "suppress_tokens",
    "tokenizer",
)
"""Options that depend on one tower's vocabulary or tokenizer."""

MAPPINGS = ("cache_config", "watermarking_config")
"""Options whose value is itself a mapping."""

STOPS = ("stopping_criteria", "stop_strings")
"""Options that end a row without an EOS token: in a batch, the row's end could not be found."""

OF_THE_BATCH = ("logits_processor", "prefix_allowed_tokens_fn")
"""Functions that may depend on a row's index in the batch."""

OF_THE_WHOLE_ROW = (
    "bad_words_ids",
    "encoder_no_repeat_ngram_size",
    "min_length",
    "no_repeat_ngram_size",
    "sequence_bias",
    "watermarking_config",
)
"""Options that treat left padding as part of the row, as ``forced_bos_token_id`` does."""


@dataclass(frozen=True)
class Settings:
    """The resolved options for decoding one tower; see ``settle``.

    Attributes:
        name: The tower's name.
        tower: The tower, or an object with its ``native``, ``begin``, ``end``, ``device``, ``max_length`` and
            ``pads_left``.
        options: Keyword arguments for ``generate``.
        config: The ``GenerationConfig`` that results from these options and the tower's own config.
        continues: Whether to continue a segment that has not ended, instead of starting a new one.
    """

    name: str
    tower: Any
    options: Options
    config: Any
    continues: bool = False

    def get(self, key: str) -> Any:
        """Return an option, whether it is part of the config or not."""
        return getattr(self.config, key, self.options.get(key))

    @property
    def begin(self) -> int:
        """The BOS token, which starts a segment."""
        if self.config.bos_token_id is None:
            raise ValueError(
                f"tower {self.name!r} has no begin token to start a segment with; set "
                f"model.unimodal({self.name!r}).generation_config.bos_token_id, or pass bos_token_id=..."
            )
        return int(self.config.bos_token_id)

    @property
    def ends(self) -> list[int]:
        """The EOS tokens; the config may hold integers or a tensor."""
        ends = self.config.eos_token_id
        return [] if ends is None else [int(each) for each in torch.as_tensor(ends).reshape(-1)]

    def limits(self, prompt: int) -> dict[str, Any]:
        """Return the length limits for a segment that follows a prompt of this length."""
        most, whole, last = self.config.max_new_tokens, self.config.max_length, self.tower.max_length
        if most is None and whole is not None:
            most = whole - prompt
            if most < 1:
                raise ValueError(
                    f"tower {self.name!r} has max_length={whole}, and {prompt} tokens already; pass "
                    "max_new_tokens"
                )
        if most is None:
            most = MAX_NEW_TOKENS if last is None else max(1, min(MAX_NEW_TOKENS, last - prompt))
        return {"max_new_tokens": most, "max_length": None}

    def keys(self, lengths: Sequence[int]) -> Sequence[int]:
        """Return a key for each row by the lengths of the prompts; equal keys are decoded together."""
        if any(self.get(key) for key in STOPS):
            return range(len(lengths))
        alike = len(set(lengths)) == 1 or self._alike_when_padded(max(lengths))
        return [0] * len(lengths) if alike else lengths

    def _alike_when_padded(self, longest: int) -> bool:
        limited, last = self.config.max_new_tokens is not None, self.tower.max_length
        counted = [self.get(key) for key in OF_THE_WHOLE_ROW]
        if any(counted) or self.config.forced_bos_token_id is not None:
            return False
        if self.config.max_length and not limited:
            return False
        return (limited or last is None or longest + MAX_NEW_TOKENS <= last) and bool(self.tower.pads_left)


def settle(name: str, tower: Any, options: Options) -> Settings:
    """Resolve the options for one tower: the caller's, then the tower's own, then transformers' defaults.

    >>> from multitower.testing import tiny_tower
    >>> settings = settle("text", tiny_tower(), {"do_sample": True, "max_new_tokens": {"text": 40}})
    >>> settings.options["do_sample"], settings.config.max_new_tokens, settings.begin
    (True, 40, 1)
    """
    own = getattr(tower.native, "generation_config", None)
    config = require("transformers", "transformers").GenerationConfig() if own is None else copy.deepcopy(own)
    for key in RETURNED:
        setattr(config, key, None)
    asked = options_of(name, options)
    for key in RESERVED:
        if key in asked:
            raise ValueError(f"{key} comes from the examples; put tokens into multitower.Segment instead")
    if asked.get("bos_token_id", 0) is None:
        del asked["bos_token_id"]
    ends = list(tower.end)
    asked = {
        "bos_token_id": tower.begin,
        "eos_token_id": ends or None,
        "pad_token_id": ends[0] if ends else tower.begin,
        "return_dict_in_generate": False,
        **asked,
    }
    config.update(**asked)
    settings = Settings(name, tower, asked, config)
    for key, reason in (RETURNED | UNSUPPORTED).items():
        value = settings.get(key)
        if value is not None and value is not False and (key, value) != ("guidance_scale", 1):
            raise ValueError(
                f"{key} is not supported: {reason} (tower {name!r} has {key}={value!r}, from this call or "
                "from the generation_config of its model)"
            )
    if config.cache_implementation == "paged":
        raise ValueError(
            "cache_implementation='paged' is not supported: it puts all rows into one, and the links "
            "could not tell them apart; take 'dynamic' or 'static'"
        )
    return settings


def groups(lengths: Sequence[tuple[Settings, Sequence[int]]]) -> list[list[int]]:
    """Group the rows that can be decoded together with the same result as each alone.

    >>> from multitower.testing import tiny_tower
    >>> plain, counting = (settle("text", tiny_tower(), {"no_repeat_ngram_size": size}) for size in (0, 2))
    >>> groups([(plain, [5, 2, 5])]), groups([(counting, [5, 2, 5])])
    ([[0, 1, 2]], [[1], [0, 2]])
    """
    keys = list(zip(*(settings.keys(each) for settings, each in lengths), strict=True))
    together = [[row for row, key in enumerate(keys) if key == each] for each in sorted(set(keys))]
    for settings, _ in lengths:
        check_batches(len(together), settings.options)
    return together


def check_single(settings: Settings, instead: str) -> None:
    """Check that each row has one result; ``instead`` says how to get several."""
    count = settings.config.num_return_sequences or 1
    if count > 1:
        raise ValueError(
            f"num_return_sequences={count} is not supported here (tower {settings.name!r}; from this call or "
            f"from the generation_config of its model): {instead}"
        )


def check_batches(count: int, options: Options) -> None:
    """Check that no option depends on the whole batch if decoding is split into several batches."""
    for key in OF_THE_BATCH:
        if count > 1 and options.get(key):
            raise ValueError(
                f"{key} would see these examples in {count} batches, since together they are not "
                "decoded as each is alone; call generate once for each"
            )


def check_shared(options: Options, names: Collection[str]) -> None:
    """Check that several towers do not share an option that refers to one tower's tokens."""
    for key in OF_ONE_VOCABULARY:
        value = given(options, key)
        if len(names) > 1 and value is not None and not is_by_tower(key, value):
            raise ValueError(
                f"{key} means tokens of one tower; decode {' and '.join(names)} by a call for each, or give "
                f"each its own: {key}={{{next(iter(names))!r}: ...}}"
            )


def check_named(options: Options, towers: Collection[str]) -> None:
    """Check that options given by tower refer to existing towers."""
    for key, value in options.items():
        for name in value if is_by_tower(key, value) else ():
            if name not in towers:
                raise ValueError(
                    f"{key}={{{name!r}: ...}}: there is no such tower; they are {', '.join(towers)}"
                )


def is_by_tower(key: str, value: Any) -> bool:
    """Whether an option's value is a mapping from tower names to values.

    >>> is_by_tower("max_new_tokens", {"text": 40, "speech": 400})
    True
    >>> is_by_tower("sequence_bias", {(3, 4): -10.0})
    False
    """
    named = isinstance(value, Mapping) and all(isinstance(name, str) for name in value)
    return named and key not in MAPPINGS


def options_of(name: str, options: Options) -> dict[str, Any]:
    """Return the options for one tower, including those of a ``generation_config``.

    >>> options_of("text", {"do_sample": True, "max_new_tokens": {"text": 40}, "top_k": {"speech": 9}})
    {'do_sample': True, 'max_new_tokens': 40}
    """
    own: dict[str, Any] = {}
    for key, value in options.items():
        if not is_by_tower(key, value):
            own[key] = value
        elif name in value:
            own[key] = value[name]
    config = own.pop("generation_config", None)
    known = () if config is None else vars(type(config)())
    return {key: value for key in known if (value := getattr(config, key)) is not None} | own


def given(options: Options, key: str) -> Any:
    """Return an option of the caller's, also from a ``generation_config``; None if it is not set."""
    return options[key] if key in options else getattr(options.get("generation_config"), key, None)
