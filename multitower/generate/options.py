"""The options of transformers' ``generate``: who sets them, and which of them a fused model refuses.

An option may also be a mapping: from the names of towers to what each of them takes.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any, Protocol

import torch

from ..tower import Tower

Options = Mapping[str, Any]


class Decodable(Protocol):
    """What options are asked against: a tower, or whatever decodes as one."""

    @property
    def native(self) -> Any:
        """What may have a ``generation_config``."""

    @property
    def max_length(self) -> int | None:
        """How many tokens a row may have."""

    @property
    def pads_left(self) -> bool:
        """Whether rows with padding on the left decode as they do alone."""


RESERVED = (
    "input_ids",
    "inputs",
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "decoder_input_ids",
)
"""Options that say what the examples say."""

NO_SCORES = (
    "generate gives segments of tokens; score them with "
    "model(**multitower.collate([[*example, segment]])).logits"
)
ANOTHER_PROMPT = "it runs the tower on a prompt of its own, outside of the fusion; leave it out"
UNSUPPORTED = {
    "return_dict_in_generate": NO_SCORES,
    "output_scores": NO_SCORES,
    "output_logits": NO_SCORES,
    "output_hidden_states": "generate gives segments of tokens; model.run gives the states of a batch",
    "output_attentions": "generate gives segments of tokens; model(..., output_attentions=True) gives the "
    "attention of the links",
    "guidance_scale": ANOTHER_PROMPT,
    "negative_prompt_ids": ANOTHER_PROMPT,
    "assistant_early_exit": "it takes layers from the tower while it decodes, and where that fails leaves "
    "them out for good; take prompt_lookup_num_tokens or assistant_model",
    "token_healing": "it rewrites the last token of the prompt, here the one that begins the segment; heal "
    "the tokens before they become a multitower.Segment",
}
"""Options that cannot work, and what to do instead."""

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
"""Options that mean the tokens of one tower."""

MAPPINGS = ("cache_config", "watermarking_config")
"""Options that are mappings by themselves."""

STOPS = ("stopping_criteria", "stop_strings")
"""Options that end a row without an end token: in a batch nothing says where it ended."""


def check_options(options: Options, towers: Mapping[str, Tower], examples: int) -> None:
    """Check the options of a call.

    Args:
        options: The options.
        towers: The towers to decode, by name.
        examples: How many examples there are.

    Raises:
        ValueError: An option cannot work, or cannot work with these towers or examples.
    """
    for key in OF_ONE_VOCABULARY:
        value = given(options, key)
        if len(towers) > 1 and value is not None and not is_by_tower(key, value):
            raise ValueError(
                f"{key} means tokens of one tower; decode {' and '.join(towers)} by a call for each, or give "
                f"each its own: {key}={{{next(iter(towers))!r}: ...}}"
            )
    for name, tower in towers.items():
        own = options_of(name, options)
        check_supported(own)
        check_own(own, tower, f"model.unimodal({name!r})")
        if setting(tower, own, "cache_implementation") == "paged":
            raise ValueError(
                "cache_implementation='paged' is not supported: it puts all rows into one, and the links "
                "could not tell them apart; take 'dynamic' or 'static'"
            )
        if own.get("streamer") is not None and examples > 1:
            raise ValueError("a streamer follows one row; call generate for one example at a time")
        _check_begin(name, tower, begin_token(tower, own))
        if (setting(tower, own, "num_return_sequences") or 1) > 1:
            if len(towers) > 1:
                raise ValueError(
                    "num_return_sequences > 1 needs a single output tower; decode the next from these"
                )
            if any(setting(tower, own, key) for key in STOPS):
                raise ValueError(
                    f"num_return_sequences > 1 with {' or '.join(STOPS)}: nothing says where each of them "
                    "stopped; call generate once for each"
                )


def check_supported(options: Options) -> None:
    """Check that options neither repeat what examples say nor ask for what cannot be given.

    Raises:
        ValueError: One does.
    """
    for key in RESERVED:
        if key in options:
            raise ValueError(f"{key} comes from the examples; put tokens into multitower.Segment instead")
    for key, reason in UNSUPPORTED.items():
        if _is_on(key, given(options, key)):
            raise ValueError(f"{key} is not supported: {reason}")


def check_own(options: Options, tower: Decodable, where: str) -> None:
    """Check that a tower has set nothing for itself that cannot work.

    Args:
        options: The caller's options, which win.
        tower: The tower.
        where: What to call its model.

    Raises:
        ValueError: It does.
    """
    for key in ("assistant_early_exit", "guidance_scale", "token_healing"):
        value = setting(tower, options, key)
        if _is_on(key, value):
            raise ValueError(
                f"{where}.generation_config has {key}={value!r}, which is not supported: {UNSUPPORTED[key]}; "
                "or set it to None there"
            )


def _is_on(key: str, value: Any) -> bool:
    return value is not None and value is not False and not (key == "guidance_scale" and value == 1)


def check_named(options: Options, towers: Collection[str]) -> None:
    """Check that options by tower name towers.

    Raises:
        ValueError: There is no tower of a name.
    """
    for key, value in options.items():
        for name in value if is_by_tower(key, value) else ():
            if name not in towers:
                raise ValueError(
                    f"{key}={{{name!r}: ...}}: there is no such tower; they are {', '.join(towers)}"
                )


def is_by_tower(key: str, value: Any) -> bool:
    """Whether a value is a mapping that gives each tower its own.

    >>> is_by_tower("max_new_tokens", {"text": 40, "speech": 400})
    True
    >>> is_by_tower("sequence_bias", {(3, 4): -10.0})
    False
    """
    named = isinstance(value, Mapping) and all(isinstance(name, str) for name in value)
    return named and key not in MAPPINGS


def options_of(name: str, options: Options) -> dict[str, Any]:
    """Return the options for one tower.

    >>> options_of("text", {"do_sample": True, "max_new_tokens": {"text": 40}, "top_k": {"speech": 9}})
    {'do_sample': True, 'max_new_tokens': 40}

    The tower's own stand in a copy of a ``generation_config``, for transformers does not want them beside it.
    """
    shared = {key: value for key, value in options.items() if not is_by_tower(key, value)}
    own = {key: value[name] for key, value in options.items() if is_by_tower(key, value) and name in value}
    config = (shared | own).get("generation_config")
    if config is None or not own:
        return shared | own
    config = copy.deepcopy(config)
    for key in [key for key in own if hasattr(config, key)]:
        setattr(config, key, own.pop(key))
    return shared | own | {"generation_config": config}


def _check_begin(name: str, tower: Tower, begin: int | None) -> None:
    if begin is None:
        raise ValueError(
            f"tower {name!r} has no begin token to start a segment with; set "
            f"model.unimodal({name!r}).generation_config.bos_token_id, or pass bos_token_id=..."
        )
    if not 0 <= begin < tower.vocab_size:
        raise ValueError(
            f"the begin token {begin} is outside the vocabulary of {tower.vocab_size} of tower {name!r}"
        )


def given(options: Options, key: str) -> Any:
    """Return an option, by itself or in the caller's ``generation_config``; None where there is none.

    >>> given({"num_beams": 4}, "num_beams"), given({}, "num_beams")
    (4, None)
    """
    return options[key] if key in options else getattr(options.get("generation_config"), key, None)


def setting(tower: Decodable, options: Options, key: str) -> Any:
    """Return an option as ``generate`` will take it: the caller's, or else the tower's own."""
    value = given(options, key)
    own = getattr(tower.native, "generation_config", None)
    return getattr(own, key, None) if value is None and key not in options else value


def begin_token(tower: Tower, options: Options) -> int | None:
    """Return the token that opens a segment: the caller's, or else the tower's."""
    begin = given(options, "bos_token_id")
    return tower.begin if begin is None else int(begin)


def as_ids(value: Any) -> tuple[int, ...]:
    """Return the ids that an option names, by integers of any kind or a tensor.

    >>> as_ids(None), as_ids(3), as_ids([3, 4]), as_ids(torch.tensor(3))
    ((), (3,), (3, 4), (3,))
    """
    return () if value is None else tuple(map(int, torch.as_tensor(value).reshape(-1).tolist()))


def filled(options: Options, defaults: Options) -> dict[str, Any]:
    """Add what the caller left open; transformers does not want options beside a ``generation_config``.

    >>> filled({"num_beams": 4}, {"num_beams": 1, "pad_token_id": 0})
    {'num_beams': 4, 'pad_token_id': 0}
    """
    if options.get("generation_config") is None:
        return {**defaults, **options}
    config = copy.deepcopy(options["generation_config"])
    for key, value in defaults.items():
        if key not in options and getattr(config, key, None) is None:
            setattr(config, key, value)
    return {**options, "generation_config": config}
