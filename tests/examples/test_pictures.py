import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="the pictures need the draw extra")
pytest.importorskip("librosa", reason="the spectrogram needs the speech extra")

import matplotlib
import matplotlib.image

import pictures
from pictures import plot_attention, plot_comparison, plot_contributions, plot_losses

HISTORY = [{"step": step, "text": 3.0 / (1 + step), "speech": 5.0 / (1 + step)} for step in range(50)]
WAVEFORM = np.sin(np.arange(8000) / 20).astype(np.float32)


def drawn(path):
    image = matplotlib.image.imread(path)
    return image[..., :3].std() > 0.01


def test_losses_are_drawn_where_asked_and_leave_no_global_state(tmp_path):
    before = dict(matplotlib.rcParams)
    path = plot_losses(HISTORY, tmp_path / "new" / "losses.png")
    assert path == tmp_path / "new" / "losses.png"
    assert drawn(path)
    assert dict(matplotlib.rcParams) == before


def test_a_single_step_and_a_loss_that_starts_late_can_be_drawn(tmp_path):
    assert drawn(plot_losses([{"step": 0, "text": 1.0}], tmp_path / "one.png"))
    assert drawn(plot_losses([*HISTORY, {"step": 50, "image": 2.0}], tmp_path / "late.png"))


def test_contributions_get_one_panel_for_each_link(tmp_path):
    names = [f"{link} {tap}" for link in ("a->b", "b->a") for tap in ("0-0", "1-1")]
    history = [{"step": step, **dict.fromkeys(names, 0.01 * step)} for step in range(5)]
    both = matplotlib.image.imread(plot_contributions(history, tmp_path / "both.png"))
    one = [{name: value for name, value in entry.items() if not name.startswith("b")} for entry in history]
    single = matplotlib.image.imread(plot_contributions(one, tmp_path / "single.png"))
    assert both.shape[1] > 1.5 * single.shape[1]


def test_contributions_are_labelled_for_people(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(pictures, "_write", lambda figure, path: figures.append(figure))
    links = ("a->b", "b->a", "a->c", "c->a")
    names = [f"{link} {tap}" for link in links for tap in ("0-0", "10-5", "2-1")]
    values = {name: 0.1 * place for place, name in enumerate(names)}
    plot_contributions([{"step": step, **values} for step in (3, 5)], tmp_path / "links.png")
    (figure,) = figures
    panels = [axes for axes in figure.axes if axes.lines]
    assert figure.get_suptitle() == "How much each link contributes"
    assert [axes.get_title() for axes in panels] == ["a → b", "b → a", "a → c", "c → a"]
    labels = ["embeddings", "layer 2 → 1", "layer 10 → 5"]
    for axes in panels:
        assert [text.get_text() for text in axes.get_legend().get_texts()] == labels
        assert len({tuple(line.get_color()) for line in axes.lines}) == 3
        bottom, top = axes.get_ylim()
        assert bottom == 0
        assert top > max(values.values())
    assert panels[0].get_ylabel() == "norm of the update / norm of the state"
    assert not any(axes.axison for axes in figure.axes[len(links) :])


def test_a_contribution_without_a_link_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="'speech adapter'"):
        plot_contributions([{"step": 0, "speech adapter": 0.1}], tmp_path / "contributions.png")


@pytest.mark.parametrize("draw", [plot_losses, plot_contributions])
def test_an_empty_history_is_refused(draw, tmp_path):
    with pytest.raises(ValueError, match="nothing to draw"):
        draw([], tmp_path / "none.png")


def test_attention_is_the_same_picture_from_either_side_of_the_link(tmp_path):
    weights = np.random.default_rng(0).dirichlet(np.ones(25), size=3)
    options = {"transcript_labels": ["$one$", "two", "</s>"], "seconds_per_unit": 0.02, "waveform": WAVEFORM}
    source = plot_attention(weights, tmp_path / "source.png", **options)
    target = plot_attention(weights.T, tmp_path / "target.png", speech="target", **options)
    assert drawn(source)
    assert source.read_bytes() == target.read_bytes()


def test_attention_asks_for_a_label_for_each_text_token(tmp_path):
    with pytest.raises(ValueError, match=r"\(3, 25\).*got 2 labels"):
        plot_attention(
            np.ones((3, 25)),
            tmp_path / "attention.png",
            transcript_labels=["one", "two"],
            seconds_per_unit=0.02,
            waveform=WAVEFORM,
        )


def test_comparison_draws_systems_that_lack_a_measure(tmp_path):
    rows = [{"system": "zipper", "ASR": 3.0, "TTS": 18.0}, {"system": "ceiling", "TTS": 5.0}]
    assert drawn(plot_comparison(rows, tmp_path / "comparison.png"))
    with pytest.raises(ValueError, match="nothing to compare"):
        plot_comparison([], tmp_path / "none.png")
