"""Models by name."""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, cast

from avfast import checkpoints, hub
from avfast.models.audio_mae import AudioMAE
from avfast.models.avbert import AVBERT
from avfast.models.avsiam import AVSiam
from avfast.models.cav_mae import CAVMAE
from avfast.models.contract import Model
from avfast.models.deepavfusion import DeepAVFusion
from avfast.models.mavil import DiffMAViL, MAViL
from avfast.released import avbert

TINY = {
    "img_size": 64, "patch_size": 8, "audio_size": (192, 64), "audio_patch_size": 16, "embed_dim": 128, "num_heads": 4,
    "decoder_embed_dim": 64, "decoder_depth": 1, "decoder_num_heads": 4,
}  # fmt: skip
TINY_LISTENER = {
    "audio_size": (192, 64), "embed_dim": 128, "depth": 4, "num_heads": 4, "decoder_embed_dim": 64, "decoder_depth": 2,
    "decoder_num_heads": 4,
}  # fmt: skip
TINY_VIDEO = {**TINY_LISTENER, "img_size": 64, "num_frames": 8}
TINY_SEQUENCE = {
    "num_clips": 8, "clip_frames": 4, "img_size": 32, "audio_size": (32, 32), "embed_dim": 96, "depth": 2,
    "num_heads": 4, "rank": 32, "init_std": 0.1, "cnn_norm": "sync",
    "visual_args": {"width": 16, "depths": (1, 1, 1, 1), "alpha": 2},
    "audio_args": {"width": 8, "depths": (1, 1, 1, 1)}, "mep_dim": 64, "num_negatives": 16, "pool_size": 4,
    "frontend": {"sample_rate": 16000},
}  # fmt: skip
LARGE = {"embed_dim": 1024, "depth": 24, "num_heads": 16}
HUGE = {"patch_size": 14, "embed_dim": 1280, "depth": 32, "num_heads": 16}

PRESETS: dict[str, tuple[Callable[..., Model], dict[str, Any]]] = {
    "avsiam_tiny": (AVSiam, {**TINY, "depth": 4}),
    "avsiam_base": (AVSiam, {}),
    "avsiam_large": (AVSiam, LARGE),
    "avsiam_huge": (AVSiam, HUGE),
    "avsep_tiny": (AVSiam, {**TINY, "depth": 4, "shared": False}),
    "avsep_large": (AVSiam, {**LARGE, "shared": False}),
    "cav_mae_tiny": (CAVMAE, {**TINY, "depth": 3}),
    "cav_mae_base": (CAVMAE, {}),
    "deepavfusion_tiny": (
        DeepAVFusion,
        {**TINY, "depth": 4, "fusion_arch": "dense", "num_fusion_tokens": (8, 4, 4), "fusion_attn_ratio": 0.5},
    ),
    "deepavfusion_base": (DeepAVFusion, {}),
    "deepavfusion_audioset": (DeepAVFusion, {"fusion_attn_ratio": 1.0, "fusion_mlp_ratio": 4.0}),
    "audio_mae_tiny": (AudioMAE, TINY_LISTENER),
    "audio_mae_base": (AudioMAE, {}),
    "mavil_tiny": (MAViL, TINY_VIDEO),
    "mavil_base": (MAViL, {}),
    "diffmavil_tiny": (DiffMAViL, TINY_VIDEO),
    "diffmavil_base": (DiffMAViL, {}),
    "avbert_tiny": (AVBERT, TINY_SEQUENCE),
    "avbert_base": (AVBERT, {}),
    "avbert_released": (AVBERT, avbert.SETTINGS),
}


def list_models(pattern: str = "*") -> list[str]:
    """Names that :func:`create_model` takes, filtered by a shell-style pattern."""
    return [name for name in PRESETS if fnmatch(name, pattern)]


def preset_of(name: str) -> tuple[Any, dict[str, Any]]:
    """Class and arguments of a preset; raises ValueError with the nearest names for an unknown one."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=3) or list(PRESETS)
        raise ValueError(f"unknown model {name!r}; did you mean {', '.join(near)}?")
    return PRESETS[name]


def create_model(name: str, **overrides: Any) -> Any:
    """Build a model by name.

    Args:
        name: one of :func:`list_models`.
        overrides: constructor arguments that replace the preset's.

    Raises:
        ValueError: for an unknown name, with the nearest ones.
        TypeError: for an argument that the model does not take.
    """
    build, settings = preset_of(name)
    return build(**{**settings, **overrides})


def from_released(checkpoint: checkpoints.Source, preset: str, **settings: Any) -> Any:
    """A checkpoint of a paper's own code, by ``from_released`` of the class of a preset.

    Args:
        checkpoint: its file, or state dict.
        preset: one of :func:`list_models`; where its sizes are not the checkpoint's, the checkpoint's are taken, with a
            warning.
        settings: overrides of the released settings.

    Raises:
        ValueError: for an unknown preset, one whose class has no released layout, and as ``from_released`` does.
    """
    build, given = preset_of(preset)
    if not hasattr(build, "from_released"):
        raise ValueError(f"{preset}: {build.__name__} knows no released checkpoints")
    model = build.from_released(checkpoint, **settings)
    defaults = {name: p.default for name, p in inspect.signature(build).parameters.items()}
    for name in ("embed_dim", "depth"):
        if (own := model.settings[name]) != (wanted := {**defaults, **given}[name]):
            warnings.warn(f"the checkpoint has {name} {own}, {preset} {wanted}", stacklevel=2)
    return model


def from_pretrained(
    where: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    resizing: checkpoints.Resizing = "cut",
    **settings: Any,
) -> Any:
    """A model that was saved or published, of whatever class it is; arguments and errors are those of
    :meth:`avfast.hub.HubMixin.from_pretrained`.
    """
    folder = hub.fetch(where, revision, token, cache_dir)
    name, saved = hub.read_config(folder)
    classes = {build.__name__: build for build, _ in PRESETS.values()}
    if name not in classes:
        raise ValueError(f"{where} holds a model of the class {name}, which is none of {', '.join(classes)}")
    return hub.build(cast(Any, classes[name]), folder, saved, settings, resizing)
