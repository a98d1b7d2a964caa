"""The layout of MAViL's released inference model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from avfast.checkpoints import Rule, block_count, listed, rename
from avfast.released.audio_mae import BLOCK, branch_settings, spectrogram_size

HEADS = {"a": "audio", "v": "visual", "av": "fused"}


def convert(state: Mapping[str, Tensor], **overrides: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and weights for :class:`avfast.MAViL` from a released checkpoint, pre-trained or fine-tuned."""
    if "patch_embed_v.proj.weight" not in state or "patch_embed.proj.weight" not in state:
        raise ValueError(f"no released MAViL checkpoint: expected keys patch_embed_v.*, found {listed(list(state), 5)}")
    rules: list[Rule] = []
    for suffix, name in (("", "audio"), ("_v", "visual")):
        rules += [
            (rf"(cls_token|pos_embed){suffix}", rf"{name}.\1"),
            (rf"patch_embed{suffix}\.(proj\.(?:weight|bias))", rf"{name}.patch_embed.\1"),
            (rf"blocks{suffix}\.{BLOCK}", rf"{name}.blocks.\1"),
            (rf"norm{suffix}\.(weight|bias)", rf"{name}.norm.\1"),
        ]
    rules += [
        (rf"blocks_av\.{BLOCK}", r"fusion.blocks.\1"),
        (r"norm_av\.(weight|bias)", r"fusion.norm.\1"),
        (r"fc_norm_(a|v|av)\.(weight|bias)", lambda m: f"heads.{HEADS[m[1]]}.0.{m[2]}"),
        (r"head_(a|v|av)\.(weight|bias)", lambda m: f"heads.{HEADS[m[1]]}.1.{m[2]}"),
    ]
    weights = rename(state, rules)
    audio, visual = ({k[len(p) :]: v for k, v in weights.items() if k.startswith(p)} for p in ("audio.", "visual."))
    if "pos_embed" not in visual:
        raise ValueError("the checkpoint lacks pos_embed_v")
    tubelet, patch, _ = visual["patch_embed.proj.weight"].shape[2:]
    count = visual["pos_embed"].shape[1] - 1
    size = 224 if count % (224 // patch) ** 2 == 0 else overrides.get("img_size", 224)  # the released one, if it can be
    times, rest = divmod(count, (size // patch) ** 2)
    if rest or not times:
        raise ValueError(f"pos_embed_v holds {count} positions, which fill no grid of frames of {size} pixels")
    heads = {key.split(".")[1]: value.shape[0] for key, value in weights.items() if key.endswith(".1.weight")}
    settings = branch_settings(audio) | {
        "audio_size": spectrogram_size(audio),
        "img_size": size,
        "num_frames": times * tubelet,
        "tubelet_size": tubelet,
        "fusion_depth": block_count(weights, "fusion.blocks"),
        "final_norm": "norm.weight" in audio,
        "num_classes": next((n for key, n in heads.items()), None),
        "heads": tuple(heads),
    }
    return settings, weights
