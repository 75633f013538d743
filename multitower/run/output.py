"""The output of a fused model's forward, and its losses."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..base.logs import warn_once
from ..batch.collate import IGNORE, Streams, values_at_hand
from ..compile.schedule import Layer
from ..tower import Tower
from .request import may_have_labels


class FusedOutput(NamedTuple):
    """The output of a forward.

    Attributes:
        loss: The sum of ``losses``, a scalar; None if no stream has labels.
        losses: For each tower with labels, the mean cross-entropy over its labels (0 without any), a scalar;
            or their sum divided by the tower's ``num_items_in_batch``.
        logits: For each tower in the batch, shape (batch, length of its stream, its vocabulary), except
            towers whose cached states are in the batch; empty if not requested.
        attentions: If requested, attention weights for each link and tap ("source layer-target layer"), shape
            (batch, heads, target length, source length). Links without visible tokens may be missing.
    """

    loss: Tensor | None
    losses: dict[str, Tensor]
    logits: dict[str, Tensor]
    attentions: dict[str, dict[str, Tensor]]


class States(NamedTuple):
    """The states after running the schedule, before the heads.

    Attributes:
        hidden: The state of each tower that ran, after its last needed layer, shape (batch, length of its
            stream, its width).
        contexts: The context of each tower, as ``Tower.embed`` returned it.
        given: The output of each layer that a tap reads, before any tap updates it.
        attentions: See ``FusedOutput``.
        sent: Copies of ``given`` on the devices that read them.
    """

    hidden: dict[str, Tensor]
    contexts: dict[str, Any]
    given: dict[Layer, Tensor]
    attentions: dict[str, dict[str, Tensor]]
    sent: dict[tuple[Layer, torch.device], Tensor]

    def read(self, tower: str, layer: int, device: torch.device) -> Tensor:
        """Return the output of a layer on a device, copied there only once."""
        state = self.given[tower, layer]
        if state.device == device:
            return state
        key = ((tower, layer), device)
        if key not in self.sent:
            self.sent[key] = state.to(device)
        return self.sent[key]


def token_loss(logits: Tensor, labels: Tensor, count: Tensor | int | None = None) -> Tensor:
    """Return the mean cross-entropy of the next token over all labels; 0 without any.

    >>> round(token_loss(torch.zeros(1, 3, 4), torch.tensor([[-100, 2, 1]])).item(), 4)     # log 4
    1.3863

    With ``count``, return the sum divided by it.
    """
    return _mean(logits, _next(labels).to(logits.device), count)


def head_loss(
    tower: Tower, hidden: Tensor, context: Any, labels: Tensor, count: Tensor | int | None = None
) -> Tensor:
    """Return ``token_loss`` from the last state, with logits only where some row has a label.

    These positions are looked up only on the CPU: elsewhere, that would synchronise with the device.
    """
    following = _next(labels)
    places = (following != IGNORE).any(0).nonzero().flatten() if values_at_hand(labels) else None
    if places is None or not 0 < len(places) < labels.shape[1] - 1:
        return token_loss(tower.head(hidden, context), labels, count)
    logits = tower.head_at(hidden, context, places.to(hidden.device))
    return _mean(logits, following[:, places].to(logits.device), count)


def _next(labels: Tensor) -> Tensor:
    """Shift labels to the left by one, so that the logits need not be copied."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE)


def _mean(logits: Tensor, labels: Tensor, count: Tensor | int | None) -> Tensor:
    scores = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(scores, labels.flatten(), ignore_index=IGNORE, reduction="sum")
    if count is None:
        count = (labels != IGNORE).sum()
    return total / torch.as_tensor(count, device=total.device).clamp(min=1)


def score(
    towers: Mapping[str, Tower],
    streams: Streams,
    states: States,
    names: Collection[str],
    *,
    logits: bool,
    training: bool,
    counts: Mapping[str, Tensor | int] | None = None,
) -> FusedOutput:
    """Run the heads of the named towers on their last states, and compute the losses.

    ``counts`` replaces the numbers of labels as divisors. ``training``: whether to check that there is
    something to learn.
    """
    final = {name: (towers[name], states.hidden[name], states.contexts[name]) for name in names}
    scores = {name: tower.head(*state) for name, (tower, *state) in final.items()} if logits else {}
    losses: dict[str, Tensor] = {}
    labelled = {name: stream["labels"] for name, stream in streams.items() if "labels" in stream}
    for name, labels in labelled.items():
        count = None if counts is None else counts[name]
        if name in scores:
            losses[name] = token_loss(scores[name], labels, count)
        elif name in final:
            losses[name] = head_loss(*final[name], labels, count)
        else:
            losses[name] = torch.zeros((), device=labels.device)
    if training and torch.is_grad_enabled():
        watch_targets(towers, streams, losses)
    device = next(iter(losses.values())).device if losses else None
    loss = torch.stack([loss.to(device) for loss in losses.values()]).sum() if losses else None
    return FusedOutput(loss, losses, scores, states.attentions)


def watch_targets(towers: Mapping[str, Tower], streams: Streams, losses: Mapping[str, Tensor]) -> None:
    """Make the backward pass of a batch without labels raise an error; warn of missing begin and end tokens.

    Values are inspected only on the CPU: elsewhere, that would synchronise with the device.
    """
    if not any(map(may_have_labels, streams.values())):
        for loss in losses.values():
            if loss.requires_grad and not isinstance(loss, FakeTensor):  # estimates run on fake tensors
                loss.register_hook(_nothing_to_learn)  # type: ignore[no-untyped-call]  # of torch
    for name, stream in streams.items():
        if "labels" in stream and values_at_hand(stream["labels"]) and values_at_hand(stream["tokens"]):
            _note_edges(name, towers[name], stream["tokens"], stream["labels"])


def _nothing_to_learn(gradient: Tensor) -> None:
    raise ValueError(
        "no token of this batch is to be predicted, so its loss is 0 and nothing would be learnt: mark what "
        "a tower is to learn, Segment(..., target=True), two tokens or more; or leave this batch's loss out"
    )


def _note_edges(name: str, tower: Tower, tokens: Tensor, labels: Tensor) -> None:
    """Warn once if a tower's target segments start, or end, with different tokens and not all with its own.

    If all share another token than the tower's, it may come from a modality.
    """
    predicted = labels != IGNORE
    next_predicted = F.pad(predicted[:, 1:], (0, 1))
    firsts = set(tokens[~predicted & next_predicted].tolist())
    lasts = set(labels[predicted & ~next_predicted].tolist())
    lacking = []
    if tower.begin is not None and len(firsts) > 1:
        lacking.append(f"begin with its token {tower.begin}")
    if tower.end and len(lasts) > 1 and not lasts <= set(tower.end):
        lacking.append(f"end with its token {' or '.join(map(str, tower.end))}")
    if lacking:
        warn_once(
            f"not all target segments of tower {name!r} {' and '.join(lacking)}, which it needs to start and "
            "stop when it decodes. A modality's encode adds both; where tokens are your own, add them"
        )
