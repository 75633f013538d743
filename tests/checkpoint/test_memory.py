"""Memory of a new process that loads a checkpoint."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import transformers

import multitower as mt

LOAD = """
import sys
import multitower as mt

def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024

mt.FusedModel.from_pretrained(sys.argv[1])  # a small one, so that all is imported
before = resident()
model = mt.FusedModel.from_pretrained(sys.argv[2], dtype=sys.argv[3] if len(sys.argv) > 3 else None)
for parameter in model.parameters():  # what is mapped counts once it is read
    parameter.detach().sum()
print(resident() - before)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Save a small checkpoint, and one of about 100 MB."""
    place = tmp_path_factory.mktemp("memory")
    for name, width in (("small", 16), ("large", 512)):
        config = transformers.LlamaConfig(
            vocab_size=8 * width,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=8,
            num_attention_heads=4,
        )
        graph = mt.FusionGraph()
        for tower in ("one", "other"):
            graph.add_tower(tower, transformers.LlamaForCausalLM(config), adapter=None)
        graph.add_link("one", "other", interleave=4)
        graph.compile().save_pretrained(place / name)
    return place / "small", place / "large"


@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured only on Linux")
@pytest.mark.parametrize("dtype", [pytest.param(None, marks=pytest.mark.slow), "bfloat16"])
def test_loading_takes_what_is_stored_and_what_is_converted(
    folders: tuple[Path, Path], dtype: str | None
) -> None:
    command = [sys.executable, "-c", LOAD, *map(str, folders), *([dtype] if dtype else [])]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    stored = sum(file.stat().st_size for file in folders[1].rglob("*.safetensors"))
    assert stored > 100e6
    converted = stored / 2 if dtype else 0  # a file stays mapped until its last tensor is freed
    assert 0.5 * stored < int(done.stdout) < 1.1 * stored + converted
