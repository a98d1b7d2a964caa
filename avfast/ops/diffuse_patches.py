"""Masked patches of raw input, noised by a diffusion process, in one pass.

For patch n of sample b, whose P values are x_0 (raw pixels or spectrogram values), and timestep t of the sample:
  x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) z,   z standard normal
(Ho et al., Denoising diffusion probabilistic models, equation 4; Diffusion models as masked audio-video learners,
section 3). PyTorch alone gathers, draws, multiplies twice and adds, each a pass over (B, M, P); and what it draws
depends on the device, on the shape and on the order of calls.

The noise is a function of (seed, sample id, stream, patch, element), whatever else is masked, however a batch is split,
on any device. With Q = ceil(P / 4), element e of patch n takes word w = e // Q of block e % Q:
  Philox4x32-10 (Salmon et al., 2011)
    counter   n Q + e % Q,  stream,  sample id mod 2^32,  sample id div 2^32
    key       seed mod 2^32,  seed div 2^32
  words 0 and 1 give normals 0 and 1, words 2 and 3 normals 2 and 3, by Box-Muller: of a pair (v, w)
    u = (v div 2^8 + 1) / 2^24, in (0, 1],   r = sqrt(-2 log u),   r cos(2 pi w / 2^32),   r sin(2 pi w / 2^32)
so that |z| < 5.77. The implementations (this reference, Triton, csrc/ on CPUs and CUDA) agree to 2e-6 max(1, |z|).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from avfast import backend
from avfast.ops._shared import autocast_dtype, without_autocast
from avfast.tensors import tensor_cache

CHUNK = 2**14  # blocks of noise that the reference draws at once: they stay in the cache
WORD = 2**32 - 1
MULTIPLIERS, WEYL = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)


@dataclass(frozen=True)
class NoiseSchedule:
    """Variances of a diffusion process: linear, then raised to a power (DiffMAViL, appendix C).

    Args:
        steps: timesteps T; t runs from 1 to T.
        first: linear variance at t = 1.
        last: at t = T.
        exponent: the variance used is the linear one to this power; below 1 it adds noise sooner.

    Raises:
        ValueError: on no steps, or variances outside (0, 1).
    """

    steps: int = 1000
    first: float = 1e-4
    last: float = 0.02
    exponent: float = 0.8

    def __post_init__(self) -> None:
        if self.steps < 1 or not (0 < self.first < 1 and 0 < self.last < 1 and self.exponent > 0):
            raise ValueError(f"a schedule needs steps, variances between 0 and 1 and an exponent above 0, got {self}")

    def alpha_bar(self) -> Tensor:
        """``(steps + 1,)`` float64 share of the signal's variance that is left at each t; 1 at t = 0, not noised."""
        variance = torch.linspace(self.first, self.last, self.steps, dtype=torch.float64, device="cpu") ** self.exponent
        return torch.cat([variance.new_ones(1), (1 - variance).cumprod(0)])

    def tables(self, device: torch.device | str = "cpu") -> Tensor:
        """``(2, steps + 1)`` float32 factors of signal and noise at each t, computed in float64."""
        return _tables(self, torch.device(device))


@tensor_cache
def _tables(schedule: NoiseSchedule, device: torch.device) -> Tensor:
    share = schedule.alpha_bar()
    return torch.stack([share.sqrt(), (1 - share).sqrt()]).float().to(device)


def diffuse_patches(
    x: Tensor,
    ids: Tensor,
    t: Tensor,
    schedule: NoiseSchedule,
    seed: int | Tensor,
    *,
    patch: Sequence[int],
    sample_ids: Tensor | None = None,
    stream: int = 0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Gather patches of raw input and noise them.

    Computed in float32 (float64 for float64 input) and cast once. Raw input has no gradient. On a GPU ids and timesteps
    out of range are not an error, which would need the host to wait: their patches come back as NaN.

    Args:
        x: ``(B, C, T, H, W)`` or ``(B, C, H, W)`` as ``patch`` has three or two sizes, or without channels, such as
            ``(B, frames, mels)`` spectrograms; any strides.
        ids: ``(B, M)`` int64 patches of each sample, numbers in its row-major grid of patches.
        t: ``(B,)`` integer timesteps, 0 (not noised) to ``schedule.steps``.
        schedule: of the variances.
        seed: non-negative below 2^63; an int64 tensor of one element on x's device is read there, so that a CUDA graph
            sees it change.
        patch: sizes of a patch, which divide those of x.
        sample_ids: ``(B,)`` int64 names of the samples, default 0 to B - 1. Those that are unique in the global batch
            give every process and micro-batch noise of its own.
        stream: names what else differs (modality, view, step), 0 to 2^31 - 1.
        dtype: of the result; default x's own, or under autocast its dtype.

    Returns:
        ``(B, M, P)``, a patch in the order of a convolution's weight: (C, [T,] H, W).

    Raises:
        ValueError: on shapes, types or numbers that do not fit, and where x requires grad.
    """
    video, sizes = _five_dimensional(x, patch)
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("x is raw input: diffuse_patches has no gradient, pass x.detach()")
    batch = x.shape[0]
    if ids.ndim != 2 or ids.shape[0] != batch or ids.dtype != torch.int64:
        raise ValueError(f"ids must be ({batch}, M) int64, got {ids.dtype} of {tuple(ids.shape)}")
    if t.shape != (batch,) or t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
        raise ValueError(f"t must be ({batch},) integers, got {t.dtype} of {tuple(t.shape)}")
    if sample_ids is None:
        sample_ids = torch.arange(batch, device=x.device)
    elif sample_ids.shape != (batch,) or sample_ids.dtype != torch.int64:
        raise ValueError(f"sample_ids must be ({batch},) int64, got {sample_ids.dtype} of {tuple(sample_ids.shape)}")
    if not isinstance(seed, Tensor):
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed must be from 0 to 2^63 - 1, got {seed}")
        seed = torch.full((1,), seed, dtype=torch.int64, device=x.device)
    elif seed.dtype != torch.int64 or seed.numel() != 1:
        raise ValueError(f"a seed tensor must hold one int64, got {seed.dtype} of {tuple(seed.shape)}")
    if not 0 <= stream < 2**31:
        raise ValueError(f"stream must be from 0 to 2^31 - 1, got {stream}")
    named = {"ids": ids, "t": t, "seed": seed, "sample_ids": sample_ids}
    if elsewhere := [f"{name} on {y.device}" for name, y in named.items() if y.device != x.device]:
        raise ValueError(f"x is on {x.device}, but {', '.join(elsewhere)}")
    tables = schedule.tables(x.device)
    dtype = autocast_dtype(x) if dtype is None else dtype
    return _diffuse(video, ids, t.long(), tables, seed.reshape(1), sample_ids, stream, sizes, dtype)


def _five_dimensional(x: Tensor, patch: Sequence[int]) -> tuple[Tensor, list[int]]:
    """``x`` as (B, C, T, H, W), with channels and frames of one where it has none, and three sizes of a patch."""
    sizes = [int(size) for size in patch]
    if len(sizes) not in (2, 3) or min(sizes) < 1:
        raise ValueError(f"patch must be two or three positive sizes, got {tuple(patch)}")
    if x.ndim not in (len(sizes) + 1, len(sizes) + 2) or not x.is_floating_point():
        raise ValueError(
            f"x must be floating-point (B, C, sizes) or (B, sizes) for patches of {tuple(sizes)}, "
            f"got {x.dtype} of {tuple(x.shape)}"
        )
    if any(n % size for n, size in zip(x.shape[-len(sizes) :], sizes, strict=True)):
        raise ValueError(f"patches of {tuple(sizes)} do not divide x {tuple(x.shape)}")
    if x.ndim == len(sizes) + 1:
        x = x.unsqueeze(1)
    return (x.unsqueeze(2), [1, *sizes]) if len(sizes) == 2 else (x, sizes)


@torch.library.custom_op("avfast::diffuse_patches", mutates_args=())
def _diffuse(
    x: Tensor,
    ids: Tensor,
    t: Tensor,
    tables: Tensor,
    seed: Tensor,
    sample_ids: Tensor,
    stream: int,
    patch: list[int],
    dtype: torch.dtype,
) -> Tensor:
    """x (B, C, T, H, W), t (B,) int64, tables (2, steps + 1), seed (1,), three sizes of a patch."""
    if x.device.type == "cpu":
        _check_range("ids", ids, 0, math.prod(_grid(x, patch)) - 1)
        _check_range("t", t, 0, tables.shape[1] - 1)
    if backend.use_native("diffuse_patches", x, (x.dtype, dtype)):
        return _compiled(x, ids, t, tables, seed, sample_ids, stream, patch, dtype)
    if backend.use_kernels("diffuse_patches", x):
        from avfast.kernels import diffuse_patches as kernels

        return kernels.diffuse(x, ids, t, tables, seed, sample_ids, stream, patch, dtype)
    with without_autocast(x):
        return _composed(x, ids, t, tables, seed, sample_ids, stream, patch, dtype)


@_diffuse.register_fake
def _(
    x: Tensor,
    ids: Tensor,
    t: Tensor,
    tables: Tensor,
    seed: Tensor,
    sample_ids: Tensor,
    stream: int,
    patch: list[int],
    dtype: torch.dtype,
) -> Tensor:
    return x.new_empty((*ids.shape, x.shape[1] * math.prod(patch)), dtype=dtype)


def _grid(x: Tensor, patch: list[int]) -> list[int]:
    """Patches along T, H and W."""
    return [n // size for n, size in zip(x.shape[2:], patch, strict=True)]


def _check_range(name: str, x: Tensor, least: int, most: int) -> None:
    if x.numel():
        low, high = x.aminmax()
        if low < least or high > most:
            raise ValueError(f"{name} must be from {least} to {most}, got {int(low)} to {int(high)}")


def _compiled(
    x: Tensor,
    ids: Tensor,
    t: Tensor,
    tables: Tensor,
    seed: Tensor,
    sample_ids: Tensor,
    stream: int,
    patch: list[int],
    dtype: torch.dtype,
) -> Tensor:
    """By csrc/, which wants a sample's columns side by side and all else contiguous."""
    out = x.new_empty((*ids.shape, x.shape[1] * math.prod(patch)), dtype=dtype)
    x = x if x.stride(4) == 1 else x.contiguous()
    run = getattr(torch.ops.avfast_native, f"diffuse_patches_{x.device.type}")
    run(x, ids.contiguous(), t.contiguous(), tables, seed, sample_ids.contiguous(), stream, patch, out)
    return out


def _composed(
    x: Tensor,
    ids: Tensor,
    t: Tensor,
    tables: Tensor,
    seed: Tensor,
    sample_ids: Tensor,
    stream: int,
    patch: list[int],
    dtype: torch.dtype,
) -> Tensor:
    """The reference: a few patches at a time, so that what it draws stays in the cache."""
    channels, (time, height, width), (p, q, r) = x.shape[1], _grid(x, patch), patch
    values = channels * p * q * r
    wide = torch.promote_types(x.dtype, torch.float32)
    out = x.new_empty((*ids.shape, values), dtype=dtype)
    rows = out.view(-1, values)
    grid = x.view(len(x), channels, time, p, height, q, width, r) if x.is_contiguous() else x.unflatten(
        4, (width, r)).unflatten(3, (height, q)).unflatten(2, (time, p))  # fmt: skip
    patches = grid.permute(0, 2, 4, 6, 1, 3, 5, 7)  # (B, time, height, width, C, p, q, r)
    sample = torch.arange(len(x), device=x.device).repeat_interleave(ids.shape[1])
    signal, level = (tables.to(wide)[i, t] for i in range(2))
    number = ids.flatten()
    step = max(1, CHUNK // max(1, -(-values // 4)))
    for start in range(0, len(rows), step):
        b, n = sample[start : start + step], number[start : start + step]
        chosen = patches[b, n // (height * width), n // width % height, n % width].flatten(1).to(wide)
        noise = normals(seed, sample_ids[b], stream, n, values).to(wide)
        rows[start : start + step] = signal[b, None] * chosen + level[b, None] * noise
    return out


def normals(seed: Tensor, sample_ids: Tensor, stream: int, patches: Tensor, values: int) -> Tensor:
    """``(R, values)`` float64 noise of R patches, each of a sample, see the head of this file.

    Args:
        seed: int64 of one element.
        sample_ids: ``(R,)`` int64.
        stream: 0 to 2^31 - 1.
        patches: ``(R,)`` int64 numbers in the grid of a sample.
        values: P.
    """
    blocks = -(-values // 4)
    first = patches[:, None] * blocks + torch.arange(blocks, device=patches.device)
    sample = sample_ids[:, None]
    counter = [first & WORD, torch.full_like(first[:1, :1], stream), sample & WORD, sample >> 32 & WORD]
    words = torch.broadcast_tensors(*philox(counter, [seed & WORD, seed >> 32 & WORD]))
    pairs = [_box_muller(v, w) for v, w in (words[:2], words[2:])]
    return torch.cat([z for pair in pairs for z in pair], 1)[:, :values]


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> list[Tensor]:
    """Four random words of Philox4x32-10, all words in int64 tensors that broadcast."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        a, b = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]  # 64 bits; int64 wraps where uint64 does
        c0, c1, c2, c3 = (b >> 32 & WORD) ^ c1 ^ k0, b & WORD, (a >> 32 & WORD) ^ c3 ^ k1, a & WORD
        k0, k1 = k0 + WEYL[0] & WORD, k1 + WEYL[1] & WORD
    return [c0, c1, c2, c3]


def _box_muller(v: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    radius = (((v >> 8) + 1).double() * 2.0**-24).log().mul(-2).sqrt()
    angle = w.double() * (2 * math.pi * 2.0**-32)
    return radius * angle.cos(), radius * angle.sin()
