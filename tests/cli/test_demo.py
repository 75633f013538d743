"""The demo page: what it decodes and shows, and, with -m slow, the page in a browser."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import multitower as mt
from letters import Letters
from multitower.cli.demo import answers, attention, joined, make_page
from multitower.testing import tiny_tower

pytest.importorskip("matplotlib", reason="needs matplotlib")


@pytest.fixture(scope="module")
def pipe(fused: Path) -> mt.Pipeline:
    return mt.Pipeline.from_pretrained(fused)


def test_text_is_shown_as_it_comes_and_attention_last(pipe: mt.Pipeline, parts: Path) -> None:
    clip = str(parts / "clips" / "0.wav")
    *pieces, (text, figure) = answers(pipe, "speech", "text", clip, 6)
    assert text == pipe([("speech", clip)], output="text", max_new_tokens=6, do_sample=False)
    assert all(shown is None for _, shown in pieces)
    (image,) = figure.axes[0].images
    given = len(pipe.modalities["speech"].encode(clip))
    assert image.get_array().shape == (len(figure.axes[0].get_yticklabels()), given)


def test_sound_is_shown_as_a_file(pipe: mt.Pipeline) -> None:
    ((path, figure),) = answers(pipe, "text", "speech", "two", 9)
    assert Path(path).suffix == ".wav"
    assert len(pipe.modalities["speech"].read_file(path))
    assert figure is not None


def test_attention_is_that_of_the_link(pipe: mt.Pipeline) -> None:
    given = mt.Segment("text", pipe.modalities["text"].encode("two"))
    answer = mt.Segment("speech", torch.tensor([16, 3, 4, 17]))
    weights = pipe.model(**mt.collate([[given, answer]]), output_attentions=True).attentions["text->speech"]
    expected = torch.stack([tap.mean(1)[0] for tap in weights.values()]).mean(0)
    (image,) = attention(pipe, given, answer).axes[0].images
    torch.testing.assert_close(torch.as_tensor(image.get_array().data), expected)


@pytest.mark.filterwarnings("ignore")  # about event loops that Gradio leaves open
def test_each_direction_is_called_by_its_name_from_other_programs(pipe: mt.Pipeline) -> None:
    pytest.importorskip("gradio", reason="the page needs the extra demo")
    named = make_page(pipe).get_api_info()["named_endpoints"]
    gc.collect()
    assert set(named) == {"/speech_to_text", "/text_to_speech"}


def test_only_towers_that_read_each_other_have_a_tab() -> None:
    graph = mt.FusionGraph()
    for place, name in enumerate(("a", "b", "c", "d")):
        graph.add_tower(name, tiny_tower(place, vocab_size=14))
    graph.add_link("a", "b", interleave=1)
    graph.add_link("b", "c", interleave=1)
    pipe = mt.Pipeline(graph.compile(), {name: Letters() for name in ("a", "c", "d")})
    assert joined(pipe) == [("a", "c")]


@pytest.fixture
def page(pipe: mt.Pipeline) -> Iterator[object]:
    pytest.importorskip("gradio", reason="the page needs the extra demo")
    browsers = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs Chromium")
    blocks = make_page(pipe)
    _, url, _ = blocks.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    with browsers.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        opened = browser.new_page()
        opened.goto(url)
        yield opened
        browser.close()
    blocks.close()
    gc.collect()  # warn about open loops here, not in a later test


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the server of the page
def test_a_recording_is_uploaded_and_its_transcript_read(page, pipe: mt.Pipeline, parts: Path) -> None:
    clip = parts / "clips" / "0.wav"
    page.wait_for_selector("text=speech", timeout=120_000)
    page.set_input_files("input[type=file]", str(clip))
    page.wait_for_selector("button[aria-label='Play']", timeout=60_000)
    page.click('button:has-text("Decode text")')
    expected = pipe([("speech", str(clip))], output="text", max_new_tokens=200, do_sample=False)
    box = page.get_by_label("text", exact=True).first
    page.wait_for_function(
        "([box, text]) => box.value.trim() === text.trim()",
        arg=[box.element_handle(), expected],
        timeout=120_000,
    )
