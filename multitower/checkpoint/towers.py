"""One tower of a checkpoint: from where it is to be had, and whether it is the one that was saved."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Collection

from torch import nn

from ..declare.spec import TowerSpec
from ..errors import CheckpointError, TowerError
from ..storage.fingerprint import fingerprint, sampled_fingerprint
from ..tower import Tower, TransformersTower, as_tower
from ..tower.peft_tower import base_state
from .adapters import load_adapters
from .assign import fill, restore_dtypes
from .layout import ADAPTER, TOWERS, WEIGHTS, whole
from .limits import check_model
from .manifest import Checkpoint
from .origins import ways_out
from .probe_record import read_proof


def load_one(
    checkpoint: Checkpoint,
    spec: TowerSpec,
    given: str | nn.Module | None,
    changed: bool | Collection[str] = False,
    *,
    verify: bool = False,
) -> Tower:
    """Load a tower, from what is given, else from the checkpoint, else from where it came from.

    Args:
        checkpoint: The checkpoint.
        spec: Its declaration.
        given: A path, a Hub id or a module, or None.
        changed: Whether another tower than the one that was saved will do, for all or for those named.
        verify: Whether to compare all of its values, and not a sample.

    Raises:
        CheckpointError: It cannot be had, does not fit, or is another one.
    """
    name, record = spec.name, checkpoint.records[spec.name]
    place = checkpoint.root / TOWERS / name
    stored = place if record["embedded"] else None
    origin = spec.source if given is None else given
    if stored is not None and given is None and (stored / "config.json").exists():
        tensors = checkpoint.tensors[f"{TOWERS}/{name}/{WEIGHTS}"]
        check_model(stored, len(tensors), checkpoint.stored(f"{TOWERS}/{name}/model"))
        origin, mixed = str(stored), len({each.partition(" ")[0] for each in tensors.values()}) > 1
    referred = given is None and stored is None
    revision = record["revision"] if given is None and origin == spec.source else None
    file = None if stored is None else stored / WEIGHTS

    steps: list[Callable[[nn.Module], nn.Module]] = []
    if file is not None and origin == str(stored):
        steps += [functools.partial(restore_dtypes, file)] * mixed
    elif file is not None:
        steps.append(functools.partial(fill, file, given is None))
    if spec.train == "lora" or "adapters" in record:
        steps.append(functools.partial(load_adapters, place / ADAPTER, record))

    def prepare(model: nn.Module) -> nn.Module:
        return functools.reduce(lambda made, step: step(made), steps, model)

    try:
        proof = None if verify or given is not None or "adapters" in record else read_proof(record)
        tower = as_tower(name, origin, prepare if steps else None, revision=revision, proof=proof)
    except (TowerError, CheckpointError) as error:
        advice = f"; {ways_out(name)}" if referred and spec.source is not None else ""
        raise CheckpointError(f"{checkpoint.root}: {error}{advice}") from error
    except ImportError:
        raise
    except Exception as error:  # a config that can be read may still be of a model that cannot run
        raise CheckpointError(
            f"{checkpoint.root}: tower {name!r}: {type(error).__name__}: {error}"
        ) from error
    _check_size(name, record, tower)
    state = base_state(whole(tower))
    if any(tensor.is_meta for tensor in state.values()):
        raise CheckpointError(
            f"tower {name!r} is on the meta device, and the checkpoint has no values for it"
        )
    digest, expected = (
        (fingerprint, record["values"]) if verify else (sampled_fingerprint, record["fingerprint"])
    )
    if digest(state) != expected:
        own = file is not None and (origin == str(stored) or not isinstance(tower, TransformersTower))
        _refuse(name, origin, own=own, allowed=changed)
    return tower


def _check_size(name: str, record: dict[str, object], tower: Tower) -> None:
    sizes = {key: getattr(tower, key) for key in ("depth", "width")}
    wrong = [f"{key} {size}, not {record[key]}" for key, size in sizes.items() if size != record[key]]
    if wrong:
        raise CheckpointError(
            f"tower {name!r} has {' and '.join(wrong)}, with which the links were trained; load it as it "
            "was, and exchange the tower with swap"
        )


def _refuse(name: str, origin: object, *, own: bool, allowed: bool | Collection[str]) -> None:
    what = f"tower {name!r} from {origin if isinstance(origin, str) else type(origin).__name__}"
    if not own and (allowed is True or (not isinstance(allowed, bool) and name in allowed)):
        warnings.warn(
            f"{what} is not the one that this checkpoint was made with; the links were trained with another",
            stacklevel=6,
        )
        return
    raise CheckpointError(
        f"{what} is not the one that this checkpoint was made with: its weights or their dtype have changed. "
        f"Give the original with towers={{{name!r}: ...}}"
        + ("" if own else f", or take this one all the same with allow_changed_towers=[{name!r}]")
    )
