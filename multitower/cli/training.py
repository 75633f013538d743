"""The command that trains a recipe."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

from ..base.extras import require
from ..pipeline.pipeline import Pipeline
from .recipe import make_graph, make_modalities, read_recipe, read_rows

typer: Any = require("typer", "cli")

RUN, FUSED, KEPT = "run", "fused", "recipe.yaml"


def train(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE.yaml", help="Towers, links, data, trainer.", show_default=False)
    ],
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint of the run.")
    ] = False,
) -> None:
    """Fuse and train towers as a recipe says, and save the model with its modalities."""
    torch: Any = require("torch", "train")
    transformers: Any = require("transformers", "train")
    plan = read_recipe(recipe)
    out = Path(plan.output)
    if (out / FUSED).exists() and not resume:
        raise FileExistsError(f"{out / FUSED} is there already: remove it, or name another output")
    if any((out / RUN).glob("checkpoint-*")) and not resume:
        raise FileExistsError(
            f"{out / RUN} has checkpoints of an earlier run: go on with --resume, remove it, or name another "
            "output"
        )
    arguments = {
        "report_to": "none",
        "logging_steps": 10,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "seed": plan.seed,
        **plan.trainer,
    }
    arguments = transformers.TrainingArguments(str(out / RUN), **arguments)
    modalities = make_modalities(plan)
    train_rows, held_out = read_rows(plan, modalities)
    torch.manual_seed(plan.seed)
    model = make_graph(plan).compile()
    print(model.graph)

    from ..train.columns import encode_columns  # slow imports of transformers come last
    from ..train.trainer import Trainer

    def examples(rows: Any) -> Any:
        columns, encoded = plan.data.columns, []
        for task in plan.data.tasks:  # targets come last: they are predicted from the others
            order = [*(name for name in columns if name not in task), *task]
            ordered = {name: columns[name] for name in order}
            encoded.append(encode_columns(rows, ordered, modalities, targets=task))
        if plan.data.dataset is None:
            return [row for task in encoded for row in task]
        return require("datasets", "train").concatenate_datasets(encoded)

    trainer = Trainer(
        model,
        arguments,
        rates=plan.rates,
        history_noise=plan.history_noise,
        source_noise=plan.source_noise,
        modalities=modalities,
        train_dataset=examples(train_rows),
        eval_dataset=examples(held_out) if len(held_out) else None,
    )
    trainer.train(resume_from_checkpoint=resume or None)
    if len(held_out):
        for name, value in sorted(trainer.evaluate().items()):
            if name.endswith("loss"):
                print(f"{name} {value:.4f}")
    if trainer.is_world_process_zero():
        Pipeline(model, modalities).save_pretrained(out / FUSED)
        if recipe.resolve() != (out / KEPT).resolve():
            shutil.copyfile(recipe, out / KEPT)
        print(f"wrote {out / FUSED}")
