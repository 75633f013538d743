"""Check the arguments of the Trainer, and set those that fused models need."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ..base.extras import require
from ..hub.push import check_reachable
from ..run.fusion import Fusion
from ..run.gathered import is_divided

UNUSED = {
    "compute_loss_func": "the loss is that of FusedModel.forward; override compute_loss in a subclass",
    "processing_class": "pass modalities={tower: tokenizer}, which are saved with the model",
}
"""Options of ``transformers.Trainer`` that the Trainer for fused models has no use for, and what to do."""


def training_arguments(model: Fusion, args: Any, options: Mapping[str, Any], rates: Mapping[str, Any]) -> Any:
    """Check the arguments and options of a Trainer; return the arguments, by default those of transformers.

    Raises:
        CheckpointError: ``push_to_hub`` would publish a frozen tower that comes from a folder.
        ValueError: An argument or option does not work with fused models.
    """
    args = require("transformers", "train").TrainingArguments() if args is None else args
    for name in ("neftune_noise_alpha", "label_smoothing_factor"):
        if getattr(args, name):
            raise ValueError(f"{name} is for models of one vocabulary; leave it out of the arguments")
    if "inputs" in args.include_for_metrics:
        raise ValueError('include_for_metrics=["inputs"] is for models of one vocabulary; leave it out')
    for name, advice in UNUSED.items():
        if options.get(name) is not None:
            raise ValueError(f"this Trainer does not use {name}: {advice}")
    own = "optimizer_cls_and_kwargs" if options.get("optimizer_cls_and_kwargs") else "optimizers"
    if rates and (options.get(own) or (None,))[0] is not None:
        raise ValueError(f"rates are for the Trainer's own optimizer; leave out rates, or {own}")
    if args.n_gpu > 1 and not hasattr(model, "hf_device_map"):
        raise ValueError(
            f"one process sees {args.n_gpu} GPUs, over which transformers would copy the model at each "
            f"step; launch one for each, torchrun --nproc-per-node {args.n_gpu} ..., or let it see one "
            "(CUDA_VISIBLE_DEVICES=0)"
        )
    if args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" or is_divided(model):
        raise ValueError(
            "this Trainer trains models that are whole on each process; divide the model by "
            "multitower.train.shard and train it in a loop of your own, with save_training and "
            "load_training (docs/training.md, On several GPUs)"
        )
    if args.push_to_hub:
        check_reachable(model, embed_towers=False)
    args.remove_unused_columns = False  # the column "segments" is not an argument of forward
    if args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = False  # every training step uses all parameters
    return args
