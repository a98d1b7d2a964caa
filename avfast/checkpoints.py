"""Checkpoints of other codebases: their layouts in, our parameter names out.

Every converter accounts for each key of the released file: mapped, or named in a drop list with the reason. Anything
else, and anything missing, is an error that lists the keys.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Rule = tuple[str, str | Callable[[re.Match], str] | None]


def load(checkpoint: str | Path | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of a ``.pth``/``.pt`` or ``.safetensors`` file, or the given one, without wrappers and ``module.``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds no tensors.
    """
    state: Any = checkpoint
    if isinstance(checkpoint, (str, Path)):
        path = Path(checkpoint)
        if not path.is_file():
            raise FileNotFoundError(f"no checkpoint at {path}")
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    for wrapper in ("model", "state_dict"):
        if isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    tensors = {k.removeprefix("module."): v for k, v in state.items() if isinstance(v, Tensor)}
    if not tensors:
        raise ValueError(f"the checkpoint holds no tensors; its entries are {', '.join(list(state)[:8]) or 'none'}")
    return tensors


def rename(state: Mapping[str, Tensor], rules: Sequence[Rule]) -> dict[str, Tensor]:
    """Rename keys by the first rule whose pattern matches the whole key; a rule with None drops it.

    Raises:
        ValueError: listing the keys that no rule matches.
    """
    renamed, unknown = {}, []
    for key, value in state.items():
        for pattern, target in rules:
            match = re.fullmatch(pattern, key)
            if match:
                if target is not None:
                    renamed[match.expand(target) if isinstance(target, str) else target(match)] = value
                break
        else:
            unknown.append(key)
    if unknown:
        raise ValueError(f"{len(unknown)} unknown keys in the checkpoint: {listed(unknown)}")
    return renamed


def listed(keys: Sequence[str], most: int = 20) -> str:
    """Keys for an error message."""
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def stack_norms(state: Mapping[str, Tensor], sets: Sequence[str]) -> dict[str, Tensor]:
    """Merge ``...norm1{set}.weight`` of several sets into one ``...norm1.weight`` ``(sets, D)``."""
    merged = {}
    for key, value in state.items():
        match = re.fullmatch(r"(.*norm[12]?)(_[a-z]+)?\.(weight|bias)", key)
        if match and (match[2] or "") in sets:
            name, parameter = match[1], match[3]
            if (match[2] or "") == sets[0]:
                missing = [f"{name}{s}.{parameter}" for s in sets if f"{name}{s}.{parameter}" not in state]
                if missing:
                    raise ValueError(f"{len(missing)} keys are missing in the checkpoint: {listed(missing)}")
                merged[f"{name}.{parameter}"] = torch.stack([state[f"{name}{s}.{parameter}"] for s in sets])
        else:
            merged[key] = value
    return merged


def load_into(model: nn.Module, weights: Mapping[str, Tensor], optional: Sequence[str] = ()) -> None:
    """Load renamed weights; every parameter must be there unless its name starts with an ``optional`` prefix.

    Raises:
        ValueError: listing missing, left-over and misshapen entries.
    """
    own = model.state_dict()
    missing = [k for k in own if k not in weights and not k.startswith(tuple(optional))]
    extra = [k for k in weights if k not in own]
    shapes = [
        f"{k} {tuple(weights[k].shape)} instead of {tuple(own[k].shape)}"
        for k in own
        if k in weights and weights[k].shape != own[k].shape
    ]
    problems = [
        f"{len(keys)} {what}: {listed(keys)}"
        for what, keys in (("missing keys", missing), ("keys without a place", extra), ("wrong shapes", shapes))
        if keys
    ]
    if problems:
        raise ValueError("the checkpoint does not fit the model: " + "; ".join(problems))
    model.load_state_dict({**own, **weights})


def block_count(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many blocks ``prefix.0``, ``prefix.1``, ... there are."""
    numbers = [int(m[1]) for k in state if (m := re.match(re.escape(prefix) + r"\.(\d+)\.", k))]
    return max(numbers, default=-1) + 1


DECODER: list[Rule] = [
    (r"decoder_(embed|norm|pred_a|pred_v)\.(weight|bias)", r"decoder.\1.\2"),
    (r"mask_token", r"decoder.mask_token"),
    (r"decoder_(modality_[av]|pos_embed_[av])", r"decoder.\1"),
    (r"decoder_blocks\.(\d+)\.((?:norm[12]|attn|mlp)\..*)", r"decoder.blocks.\1.\2"),
    (r"decoder_blocks\.\d+\.norm[12]_[av]\..*", None),  # norm sets of its block class that the decoder never reads
]


def num_heads(dim: int) -> int:
    """Heads of the Base, Large and Huge Vision Transformers, whose state dicts do not tell."""
    return {768: 12, 1024: 16, 1280: 16}.get(dim, max(dim // 64, 1))


def avsiam(state: Mapping[str, Tensor], **overrides: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and weights for :class:`avfast.AVSiam` from a released AVSiam checkpoint, pre-trained or fine-tuned.

    ``separate_mae_audio=True`` keeps the released Base's second audio encoder ``ast_base``.
    """
    backbones = {m[1] for k in state if (m := re.match(r"(vit_(?:base|large|huge))\.", k))}
    if len(backbones) != 1:
        raise ValueError(f"no released AVSiam checkpoint: expected keys vit_base.*, found {listed(list(state), 5)}")
    vit = backbones.pop()
    separate = bool(overrides.get("separate_mae_audio"))
    heads = {"mlp_head_a": "head_a", "mlp_head": "head_v", "mlp_head_mm": "head_av"}
    concat = "mlp_head_mm.1.weight" in state
    if not concat:
        heads = {"mlp_head_a": "head_a", "mlp_head": "head_v", "mlp_head_mm_v2": "head_av"}
    keeps_heads = not ("num_classes" in overrides and overrides["num_classes"] is None)
    rules: list[Rule] = [
        (rf"{vit}\.(cls_token|head\.(weight|bias))", None),  # never read: class token and the 21k-class head
        (r"my_blocks\..*|my_patch_embed(_a)?\..*", None),  # aliases and unused copies of the backbone
        (rf"{vit}\.(pos_embed|pos_embed_a)", r"\1"),
        (rf"{vit}\.(patch_embed|patch_embed_a)\.(proj\..*)", r"\1.\2"),
        (rf"{vit}\.norm\.(weight|bias)", r"encoder.norm_v.\1"),
        (rf"{vit}\.norm_a\.(weight|bias)", r"encoder.norm_a.\1"),
        (rf"{vit}\.blocks\.(\d+\.(?:norm[12]_[av]|attn|mlp)\..*)", r"encoder.blocks.\1"),
        (rf"{vit}\.blocks\.\d+\.norm[12]\..*", None),  # read by the second audio encoder's class only
        (r"mm_layer_(\d+)\.(norm[12])_a\.(.*)", lambda m: f"fusion.{int(m[1]) - 1}.{m[2]}.{m[3]}"),
        (r"mm_layer_(\d+)\.((?:attn|mlp)\..*)", lambda m: f"fusion.{int(m[1]) - 1}.{m[2]}"),
        (r"mm_layer_\d+\.norm[12](_v)?\..*", None),  # fusion layers read their audio norms only
        *((rf"{old}\.([01]\..*)", rf"{new}.\1" if keeps_heads else None) for old, new in heads.items()),
        (r"mlp_head_mm_v2\..*", None),  # unused in Base and Large
        *DECODER,
    ]
    ast = vit.replace("vit_", "ast_")
    if separate:
        rules += [
            (rf"{ast}\.blocks\.(\d+\.(?:norm[12]|attn|mlp)\..*)", r"encoder_a.blocks.\1"),
            (rf"{ast}\.norm_a\.(.*)", r"encoder_a.norm.\1"),
        ]
    rules.append((rf"{ast}\..*", None))  # Base's second audio encoder, discarded after pre-training
    weights = rename(state, rules)
    if "pos_embed" not in weights or "patch_embed.proj.weight" not in weights or "pos_embed_a" not in weights:
        raise ValueError("the checkpoint lacks the patch embeddings or positions of " + vit)
    weights["pos_embed"] = weights["pos_embed"][:, 1:]
    second = {k: v for k, v in weights.items() if k.startswith("encoder_a.")}
    encoder = {k: v for k, v in weights.items() if k.startswith("encoder.")}
    rest = {k: v for k, v in weights.items() if k not in encoder and k not in second}
    weights = {**rest, **second, **stack_norms(encoder, ("_a", "_v"))}
    dim, _, patch, _ = weights["patch_embed.proj.weight"].shape
    decoder_depth = block_count(weights, "decoder.blocks")
    head = weights.get("head_a.1.weight")
    settings = {
        "img_size": round(weights["pos_embed"].shape[1] ** 0.5) * patch,
        "patch_size": patch,
        "embed_dim": dim,
        "depth": block_count(weights, "encoder.blocks"),
        "num_heads": num_heads(dim),
        "fusion_depth": block_count(weights, "fusion"),
        "decoder_depth": decoder_depth,
        "double_embedding": True,
        "eps": 1e-5,
        "norm_eps": 1e-6,
        "norm_pix": False,
        "objective": "released",
        "mask_ratios": (0.0, 0.2, 0.4, 0.6, 0.8) if vit == "vit_base" else tuple(i / 10 for i in range(8)),
        "audio_structure": "time_frequency",
        "stop_gradient": vit != "vit_base",
        "num_classes": None if head is None else head.shape[0],
        "joint_head": "concat" if concat or head is None else "mean",
    }
    if decoder_depth and "decoder.embed.weight" in weights:
        settings["decoder_embed_dim"] = weights["decoder.embed.weight"].shape[0]
    return settings, weights


def cav_mae(state: Mapping[str, Tensor], **overrides: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and weights for :class:`avfast.CAVMAE` from a released CAV-MAE checkpoint, pre-trained or fine-tuned."""
    if "blocks_u.0.norm1_a.weight" not in state or "modality_a" not in state:
        raise ValueError(f"no released CAV-MAE checkpoint: expected keys blocks_u.*, found {listed(list(state), 5)}")
    keeps_heads = not ("num_classes" in overrides and overrides["num_classes"] is None)
    rules: list[Rule] = [
        (r"patch_embed_a\.(proj\..*)", r"patch_embed_a.\1"),
        (r"patch_embed_v\.(proj\..*)", r"patch_embed.\1"),
        (r"(pos_embed_a|modality_[av])", r"\1"),
        (r"pos_embed_v", r"pos_embed"),
        (r"blocks_([av])\.(\d+\.(?:norm[12]|attn|mlp)\..*)", r"blocks_\1.\2"),
        (r"blocks_[av]\.\d+\.norm[12]_[av]\..*", None),  # norm sets of its block class that these blocks never read
        (r"(blocks_u\.\d+\..*)", r"\1"),
        (r"(norm(?:_[av])?\.(?:weight|bias))", r"\1"),
        (r"mlp_head\.([01]\..*)", r"head.\1" if keeps_heads else None),
        (r"cls_token.*", None),  # set by an adaptation script, never read
        *DECODER,
    ]
    weights = rename(state, rules)
    joint = {k: v for k, v in weights.items() if k.startswith(("blocks_u.", "norm"))}
    weights = {**{k: v for k, v in weights.items() if k not in joint}, **stack_norms(joint, ("", "_a", "_v"))}
    dim, _, patch, _ = weights["patch_embed.proj.weight"].shape
    decoder_depth = block_count(weights, "decoder.blocks")
    head = weights.get("head.1.weight")
    settings = {
        "img_size": round(weights["pos_embed"].shape[1] ** 0.5) * patch,
        "patch_size": patch,
        "embed_dim": dim,
        "depth": block_count(weights, "blocks_a"),
        "joint_depth": block_count(weights, "blocks_u"),
        "num_heads": num_heads(dim),
        "decoder_depth": decoder_depth,
        "num_classes": None if head is None else head.shape[0],
    }
    if decoder_depth and "decoder.embed.weight" in weights:
        settings["decoder_embed_dim"] = weights["decoder.embed.weight"].shape[0]
    return settings, weights


def deepavfusion(state: Mapping[str, Tensor], **overrides: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and weights for :class:`avfast.DeepAVFusion` from a released checkpoint, with or without decoders.

    A state dict does not tell how the fusion tokens divide (taken as 2 : 1 : 1, the released 16, 8, 8) nor the mel bins
    of a spectrogram (128); ``overrides`` may.
    """
    if "encoder.fusion_tokens" not in state:
        raise ValueError(
            f"no released DeepAVFusion checkpoint: expected keys encoder.*, found {listed(list(state), 5)}"
        )
    count, dim = state["encoder.fusion_tokens"].shape[1:]
    blocks = {key: value for key, value in state.items() if key.startswith("encoder.fusion_blocks.")}
    if any(".attn.attn_v." in key for key in blocks):
        arch = "factorized"
    else:
        pairs = any(key.endswith(".attn.kv.weight") and value.shape[1] == 2 * dim for key, value in blocks.items())
        arch = "dense" if pairs or not blocks else "token"
    side = {"image": "v", "img": "v", "audio": "a", "aud": "a"}
    norms = side if arch != "token" else {"img": "a", "aud": "v"}  # called with its arguments in another order
    keeps_decoders = overrides.get("decoder_depth") != 0
    block = r"(\d+\.(?:norm[12]|attn\.(?:qkv|proj)|mlp\.fc[12])\.(?:weight|bias))"
    rules: list[Rule] = [
        (r"encoder\.(fusion_tokens|fusion_norm\.(?:weight|bias))", r"\1"),
        (r"encoder\.image\.(pos_embed|patch_embed\.proj\.(?:weight|bias))", r"\1"),
        (r"encoder\.audio\.(pos_embed|patch_embed)(\.proj\.(?:weight|bias))?", r"\1_a\2"),
        (r"encoder\.(image|audio)\.norm\.(weight|bias)", lambda m: f"norm_{side[m[1]]}.{m[2]}"),
        (rf"encoder\.(image|audio)\.blocks\.{block}", lambda m: f"blocks_{side[m[1]]}.{m[2]}"),
        (r"encoder\.(fusion_blocks\.\d+\.norm1)_mm(\..*)", r"\1\2"),
        (r"encoder\.(fusion_blocks\.\d+\.norm1)_(aud|img)(\..*)", lambda m: f"{m[1]}_{norms[m[2]]}{m[3]}"),
        (r"encoder\.(fusion_blocks\.\d+)\.attn(\.attn_[av]\..*)", r"\1\2"),
        (r"encoder\.(fusion_blocks\.\d+\.(?:norm2|mlp|attn)\..*)", r"\1"),
        (r"image_decoder_(.*)", r"decoders.visual.\1" if keeps_decoders else None),
        (r"audio_decoder_(.*)", r"decoders.audio.\1" if keeps_decoders else None),
    ]
    weights = rename(state, rules)
    lacking = [k for k in ("patch_embed.proj.weight", "pos_embed", "pos_embed_a") if k not in weights]
    if lacking:
        raise ValueError(f"the checkpoint lacks {', '.join(lacking)}")
    for key in list(weights):
        other = re.sub(r"\.attn\.k\.(weight|bias)$", r".attn.v.\1", key)
        if other != key and other in weights:
            weights[key.replace(".attn.k.", ".attn.kv.")] = torch.cat([weights.pop(key), weights.pop(other)])
        if arch == "dense" and key.endswith(".attn.kv.weight") and key.startswith("fusion_blocks."):
            weights[key] = weights[key].roll(dim, 1)  # released pairs are [audio | image] here
    patch = weights["patch_embed.proj.weight"].shape[2]
    mels = overrides.get("audio_size", (0, 128))[1]
    settings: dict[str, Any] = {
        "img_size": round(weights["pos_embed"].shape[1] ** 0.5) * patch,
        "patch_size": patch,
        "audio_size": (weights["pos_embed_a"].shape[1] // (mels // patch) * patch, mels),
        "embed_dim": dim,
        "depth": block_count(weights, "blocks_v"),
        "num_heads": num_heads(dim),
        "fusion_arch": arch,
        "fusion_layers": sorted({int(key.split(".")[2]) for key in blocks}),
        "num_fusion_tokens": (count - 2 * (count // 4), count // 4, count // 4),
        "fusion_residual": "normed",
        "fusion_scale": None if arch == "token" else (dim // num_heads(dim)) ** -0.5,
        "decoder_depth": block_count(weights, "decoders.visual.blocks"),
        "train_decoder_positions": True,
    }
    for key in weights:
        if re.fullmatch(r"fusion_blocks\.\d+\.attn\.q\.weight", key):
            settings["fusion_attn_ratio"] = weights[key].shape[0] / dim
        if re.fullmatch(r"fusion_blocks\.\d+\.mlp\.fc1\.weight", key):
            settings["fusion_mlp_ratio"] = weights[key].shape[0] / dim
    if "decoders.visual.embed.weight" in weights:
        settings["decoder_embed_dim"] = weights["decoders.visual.embed.weight"].shape[0]
    return settings, weights


def mae_encoder(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Blocks, final norm and patch embedding of a masked autoencoder (MAE or AudioMAE, pre-trained) in timm's names."""
    return rename(
        state,
        [
            (r"(patch_embed\.proj\.(?:weight|bias)|blocks\..*|norm\.(?:weight|bias))", r"\1"),
            (r"cls_token|pos_embed|mask_token|decoder_.*", None),  # class token, tables of another grid, the decoder
        ],
    )


def timm_vit(name: str, pretrained: bool, img_size: int | None = None) -> nn.Module:
    """A timm Vision Transformer without head, its positions resized to ``img_size``.

    Raises:
        ImportError: without timm.
        ValueError: if it has no plain ViT blocks and positions.
    """
    try:
        import timm
    except ImportError as error:
        raise ImportError("loading timm weights needs timm: pip install timm") from error
    size = {} if img_size is None else {"img_size": img_size}
    vit = timm.create_model(name, pretrained=pretrained, num_classes=0, **size)
    if not hasattr(vit, "blocks") or getattr(vit, "pos_embed", None) is None:
        raise ValueError(f"{name} is no plain Vision Transformer")
    return vit


def vit_settings(vit: nn.Module) -> dict[str, Any]:
    """Constructor arguments that a timm ViT fixes."""
    block, embed = vit.blocks[0], vit.patch_embed
    return {
        "img_size": embed.img_size[0],
        "patch_size": embed.patch_size[0],
        "embed_dim": vit.embed_dim,
        "depth": len(vit.blocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": block.mlp.fc1.out_features / vit.embed_dim,
    }


def ast(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Encoder weights in timm's names from an AST checkpoint (audio spectrogram transformer, DeiT layout ``v.*``)."""
    weights = rename(
        state,
        [
            (r"v\.(patch_embed\.proj\..*|pos_embed|blocks\..*|norm\..*)", r"\1"),
            (r"v\.(cls_token|dist_token|head.*)|mlp_head\..*", None),  # class tokens and heads are not used here
        ],
    )
    if "patch_embed.proj.weight" not in weights:
        raise ValueError(f"no AST checkpoint: expected keys v.*, found {listed(list(state), 5)}")
    classes = 2 if "v.dist_token" in state else 1
    return weights | {"pos_embed": weights["pos_embed"][:, classes:]}
