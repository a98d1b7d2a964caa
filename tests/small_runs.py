"""Small runs of training: their settings, how they are started, what they leave."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from avfast.train import checkpoint
from avfast.train.recipes import demo

MODEL = {"embed_dim": 32, "depth": 1, "num_heads": 2, "decoder_embed_dim": 16, "decoder_num_heads": 2}
QUIET = {"count_flops": False, "figures": 0, "evaluate": False, "log_every": 1}


def settings(out, clips, **changes):
    """A small run that takes a second or two."""
    base = replace(demo(), data=(clips.train,), class_csv=clips.classes, eval_data=(clips.test,), batch_size=4, **QUIET)
    return replace(base, model_args=MODEL, out=str(out), steps=4, warmup_steps=2, **changes)


def arguments(config):
    """The command line of a configuration."""
    path = Path(config.out).parent / f"{Path(config.out).name}.json"
    path.write_text(config.to_json())
    return ["--config", str(path), "--out", config.out]


def python(code, *words, timeout=120):
    """Runs Python code in a process of its own."""
    found = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=timeout)
    return found.returncode, found.stdout + found.stderr


def losses(out):
    return [json.loads(line)["loss"] for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def assert_same(a, b):
    """Two checkpoints hold the same parameters and optimiser states, bit for bit."""
    (model, state), (model_b, state_b) = checkpoint.load(a), checkpoint.load(b)
    assert model.keys() == model_b.keys() and all(torch.equal(model[k], model_b[k]) for k in model)
    assert len(state["optimizers"]) == len(state_b["optimizers"])
    for one, other in zip(state["optimizers"], state_b["optimizers"], strict=True):
        assert one["state"].keys() == other["state"].keys() and one["state"]
        for k, values in one["state"].items():
            assert all(torch.equal(value, other["state"][k][name]) for name, value in values.items())
