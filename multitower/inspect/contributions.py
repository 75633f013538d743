"""How much links and input adapters change the states of towers on a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from ..link.attention import Visibility
from ..run.fusion import Fusion


@torch.no_grad()
def contributions(model: Fusion, streams: Mapping[str, Mapping[str, Tensor]]) -> dict[str, float]:
    """Return the norm of each update over the norm of the state that it changes; see ``FusedModel``."""
    found: dict[str, float] = {}

    def of_tap(name: str) -> Callable[..., None]:
        def note(module: Any, inputs: tuple[Tensor, Any, Visibility], update: Tensor) -> None:
            x, _, seen, *_ = inputs
            real = torch.ones_like(x[..., :1], dtype=torch.bool) if seen.sees is None else seen.sees
            found[name] = _ratio(update, x, real)

        return note

    def of_adapter(name: str) -> Callable[..., None]:
        def note(module: Any, inputs: tuple[Tensor], adapted: Tensor) -> None:
            real = streams[name]["mask"].to(adapted.device)[..., None]
            found[f"{name} adapter"] = _ratio(adapted - inputs[0], inputs[0], real)

        return note

    with ExitStack() as hooks:
        for name, adapter in model.adapters.items():
            hooks.callback(adapter.register_forward_hook(of_adapter(name)).remove)
        for tap in model.schedule.taps:
            hook = of_tap(f"{tap.link} {tap.key}")
            hooks.callback(model.tap(tap).register_forward_hook(hook).remove)
        model.run(streams)
    return dict(sorted(found.items()))


def _ratio(update: Tensor, state: Tensor, real: Tensor) -> float:
    part, whole = (torch.where(real, each.float(), 0.0).norm() for each in (update, state))
    return float(part / whole.clamp(min=torch.finfo(torch.float32).tiny))
