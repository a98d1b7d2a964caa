import math
import shlex
from dataclasses import replace

import pytest
import torch

from avfast import create_model
from avfast.data.clips import Batch
from avfast.data.spec import clips as clips_of
from avfast.data.spec import video
from avfast.train.__main__ import resolve
from avfast.train.config import Config, SettingError
from avfast.train.recipes import RECIPES, demo
from avfast.train.recipes.row import Row
from avfast.train.schedule import learning_rate
from avfast.train.setup import build_model
from avfast.train.tables import ROWS, TITLES, listing, main
from avfast.train.trainer import METRICS, Trainer

TWINS = {
    "avsiam_base": "avsiam_tiny",
    "avsiam_large": "avsiam_tiny",
    "avsiam_huge": "avsiam_tiny",
    "avsep_large": "avsep_tiny",
    "cav_mae_base": "cav_mae_tiny",
    "deepavfusion_base": "deepavfusion_tiny",
    "audio_mae_base": "audio_mae_tiny",
    "mavil_base": "mavil_tiny",
    "diffmavil_base": "diffmavil_tiny",
    "avbert_base": "avbert_tiny",
}
SMALL = {"audio_size": [8, 16], "audio_args": {"width": 4, "depths": [1, 1]}}
MAVIL_CONTRASTS = {"inter_modal", "intra_modal_audio", "intra_modal_visual"}


def name(row: Row) -> str:
    return f"{row.table}: {row.label}"


def given(row: Row) -> Config:
    """What the printed command asks for."""
    words = shlex.split(row.command())
    return resolve(words[words.index("avfast.train") + 1 :])


def tiny(config: Config) -> Config:
    """The same run with a tiny model, from random weights."""
    arguments = dict(config.model_args)
    if arguments.get("fusion_layers", 0) > 4:  # the twin has four
        arguments["fusion_layers"] = 4
    if "avbert" in config.model:
        arguments |= SMALL
    return replace(config, model=TWINS[config.model], model_args=arguments, timm=None, init_ast=None, init_audio=None)


def distinct() -> list[Config]:
    """Rows whose optimisation or model differs."""
    found = []
    for row in ROWS:
        config = tiny(given(row))
        key = (config.model, config.model_args, config.lr, config.betas)
        if key not in [k for k, _ in found]:
            found.append((key, config))
    return [config for _, config in found]


@pytest.mark.parametrize("row", ROWS, ids=name)
def test_the_command_asks_for_the_row(row):
    recipe = row.recipe()
    of_model = {k[6:]: v for k, v in row.overrides.items() if k.startswith("model.")}
    others = {k: v for k, v in row.overrides.items() if not k.startswith("model.")}
    want = replace(recipe, **others, data=row.data, eval_data=(row.eval_data,))
    assert given(row) == replace(want, model_args=recipe.model_args | of_model)
    assert row.table in TITLES and row.figures


@pytest.mark.parametrize("row", ROWS, ids=name)
def test_the_processes_make_the_papers_batch(row):
    words = [word.split("=") for word in row.command().split() if word.startswith("--n")]
    processes = math.prod(int(number) for _, number in words)
    config = given(row)
    step = config.batch_size * config.accumulate
    assert processes * step == (config.paper_batch or step)


def test_rows_are_not_given_twice():
    assert len({(row.table, row.label) for row in ROWS}) == len(ROWS)
    assert {row.table for row in ROWS} == set(TITLES)


def random_batch(model: torch.nn.Module, clips: int) -> Batch:
    everywhere, spec = torch.ones(clips, dtype=torch.bool), model.frontend.spec
    samples = int(spec.seconds * spec.sample_rate)
    shape = (clips, spec.num_frames, 3, spec.image_size, spec.image_size)
    return Batch(
        waveform=torch.randn(clips, samples),
        num_samples=torch.full((clips,), samples),
        frames=torch.randint(0, 256, shape, dtype=torch.uint8),
        has_audio=everywhere,
        has_visual=everywhere if spec.num_frames else ~everywhere,
        labels=None,
        index=torch.arange(clips),
        positions=tuple(range(clips)),
        step=0,
        total=clips,
        failures=[],
        short=~everywhere,
    )


def of_avbert(given: dict) -> tuple[set[str], tuple[str, ...]]:
    """The losses of a row, and the parts that do not learn where the other modality comes first."""
    if first := given.get("frozen"):
        other, parts = {"audio": "visual", "visual": "audio"}[first], ("adapters", "times", "mep_heads")
        return {f"mep_{first}"}, (
            f"{other}_cnn.",
            "cpp_heads.",
            *(f"{p}.{k}." for p in parts for k in (other, "fused")),
        )
    fusion, pairs = given.get("fusion", "mid"), given.get("cpp", True)
    expected = {"mep_audio", "mep_visual"} if fusion != "early" else set()
    expected |= {"mep_multimodal"} if fusion != "late" and given.get("multimodal_mep", True) else set()
    expected |= {"cpp_unimodal"} if pairs and fusion != "early" else set()
    return expected | ({"cpp_multimodal"} if pairs and fusion != "late" else set()), ()


@pytest.mark.parametrize("config", distinct(), ids=lambda c: f"{c.recipe} {c.model} {c.model_args}")
def test_one_step_of_every_kind_of_row(config):
    model = build_model(config)
    before = {k: v.clone() for k, v in model.named_parameters() if v.requires_grad}
    trainer = Trainer(model, config, torch.device("cpu"))
    for _ in range(2 if "avbert" in config.model else 1):  # the last norm of a bottleneck is 0 before the first
        found = trainer.step([random_batch(model, 6)], config.lr)
    losses = {name: value for name, value in found.items() if not name.startswith(METRICS)}
    still = {k for k, v in model.named_parameters() if k in before and torch.equal(v, before[k])}
    if "avbert" in config.model:
        expected, idle = of_avbert(config.model_args)
        assert set(losses) == {"loss"} | expected and all(math.isfinite(loss) and loss > 0 for loss in losses.values())
        assert still == {k for k in before if k.startswith(idle)}
        return
    expected = {"loss"}
    if model.contrasts:
        expected |= MAVIL_CONTRASTS if "mavil" in config.model else {"contrastive"}
    reconstructs = config.model_args.get("reconstruction_weight", 1)
    expected |= {"reconstruction_audio", "reconstruction_visual"} if reconstructs else set()
    expected -= {"reconstruction_visual"} if model.frontend.frames is None else set()
    assert set(losses) == expected and all(math.isfinite(loss) and loss > 0 for loss in losses.values())
    idle = ("decoder.", "fusion.") if not reconstructs else ()
    assert {k for k in still if not k.startswith(idle)} == set()


def test_distinct_rows_have_distinct_steps():
    """AVSiam: multi-ratio, three fixed ratios, contrastive only, separate encoders, released; CAV-MAE: three kinds;
    DeepAVFusion: full, token fusion, dense, four numbers of layers, six of tokens; MAViL with either decoder; DiffMAViL
    with either, and with the curriculum; AudioMAE with and without diffusion; AVBERT: two data sets, four kinds of
    fusion, three of other negatives, five of other sharing, three of something left out, two of frozen halves."""
    assert len(distinct()) == 10 + 13 + 2 + 3 + 2 + (2 + 4 + 3 + 5 + 3 + 2)


# Supplement of AVSiam, Tables 4-6, pre-training column: batch per GPU and GPUs; the rest is common to the three.
TABLES_4_TO_6 = {"Base": (96, "16 A5000"), "Large": (48, "32 A5000"), "Huge": (24, "64 V100")}


@pytest.mark.parametrize("size", TABLES_4_TO_6)
def test_recipes_are_tables_4_to_6(size):
    batch, gpus = TABLES_4_TO_6[size]
    (row,) = (row for row in ROWS if row.table == "supplement-4-6" and row.label == f"AVSiam-{size}")
    config = given(row)
    with torch.device("meta"):
        model = create_model(config.model, **config.model_args)
    assert row.figures == {
        "optimizer": config.optimizer.capitalize(),
        "betas": ", ".join(map(str, config.betas)),
        "weight decay": config.weight_decay,
        "lr": config.lr,
        "decay from": config.decay_start,
        "by": config.decay_rate,
        "every": config.decay_every,
        "epochs": config.epochs,
        "batch per GPU": config.batch_size,
        "GPUs": f"{config.paper_batch // config.batch_size} {gpus.split()[1]}",
        "mean": model.frontend.mean,
        "std": model.frontend.std,
    }
    assert (row.figures["batch per GPU"], row.figures["GPUs"]) == (batch, gpus)
    common = {"optimizer": "Adam", "betas": "0.95, 0.999", "weight decay": 5e-7, "lr": 1e-4, "decay from": 10}
    common |= {"by": 0.5, "every": 5, "epochs": 20, "mean": -5.081, "std": 4.485}
    assert common.items() <= row.figures.items()
    assert config.schedule == "step" and config.warmup_steps == 0 and config.accumulate == 1
    assert config.weights_csv == ()  # class balance sampling: no
    assert model.frontend.time_shift == 1024  # random time shifting: yes
    assert (model.contrastive_weight, model.reconstruction_weight) == (1, 1)  # CL + MAE
    assert model.mask_ratios == (0.0, 0.1, 0.2, 0.3, 0.4, 0.5) and len(model.decoder.blocks) == 6
    assert config.timm is not None and config.timm.startswith(f"vit_{size.lower()}_patch")


def test_the_cav_mae_recipe_is_scale_plus_plus():
    config = RECIPES["cav_mae_base_pretrain"]()
    with torch.device("meta"):
        model = create_model(config.model, **config.model_args)
    assert (config.optimizer, config.lr, config.betas, config.weight_decay) == ("adam", 2e-4, (0.95, 0.999), 5e-7)
    assert (config.decay_start, config.decay_rate, config.decay_every, config.epochs) == (10, 0.5, 5, 25)
    assert (config.batch_size * 8, config.paper_batch) == (256, 256)
    assert (model.mask_ratios, model.contrastive_weight, model.reconstruction_weight) == ((0.75,), 0.01, 1)


def test_the_released_recipe_has_the_released_layout():
    """Its model has the settings that a released Base checkpoint asks for, but for the file's own shapes."""
    config = RECIPES["avsiam_base_released"]()
    with torch.device("meta"):
        model = create_model(config.model, **config.model_args)
    assert model.passes == ("contrastive", "reconstruction") and model.encoder_a is not None
    assert (model.mask_ratios, model.audio_structure) == ((0.0, 0.2, 0.4, 0.6, 0.8), "time_frequency")
    assert (model.reconstruction_ratio, model.norm_pix, model.stop_gradient) == (0.75, False, False)
    assert model.double_embedding and len(model.decoder.blocks) == 8
    assert (model.encoder.blocks[0].norm1.eps, model.encoder.norm.eps) == (1e-5, 1e-6)


def test_deepavfusions_recipes_are_section_4_1():
    for data_set, epochs, batch in (("vggsound", 800, 1024), ("audioset", 200, 4096)):
        config = RECIPES[f"deepavfusion_{data_set}_pretrain"]()
        assert config.batch_size * config.accumulate * 8 == config.paper_batch == batch
        assert (config.epochs, config.warmup_epochs, config.schedule, config.min_lr) == (epochs, 40, "cosine", 0)
        assert (config.lr / config.lr_batch, config.weight_decay) == (1.5e-4 / 256, 0.05)
        assert (config.crop_scale, config.unimodal_ramp, config.model_args) == ((0.5, 1.0), 0, {})
        assert learning_rate(config, 40 * 10, 10, 8000) * 8 == pytest.approx(1.5e-4 * batch / 256)


def test_deepavfusions_released_recipes_are_the_released_settings():
    """README of the released code, and what ``from_released`` sets."""
    for data_set, batch, ratios in (("vggsound", 512, (0.25, 1.0)), ("audioset", 2048, (1.0, 4.0))):
        config = RECIPES[f"deepavfusion_{data_set}_released"]()
        assert config.batch_size * config.accumulate * 8 == config.paper_batch == batch
        assert (config.epochs, config.unimodal_ramp, config.decay_1d, config.betas) == (200, 0.5, False, (0.9, 0.95))
        with torch.device("meta"):
            model = create_model(config.model, **config.model_args)
        block = model.fusion_blocks["0"]
        hidden = block.mlp.fc1.out_features / 768, block.attn.q.out_features / 768
        assert (hidden[1], hidden[0]) == ratios and sorted(model.fusion_blocks) == sorted(map(str, range(12)))
        assert model.extra_repr().startswith("fusion_arch='factorized'")


@pytest.mark.parametrize(
    "name", ["mavil_pretrain", "diffmavil_pretrain", "audiomae_pretrain", "audiomae_diffusion_pretrain"]
)
def test_mavils_recipes_are_table_4(name):
    config = RECIPES[name]()
    assert (config.recipe, config.optimizer, config.betas, config.weight_decay) == (name, "adamw", (0.9, 0.95), 1e-5)
    assert (config.lr, config.lr_batch, config.min_lr, config.schedule) == (4e-4, None, 1e-6, "cosine")
    assert (config.warmup_epochs, config.epochs, config.batch_size * 256, config.paper_batch) == (8, 60, 2048, 2048)
    assert config.accumulate == 1 and config.clip_grad is None and config.weights_csv == ()
    with torch.device("meta"):
        frontend = create_model(config.model, **config.model_args).frontend
    assert (frontend.mean, frontend.std, frontend.deviations, frontend.num_frames) == (-4.268, 4.569, 2, 1024)
    assert frontend.roll and not (frontend.magnitude or frontend.noise or frontend.time_shift)  # "R"
    if "mavil" in name:
        assert frontend.spec.frames == video(16, 4.0)


def test_the_rows_of_table_2_are_steps_to_the_recipe():
    """Which also holds at the ends: the curriculum from 90 % to 80 %, which doubles the first batch."""
    found = {row.label: given(row) for row in ROWS if row.table == "diffmavil-2"}
    arguments = {label: config.model_args for label, config in found.items()}
    assert arguments["R1"] == {"decoder_attention": "self", "mask_ratio": 0.8}
    assert arguments["R2"] == {"mask_ratio": 0.8} and arguments["R3"] == arguments["R4"] == {"mask_ratio": [0.9, 0.8]}
    assert [found[f"R{i}"].adaptive_batch for i in range(1, 5)] == [False, False, False, True]
    recipe = RECIPES["diffmavil_pretrain"]()
    assert arguments["R4"] == recipe.model_args and recipe.adaptive_batch
    with torch.device("meta"):
        visible = create_model(recipe.model, **recipe.model_args).visible
    assert visible(1.0) / visible(0.0) == pytest.approx(2, rel=0.01)


@pytest.mark.parametrize(
    ("name", "batch", "steps", "clips"),
    [("kinetics_pretrain", 256, 220_000, 30), ("audioset_pretrain", 300, 220_000, 10), ("ablation", 4, 80_000, 30)],
)
def test_avberts_recipes_are_appendix_a_4(name, batch, steps, clips):
    config = RECIPES[f"avbert_{name}"]()
    assert (config.optimizer, config.amsgrad, config.betas, config.weight_decay) == ("adamw", True, (0.9, 0.98), 1e-4)
    assert (config.lr, config.lr * config.orthogonal_lr, config.lr_batch) == (1e-4, pytest.approx(1e-5), None)
    assert (config.steps, config.paper_batch, config.clip_grad, config.min_lr) == (steps, batch, None, 0)
    first, last = round(0.06 * steps), steps
    rates = [learning_rate(config, step, 100, steps) for step in (0, first - 1, (first + last) / 2, last)]
    assert rates == pytest.approx([1e-4 / first, 1e-4, 5e-5, 0])
    with torch.device("meta"):
        model = create_model(config.model, **config.model_args)
    spec, transformer = model.frontend.spec, model.transformer
    assert (spec.seconds, spec.frames, spec.image_size) == (clips, clips_of(clips, 32), 112)
    assert sum(p.numel() for p in transformer.parameters()) == 3_843_840 and transformer.orthogonal_parameters()


def test_avberts_schemes_have_the_papers_sizes():
    """Biases and norms counted, as 128M and 4M have it."""
    sizes = []
    for row in (row for row in ROWS if row.table == "avbert-1c"):
        config = given(row)
        with torch.device("meta"):
            transformer = create_model(config.model, **config.model_args).transformer
        sizes.append(sum(p.numel() for p in transformer.parameters()))
        assert (config.orthogonal_lr == 1) == (not transformer.orthogonal_parameters())  # else training refuses it
    assert sizes == [127_581_696, 7_397_760, 21_263_616, 42_527_232, 7_087_872, 3_843_840]


def test_listing(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(row.command() in printed and row.label in printed for row in ROWS)
    assert all(title in printed for title in TITLES.values())
    assert main(["--table", "ablation"]) == 0
    part = capsys.readouterr().out
    assert part.endswith(listing([row for row in ROWS if row.table == "ablation"]) + "\n") and "AVSiam-Huge" not in part
    assert main(["--table=ablatoin"]) == 2
    assert capsys.readouterr().err.startswith("avfast: unknown table 'ablatoin'; did you mean: ablation")
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert "[--table NAME]" in listed and all(name in listed for name in TITLES) and "AVSiam-Huge" not in listed
    assert main(["ablation"]) == 2
    assert capsys.readouterr().err == "avfast: unexpected 'ablation'; expected [--table NAME]\n"


def test_figures_stand_under_their_columns():
    rows = [
        Row("main", "a", demo, {"x": 1, "y": 22.5}, note=""),
        Row("main", "longer", demo, {"y": 3.0}, note="why"),
    ]
    lines = listing(rows).splitlines()
    assert lines[1:3] + lines[4:5] + lines[6:] == [
        "          x     y",
        "  a       1  22.5",
        "  longer  -   3.0",
        "      (why)",
    ]


def test_an_ast_checkpoint_starts_the_model(tmp_path):
    settings = {"patch_size": 16}  # one kernel for both modalities
    source = create_model("avsiam_tiny", **settings, shared_norms=True)
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter)
    state = {f"v.{k.removeprefix('encoder.')}": v for k, v in source.state_dict().items() if k.startswith("encoder.")}
    state |= {f"v.patch_embed.proj.{k}": v for k, v in source.patch_embed_a.proj.state_dict().items()}
    state |= {"v.cls_token": torch.zeros(1, 1, 128), "v.pos_embed": torch.randn(1, 2 + 48, 128)}
    torch.save({f"module.{k}": v for k, v in state.items()}, tmp_path / "ast.pth")
    config = Config(model="avsiam_tiny", model_args=settings, init_ast=str(tmp_path / "ast.pth"))
    model = build_model(config)
    assert torch.equal(model.encoder.blocks[1].attn.qkv.weight, source.encoder.blocks[1].attn.qkv.weight)
    assert torch.equal(model.encoder.norm.weight, source.encoder.norm.weight.expand(2, -1))
    assert torch.equal(model.patch_embed_a.proj.weight, source.patch_embed_a.proj.weight)
    resumed = build_model(config, fresh=False)
    assert not torch.equal(resumed.patch_embed_a.proj.weight, source.patch_embed_a.proj.weight)

    for changes, says in (
        ({"init_ast": str(tmp_path / "no.pth")}, "--init_ast .*no.pth: no checkpoint at .*; --init_ast none starts"),
        ({"model_args": settings | {"depth": 3}}, "--init_ast .*ast.pth: the checkpoint does not fit the model"),
        ({"model": "cav_mae_tiny"}, "--init_ast .*: cav_mae_tiny does not start from a Vision Transformer; use none"),
        ({"init_ast": None, "init_audio": "x.pth"}, "--init_audio x.pth: avsiam_tiny does not start from an AudioMAE"),
        ({"init_ast": None, "init_video": "x.pth"}, "--init_video x.pth: avsiam_tiny does not start from a mae_st"),
    ):
        with pytest.raises(SettingError, match=says):
            build_model(replace(config, **changes))
    with pytest.raises(SettingError, match="--init_ast .* and --timm x both start the encoder"):
        replace(config, timm="x")


def test_deepavfusion_starts_from_masked_autoencoders(tmp_path, monkeypatch):
    import timm

    settings = {"embed_dim": 64, "depth": 2, "num_heads": 4, "decoder_depth": 0, "audio_patch_size": 8}
    vit = {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4, "num_classes": 0, "global_pool": "token"}
    image = timm.models.VisionTransformer(img_size=64, **vit)
    audio = timm.models.VisionTransformer(img_size=64, in_chans=1, **vit)
    monkeypatch.setattr("avfast.released.vit.timm_vit", lambda name, pretrained, size: image)
    torch.save({"model": audio.state_dict() | {"decoder_pred.weight": torch.ones(2, 2)}}, tmp_path / "audiomae.pth")
    config = Config(
        model="deepavfusion_tiny", model_args=settings, timm="vit", init_audio=str(tmp_path / "audiomae.pth")
    )
    model = build_model(config)
    assert torch.equal(model.patch_embed.proj.weight, image.patch_embed.proj.weight)
    assert torch.equal(model.patch_embed_a.proj.weight, audio.patch_embed.proj.weight.mT)  # time x mel -> mel x time
    for blocks, source in ((model.blocks_v, image), (model.blocks_a, audio)):
        assert torch.equal(blocks[1].attn.qkv.weight, source.blocks[1].attn.qkv.weight)
    resumed = build_model(config, fresh=False)
    assert not torch.equal(resumed.patch_embed.proj.weight, image.patch_embed.proj.weight)
    with pytest.raises(SettingError, match="--init_audio no.pth: no checkpoint at no.pth; --init_audio none starts"):
        build_model(replace(config, init_audio="no.pth"))
