"""Code as in the documentation passes ``mypy --strict``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import multitower as mt

USE = """
import torch
import multitower as mt

def use(model: mt.FusedModel, examples: list[mt.batch.Example]) -> torch.Tensor:
    batch = mt.collate(examples)
    model.forward(**batch, output_attentions=True)
    model.forward(**mt.batch.to_device(batch, model.device))
    model.forward(**mt.pack(batch), logits=False)
    model.estimate(batch, logits=False)
    assert batch["streams"]["text"]["tokens"].dim() == 2
    loss = model.forward(**batch).loss
    assert loss is not None
    return loss
"""

WITHOUT_TORCH = """
[mypy]
strict = True
follow_imports = silent
[mypy-torch.*,transformers.*,peft.*,numpy.*,safetensors.*,huggingface_hub.*]
follow_imports = skip
"""
"""Checking the types of these as well would take a minute."""


def test_a_batch_goes_to_forward(tmp_path: Path) -> None:
    use, config = tmp_path / "use.py", tmp_path / "mypy.ini"
    use.write_text(USE)
    config.write_text(WITHOUT_TORCH)
    command = [sys.executable, "-m", "mypy", "--config-file", str(config), "--cache-dir", str(tmp_path)]
    environment = {**os.environ, "MYPYPATH": str(Path(mt.__file__).parents[1])}
    done = subprocess.run([*command, str(use)], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
