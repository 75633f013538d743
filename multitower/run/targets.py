"""Batches from which nothing, or not what was meant, would be learnt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..base.logs import warn_once
from ..batch.collate import IGNORE, Streams, values_at_hand
from ..tower import Tower


def may_have_labels(labels: Tensor) -> bool:
    """Whether labels name a token to predict; also where their values are not at hand.

    >>> import torch
    >>> may_have_labels(torch.tensor([[IGNORE, 3]])), may_have_labels(torch.tensor([[IGNORE, IGNORE]]))
    (True, False)
    """
    return not values_at_hand(labels) or bool((labels[:, 1:] != IGNORE).any())


def watch_targets(towers: Mapping[str, Tower], streams: Streams, losses: Mapping[str, Tensor]) -> None:
    """Have losses that nothing stands behind refuse to be learnt from; note segments without begin or end.

    Values are looked at only on the CPU: elsewhere that would wait for the device.
    """
    labelled = {name: stream["labels"] for name, stream in streams.items() if "labels" in stream}
    if not any(map(may_have_labels, labelled.values())):
        _refuse(losses.values())
    for name, labels in labelled.items():
        tokens = streams[name]["tokens"]
        if values_at_hand(labels) and values_at_hand(tokens):
            _note_edges(name, towers[name], tokens, labels)


def _refuse(losses: Iterable[Tensor]) -> None:
    for loss in losses:
        if loss.requires_grad and not isinstance(loss, FakeTensor):  # of which an estimate learns nothing
            loss.register_hook(_nothing_to_learn)  # type: ignore[no-untyped-call]  # of torch


def _nothing_to_learn(gradient: Tensor) -> None:
    raise ValueError(
        "no token of this batch is to be predicted, so its loss is 0 and nothing would be learnt: mark what "
        "a tower is to learn, Segment(..., target=True), two tokens or more; or leave this batch's loss out"
    )


def _note_edges(name: str, tower: Tower, tokens: Tensor, labels: Tensor) -> None:
    """Warn once where target segments of a tower begin, or end, with unlike tokens: not all with its own.

    Those that share another token than the tower's may have that from a modality.
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
