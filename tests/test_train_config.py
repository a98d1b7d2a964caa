import dataclasses
import json
import logging
import os
import subprocess
import sys
import warnings

import pytest

from avfast.models import registry
from avfast.train import config as settings
from avfast.train.__main__ import main, resolve
from avfast.train.config import Config, SettingError, fields, from_dict, from_json
from avfast.train.evaluate import main as evaluate
from avfast.train.log import plain_warnings
from avfast.train.recipes import RECIPES, demo
from avfast.train.setup import check_compiler
from avfast.train.trainer import parameter_groups


def test_every_field_is_documented():
    assert all(field.metadata["doc"] for field in fields().values())


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_survive_json(name, tmp_path):
    recipe = RECIPES[name]()
    assert recipe.recipe == name
    (tmp_path / "config.json").write_text(recipe.to_json())
    assert from_json(tmp_path / "config.json") == recipe
    assert resolve(["--config", str(tmp_path / "config.json")]) == recipe


def test_groups_of_parameters():
    import torch

    model = torch.nn.ModuleDict({"image": torch.nn.Linear(2, 3), "fusion": torch.nn.Linear(3, 4)})
    (group,) = parameter_groups(model, Config())
    assert group["params"] == list(model.parameters()) and group["weight_decay"] == Config().weight_decay
    model.parameter_groups = dict
    with pytest.raises(SettingError, match="avsiam_base names no unimodal parts"):
        parameter_groups(model, Config(unimodal_ramp=0.5))
    model.parameter_groups = lambda: {"unimodal": list(model["image"].parameters())}
    groups = parameter_groups(model, Config(unimodal_ramp=0.5, decay_1d=False, weight_decay=0.05))
    found = {(g["unimodal"], g["weight_decay"]): [tuple(p.shape) for p in g["params"]] for g in groups}
    assert found == {(True, 0.05): [(3, 2)], (True, 0.0): [(3,)], (False, 0.05): [(4, 3)], (False, 0.0): [(4,)]}


def test_groups_of_orthogonal_matrices():
    import torch

    model = torch.nn.ModuleDict({"skew": torch.nn.Linear(3, 3, bias=False), "rest": torch.nn.Linear(3, 4)})
    model.parameter_groups = dict
    for changes, says in (
        ({"orthogonal_lr": 0.1}, "--orthogonal_lr 0.1: avsiam_base names no orthogonal parts; use 1"),
        ({"decay_orthogonal": False}, "--no-decay_orthogonal: avsiam_base names no orthogonal parts; use --decay_"),
    ):
        with pytest.raises(SettingError, match=says):
            parameter_groups(model, Config(**changes))
    model.parameter_groups = lambda: {"orthogonal": list(model["skew"].parameters())}
    (group,) = parameter_groups(model, Config())
    assert len(group["params"]) == 3 and group["factor"] == 1
    for changes, want in (
        ({"orthogonal_lr": 0.1}, {(0.1, 0.05): [(3, 3)], (1.0, 0.05): [(4, 3), (4,)]}),
        ({"decay_orthogonal": False}, {(1.0, 0.0): [(3, 3)], (1.0, 0.05): [(4, 3), (4,)]}),
        ({"orthogonal_lr": 0.1, "decay_1d": False}, {(0.1, 0.05): [(3, 3)], (1.0, 0.05): [(4, 3)], (1.0, 0.0): [(4,)]}),
    ):
        groups = parameter_groups(model, Config(weight_decay=0.05, **changes))
        assert {(g["factor"], g["weight_decay"]): [tuple(p.shape) for p in g["params"]] for g in groups} == want


def test_the_ramp_holds_the_unimodal_parts_back():
    import torch

    from avfast import create_model
    from avfast.train.trainer import Trainer

    model = create_model("avsiam_tiny", embed_dim=32, depth=1)
    model.parameter_groups = lambda: {"unimodal": list(model.encoder.parameters())}
    trainer = Trainer(model, dataclasses.replace(demo(), unimodal_ramp=0.5), torch.device("cpu"))
    trainer.step([], 0.1, 0.25)
    rates = {group["unimodal"]: group["lr"] for group in trainer.optimizers[0].param_groups}
    assert rates == {True: 0.025, False: 0.1}


def test_orthogonal_matrices_learn_more_slowly_under_amsgrad():
    """Decoupled decay is lr * decay of the weight, with the group's own rate; the first step of Adam is one of lr."""
    import torch

    from avfast import create_model
    from avfast.train.trainer import Trainer

    model = create_model("avsiam_tiny", embed_dim=32, depth=1)
    slow = list(model.encoder.parameters())
    model.parameter_groups = lambda: {"orthogonal": slow}
    config = dataclasses.replace(demo(), optimizer="adamw", amsgrad=True, orthogonal_lr=0.1, weight_decay=0.5)
    trainer = Trainer(model, config, torch.device("cpu"))
    (optimizer,) = trainer.optimizers
    before = [p.detach().clone() for p in model.parameters()]
    trainer.step([], 0.1)  # no batch, no gradient: nothing moves
    assert {group["factor"]: group["lr"] for group in optimizer.param_groups} == {0.1: pytest.approx(0.01), 1.0: 0.1}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for parameter, old in zip(model.parameters(), before, strict=True):
        rate = 0.01 if any(parameter is p for p in slow) else 0.1
        torch.testing.assert_close(parameter.detach(), old * (1 - rate * 0.5) - rate, atol=1e-6, rtol=1e-5)
    assert all("max_exp_avg_sq" in state for state in optimizer.state.values())


def test_flags():
    changed = resolve(
        ["demo", "--batch-size", "8", "--lr=1e-3", "--betas", "0.9", "0.99", "--deterministic"]
        + ["--tracker", "wandb,trackio", "--seed", "3"]
        + ["--data", "a b", "c,d", "--steps", "none", "--clip_grad", "None", "--evaluate", "false", "--eval_data=x,y"]
        + ["--model.depth", "4", "--model.mask_ratios", "[0, 0.5]", "--model.norm-pix", "False", "--epochs", "3"]
    )
    assert (changed.batch_size, changed.lr, changed.betas) == (8, 1e-3, (0.9, 0.99))
    assert changed.deterministic and changed.tracker == ("wandb", "trackio") and not changed.evaluate
    assert changed.data == ("a b", "c,d") and changed.eval_data == ("x", "y")
    assert changed.steps is None and changed.clip_grad is None and changed.epochs == 3.0
    assert changed.model_args == demo().model_args | {"depth": 4, "mask_ratios": [0, 0.5], "norm_pix": False}
    assert resolve(["--model_args", '{"depth": 2}']).model_args == demo().model_args | {"depth": 2}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["dem"], "unknown recipe 'dem'; did you mean: demo?"),
        (["avsiam_base_pretrian"], "avsiam_base_pretrain"),
        (["--batchsize", "3"], "unknown flag '--batchsize'; did you mean: --batch_size"),
        (["--batch_size", "x"], "--batch_size x: expected a whole number"),
        (["--batch_size", "1.5"], "--batch_size 1.5: expected a whole number"),
        (["--batch_size", "0"], "--batch_size 0: expected a number at least 1"),
        (["--lr"], "--lr needs a value"),
        (["--lr", "nan"], "--lr nan: expected a number at least 0"),
        (["--betas", "0.9"], "expected 2 numbers"),
        (["--precision", "fp8"], "expected auto or fp32 or bf16 or fp16"),
        (["--deterministic=perhaps"], "expected true or false"),
        (["--model_args", "3"], "expected a JSON object"),
        (["demo", "more"], "unexpected argument 'more'"),
        (["--config", "no/such/file"], "--config no/such/file: No such file or directory"),
        (["demo", "--config", "x.json"], "not both"),
        (["demo", "--recipe", "demo"], "--recipe: the recipe is given already, demo"),
        (["--recipe", "dem"], "unknown recipe 'dem'; did you mean: demo?"),
        (["--recipe", "nowhere.py:mine"], "--recipe nowhere.py:mine: no file nowhere.py"),
        (
            ["nowhere.at_all:mine"],
            "--recipe nowhere.at_all:mine: no module 'nowhere.at_all' here or among those installed",
        ),
        (["avfast.train.recipes.cav_mae:cav_mae_bas"], "did you mean: cav_mae_base_pretrain"),
        (["avfast.train.config:fields"], "expected a Config from fields(), got dict"),
        (["--lr", "inf"], "--lr inf: expected a number at least 0"),
        (["--weight_decay", "-1"], "--weight_decay -1.0: expected a number at least 0"),
        (["--betas", "0.9", "1"], "--betas 0.9 1.0: expected 2 numbers from 0 to below 1"),
        (["--learning_rate", "1"], "did you mean: --lr, "),
        (["--weight-penalty", "1"], "did you mean: --probe_l2"),
        (["--model.depth", "x"], "--model.depth x: expected a whole number"),
        (["--model.depth", "none"], "--model.depth none: expected a whole number"),
        (["--model.depth", "1.5"], "--model.depth 1.5: expected a whole number"),
        (["--model.depth", "-1"], "--model.depth -1: expected 0 or more"),
        (["--model.temperature", "nan"], "--model.temperature nan: expected 0 or more"),
        (["--model.norm_pix", "perhaps"], "--model.norm_pix perhaps: expected true or false"),
        (["--model.mask_ratios", "0.5"], "--model.mask_ratios 0.5: expected a JSON list, each a number"),
        (["--model.mask_ratios", '["a"]'], "--model.mask_ratios a: expected a number"),
        (["--model.audio_size", "[3]"], "--model.audio_size [3]: expected 2 numbers"),
        (["--model.audio_structure", "both"], "--model.audio_structure both: expected unstructured or time or"),
        (["--model.frontend", "3"], "--model.frontend 3: expected a JSON object or none"),
        (["--model.dept", "3"], "unknown setting of avsiam_tiny '--model.dept'; did you mean: --model.depth"),
        (["--model_args", '{"depth": "x"}'], "--model.depth x: expected a whole number"),
        (["--model.num_heads", "0"], "--model.num_heads 0: "),
        (["--model.num_heads", "3"], "--model.num_heads 3: "),
        (["--model.patch_size", "0"], "--model.patch_size 0: "),
        (["--model.temperature", "0"], "temperature"),
        (["deepavfusion_demo", "--model.fusion_layers", "some"], "--model.fusion_layers some"),
    ],
)
def test_wrong_flags_are_answered_in_one_line(arguments, says, capsys, monkeypatch):
    monkeypatch.setenv("AVFAST_CACHE", "/dev/null")  # before any clip is looked for
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert says in printed.err and printed.err.count("\n") == 1 and printed.err.startswith("avfast: ")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere"], "nowhere: no checkpoint; expected a run folder"),
        (["--eval_clips", "9"], "expected a run folder"),
        (["nowhere", "--eval_clip", "9"], "did you mean: --eval_clips"),
        (["nowhere", "--model.depth", "9"], "--model_args: the run's own settings"),
    ],
)
def test_wrong_flags_of_evaluation(arguments, says, capsys):
    assert evaluate(arguments) == 2
    printed = capsys.readouterr().err
    assert says in printed and printed.count("\n") == 1


def test_settings_of_a_model_have_the_types_of_its_constructor():
    given = {"depth": "4", "mask_ratios": "[0, 0.5]", "norm_pix": "False", "num_classes": "none", "temperature": "1e-1"}
    found = {"depth": 4, "mask_ratios": [0.0, 0.5], "norm_pix": False, "num_classes": None, "temperature": 0.1}
    assert settings.model_settings("avsiam_tiny", given) == found
    assert settings.model_settings("avsiam_tiny", found) == found  # as a config.json holds them
    for text, value in (("none", "none"), ("2", 2), ("[0, 3]", [0, 3])):
        typed = settings.model_settings("deepavfusion_tiny", {"fusion_layers": text})["fusion_layers"]
        assert typed == value and type(typed) is type(value)
    assert settings.model_settings("deepavfusion_tiny", {"num_fusion_tokens": "[1, 8, 8]"}) == {
        "num_fusion_tokens": [1, 8, 8]
    }


OWN = """
from avfast.models.avsiam import AVSiam
from avfast.models.registry import PRESETS, TINY
from avfast.train import Config

PRESETS["own_tiny"] = (AVSiam, {**TINY, "depth": 1})

def mine() -> Config:
    \"\"\"The user's.\"\"\"
    return Config(model="own_tiny", lr=0.5, model_args={"temperature": 0.2})
"""


def test_a_recipe_and_its_model_from_the_users_own_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(registry, "PRESETS", dict(registry.PRESETS))
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own_recipes.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    changed = resolve(["--recipe", "own_recipes.py:mine", "--lr", "0.25", "--model.temperature", "0.1"])
    assert (changed.model, changed.lr, changed.model_args, changed.name) == (
        "own_tiny",
        0.25,
        {"temperature": 0.1},
        "mine",
    )
    assert resolve(["own_recipes:mine"]).lr == 0.5 and sys.modules["own_recipes"].__file__ == changed.recipe[:-5]
    (tmp_path / "config.json").write_text(changed.to_json())
    monkeypatch.chdir("/")
    for _ in range(2):  # the second time as a process that has not imported it
        assert resolve(["--config", str(tmp_path / "config.json")]) == changed

        del sys.modules["own_recipes"], registry.PRESETS["own_tiny"]
    assert main(["--help", f"{tmp_path}/own_recipes.py:mine"]) == 0
    assert "--lr [0.5]" in capsys.readouterr().out


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_give_models_what_they_take(name):
    recipe = RECIPES[name]()
    assert settings.model_settings(recipe.model, recipe.model_args) == recipe.model_args


def test_a_reader_that_leaves_ends_a_listing_quietly():
    code = "import sys; from avfast.train.config import command; command(lambda _: [print(i) for i in range(10**6)])"
    first = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert first.stdout.readline() == b"0\n"
    first.stdout.close()
    assert first.stderr.read() == b"" and first.wait(60) == 141


def test_a_process_of_several_is_not_taken_down_by_the_interpreter():
    """Threads of the process group would meet an interpreter that is going, and abort."""
    code = "import atexit, os; from avfast.train.config import command; atexit.register(os.abort); command(lambda _: 3)"
    found = subprocess.run([sys.executable, "-c", code], env=os.environ | {"WORLD_SIZE": "2"}, timeout=60)
    assert found.returncode == 3


def test_warnings_are_lines_of_the_log(capsys):
    with plain_warnings():
        warnings.warn("one\n  thing", stacklevel=1)
        logging.getLogger("avfast").warning("%s thing", "another")
    assert capsys.readouterr() == ("warning: one thing\nwarning: another thing\n", "")


def test_compiling_needs_a_compiler(monkeypatch):
    import torch

    check_compiler(torch.device("cpu"))
    monkeypatch.setenv("PATH", "")
    for variable, device in (("CXX", "cpu"), ("CC", "cuda")):
        monkeypatch.delenv(variable, raising=False)
        with pytest.raises(SettingError, match=f"--compile needs a C.. compiler: .* found; .* set {variable}"):
            check_compiler(torch.device(device))
        monkeypatch.setenv(variable, sys.executable)
        check_compiler(torch.device(device))


def test_a_cache_that_cannot_be_written_names_the_variable(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AVFAST_CACHE", str(tmp_path / "file"))
    assert main(["--out", str(tmp_path / "run")]) == 2
    printed = capsys.readouterr().err
    assert "AVFAST_CACHE" in printed and printed.count("\n") == 1 and not (tmp_path / "run").exists()


def test_wrong_config_files(tmp_path):
    path = tmp_path / "config.json"
    for text, says in (("{", "not JSON"), ("[]", "expected an object"), ('{"epoch": 3}', "did you mean: epochs")):
        path.write_text(text)
        with pytest.raises(SettingError, match=says):
            from_json(path)


def test_help_names_every_setting(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in fields() if name != "recipe")
    assert all(name in text for name in RECIPES)
    assert max(map(len, text.splitlines())) < 160


def test_a_resumed_run_takes_its_own_settings(tmp_path):
    stored = dataclasses.replace(RECIPES["avsiam_base_pretrain"](), lr=0.5, out=str(tmp_path))
    (tmp_path / "config.json").write_text(stored.to_json())
    resumed = resolve(["--resume", "auto", "--out", str(tmp_path), "--steps", "3"])
    assert resumed == dataclasses.replace(stored, resume="auto", steps=3)
    assert resolve(["demo", "--resume", "auto", "--out", str(tmp_path)]).lr != 0.5
    (tmp_path / "checkpoints").mkdir()
    assert resolve(["--resume", str(tmp_path)]) == dataclasses.replace(stored, resume=str(tmp_path), out=str(tmp_path))
    assert resolve(["--resume", str(tmp_path), "--out", "other"]).out == "other"


def test_from_dict_restores_tuples():
    values = json.loads(Config(data=("a",)).to_json())
    assert values["data"] == ["a"] and from_dict(values).data == ("a",)
    assert settings.describe(float | None) == "a number or none"
