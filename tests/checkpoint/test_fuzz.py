"""Load checkpoints with randomly changed files."""

from __future__ import annotations

import json
import random
import resource
import time
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file

import multitower as mt
from fuzzing import mutate
from multitower.storage import files as storage_files
from tampering import rewrite_manifest
from victims import Base, at_most

KINDS = ["plain", "transformers", "lora", "modality"]


def fuzz(base: Base, rounds: int, seed: int) -> Counter[str]:
    """Change a file in each round, half of the time with the manifest; count the outcomes.

    Half of the time files are hashed in full, like small ones, otherwise by samples, like large ones.
    """
    chance, outcomes = random.Random(seed), Counter[str]()
    before = base.load()
    expected, graph = before.state_dict(), before.graph
    fusion = base.folder / "fusion.json"
    manifest = fusion.read_bytes()
    files = sorted(path for path in base.folder.rglob("*") if path.suffix in (".json", ".safetensors"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(rounds):
        file = fusion if chance.random() < 0.3 else chance.choice(files)
        kept = file.read_bytes()
        said, changed = mutate(str(file.relative_to(base.folder)), kept, chance)
        file.write_bytes(changed)
        again = chance.random() < 0.5
        if again:
            try:
                rewrite_manifest(base.folder, tensors=file != fusion)
            except (ValueError, RecursionError, AttributeError, LookupError, TypeError):
                again = False  # no longer JSON
        whole = chance.random() < 0.5
        try:
            with at_most(60), pytest.MonkeyPatch.context() as patch:
                patch.setattr(storage_files, "SMALL", storage_files.SMALL if whole else 0)
                patch.setattr(storage_files, "BLOCK", storage_files.BLOCK if whole else 1)
                found = base.load()
        except mt.errors.CheckpointError:
            outcomes["agrees, refused" if again else "refused"] += 1
        except mt.errors.PluginError:
            assert "modalities" in json.loads(fusion.read_text()), said
            outcomes["no such plugin"] += 1
        except BaseException as error:
            raise AssertionError(f"seed {seed}, round {number}: {said}: {error!r}") from error
        else:
            if again:
                stored = load_file(base.folder / "links.safetensors")
                state = found.state_dict()
                assert all(same(state[key], stored[key]) for key in stored), said
                assert {key for key in state if not key.startswith("towers.")} == set(stored), said
                outcomes["agrees, loaded as it is written"] += 1
            else:
                assert found.graph == graph, said
                state = found.state_dict()
                assert state.keys() == expected.keys(), said
                assert all(alike(state[key], value) for key, value in expected.items()), said
                assert not whole or all(same(state[key], value) for key, value in expected.items()), said
                outcomes["loaded as it was" if whole else "loaded by samples"] += 1
        file.write_bytes(kept)
        fusion.write_bytes(manifest)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    assert grown < 1_000_000, f"memory grew by {grown} kB"
    return outcomes


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether tensors are equal bit for bit, including NaN."""
    return alike(one, other) and one.detach().numpy().tobytes() == other.detach().numpy().tobytes()


def alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (one.shape, one.dtype) == (other.shape, other.dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")  # warnings of transformers and peft about damaged files
def test_what_is_changed_at_random_is_refused_or_loaded_right(kind: str, base: Base) -> None:
    outcomes = fuzz(base, 100 if kind in ("plain", "modality") else 25, seed=1)
    assert outcomes["refused"] > 5
    assert outcomes["agrees, refused"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")  # warnings of transformers and peft about damaged files
def test_thousands_of_changes_are_refused_or_loaded_right(kind: str, base: Base) -> None:
    rounds = 2000 if kind in ("plain", "modality") else 1000
    begin = time.monotonic()
    outcomes = fuzz(base, rounds, seed=2)
    print(f"{kind}: {rounds} changes in {time.monotonic() - begin:.0f} s: {dict(outcomes)}")
