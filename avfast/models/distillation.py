"""Stage 2 of MAViL: a student predicts what a frozen teacher of stage 1 makes of the whole pair."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from avfast.checkpoints import load, load_into, naming
from avfast.distributed import all_sum, world_size

if TYPE_CHECKING:
    from avfast.models.mavil import MAViL
    from avfast.models.views import ViewDraws


class Teacher:
    """A frozen model; no module, so that it is no part of its student's parameters and weights.

    Args:
        model: without decoders and heads.
        checkpoint: a file or a state dict with its weights, as ``model.state_dict()`` or the training loop saves them;
            decoders and heads are left out.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, and listing missing, left-over and misshapen entries.
    """

    def __init__(self, model: MAViL, checkpoint: str | Path | Mapping[str, Tensor]) -> None:
        with naming(checkpoint):
            weights = load(checkpoint)
            weights = {k: v for k, v in weights.items() if ".decoder." not in k and not k.startswith("heads.")}
            if not any(p.is_meta for p in model.parameters()):  # where FLOPs are counted
                load_into(model, weights)
        self.model = model.requires_grad_(False).eval()

    @torch.no_grad()
    def features(self, images: Mapping[str, Tensor], draws: ViewDraws) -> dict[str, Tensor]:
        """Its fused tokens ``(B, N, D)`` of the patches of both modalities, nothing masked; plans are the draws'."""
        parts = self.model.branches.items()
        tokens = {name: branch.encode(images[name], draws.plan(f"whole {name}")) for name, branch in parts}
        return {name: x[:, 1:] for name, x in self.model.fusion(**tokens, plan=draws.plan("whole fusion")).items()}


def token_mse(prediction: Tensor, features: Tensor, ids: Tensor) -> Tensor:
    """Mean squared error of predicted tokens ``(B, M, D)`` at ``ids`` of ``(B, N, D)``, over those not negative.

    The mean over processes is the loss of the global batch.
    """
    wide = torch.promote_types(prediction.dtype, torch.float32)
    target = features.gather(1, ids.clamp(min=0)[..., None].expand_as(prediction)).to(wide)
    errors = (prediction.to(wide) - target).square().mean(2)
    counts = ids >= 0
    return (errors * counts).sum() * world_size() / all_sum(counts.sum()).clamp(min=1)
