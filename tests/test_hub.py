"""Models saved as folders, published and read back; released checkpoints converted into such folders."""

from __future__ import annotations

import json
import re
import sys
import types

import pytest
import torch
from own_models import Own
from released import Released
from small_models import small_inference, small_released
from test_avbert_released import ReleasedAVBERT
from test_deepavfusion_released import ReleasedFusion
from test_models import NAMES, inputs, small

import avfast
from avfast import AVSiam, create_model, hub
from avfast.models.registry import from_released
from avfast.released.__main__ import main

SUMMARY = {
    "retrieval": {
        "gallery": 40, "audio_to_visual": {"R@1": 0.25, "MdR": 3.0}, "visual_to_audio": {"R@1": 0.2, "MdR": 4.0},
        "chance": {"R@1": 0.025, "MdR": 20.5},
    },
    "probe": {"of": "joint", "accuracy": 0.5, "chance": 0.125, "majority": 0.13, "audio": 0.4}, "knn": None,
    "notes": ["8 clips have no class"], "clips": {"train": 100, "held_out": 40}, "steps": 30, "processes": 2,
    "modalities": {"both": 140}, "bad_files": {"count": 0},
}  # fmt: skip


def features(model):
    return {k: x for k, x in vars(model.eval().encode(**inputs(model))).items() if x is not None}


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_model_comes_back_whole(name, tmp_path):
    model = small(name, frontend={"sample_rate": 8000})
    for parameter in model.parameters():
        parameter.data.add_(0.01 * torch.randn(parameter.shape))
    assert model.save_pretrained(tmp_path / "made" / name) == tmp_path / "made" / name
    for again in (
        avfast.from_pretrained(tmp_path / "made" / name),
        type(model).from_pretrained(tmp_path / "made" / name),
    ):
        assert type(again) is type(model) and again.frontend == model.frontend
        assert again.settings | {"frontend": 0} == model.settings | {"frontend": 0}
        found = features(again)
        assert all(torch.equal(found[k], x) for k, x in features(model).items()) and found
    assert oct((tmp_path / "made" / name / hub.WEIGHTS).stat().st_mode & 0o777) == oct(
        (tmp_path / "made" / name / hub.CONFIG).stat().st_mode & 0o777
    )


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("avbert")])
def test_the_decoder_can_be_left_out_or_start_anew(name, tmp_path):
    model = small(name)
    model.save_pretrained(tmp_path)
    found = features(avfast.from_pretrained(tmp_path, decoder_depth=0))
    assert all(torch.equal(found[k], x) for k, x in features(model).items())
    with pytest.warns(UserWarning, match="starting anew for decoder_embed_dim=8"):
        other = avfast.from_pretrained(tmp_path, decoder_embed_dim=8, frontend={"sample_rate": 8000})
    assert other.frontend.sample_rate == 8000
    with pytest.raises(ValueError, match=rf"{tmp_path}: the checkpoint does not fit the model: .*wrong shapes"):
        avfast.from_pretrained(tmp_path, embed_dim=64)


def test_another_size_cuts_or_interpolates_positions(tmp_path):
    model = small("avsiam_tiny")
    model.save_pretrained(tmp_path)
    short = avfast.from_pretrained(tmp_path, audio_size=(96, 64))
    table = model.pos_embed_a[0].unflatten(0, (4, 12))
    assert torch.equal(short.pos_embed_a[0], table[:, :6].flatten(0, 1)) and short.frontend.time_shift == 96
    other = avfast.from_pretrained(tmp_path, audio_size=(96, 64), resizing="interpolate")
    assert other.pos_embed_a.shape == short.pos_embed_a.shape and not torch.equal(other.pos_embed_a, short.pos_embed_a)


def test_defaults_of_another_day_change_nothing(tmp_path, monkeypatch):
    """The folder says everything, the front end's defaults too."""
    model = small("avsiam_tiny")
    folder = model.save_pretrained(tmp_path)
    said = json.loads((folder / hub.CONFIG).read_text())
    assert said["arguments"]["mask_ratios"] == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5] and said["model"] == "AVSiam"
    assert said["arguments"]["frontend"]["mean"] == -5.081
    said["arguments"]["frontend"]["mean"] = -4.0
    (folder / hub.CONFIG).write_text(json.dumps(said))
    assert avfast.from_pretrained(folder).frontend.mean == -4.0


def test_what_is_no_such_folder_is_said_in_one_line(tmp_path, monkeypatch):
    model = small("cav_mae_tiny")
    folder = model.save_pretrained(tmp_path / "cav")
    with pytest.raises(ValueError, match="cav holds a model of the class CAVMAE, not AVSiam"):
        AVSiam.from_pretrained(folder)
    (folder / hub.WEIGHTS).write_bytes((folder / hub.WEIGHTS).read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"{hub.WEIGHTS} is no whole safetensors file: cut short"):
        avfast.from_pretrained(folder)
    for text, message in (
        ("{", "not JSON"),
        ('{"recipe": "demo"}', "is a run folder: avfast.train.checkpoint.load_model reads it"),
        ('{"architectures": ["Bert"]}', "is of no model of avfast"),
        ('{"library": "avfast", "model": "Mine", "arguments": {}}', "class Mine, which is none of AVSiam, "),
    ):
        (folder / hub.CONFIG).write_text(text)
        with pytest.raises(ValueError, match=message):
            avfast.from_pretrained(folder)
    with pytest.raises(ValueError, match=f"no {hub.CONFIG}; expected a folder of save_pretrained"):
        avfast.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="/no/such: no such folder; expected one, or OWNER/NAME"):
        avfast.from_pretrained("/no/such")
    model.settings["frontend"] = {"mean": torch.zeros(1)}
    model.frontend.mean = torch.zeros(1)
    with pytest.raises(ValueError, match="frontend: a dict cannot be written into config.json"):
        model.save_pretrained(folder)


def test_a_hub_id_without_network_ends_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError) as raised:
        avfast.from_pretrained("owner/name", cache_dir=tmp_path)
    assert re.fullmatch(
        "owner/name: no such folder here, and not from the Hugging Face Hub: no connection to it, and no copy in the "
        "local cache", str(raised.value)
    )  # fmt: skip


def test_a_model_comes_from_the_hub(tmp_path, monkeypatch):
    model = small("avsiam_tiny")
    folder, asked = model.save_pretrained(tmp_path), []

    def download(repo, name, **given):
        asked.append((repo, name, given["revision"]))
        return str(folder / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    again = avfast.from_pretrained("owner/name", revision="v1")
    assert asked == [("owner/name", hub.CONFIG, "v1"), ("owner/name", hub.WEIGHTS, "v1")]
    assert torch.equal(again.pos_embed, model.pos_embed)


def test_publishing_uploads_the_folder(monkeypatch):
    sent = {}

    class Api:
        def __init__(self, token):
            sent["token"] = token

        def create_repo(self, repo_id, **given):
            sent["repo"] = given
            return types.SimpleNamespace(repo_id=f"me/{repo_id}")

        def upload_folder(self, *, repo_id, folder_path, **given):
            sent["names"] = sorted(p.name for p in hub.Path(folder_path).iterdir())
            return f"https://huggingface.co/{repo_id}"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    where = small("cav_mae_tiny").push_to_hub("name", private=True, token="t", license="mit")
    assert where == "https://huggingface.co/me/name" and sent["names"] == [hub.CARD, hub.CONFIG, hub.WEIGHTS]
    assert sent["token"] == "t" and sent["repo"] == {"private": True, "exist_ok": True}


def test_the_card_tells_recipe_data_figures_and_licence(tmp_path):
    from avfast.train.recipes import RECIPES

    config = json.loads(RECIPES["demo"]().to_json()) | {"data": ["/home/me/secret/clips"], "init_ast": "/home/me/a.pth"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    model = small("avsiam_tiny")
    card = (model.save_pretrained(tmp_path / "out", run=tmp_path, license="cc-by-4.0") / hub.CARD).read_text()
    for line in (
        "license: cc-by-4.0", "library_name: avfast", "# AVSiam", "| recipe | demo |", "| data | clips |",
        "| started from | init_ast a.pth |", "| clips trained on | 100 |", "| modalities | both 140 |",
        "| files that could not be read | 0 |", "|  | R@1 | MdR |", "| audio to visual | 25.0% | 3.0 |",
        "| chance | 2.5% | 20.5 |", "| joint | 50.0% |", "| chance | 12.5% |", "Note: 8 clips have no class.",
        "cc-by-4.0",
    ):  # fmt: skip
        assert line in card.splitlines(), line
    assert "/home/me" not in card and "Siamese Vision Transformers" in card
    plain = (model.save_pretrained(tmp_path / "plain") / hub.CARD).read_text()
    assert "## Figures" not in plain and "license:" not in plain and "Not stated by who published them." in plain
    with pytest.raises(ValueError, match="no run folder"):
        model.save_pretrained(tmp_path / "other", run=tmp_path / "plain")


# Released checkpoints.


NARROW = {768: 64, 2304: 192, 3072: 256, 1536: 128, 512: 64, 2048: 256, 192: 16, 384: 32}


def narrow(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """Random weights of these keys, thinner than they are, for spectrograms of 128 frames."""
    state = {}
    for key, shape in shapes.items():
        thinner = [NARROW.get(n, n) for n in shape]
        if "pred_v" in key:
            thinner[0] = 768  # 16 x 16 pixels of three colours
        elif "decoder" in key and "qkv" in key:
            thinner[0] = 192
        state[key] = 0.02 * torch.randn(thinner)
    return state


def first_blocks(name: str, layout: str) -> dict[str, torch.Tensor]:
    """A released layout with one block of each kind."""
    keys = Released(name).manifest[layout]["keys"]
    return narrow({k: shape for k, shape, _ in keys if not re.search(r"blocks(_[avu])?\.([1-9]|1\d)\.", k)})


def fusion() -> dict[str, torch.Tensor]:
    """DeepAVFusion's encoder with one layer."""
    return narrow({k: s for k, s in ReleasedFusion("dense").keys(False).items() if not re.search(r"\.[1-9]\d?\.", k)})


def avbert() -> dict[str, torch.Tensor]:
    """AVBERT's, mostly without values that would take long to draw: features begin with the outputs of the CNNs."""
    state = {}
    for key, shape in ReleasedAVBERT().shapes.items():
        drawn = "visual_conv" not in key and not key.endswith("tracked")
        state[key] = 0.02 * torch.randn(shape) if drawn else torch.zeros(shape)
    return state


LAYOUTS = {
    "avsiam_base": (lambda: first_blocks("avsiam", "pretrain"), []),
    "avsiam_large": (lambda: first_blocks("avsiam", "finetune"), []),
    "cav_mae_base": (lambda: first_blocks("cav_mae", "pretrain"), []),
    "deepavfusion_base": (fusion, []),
    "audio_mae_tiny": (small_released, ["--model.num_heads", "2"]),
    "mavil_tiny": (lambda: small_inference({"av": 3}), ["--model.img_size=32"]),
    "avbert_released": (avbert, []),
}


@pytest.mark.parametrize("preset", [pytest.param(p, marks=pytest.mark.slow if "avbert" in p else ()) for p in LAYOUTS])
def test_released_checkpoints_become_folders(preset, tmp_path, capsys):
    state, words = LAYOUTS[preset]
    torch.save({"model": state()}, tmp_path / "released.pth")
    command = ["convert", str(tmp_path / "released.pth"), "--preset", preset, "--out", str(tmp_path / "out"), *words]
    assert main([*command, "--license", "cc-by-nc-4.0"]) == 0
    out = capsys.readouterr().out
    assert f"avfast.from_pretrained('{tmp_path / 'out'}') reads it" in out
    assert "cc-by-nc-4.0" in (tmp_path / "out" / hub.CARD).read_text()
    assert ("warning: the checkpoint has depth" in out) == (preset != "avbert_released")
    settings = {"img_size": 32} if preset == "mavil_tiny" else {"num_heads": 2} if preset == "audio_mae_tiny" else {}
    torch.manual_seed(1)
    got = avfast.from_pretrained(tmp_path / "out").eval()
    want = type(got).from_released(tmp_path / "released.pth", **settings).eval()
    assert got.frontend == want.frontend
    with torch.no_grad():
        data = given(want)
        wanted, found = (vars(model.encode(**data)) for model in (want, got))
    assert any(x is not None and x.abs().max() > 0 for x in wanted.values())
    assert all(x is None or torch.equal(found[k], x) for k, x in wanted.items())


def given(model):
    if isinstance(model, avfast.AVBERT):
        return {name: torch.randn(1, 3, model.cnn(name).out_features) for name in ("audio", "visual")}
    return inputs(model, 1)


def test_the_command_names_what_is_wrong(tmp_path, capsys):
    torch.save(small_released(), tmp_path / "released.pth")
    file, out = str(tmp_path / "released.pth"), str(tmp_path / "out")
    for words, message in (
        ([file, "--preset", "audio_mae"], "unknown model 'audio_mae'; did you mean audio_mae_tiny"),
        ([file, "--preset", "avsiam_base"], "released.pth: no released AVSiam checkpoint"),
        ([file, "--preset", "audio_mae_tiny", "--model.dept", "2"], "unknown setting of audio_mae_tiny '--model.dept'"),
        ([file, "--preset", "audio_mae_tiny", "--depth", "2"], "unexpected --depth; expected --model.ARGUMENT VALUE"),
        ([out, "--preset", "audio_mae_tiny"], "no checkpoint at"),
    ):
        assert main(["convert", *words, "--out", out]) == 2
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1 and message in said[0], said
    assert not (tmp_path / "out").exists()


def test_a_preset_without_a_released_layout(monkeypatch):
    monkeypatch.setitem(avfast.models.registry.PRESETS, "own", (Own, {}))
    with pytest.raises(ValueError, match="own: Own knows no released checkpoints"):
        from_released({}, "own")


def test_a_missing_huggingface_hub_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        avfast.from_pretrained("owner/name")
    assert create_model("avsiam_tiny").settings["depth"] == 4
