"""What the figures of a run say beside the pixels."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from avfast import create_model
from avfast.data.clip_list import Clip, ClipList
from avfast.models.contract import AttentionMaps, Figures, Reconstruction
from avfast.train import figures as drawing
from avfast.train import summary
from avfast.train.figures import Labels, draw_attention, draw_losses, draw_reconstructions
from avfast.train.recipes import demo

pytest.importorskip("matplotlib")
NAMES = ("a bell, red", "costs $5 or $6")
CLIPS = ClipList(tuple(Clip(f"clip {i}\udcff", "x.mp4", "x.mp4", (i % 2,)) for i in range(6)), NAMES)
MODEL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "decoder_embed_dim": 16, "decoder_num_heads": 2}


@pytest.fixture
def drawn(monkeypatch):
    """The figures in place of their files."""
    figures, save = [], drawing._save
    monkeypatch.setattr(drawing, "_save", lambda figure, *rest: (figures.append(figure), save(figure, *rest)))
    return figures


def figures(model, audio, visual):
    draws = model.draw(len(audio))
    return model.figures({"audio": audio, "visual": visual}, draws, model(audio, visual, draws))


def texts(figure):
    figure.canvas.draw()
    return {text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))}


def test_reconstructions(tmp_path, drawn):
    model = create_model("avsiam_tiny", **MODEL, mask_ratios=[0.5])
    audio, visual = torch.randn(2, *model.audio_size), torch.randn(2, 3, 64, 64)
    shown = figures(model.eval(), audio, visual).reconstruction
    assert {side: share.tolist() for side, share in shown.masked.items()} == dict.fromkeys(
        ("audio", "visual"), [0.5, 0.5]
    )
    labels = Labels.of("demo: avsiam_tiny after 3 steps", CLIPS, [4, 5], model.frontend)
    draw_reconstructions(shown, labels, tmp_path / "x.png")
    said = texts(drawn[0])
    assert {"50% masked", "1.94 s", "250 Hz", "4 kHz", "log-mel power", "demo: avsiam_tiny after 3 steps"} <= said
    assert any("clip 4" in text and "a bell, red" in text for text in said)
    assert any(r"costs \$5 or \$6" in text for text in said)  # not a formula


def test_hertz_stand_where_the_filters_are():
    """Bin i of M is centred (i + 1) / (M + 1) of the way between the ends of the mel scale."""
    frontend = create_model("avsiam_tiny").frontend
    figure = drawing._figure(3, 3)
    axis = figure.subplots()
    Labels("", [], frontend).spectrogram(axis, torch.rand(192, 64))
    low, high = (1127 * math.log(1 + hertz / 700) for hertz in (20.0, 8000.0))
    for place, hertz in zip(axis.get_yticks(), (250, 1000, 4000), strict=True):
        assert low + (place + 1) * (high - low) / 65 == pytest.approx(1127 * math.log(1 + hertz / 700))


def test_fusion(tmp_path, drawn):
    model = create_model("deepavfusion_tiny", **MODEL)
    maps = figures(model.eval(), torch.randn(1, *model.audio_size), torch.randn(1, 3, 64, 64)).attention
    draw_attention(maps, Labels.of("recipe: model", CLIPS, [0], model.frontend), tmp_path / "x.png")
    said = texts(drawn[0])
    assert any(text.startswith("recipe: model\nr, p: the weight that the fusion tokens give") for text in said)
    assert {"weight / largest of its panel", "r, layer 0", "p, layer 1"} <= said


def test_a_map_of_one_modality(tmp_path, drawn):
    frontend = create_model("avsiam_tiny").frontend
    maps = AttentionMaps(torch.rand(1, 192, 64), None, {3: torch.rand(1, 4, 12)}, {}, "p")
    draw_attention(maps, Labels.of("title", CLIPS, [0], frontend), tmp_path / "x.png")
    assert {"audio", "p, layer 3"} <= texts(drawn[0]) and "visual" not in texts(drawn[0])


def test_losses(tmp_path, drawn):
    row = {"step": 2, "loss": 3.0, "losses": {"contrastive": 2.0, "reconstruction_audio": 1.0}}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row))
    draw_losses(tmp_path / "metrics.jsonl", "recipe: model", tmp_path / "x.png", 8)
    assert {"chance, ln 8", "nats", "mean squared error", "recipe: model", "step"} <= texts(drawn[0])
    assert drawn[0].axes[1].lines[1].get_ydata()[0] == pytest.approx(math.log(8))


@pytest.mark.parametrize(
    ("name", "unit"),
    [("mep_audio", "nats"), ("cpp_unimodal", "nats"), ("intra_modal_audio", "nats")]
    + [("distillation_visual", "mean squared error")],
)
def test_units_of_losses(tmp_path, drawn, name, unit):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 2, "loss": 3.0, "losses": {name: 2.0}}))
    draw_losses(tmp_path / "metrics.jsonl", "recipe: model", tmp_path / "x.png")
    assert [axis.get_ylabel() for axis in drawn[0].axes] == ["loss", unit]


def test_clips_of_which_nothing_is_masked_are_not_chosen(tmp_path, monkeypatch):
    a, v = torch.tensor([0.0, 0.5, 0.5, 0.5, 0.0, 0.3]), torch.tensor([0.5, 0.5, 0.0, 0.2, 0.0, 0.1])
    found = Figures(Reconstruction({"input": torch.arange(6.0)}, {}, {"audio": a, "visual": v}))
    batch = SimpleNamespace(index=torch.arange(6), has_audio=torch.ones(6) > 0, has_visual=torch.ones(6) > 0)
    trainer = SimpleNamespace(config=replace(demo(), figures=2), inputs=lambda *_, **__: ({"audio": None}, None))
    model, shown = MagicMock(), {}
    model.figures.return_value, model.passes = found, ("joint",)
    monkeypatch.setattr(summary, "eval_loader", lambda *_: [batch])
    monkeypatch.setattr(summary, "draw_reconstructions", lambda rows, labels, path: shown.update(rows=rows, at=labels))
    summary.paint(trainer, model, CLIPS, tmp_path, "title")
    assert shown["rows"].audio["input"].tolist() == [1, 3] and [name[5] for name in shown["at"].names] == ["1", "3"]
    trainer.config = replace(trainer.config, figures=4)  # too few of them: others follow
    summary.paint(trainer, model, CLIPS, tmp_path, "title")
    assert shown["rows"].audio["input"].tolist() == [0, 1, 3, 5]
