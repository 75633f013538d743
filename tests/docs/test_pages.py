"""Run the Python blocks of the documentation's pages, and compare what they print."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest

from models import causal_lm
from pages import DOCS, PAGES, Block, blocks, name

for needed in ("accelerate", "datasets", "peft", "tokenizers", "transformers"):
    pytest.importorskip(needed, reason="the pages train decoders of transformers")

QUICK = ("index.md", "concepts.md", "own_decoder.md", "troubleshooting.md", "tutorials/reuse.md")
RUN = (*QUICK, "start.md", "tutorials/two_models.md", "tutorials/recordings.md", "raw_data.md")
ELSEWHERE = ("conversations.md", "own_modality.md", "training.md")
"""Pages that other tests run."""
FRAGMENTS = ("estimate.md", "hub_and_export.md", "kept_states.md", "serving.md", "speech.md")
"""Pages whose Python needs objects that they do not define; it is only compiled."""

NOT_ON_CPU = "ignore:'pin_memory' argument is set"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(page: str, change: dict[str, str] | None = None) -> dict[str, Any]:
    """Run the blocks of a page in one namespace; compare text blocks with the output before them."""
    names: dict[str, Any] = {"__name__": "__main__"}
    printed = ""
    for block in blocks(DOCS / page):
        if block.kind == "text":
            assert "".join(printed.split()) == "".join(block.code.split()), f"{page}, line {block.line}"
        elif block.kind == "python":
            printed = execute(page, block, names, change or {})
    return names


def execute(page: str, block: Block, names: dict[str, Any], change: dict[str, str]) -> str:
    code = block.code
    for before, after in change.items():
        code = code.replace(before, after)
    compiled = compile("\n" * block.line + code, page, "exec")
    if block.mark and not change:
        return ""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compiled, names)
    return printed.getvalue()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_compiles(page: Path) -> None:
    for block in blocks(page):
        if block.kind == "python":
            compile(block.code, name(page), "exec")


def test_every_page_with_python_is_known() -> None:
    with_python = {
        page.relative_to(DOCS).as_posix()
        for page in DOCS.rglob("*.md")
        if any(block.kind == "python" for block in blocks(page))
    }
    assert with_python | set(FRAGMENTS) == {*RUN, *ELSEWHERE, *FRAGMENTS}


@pytest.mark.parametrize(
    "page", ["index.md", "concepts.md", "troubleshooting.md", "tutorials/reuse.md", "own_decoder.md"]
)
def test_pages_run(page: str) -> None:
    run(page)


@pytest.mark.filterwarnings(NOT_ON_CPU)
def test_the_first_steps_teach() -> None:
    names = run("start.md")
    assert names["right"] >= 90


@pytest.mark.filterwarnings(NOT_ON_CPU)
def test_two_models_are_fused() -> None:
    fewer = {
        "arguments(40)": "arguments(2)",
        "arguments(200)": "arguments(2)",
        "torch.randperm(1000)": "torch.randperm(30)",
        "test_size=100": "test_size=4",
    }
    names = run("tutorials/two_models.md", fewer)
    assert names["again"].modalities.keys() == {"digits", "words"}


@pytest.mark.slow
@pytest.mark.filterwarnings(NOT_ON_CPU)
def test_two_models_learn() -> None:
    assert run("tutorials/two_models.md")["measured"]["eval_right"] > 0.9


def write_tokenizer(folder: str) -> None:
    import tokenizers
    import transformers

    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2, "four": 3, "two": 4, "nine": 5}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)


@pytest.mark.filterwarnings(NOT_ON_CPU)
@pytest.mark.filterwarnings("ignore:.*vectors are few")  # its clips are short
def test_recordings_become_a_model_that_speaks() -> None:
    np = pytest.importorskip("numpy", reason="needs numpy")
    soundfile = pytest.importorskip("soundfile", reason="the page needs the speech extra")
    for needed in ("librosa", "typer", "yaml"):
        pytest.importorskip(needed, reason="the page needs the speech and cli extras")
    from multitower.cli import main

    Path("recordings").mkdir()
    lines = ["file_name,transcription"]
    for number in range(6):
        sound = np.random.default_rng(number).normal(scale=0.1, size=8000)
        soundfile.write(f"recordings/{number}.wav", sound, 16_000)
        lines.append(f"{number}.wav,four two")
    Path("recordings/metadata.csv").write_text("\n".join(lines))
    causal_lm("llama", vocab_size=80, depth=4).save_pretrained("path/to/text-decoder")
    write_tokenizer("path/to/text-decoder")
    quick = {
        "units=512, rate=25": "units=16, rate=25, refine_steps=0",
        "max_steps=300": "max_steps=2",
        "max_steps: 800": "max_steps: 2, use_cpu: true",
        "train_batch_size: 32": "train_batch_size: 2",
        "held_out: 50": "held_out: 2",
        "eval_steps: 200": "eval_steps: 1",
    }
    page, names = "tutorials/recordings.md", dict[str, Any]()
    for block in blocks(DOCS / page):
        if block.kind == "python":
            execute(page, block, names, quick)
        elif block.kind == "yaml":
            recipe = block.code
            for before, after in quick.items():
                recipe = recipe.replace(before, after)
            Path("recipe.yaml").write_text(recipe)
            assert main(["train", "recipe.yaml"]) == 0
    assert Path("units.wav").stat().st_size > 0 < Path("said.wav").stat().st_size


def test_raw_data_go_in_and_come_out() -> None:
    np = pytest.importorskip("numpy", reason="needs numpy")
    soundfile = pytest.importorskip("soundfile", reason="the page needs the speech extra")
    pytest.importorskip("librosa", reason="the page needs the speech extra")
    import multitower as mt

    write_tokenizer("path/to/text-decoder")
    graph = mt.FusionGraph()
    for tower in ("speech", "text"):
        graph.add_tower(tower, causal_lm("llama", vocab_size=80))
    graph.add_link("speech", "text", interleave=1)
    graph.add_link("text", "speech", interleave=1)
    graph.compile().save_pretrained("path/to/fused")
    soundfile.write("clip.wav", np.random.default_rng(0).normal(scale=0.1, size=160_000), 16_000)
    names = run(
        "raw_data.md", {"units=64": "units=64, refine_steps=1", "max_new_tokens=60": "max_new_tokens=5"}
    )
    assert names["pipe"].modalities.keys() == {"text", "speech"}
