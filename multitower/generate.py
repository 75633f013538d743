"""Decoding by transformers' own generate.

The other towers run once over what is given; each tap into the decoded tower keeps their keys and values.
Then a copy of that tower, whose layers are followed by the taps, is to transformers an ordinary causal LM.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .link import KeysValues, visibility
from .options import begin_token, check_options, filled, given, groups
from .schedule import Tap
from .stream import Example, Segment, Stream, make_streams, place_in_time

if TYPE_CHECKING:
    from .fused import FusedModel

MAX_NEW_TOKENS = 1024
"""How long a segment may grow when neither the caller nor the tower says so."""


@torch.no_grad()
def generate(
    model: FusedModel, examples: Sequence[Example], output: Sequence[str], options: Mapping[str, Any]
) -> list[list[Segment]]:
    """Decode one segment for each tower in ``output``; see ``FusedModel.generate``.

    Raises:
        ValueError: Nothing is to be decoded, a tower is unknown or has no begin token, an example holds
            a target, or an option cannot be passed on.
    """
    _check(model, examples, output, options)
    rows = [list(example) for example in examples]
    decoded: list[list[Segment]] = []
    training = model.training
    model.eval()
    try:
        for name in output:
            segments = _decode_segments(model, rows, name, options)
            before = decoded or [[] for _ in segments]
            decoded = [[*row, segment] for row, segment in zip(before, segments, strict=True)]
            if name != output[-1]:
                rows = [[*row, segment] for row, segment in zip(rows, segments, strict=True)]
    finally:
        model.train(training)
    return decoded


def _decode_segments(
    model: FusedModel, rows: Sequence[Example], name: str, options: Mapping[str, Any]
) -> list[Segment]:
    """Decode rows, together where that does not change what each becomes."""
    tower = model.tower(name)
    begin = begin_token(tower, options)
    assert begin is not None
    prompts = [_prompt(row, name, begin) for row in rows]
    decoded: dict[int, list[Segment]] = {}
    for group in groups(tower, [len(tokens) for tokens, _ in prompts], options):
        times = pad_left([prompts[row][1] for row in group], -1).to(tower.device)
        reader = _TapReader(model, name, make_streams([rows[row] for row in group]), times)
        sequences = decode_rows(
            tower.decoder(reader),
            [prompts[row][0] for row in group],
            begin=begin,
            end=tower.end,
            options=options,
        )
        copies = len(sequences) // len(group)
        for number, row in enumerate(group):
            own = sequences[number * copies : (number + 1) * copies]
            decoded[row] = [Segment(name, sequence) for sequence in own]
    return [segment for row in range(len(rows)) for segment in decoded[row]]


def decode_rows(
    decoder: Any, prompts: Sequence[Tensor], *, begin: int, end: Sequence[int], options: Mapping[str, Any]
) -> list[Tensor]:
    """Let transformers decode after prompts of unlike length.

    Args:
        decoder: A causal LM with ``generate``.
        prompts: int64, each of shape (length,), the last token being the begin token of the new segment.
        begin: That token.
        end: The tokens that may end the segment.
        options: Options of ``generate``; they win over what is set here.

    Returns:
        Each new segment on the CPU, from its begin token to its end token if it was reached.
    """
    tokens = pad_left(prompts, begin)
    mask = pad_left([torch.ones_like(prompt) for prompt in prompts], 0)
    length = tokens.shape[1]
    settings = filled(
        options,
        {
            "bos_token_id": begin,
            "eos_token_id": list(end) or None,
            "pad_token_id": end[0] if end else begin,
            "return_dict_in_generate": False,
            **_length_limit(decoder, options, length),
        },
    )
    sequences = decoder.generate(
        tokens.to(decoder.device), attention_mask=mask.to(decoder.device), **settings
    )
    ends = _as_ids(given(settings, "eos_token_id"))
    return [_until_end(sequence[length - 1 :].cpu(), ends) for sequence in sequences]


class _TapReader:
    """What one tower reads of the others while it is decoded: called after each of its layers."""

    def __init__(
        self, model: FusedModel, name: str, streams: Mapping[str, Stream], prompt_times: Tensor
    ) -> None:
        self.model, self.name = model, name
        self.prompt_times = prompt_times
        self.taps: dict[int, list[Tap]] = {}
        self.keys: dict[str, tuple[Tensor, Tensor]] = {}
        self.sources: dict[Tap, KeysValues] = {}
        device = prompt_times.device
        sources = {
            key: {
                part: value.to(model.tower(key).device) for part, value in stream.items() if part != "labels"
            }
            for key, stream in streams.items()
        }
        if not sources:
            return
        given = model.run(sources).given
        for tap in model.schedule.taps:
            if tap.target == name and tap.source in sources:
                stream = sources[tap.source]
                self.taps.setdefault(tap.target_layer, []).append(tap)
                self.sources[tap] = model.tap(tap).read(given[tap.source, tap.source_layer], stream["times"])
                self.keys[tap.source] = (stream["times"].to(device), stream["mask"].to(device))

    def __call__(self, layer: int, x: Tensor, positions: Tensor) -> Tensor:
        if layer == 0:
            return self.model.adapt(self.name, x)
        if layer not in self.taps:
            return x
        self._expand(len(x))
        query_times = self._times(positions)
        update = torch.zeros_like(x)
        for tap in self.taps[layer]:
            seen = visibility(query_times, *self.keys[tap.source], self.model.graph.links[tap.link].window)
            update = update + self.model.tap(tap)(x, query_times, self.sources[tap], seen)
        return x + update

    def _times(self, positions: Tensor) -> Tensor:
        """Give the times of these tokens: those of the prompt are known, later ones follow one by one."""
        positions = positions.to(self.prompt_times.device)
        known = positions.clamp(max=self.prompt_times.shape[1] - 1)
        return self.prompt_times[:, known] + (positions - known)

    def _expand(self, rows: int) -> None:
        """Repeat what was read once for each beam or returned sequence; they need no reordering."""
        times, rest = divmod(rows, len(self.prompt_times))
        if rest or not times:
            raise ValueError(
                f"{rows} rows are decoded where {len(self.prompt_times)} were prepared; a decoding loop must "
                "keep all rows until the last has ended"
            )
        if times > 1:
            self.prompt_times = self.prompt_times.repeat_interleave(times, 0)
            self.keys = {
                name: (key_times.repeat_interleave(times, 0), mask.repeat_interleave(times, 0))
                for name, (key_times, mask) in self.keys.items()
            }
            self.sources = {
                tap: KeysValues(*(part.repeat_interleave(times, 0) for part in source))
                for tap, source in self.sources.items()
            }


def _check(
    model: FusedModel, examples: Sequence[Example], output: Sequence[str], options: Mapping[str, Any]
) -> None:
    if isinstance(output, str) or not output:
        raise ValueError(f"output must be a list of towers to decode, as in output=['text'], not {output!r}")
    if len(examples) == 0:
        raise ValueError("there are no examples to decode from")
    given = [
        [segment for segment, _ in place_in_time(example, number)] for number, example in enumerate(examples)
    ]
    for name in [*output, *(segment.tower for example in given for segment in example)]:
        if name not in model.towers:
            raise ValueError(f"there is no tower {name!r}; the towers are {', '.join(model.towers)}")
    for number, example in enumerate(given):
        if any(segment.target for segment in example):
            raise ValueError(
                f"example {number} holds a target segment: give generate only what is known, without answers"
            )
    check_options(options, {name: model.tower(name) for name in output}, len(examples))


def _prompt(row: Example, name: str, begin: int) -> tuple[Tensor, Tensor]:
    """Give the tokens of one row's earlier segments of the tower, then the begin token, and their times."""
    timed = place_in_time([*row, Segment(name, [begin])])
    own = [(torch.as_tensor(segment.tokens), time) for segment, time in timed if segment.tower == name]
    times = [torch.arange(time, time + len(tokens)) for tokens, time in own]
    return torch.cat([tokens for tokens, _ in own]), torch.cat(times)


def pad_left(rows: Sequence[Tensor], value: int) -> Tensor:
    """Stack rows of shape (length,), padded on the left.

    >>> pad_left([torch.tensor([1, 2]), torch.tensor([3])], 0).tolist()
    [[1, 2], [0, 3]]
    """
    return pad_sequence(list(rows), batch_first=True, padding_value=value, padding_side="left")


def _until_end(tokens: Tensor, end: Sequence[int]) -> Tensor:
    """Cut a segment after its first end token; the begin token at its front may be the same id."""
    is_end = torch.isin(tokens[1:], torch.tensor(end, dtype=tokens.dtype))
    return tokens[: int(is_end.int().argmax()) + 2] if bool(is_end.any()) else tokens


def _as_ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def _length_limit(decoder: Any, options: Mapping[str, Any], prompt: int) -> dict[str, int]:
    """Say how long the segment may grow, where nobody else does."""
    for key in ("max_new_tokens", "max_length"):
        if given(options, key) is not None or getattr(decoder.generation_config, key) is not None:
            return {}
    config = decoder.config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None) or -1
    room = limit - prompt if limit > 0 else MAX_NEW_TOKENS
    return {"max_new_tokens": max(1, min(MAX_NEW_TOKENS, room))}
