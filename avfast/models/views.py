"""The random choices of AudioMAE, MAViL and DiffMAViL: views, masked patches, noise; and their schedule of masking."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from avfast.masking import Rounding, check_ratio, decimal, num_kept
from avfast.models.contract import Draws
from avfast.models.patched import shared_plan
from avfast.ops import AttentionPlan
from avfast.random import DrawKey

if TYPE_CHECKING:
    from avfast.models.branch import Branch

Timesteps = Literal["clip", "batch"]
Keep = Tensor | Sequence[Tensor]


@dataclass(frozen=True, eq=False)
class BranchDraws:
    """The random choices of one modality.

    Args:
        kept: ``(V, B, K)`` int64 patches that each view keeps, ascending.
        masked: ``(B, M)`` int64 patches that the first view lacks and that are predicted, ascending.
        timesteps: ``(B,)`` int64 of the diffusion, 1 .. T; None with mask tokens.
        counts: sequence lengths of encoder, of what the decoder attends to, and its queries.
        plans: of these, once on a device.
    """

    kept: Tensor
    masked: Tensor
    timesteps: Tensor | None
    counts: tuple[int, int, int]
    plans: dict[str, AttentionPlan] | None = field(default=None, compare=False)

    def plan(self, name: str) -> AttentionPlan:
        """``"encoder"``, ``"decoder"`` (all it attends to) or ``"read"`` (its queries of these)."""
        assert self.plans is not None
        return self.plans[name]

    def planned(self, device: torch.device) -> BranchDraws:
        """With plans for a device."""
        views, batch, _ = self.kept.shape
        encoder, keys, queries = self.counts
        plans = {
            "encoder": shared_plan((encoder,) * (views * batch), device),
            "decoder": shared_plan((keys,) * batch, device),
            "read": shared_plan((queries,) * batch, device, (keys,) * batch),
        }
        return replace(self, plans=plans)


@dataclass(frozen=True, eq=False)
class Noise:
    """What names the noise of a step.

    Args:
        seed: ``()`` int64, the same on all processes.
        sample_ids: ``(B,)`` int64 of the instances in the global batch.
    """

    seed: Tensor
    sample_ids: Tensor

    @classmethod
    def draw(cls, key: DrawKey, seed: Tensor | int | None = None) -> Noise:
        """Of a step; a given seed is taken."""
        if seed is None:
            seed = int(replace(key, positions=[0]).bits("noise", 1)[0, 0] >> 1)
        ids = torch.tensor(list(key.positions), dtype=torch.int64, device="cpu")
        return cls(torch.as_tensor(seed, dtype=torch.int64, device="cpu"), ids)


@dataclass(frozen=True, eq=False)
class ViewDraws(Draws):
    """The random choices of a step.

    Args:
        audio: two views, the masked patches of the first, timesteps.
        visual: likewise.
        noise: of the diffusion; None with mask tokens.
        audio_rows: batch rows that have audio; None for all.
        visual_rows: likewise.
        pair_rows: those that have both.
        whole: patches of both modalities where a teacher sees them all; None without one.
        plans: once on a device, of the fused sequences, ``"fusion"``, and of a teacher's, ``"whole audio"`` ...
    """

    audio: BranchDraws
    visual: BranchDraws
    noise: Noise | None
    audio_rows: Tensor | None
    visual_rows: Tensor | None
    pair_rows: Tensor | None
    whole: tuple[int, int] | None = None
    plans: dict[str, AttentionPlan] | None = field(default=None, compare=False)

    def to(self, device: torch.device | str) -> ViewDraws:
        """On a device, with plans there."""
        moved, device, batch = super().to(device), torch.device(device), self.audio.kept.shape[1]
        lengths = {"fusion": self.audio.counts[0] + self.visual.counts[0]}
        if self.whole is not None:
            audio, visual = (1 + count for count in self.whole)
            lengths |= {"whole audio": audio, "whole visual": visual, "whole fusion": audio + visual}
        plans = {name: shared_plan((length,) * batch, device) for name, length in lengths.items()}
        return replace(moved, audio=moved.audio.planned(device), visual=moved.visual.planned(device), plans=plans)

    def plan(self, name: str) -> AttentionPlan:
        """One of ``plans``."""
        assert self.plans is not None
        return self.plans[name]

    def sides(self) -> dict[str, BranchDraws]:
        """By modality."""
        return {"audio": self.audio, "visual": self.visual}

    def rows(self) -> dict[str, Tensor | None]:
        """By modality, the batch rows that have it."""
        return {"audio": self.audio_rows, "visual": self.visual_rows}


class Masking:
    """How many patches a view keeps, from a first masking ratio linearly to a last one, and how timesteps are drawn.

    Args:
        ratio: share of masked patches, or that at the start and that at the end of training.
        rounding: of the number of kept patches.
        timesteps: of the diffusion, one per ``"clip"`` or ``"batch"``.
    """

    def __init__(self, ratio: float | Sequence[float], rounding: Rounding, timesteps: Timesteps) -> None:
        both = tuple(ratio) if isinstance(ratio, Sequence) else (ratio, ratio)
        if len(both) != 2:
            raise ValueError(f"mask_ratio must be one ratio, or the first and the last, got {ratio!r}")
        for name, value, allowed in (("rounding", rounding, Rounding), ("timesteps", timesteps, Timesteps)):
            if value not in get_args(allowed):
                raise ValueError(f"{name} must be one of {', '.join(get_args(allowed))}, got {value!r}")
        self.first, self.last = (decimal(check_ratio(r)) for r in both)
        self.rounding, self.timesteps = rounding, timesteps

    def ratio(self, progress: float) -> Fraction:
        """At a point of training, exactly: the last bits of a float would cost a patch."""
        return self.first + (self.last - self.first) * Fraction(progress).limit_denominator(10**6)

    def visible(self, progress: float) -> float:
        """Share of patches that a view keeps."""
        return float(1 - self.ratio(progress))

    def kept(self, num_patches: int, progress: float) -> int:
        """Patches that a view keeps of N.

        Raises:
            ValueError: where none is left.
        """
        kept = num_kept(num_patches, self.ratio(progress), self.rounding)
        if not kept:
            raise ValueError(f"a masking ratio of {float(self.ratio(progress))} keeps none of {num_patches} patches")
        return kept

    def check(self, *num_patches: int) -> None:
        """Raises ValueError where a view would keep none or all of so many patches, first or last in training."""
        for count in num_patches:
            for progress in (0.0, 1.0):
                if self.kept(count, progress) == count:
                    raise ValueError(f"a masking ratio of {float(self.ratio(progress))} masks none of {count} patches")


def draw_views(
    branches: Mapping[str, Branch],
    masking: Masking,
    batch_size: int,
    generator: torch.Generator | None = None,
    *,
    views: int = 1,
    fractions: Mapping[str, float] | None = None,
    key: DrawKey | None = None,
    only: str | None = None,
    audio_keep: Keep | None = None,
    visual_keep: Keep | None = None,
    audio_timesteps: Tensor | None = None,
    visual_timesteps: Tensor | None = None,
    noise_seed: Tensor | int | None = None,
) -> tuple[dict[str, BranchDraws], Noise | None]:
    """The random choices of a pass, on the CPU; what is given is not drawn.

    Args:
        branches: by modality.
        masking: how many patches are kept.
        batch_size: instances on this process.
        generator: seeds a stand-alone draw; default torch's global generator.
        views: how often the patches are masked, V.
        fractions: by modality, the share of masked patches that are predicted; default all.
        key: names the draw instead (training), see :class:`~avfast.random.DrawKey`.
        only: ``"joint"``.
        audio_keep: ``(V, B, K)`` ids of the patches that each view keeps, or ``(B, K)`` of a single view.
        visual_keep: likewise.
        audio_timesteps: ``(B,)`` int64 of the diffusion, 1 .. 1000.
        visual_timesteps: likewise.
        noise_seed: of its noise.
    """
    if only not in (None, "joint"):
        raise ValueError(f"only must be joint, got {only!r}")
    if key is not None and len(key.positions) != batch_size:
        raise ValueError(f"the key names {len(key.positions)} positions for a batch of {batch_size}")
    key = DrawKey.fresh(batch_size, generator) if key is None else key
    given = {"audio": (audio_keep, audio_timesteps), "visual": (visual_keep, visual_timesteps)}
    drawn = {
        name: branch.draw(
            key, name, views, masking.kept(branch.num_patches, key.progress), *given[name],
            fraction=(fractions or {}).get(name, 1.0), one_timestep=masking.timesteps == "batch",
        )
        for name, branch in branches.items()
    }  # fmt: skip
    diffused = any(draws.timesteps is not None for draws in drawn.values())
    if noise_seed is not None and not diffused:
        raise ValueError('noise_seed is of mask_content="diffused"')
    return drawn, Noise.draw(key, noise_seed) if diffused else None


def present_rows(batch_size: int, *present: Iterable[bool] | None) -> Tensor | None:
    """Batch rows ``(n,)`` of the instances that have all of these modalities; None for all rows."""
    given = [p for p in present if p is not None]
    has = [all(row) for row in zip(*given, strict=True)] if given else [True] * batch_size
    if len(has) != batch_size:
        raise ValueError(f"has_audio and has_visual tell of {len(has)} instances, the batch has {batch_size}")
    return None if all(has) else torch.tensor([i for i, x in enumerate(has) if x], dtype=torch.int64, device="cpu")


def check_given(
    name: str, draws: BranchDraws, rows: Tensor | None, batch_size: int, given: bool, views: int = 1
) -> None:
    """Raises ValueError for draws of another batch, of other views, or of a modality that is not given."""
    if draws.kept.shape[0] != views:
        raise ValueError(f"draws hold {draws.kept.shape[0]} views of {name}, the model takes {views}")
    if draws.kept.shape[1] != batch_size:
        raise ValueError(f"draws are of {draws.kept.shape[1]} instances, the batch has {batch_size}")
    if not given and (rows is None or rows.shape[0]):
        raise ValueError(f"the draws keep patches of {name}, which is not given; draw with has_{name}=[False] * B")


def counted(ids: Tensor, rows: Tensor | None) -> Tensor:
    """Patches ``(B, M)`` as the loss takes them: -1 in the instances that are not among ``rows``."""
    if rows is None:
        return ids
    there = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device).index_fill(0, rows, True)
    return torch.where(there[:, None], ids, -1)
