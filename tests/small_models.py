"""Small AudioMAE and MAViL models: weights by name, stored figures, checkpoints in the released layouts."""

from __future__ import annotations

import json

import torch
from helpers import assert_close
from released import FOLDER, Released

from avfast.random import DrawKey


def named_weights(model: torch.nn.Module) -> torch.nn.Module:
    """The model in float64, its trained weights drawn by their names."""
    for name, parameter in model.double().named_parameters():
        if parameter.requires_grad:
            n = torch.from_numpy(Released("audio_mae").normal(f"small {name}", tuple(parameter.shape)))
            fan = parameter[0].numel() if parameter.ndim > 1 else 1
            plain = parameter.ndim == 1 and not name.endswith(("tau", "weight"))
            parameter.data = 0.02 * n if plain else n / fan**0.5 if parameter.ndim > 1 else 1 + 0.1 * n
    return model


def signals(*shape: int) -> torch.Tensor:
    return torch.from_numpy(Released("audio_mae").normal(f"small {shape}", shape))


def figures_of(model: torch.nn.Module, *inputs: torch.Tensor) -> list[float]:
    """The losses, and the norm of all gradients."""
    model.zero_grad()
    output = model(*inputs, draws=model.draw(len(inputs[0]), key=DrawKey(1, 2, range(3, 3 + len(inputs[0])), 9)))
    output.loss.backward()
    gradients = [p.grad.square().sum() for p in model.parameters() if p.grad is not None]
    values = [output.loss, *output.losses.values(), torch.stack(gradients).sum().sqrt()]
    return [value.item() for value in values]


def assert_stored(name: str, found: list[float], noised: bool = False) -> None:
    """Compare with what the code gave that was checked at full size; noise may be of any implementation."""
    stored = torch.tensor(json.loads((FOLDER / "mavil_small.json").read_text())[name], dtype=torch.float64)
    assert_close(name, torch.tensor(found, dtype=torch.float64), stored, 1e-5 if noised else 1e-8)


def small_released(dim: int = 32, width: int = 16) -> dict[str, torch.Tensor]:
    """A checkpoint in AudioMAE's layout, of a small model with a local decoder."""
    state = {
        "cls_token": (1, 1, dim), "pos_embed": (1, 129, dim), "patch_embed.proj.weight": (dim, 1, 16, 16),
        "patch_embed.proj.bias": (dim,), "mask_token": (1, 1, width), "decoder_pos_embed": (1, 129, width),
        "decoder_embed.weight": (width, dim), "decoder_embed.bias": (width,), "decoder_pred.weight": (256, width),
        "decoder_pred.bias": (256,),
    }  # fmt: skip
    for prefix, d in (("blocks", dim), ("decoder_blocks", width)):
        for i in range(2):
            shapes = {"attn.qkv": (3 * d, d), "attn.proj": (d, d), "mlp.fc1": (4 * d, d), "mlp.fc2": (d, 4 * d)}
            if prefix == "decoder_blocks":
                shapes |= {"attn.meta_mlp.fc1": (384, 2), "attn.meta_mlp.fc2": (2, 384)}
                state[f"{prefix}.{i}.attn.tau"] = (2,)
            for name, shape in shapes.items():
                state[f"{prefix}.{i}.{name}.weight"], state[f"{prefix}.{i}.{name}.bias"] = shape, shape[:1]
            for norm in ("norm1", "norm2"):
                state[f"{prefix}.{i}.{norm}.weight"], state[f"{prefix}.{i}.{norm}.bias"] = (d,), (d,)
    for norm, d in (("norm", dim), ("decoder_norm", width)):
        state[f"{norm}.weight"], state[f"{norm}.bias"] = (d,), (d,)
    generator = torch.Generator().manual_seed(0)
    return {key: torch.randn(shape, generator=generator) for key, shape in state.items()}


def small_mae_st(dim: int = 32) -> dict[str, torch.Tensor]:
    """A checkpoint in mae_st's layout, of a small model."""
    state = small_released(dim)
    state = {k: v for k, v in state.items() if not k.startswith("decoder") and "pos_embed" not in k}
    for key in [k for k in state if ".qkv." in k]:
        value = state.pop(key)
        for name, part in zip("qkv", value.split(dim), strict=True):
            state[key.replace("qkv", name)] = part
    shapes = {"spatial": 4, "temporal": 4, "class": 1}
    state |= {f"pos_embed_{k}": torch.randn(1, n, dim) for k, n in shapes.items()}
    return state | {"patch_embed.proj.weight": torch.randn(dim, 3, 2, 16, 16)}


def small_inference(heads: dict[str, int]) -> dict[str, torch.Tensor]:
    """A checkpoint in the layout of MAViL's inference model."""
    state = {}
    for suffix, source in (("", small_released()), ("_v", small_mae_st())):
        for key, value in source.items():
            part, *rest = key.split(".")
            if part in ("cls_token", "patch_embed") or part == "blocks" and ".qkv" in key or part == "blocks":
                state[".".join([part + suffix, *rest])] = value
        positions = 129 if not suffix else 17
        state["pos_embed" + suffix] = torch.randn(1, positions, 32)
    for key in [k for k in state if ".attn.q." in k]:
        parts = [state.pop(key.replace(".q.", f".{x}.")) for x in "qkv"]
        state[key.replace(".q.", ".qkv.")] = torch.cat(parts)
    state |= {key.replace("blocks.0", "blocks_av.0"): x for key, x in state.items() if key.startswith("blocks.0")}
    for name, classes in heads.items():
        width = 64 if name == "av" else 32
        state |= {f"fc_norm_{name}.weight": torch.ones(width), f"fc_norm_{name}.bias": torch.zeros(width)}
        state |= {f"head_{name}.weight": torch.randn(classes, width), f"head_{name}.bias": torch.zeros(classes)}
    return state
