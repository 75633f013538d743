"""The transformers Trainer for fused models."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..base.extras import require
from ..batch.collate import IGNORE, Example, Streams, count_targets, to_device
from ..batch.corrupt import corrupt_history, corrupt_sources
from ..checkpoint.load import load_weights
from ..checkpoint.manifest import MODALITIES
from ..checkpoint.modalities import check_modalities
from ..checkpoint.save import save_pretrained
from ..generate.edges import with_edges
from ..hub.card import model_card
from ..hub.push import without_paths
from ..plugins.entry_points import as_modality
from ..plugins.modality import Modality
from ..run.fusion import Fusion
from ..run.parallel import all_or_none
from ..storage.files import FUSION, is_part
from .arguments import training_arguments
from .columns import Collator, as_example
from .score import decode_targets

transformers: Any = require("transformers", "train")
gather_object: Any = require("accelerate.utils", "train").gather_object

ARGUMENTS = "training_args.bin"
TIMES = ("_runtime", "_per_second", "_preparation_time")

Counts = dict[str, Tensor]
Decoded = Callable[[list[Example], list[Any], list[Example]], Mapping[str, float]]


class Trainer(transformers.Trainer):  # type: ignore[misc]  # known only at run time
    """``transformers.Trainer`` for a ``FusedModel``, with the same arguments.

    >>> import tempfile, multitower as mt, transformers
    >>> from multitower.testing import tiny_model
    >>> pair = [mt.Segment("speech", [1, 5, 6, 2]), mt.Segment("text", [1, 7, 2], target=True)]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     arguments = transformers.TrainingArguments(
    ...         folder, max_steps=2, report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no"
    ...     )
    ...     trainer = Trainer(tiny_model(), arguments, train_dataset=[pair] * 8)
    ...     trainer.train().global_step                                     # doctest: +ELLIPSIS
    {...}
    2

    A data set holds examples, lists of segments, or rows made by ``encode_columns``. Each tower's loss is
    normalised by its target tokens in a whole optimizer step, across gradient accumulation and, with
    ``average_tokens_across_devices`` (the default), processes. It is logged per tower ("loss_text",
    "eval_text_loss"); "eval_loss" is the sum of the towers' means over the data set. ``compute_metrics`` gets
    logits and labels by tower; labels are -100 if a batch has no tokens of the tower. Checkpoints are fused
    checkpoints.

    Args:
        model: The model.
        args: The arguments.
        rates: Learning rates per part, the arguments of ``parameter_groups`` other than ``lr``:
            ``{"towers": {"speech": 1e-4}}``. Other parts have the rate in ``args``.
        history_noise: By tower, the share of tokens in its own history that are replaced by random ones
            during training; see ``batch.corrupt_history``.
        source_noise: By tower, the share of tokens in segments without ``target`` that are replaced during
            training; see ``batch.corrupt_sources``.
        modalities: Modalities or tokenizers to save with the model, by tower.
        score: Computes metrics from generated output in an evaluation. It is called with the prompts (each
            example's segments before its first target), the outputs, and the examples, in which only targets
            may follow a target.
        decoding: Options of ``generate`` for ``score``.
        data_collator: Collates examples; ``Collator()`` by default.
        options: Other arguments of ``transformers.Trainer``: ``train_dataset``, ``eval_dataset``,
            ``callbacks``, ``compute_metrics``, ``optimizers``, ...

    Raises:
        CheckpointError: ``push_to_hub`` would publish a frozen tower that comes from a folder.
        TypeError: The model is not a ``FusedModel``.
        ValueError: ``args`` or ``options`` ask for something that fused models cannot do, such as NEFTune and
            label smoothing, which assume a single vocabulary; the model is sharded by FSDP; one process has
            several GPUs; or noise is set for an unknown tower.
    """

    loss_is_scaled_for_ga = True
    optimizer: Any

    def __init__(
        self,
        model: Fusion,
        args: Any = None,
        *,
        rates: Mapping[str, Any] | None = None,
        history_noise: Mapping[str, float] | None = None,
        source_noise: Mapping[str, float] | None = None,
        modalities: Mapping[str, Modality] | None = None,
        score: Decoded | None = None,
        decoding: Mapping[str, Any] | None = None,
        data_collator: Callable[[Sequence[Any]], Any] | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(model, Fusion):
            raise TypeError(f"this Trainer takes a FusedModel, not a {type(model).__name__}")
        args = training_arguments(model, args, options, rates or {})
        self.rates = dict(rates or {})
        self.modalities = {name: as_modality(each) for name, each in (modalities or {}).items()}
        check_modalities(model, self.modalities)
        self.history_noise, self.source_noise = dict(history_noise or {}), dict(source_noise or {})
        for name in {*self.history_noise, *self.source_noise} - set(model.towers):
            raise ValueError(f"noise for tower {name!r}: the towers are {', '.join(model.towers)}")
        self.score, self.decoding = score, dict(decoding or {})
        self._seen: dict[str, Counts] = {}
        super().__init__(model, args, data_collator=data_collator or Collator(), **options)
        self.model_accepts_loss_kwargs = True

    def train(self, *args: Any, **options: Any) -> Any:
        """Train like ``transformers.Trainer``."""
        self._seen = {}  # of an earlier run
        return super().train(*args, **options)

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """Create the optimizer from the arguments, with the model's ``parameter_groups``."""
        if self.optimizer is None and self.optimizer_cls_and_kwargs is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            if not set(options) & {"params", "model", "optimizer_dict"}:
                fused = self._fused()
                groups = fused.parameter_groups(self.args.learning_rate, **self.rates)
                decay = self.args.weight_decay
                self.optimizer = kind([{"weight_decay": decay, **group} for group in groups], **options)
                return self.optimizer
            if self.rates:
                raise ValueError(f"rates: transformers makes the groups of the optimizer {self.args.optim}")
        return super().create_optimizer(model)

    def _prepare_inputs(self, inputs: Any) -> Any:
        return to_device(super()._prepare_inputs(inputs), self._fused().devices)

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **options: Any) -> Tensor:
        """Train on a batch, after adding noise to it if configured."""
        learnt = {name for name, stream in inputs["streams"].items() if "labels" in stream}
        history = {name: rate for name, rate in self.history_noise.items() if name in learnt}
        batch = corrupt_sources(corrupt_history(inputs, history), self.source_noise)
        loss: Tensor = super().training_step(model, batch, *args, **options)
        return loss

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Counts:
        """Count each tower's target tokens in all batches of a step, over all processes if configured."""
        counts = self._counted(batch_samples, device)
        if self.args.average_tokens_across_devices:
            table = self.accelerator.reduce(torch.stack(list(counts.values())))
            counts = dict(zip(counts, table.unbind(), strict=True))
        return counts

    def _counted(self, batches: list[Any], device: torch.device) -> Counts:
        zero, found = torch.zeros((), dtype=torch.int64, device=device), count_targets(batches)
        return {name: found.get(name, zero).to(device) for name in self._fused().towers}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Counts | None = None,
    ) -> Any:
        """Return the sum of the towers' losses, each normalised by the tokens of the whole step.

        Logits are computed only with ``return_outputs``.
        """
        out = model(**inputs, logits=return_outputs, num_items_in_batch=num_items_in_batch)
        if out.loss is None:
            raise ValueError(
                "no stream of this batch has labels; mark what is to be learnt: Segment(..., target=True)"
            )
        if num_items_in_batch is not None:
            self._note(inputs["streams"], out.losses, num_items_in_batch)
        loss = out.loss.to(self.args.device)  # towers may be on several devices
        if model.training and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # DDP averages gradients over processes
        return (loss, out) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Any, Any, Any]:
        """Return the loss of a batch, and its logits and labels by tower."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            counts = self._counted([inputs], self.args.device)
            if prediction_loss_only:
                return self.compute_loss(model, inputs, num_items_in_batch=counts).detach(), None, None
            loss, out = self.compute_loss(model, inputs, return_outputs=True, num_items_in_batch=counts)
        logits, labels = {}, {}
        some = next(iter(inputs["streams"].values()))["tokens"]
        for name in self._fused().towers:
            stream, size = inputs["streams"].get(name, {}), self._fused().tower(name).vocab_size
            absent = name not in out.logits
            logits[name] = loss.new_zeros(len(some), 1, size) if absent else out.logits[name].detach()
            labels[name] = stream.get(
                "labels", torch.full_like(logits[name][..., 0], IGNORE, dtype=torch.int64)
            )
        return loss.detach(), logits, labels

    def evaluation_loop(self, dataloader: Any, *args: Any, **options: Any) -> Any:
        """Evaluate like ``transformers.Trainer``, with losses by tower and the metrics of ``score``."""
        before, self._seen = self._seen, {}
        try:
            out = super().evaluation_loop(dataloader, *args, **options)
            losses = self._losses()
        finally:
            self._seen = before
        prefix = options.get("metric_key_prefix", "eval")
        if losses:
            out.metrics.update({f"{prefix}_{name}_loss": loss for name, loss in losses.items()})
            out.metrics[f"{prefix}_loss"] = sum(losses.values())
        if self.score is not None:
            found = self.score(*self._decoded(dataloader.dataset))
            out.metrics.update({f"{prefix}_{name}": value for name, value in found.items()})
        return out

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """Log the loss of each tower in addition to their sum."""
        if "loss" in logs:
            logs |= {f"loss_{name}": round(loss, 4) for name, loss in self._losses().items()}
            self._seen = {}
        super().log(logs, *args, **options)

    def _fused(self) -> Fusion:
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        assert isinstance(model, Fusion)
        return model

    def _note(self, streams: Streams, losses: Mapping[str, Tensor], counts: Counts) -> None:
        for name, loss in losses.items():
            if "labels" not in streams.get(name, {}):
                continue  # ran only to keep processes in step
            seen = self._seen.setdefault(name, {"sum": torch.zeros(()), "tokens": torch.zeros(())})
            here = (streams[name]["labels"][:, 1:] != IGNORE).sum()
            seen["sum"] = seen["sum"].to(loss.device) + loss.detach() * counts[name].to(loss.device)
            seen["tokens"] = seen["tokens"].to(loss.device) + here

    def _losses(self) -> dict[str, float]:
        """Return the mean loss by tower since ``_seen`` was reset, over all processes."""
        zero = torch.zeros((), device=self.args.device)
        table = torch.stack(
            [
                self._seen.get(name, {}).get(key, zero).to(self.args.device, torch.float32)
                for name in self._fused().towers
                for key in ("sum", "tokens")
            ]
        )
        rows = self.accelerator.reduce(table).view(-1, 2).tolist()
        found = zip(self._fused().towers, rows, strict=True)
        return {name: total / tokens for name, (total, tokens) in found if tokens}

    def _decoded(self, dataset: Any) -> tuple[list[Any], list[Any], list[Any]]:
        """Generate the target towers of each example of a data set, which is split over processes."""
        found: list[tuple[Any, Any, Any]] = []
        options = with_edges(self.decoding, self._fused(), self.modalities)
        place, processes = self.accelerator.process_index, self.accelerator.num_processes
        share = islice(dataset, place, None, processes)
        while rows := list(islice(share, self.args.per_device_eval_batch_size)):
            found += decode_targets(self._fused(), list(map(as_example, rows)), options)
        given, decoded, originals = zip(*gather_object(found), strict=True)
        return list(given), list(decoded), list(originals)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save a fused checkpoint; if the first process fails, all raise its error."""
        all_or_none(lambda: super(Trainer, self).save_model(output_dir, _internal_call=True))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        all_or_none(lambda: super(Trainer, self)._save_checkpoint(model, trial))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save a fused checkpoint into a folder that may contain other files of the run."""
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        if not self.args.should_save:
            return
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            fresh, old = Path(scratch, "fused"), Path(scratch, "old")
            if (folder / FUSION).exists() and (folder / MODALITIES).exists():
                # They are kept unless there are new ones, as by save_pretrained.
                shutil.copytree(folder / MODALITIES, fresh / MODALITIES)
                shutil.copy(folder / FUSION, fresh)
            published = without_paths if self.args.push_to_hub else nullcontext
            with published(self._fused()) as model:
                save_pretrained(model, fresh, modalities=self.modalities)
            old.mkdir()
            for path in folder.iterdir():
                if path.name == FUSION or is_part(path.name):
                    path.rename(old / path.name)
            for path in sorted(fresh.iterdir(), key=lambda each: each.name == FUSION):  # the manifest last
                path.rename(folder / path.name)
        torch.save(self.args, folder / ARGUMENTS)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push a fused checkpoint; transformers alone would push only the files of its own models."""
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if self.args.hub_strategy != "end" and (self.args.hub_always_push or not busy):
            self._save()
        super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(
        self,
        model_name: str | None = None,
        license: str | None = None,  # noqa: A002  # what transformers calls it
    ) -> None:
        """Write a model card, ``README.md``, with training settings and the latest scores."""
        if not self.is_world_process_zero():
            return
        args, name = self.args, model_name or Path(self.args.output_dir).name
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        training = {
            "steps": self.state.global_step,
            "examples in a step": batch,
            "optimizer": str(getattr(args.optim, "value", args.optim)),
            "learning rate": args.learning_rate,
            **{f"learning rate of {part}": rate for part, rate in self.rates.items()},
            "schedule": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
            **{f"noise in the past of {tower}": rate for tower, rate in self.history_noise.items()},
            **{f"noise in what is read of {tower}": rate for tower, rate in self.source_noise.items()},
            "seed": args.seed,
        }
        evaluations = [log for log in self.state.log_history if "eval_loss" in log] or [{}]
        latest = {key: value for key, value in evaluations[-1].items() if key.startswith("eval_")}
        scores = {key: value for key, value in latest.items() if not key.endswith(TIMES)}
        card = model_card(
            self._fused(), name, modalities=self.modalities, license=license, training=training, scores=scores
        )
        Path(args.output_dir, "README.md").write_text(card, encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_weights(self._fused(), resume_from_checkpoint)

    def _load_best_model(self) -> None:
        load_weights(self._fused(), self.state.best_model_checkpoint)
