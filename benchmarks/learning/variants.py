"""The variants to compare, by name."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path

from data import BATCH


@dataclass(frozen=True)
class Variant:
    """How two decoders are joined and trained.

    Attributes:
        method: "fusion", or "expansion all", "expansion lora", "expansion new": vocabulary expansion of the
            text decoder that trains everything, LoRA and the new rows, or only the new rows.
        lr: Learning rate.
        rates: Other learning rates, as for ``FusedModel.parameter_groups``.
        train: What to train, by tower.
        random: Towers that start from random weights, not from the pretrained ones.
        adapter: Input adapter of both towers.
        link: Options of ``add_link`` for both links.
        links: Other options of one link, by its name: "speech->text".
        noise: Share of the input tokens that are replaced in speech targets; their labels stay.
        text_noise: The same for text.
        sources: Share of the tokens that are replaced in sources, by tower.
        batch: Pairs in a batch.
        paced: Whether links get the pace of the two towers, measured on the pairs.
        trials: Experiments outside of the library, by name; see ``trials``.
    """

    method: str = "fusion"
    lr: float = 3e-3
    rates: dict[str, float | dict[str, float]] = field(default_factory=dict)
    train: dict[str, str] = field(default_factory=lambda: {"speech": "all", "text": "none"})
    random: tuple[str, ...] = ()
    adapter: str | None = None
    link: dict[str, object] = field(default_factory=dict)
    links: dict[str, dict[str, object]] = field(default_factory=dict)
    noise: float = 0.15
    text_noise: float = 0.0
    sources: dict[str, float] = field(default_factory=dict)
    batch: int = BATCH
    paced: bool = False
    trials: dict[str, object] = field(default_factory=dict)


LINK = {
    "interleave": 1,
    "embeddings": True,
    "gate": None,
    "projection": "none",
    "feed_forward": False,
    "position": "segment",
    "relative": False,
}
BASE = Variant(link=LINK)
"""The recipe of the main example, but for relative updates, which came later; other variants change it."""


def linked(**changes: object) -> Variant:
    """Return the base variant with other link options."""
    return replace(BASE, link={**LINK, **changes})


SHARED_TIME = linked(position="rotary")
"""With positions of the shared time, the default when most other settings were first tried."""


def expansion(kind: str, lr: float, noise: float = 0.0) -> Variant:
    """Return vocabulary expansion of the text decoder."""
    return Variant(f"expansion {kind}", lr=lr, noise=noise, train={}, link={})


CHANGES = {
    "tanh gates": {"link": {"gate": "tanh"}},
    "linear projection": {"link": {"projection": "linear"}},
    "mlp projection": {"link": {"projection": "mlp"}},
    "feed-forward": {"link": {"feed_forward": True}},
    "no embeddings": {"link": {"embeddings": False}},
    "no positions": {"link": {"position": None}},
    "every second layer": {"link": {"interleave": 2}},
    "paced": {"paced": True},
    "residual adapters": {"adapter": "residual"},
    "gated adapters": {"adapter": "gated"},
    "lr 1.5e-3": {"lr": 1.5e-3},
    "lr 5e-3": {"lr": 5e-3},
    "towers at a third": {"rates": {"towers": 1e-3}},
    "towers at a tenth": {"rates": {"towers": 3e-4}},
    "speech frozen": {"train": {"speech": "none", "text": "none"}},
    "text trained": {"train": {"speech": "all", "text": "all"}},
    "no noise": {"noise": 0.0},
    "noise 30 %": {"noise": 0.3},
    "noise 50 %": {"noise": 0.5},
    "speech read 30 %": {"sources": {"speech": 0.3}},
    "stop gradient": {"trials": {"stop gradient": True}},
    "q/k norms": {"trials": {"q/k norms": True}},
    "warm start": {"trials": {"warm start": True}},
    "alignment loss": {"trials": {"alignment": 1.0}},
    "links dropped": {"trials": {"drop": 0.1}},
    "links dropped, guidance 1.5": {"trials": {"drop": 0.1, "guidance": 1.5}},
    "links dropped, guidance 2.5": {"trials": {"drop": 0.1, "guidance": 2.5}},
    "noise 30 %, lr 1.5e-3": {"noise": 0.3, "lr": 1.5e-3},
    "noise 30 %, text too": {"noise": 0.3, "text_noise": 0.3},
    "noise 30 %, sources 15 %": {"noise": 0.3, "sources": {"speech": 0.15, "text": 0.15}},
    "noise 30 %, text too, sources 15 %": {
        "noise": 0.3,
        "text_noise": 0.3,
        "sources": {"speech": 0.15, "text": 0.15},
    },
    "noise 30 %, sources 30 %": {"noise": 0.3, "sources": {"speech": 0.3, "text": 0.3}},
    "noise 30 %, speech read 30 %": {"noise": 0.3, "sources": {"speech": 0.3}},
    "noise 30 %, speech read 50 %": {"noise": 0.3, "sources": {"speech": 0.5}},
    "noise 30 %, towers at a third": {"noise": 0.3, "rates": {"towers": 1e-3}},
    "noise 50 %, speech read 40 %": {"noise": 0.5, "sources": {"speech": 0.4}},
    "noise 50 %, speech read 40 %, towers at a third": {
        "noise": 0.5,
        "sources": {"speech": 0.4},
        "rates": {"towers": 1e-3},
    },
    "noise 50 %, speech read 40 %, towers at a third, paced": {
        "noise": 0.5,
        "sources": {"speech": 0.4},
        "rates": {"towers": 1e-3},
        "paced": True,
    },
    "noise 50 %, speech read 40 %, towers at a tenth": {
        "noise": 0.5,
        "sources": {"speech": 0.4},
        "rates": {"towers": 3e-4},
    },
}
"""Changed fields of a variant; ``link`` is merged into that of the base."""


def changed(base: Variant, changes: dict[str, object]) -> Variant:
    """Return a variant with changed fields."""
    link = {**base.link, **changes.get("link", {})}
    return replace(base, **{**changes, "link": link})


VARIANTS = {
    "base": BASE,
    **{name: changed(BASE, changes) for name, changes in CHANGES.items()},
    "before": replace(
        SHARED_TIME,
        link={**LINK, "embeddings": False, "gate": "tanh", "projection": "mlp", "feed_forward": True}
        | {"position": "rotary"},
        adapter="gated",
        lr=1.5e-3,
        noise=0.0,
    ),
    "shared time": SHARED_TIME,
    **{f"shared time, {name}": changed(SHARED_TIME, changes) for name, changes in CHANGES.items()},
    **{f"expansion all, lr {lr:g}": expansion("all", lr) for lr in (5e-4, 1e-3, 1.5e-3, 3e-3, 6e-3)},
    **{f"expansion lora, lr {lr:g}": expansion("lora", lr) for lr in (3e-3, 1e-2, 3e-2)},
    **{f"expansion new, lr {lr:g}": expansion("new", lr) for lr in (3e-3, 1e-2, 3e-2)},
    "expansion all, noise 30 %, speech read 30 %, lr 0.0015": replace(
        expansion("all", 1.5e-3, 0.3), sources={"speech": 0.3}
    ),
    "expansion all, noise 50 %, lr 0.0015": expansion("all", 1.5e-3, 0.5),
    "expansion all, noise 50 %, lr 0.003": expansion("all", 3e-3, 0.5),
    "expansion all, noise 70 %, lr 0.0015": expansion("all", 1.5e-3, 0.7),
    "expansion all, noise 50 %, speech read 40 %, lr 0.0015": replace(
        expansion("all", 1.5e-3, 0.5), sources={"speech": 0.4}
    ),
    **{f"expansion all, noise, lr {lr:g}": expansion("all", lr, 0.15) for lr in (1.5e-3, 3e-3)},
}


def read_variant(name: str) -> tuple[str, Variant]:
    """Return the name of a variant, and the variant: one of ``VARIANTS``, or from a TOML file.

    Raises:
        ValueError: The variant does not exist, or the file has an unknown field.
    """
    if not name.endswith(".toml"):
        if name not in VARIANTS:
            raise ValueError(f"no variant {name!r}: see benchmarks/learning/variants.py, or name a TOML file")
        return name, VARIANTS[name]
    fields = tomllib.loads(Path(name).read_text())
    if unknown := fields.keys() - Variant.__dataclass_fields__.keys():
        raise ValueError(f"{name}: a variant has no {', '.join(sorted(unknown))}")
    link = {
        key: None if value == "none" and key != "projection" else value
        for key, value in fields.get("link", {}).items()
    }
    return Path(name).stem, Variant(**{**fields, "link": link})
