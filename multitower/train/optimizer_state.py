"""The mutable state of a training run, by name: parameters, optimizer state, random number generators."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from ..run.fusion import Fusion
from ..run.request import trains_in_parallel
from ..storage.fingerprint import sampled_fingerprint
from ..tower.peft_tower import adapter_names, is_peft_model

Settings = dict[str, Any]


def trained_state(model: Fusion) -> dict[str, Tensor]:
    """Return the tensors that training may change (links, input adapters, trained towers), each once."""
    trained: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    changing = _changing(model)
    for name, tensor in state.items():
        if tensor.requires_grad or not name.startswith("towers.") or name.startswith(changing):
            trained.setdefault(id(tensor), name)
    return {name: state[name] for name in trained.values()}


def _changing(model: Fusion) -> tuple[str, ...]:
    """Return the name prefixes of tensors in trained towers and peft adapters."""
    begins = []
    for name, spec in model.graph.towers.items():
        if spec.train == "all":
            begins.append(f"towers.{name}.")
        elif spec.train == "lora" and is_peft_model(model.unimodal(name)):
            inside = next(iter(dict(model.tower(name).named_children())))
            begins += [f"towers.{name}.{inside}.{key}" for key in adapter_names(model.unimodal(name))]
    return tuple(begins)


def frozen_fingerprints(model: Fusion) -> dict[str, str]:
    """Return a fingerprint of each tower's frozen tensors, without offloaded ones."""
    trained = {id(tensor) for tensor in trained_state(model).values()}
    prints = {}
    for name in model.towers:
        state = model.tower(name).state_dict(keep_vars=True)
        frozen = {
            key: tensor.detach()
            for key, tensor in state.items()
            if id(tensor) not in trained and tensor.device.type != "meta"
        }
        if frozen:
            prints[name] = sampled_fingerprint(frozen)
    return prints


def optimizer_state(model: Fusion, optimizer: Optimizer) -> tuple[dict[str, Tensor], Settings]:
    """Return an optimizer's tensors, named "optimizer.<key>.<parameter>", and the rest of its state.

    torch's ``get_optimizer_state_dict`` would take a step with an optimizer that has no state yet.
    """
    names, state = trained_names(model, optimizer), optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    others: dict[int, dict[str, Any]] = {}
    for place, kept in state["state"].items():
        found = {key: value for key, value in kept.items() if isinstance(value, Tensor)}
        tensors |= {f"optimizer.{key}.{names[place]}": value for key, value in found.items()}
        others[place] = {key: value for key, value in kept.items() if key not in found}
    settings = {"names": names, "groups": state["param_groups"], "state": others}
    return tensors, {"class": type(optimizer).__name__, **settings}


def expected_tensors(model: Fusion, listed: Mapping[str, Any]) -> dict[str, Tensor]:
    """Allocate the tensors of an optimizer's state, sharded like their parameters."""
    parameters, room = {name: each for each, name in _names(model).items()}, {}
    for name, (shape, dtype) in listed.items():
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            owner, to = parameters[rest.partition(".")[2]], getattr(torch, dtype)
            alike = list(owner.shape) == shape
            room[name] = torch.empty_like(owner, dtype=to) if alike else torch.empty(shape, dtype=to)
    return room


def load_optimizer(optimizer: Optimizer, settings: Settings, tensors: Mapping[str, Tensor]) -> None:
    """Load the result of ``optimizer_state`` into an optimizer of the same parameters."""
    state = {place: dict(kept) for place, kept in settings["state"].items()}
    places = {name: place for place, name in enumerate(settings["names"])}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            key, _, parameter = rest.partition(".")
            state[places[parameter]][key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": settings["groups"]})


def unlike_settings(model: Fusion, optimizer: Optimizer, settings: Settings) -> list[str]:
    """List the differences between an optimizer and the saved one."""
    problems = []
    if settings["class"] != type(optimizer).__name__:
        problems.append(f"the optimizer is {type(optimizer).__name__}; {settings['class']} was saved")
    groups = optimizer.state_dict()["param_groups"]
    mine = trained_names(model, optimizer), [group["params"] for group in groups]
    if mine != (settings["names"], [group["params"] for group in settings["groups"]]):
        problems.append("the optimizer's groups hold other parameters than those that were saved")
    return problems


def trained_names(model: Fusion, optimizer: Optimizer) -> list[str]:
    """Return the names of an optimizer's parameters, in its order."""
    names = _names(model)
    trained: list[Tensor] = [each for group in optimizer.param_groups for each in group["params"]]
    for parameter in trained:
        if parameter not in names:
            raise ValueError(
                f"the optimizer trains a parameter of shape {tuple(parameter.shape)} that is not the "
                "model's; was it made for another model?"
            )
    return [names[parameter] for parameter in trained]


def _names(model: Fusion) -> dict[Tensor, str]:
    """Map parameters to their names in ``state_dict``, which omits wrappers of activation checkpointing."""
    named = model.named_parameters()
    return {parameter: name.replace("_checkpoint_wrapped_module.", "") for name, parameter in named}


def described(tensor: Tensor) -> list[Any]:
    """Return shape and dtype as plain data."""
    return [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]


def random_state() -> dict[str, Tensor]:
    """Return the states of torch's random number generators in this process."""
    rank = dist.get_rank() if trains_in_parallel() else 0
    state = {f"random.cpu.{rank}": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch's own
        state[f"random.cuda.{rank}"] = torch.cuda.get_rng_state()
    return state


def load_random_state(tensors: Mapping[str, Tensor]) -> None:
    """Restore this process's random number generators; warn if a state was not saved."""
    for name in random_state():
        if name not in tensors:
            warnings.warn(
                f"the checkpoint has no {name}: it was saved by other processes or devices, so that random "
                "numbers (dropout, for instance) will be others than in an unbroken run",
                stacklevel=3,
            )
        elif ".cuda." in name:
            torch.cuda.set_rng_state(tensors[name])
        else:
            torch.set_rng_state(tensors[name])
