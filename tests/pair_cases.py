"""Inputs for tests of pair_attention, and what they must give."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from helpers import assert_close, relative_error

from avfast.ops import pair_attention
from avfast.packing import cumulative

HALVES = (torch.float16, torch.bfloat16)
NAMES = ("out", "dq", "dk_a", "dv_a", "dk_v", "dv_v", "dbias")


@dataclass
class Problem:
    """Inputs of one call, dense; `options` are its keywords, and `rows` says what a packed side is made of."""

    tensors: list[torch.Tensor]
    options: dict = field(default_factory=dict)
    lengths: dict[str, list[int]] = field(default_factory=dict)

    def arguments(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """What pair_attention is called with: packed where lengths are given."""
        q, k_a, v_a, k_v, v_v, bias = tensors
        sides = {"a": (k_a, v_a), "v": (k_v, v_v)}
        for side, lengths in self.lengths.items():
            sides[side] = tuple(
                torch.cat([row[:, :n].transpose(0, 1) for row, n in zip(x, lengths, strict=True)]) for x in sides[side]
            )
        return [q, *sides["a"], *sides["v"], bias]

    def keywords(self) -> dict:
        device = self.tensors[0].device
        return self.options | {
            f"cu_seqlens_{side}": cumulative(lengths).to(device) for side, lengths in self.lengths.items()
        }

    def masks(self) -> dict[str, torch.Tensor | None]:
        """Which dense tokens take part."""
        masks = {"a": self.options.get("mask_a"), "v": self.options.get("mask_v")}
        for side, lengths in self.lengths.items():
            n = self.tensors[1 if side == "a" else 3].shape[2]
            masks[side] = (
                torch.arange(n, device=self.tensors[0].device)
                < torch.tensor(lengths, device=self.tensors[0].device)[:, None]
            )
        return masks


def draw(batch, heads, queries, n_a, n_v, dim, dim_v, dtype=torch.float64, device="cpu", lengths=None, masked=""):
    """Views of (B, N, H, D) memory, as projections leave them."""
    shapes = ((queries, dim), (n_a, dim), (n_a, dim_v), (n_v, dim), (n_v, dim_v))
    tensors = [torch.randn(batch, n, heads, d, device=device).to(dtype).transpose(1, 2) for n, d in shapes]
    tensors.append(torch.randn(heads, dim_v, device=device).to(dtype))
    options = {}
    for side, n in (("a", n_a), ("v", n_v)):
        if side in masked:
            options[f"mask_{side}"] = torch.rand(batch, n, device=device) < 0.6
    return Problem(tensors, options, lengths or {})


def outcome(call, tensors, weight):
    """Output and gradients of a loss that is linear in the output."""
    tensors = [x.detach().requires_grad_() for x in tensors]
    out = call(tensors)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), tensors, materialize_grads=True)]


def ours(problem, weight):
    def call(tensors):
        return pair_attention(*problem.arguments(tensors), **problem.keywords())

    return outcome(call, problem.tensors, weight)


def separate(problem, tensors):
    """Two softmaxes written out, each 0 where it has no key; :func:`materialised.pair_attention` needs one pair."""
    q, k_a, v_a, k_v, v_v, bias = tensors
    out, masks = bias[:, None] + torch.zeros_like(q[..., :1]), problem.masks()
    scale = problem.options.get("scale", q.shape[-1] ** -0.5)
    for side, k, v in (("a", k_a, v_a), ("v", k_v, v_v)):
        mask = masks[side]
        logits = scale * q @ k.mT
        if mask is not None:
            logits = logits.masked_fill(~mask[:, None, None], float("-inf"))
            some = mask.any(1)[:, None, None, None]  # the gradient of a softmax without keys is not a number
            p = torch.where(some, torch.where(some, logits, 0.0).softmax(-1), 0.0)
        else:
            p = logits.softmax(-1)
        out = out + p @ v
    return out


def assert_right(problem, tol=1e-5):
    """Against float64; in half precision an error of twice plain PyTorch's, or an RMS ratio of 0.005, is allowed."""
    tensors = problem.tensors
    weight = torch.randn(*tensors[0].shape[:3], tensors[2].shape[-1]).to(tensors[0])
    got = ours(problem, weight)
    exact = outcome(lambda x: separate(problem, x), [x.double() for x in tensors], weight.double())
    usual = outcome(lambda x: separate(problem, x), tensors, weight) if tensors[0].dtype in HALVES else None
    largest = max(x.abs().max().item() for x in exact[1:] if x.numel())
    for i, (name, a, b) in enumerate(zip(NAMES, got, exact, strict=True)):
        assert a.dtype == tensors[0].dtype
        allowed = tol
        if usual is not None:
            allowed = 2 * relative_error(usual[i], b, largest if i else None)
            if (a.double() - b).norm() <= 0.005 * b.norm():
                continue
        assert_close(name, a, b, allowed, scale=largest if i else None)
    return got, weight


def assert_identical(got, want, names=NAMES):
    """Forward to 1e-12, gradients to 1e-11; those that are zero in theory (keys without a choice) are zero in ours."""
    largest = max(x.abs().max().item() for x in want[1:])
    assert_close(names[0], got[0], want[0], 1e-12)
    for name, a, b in zip(names[1:], got[1:], want[1:], strict=True):
        if a.any() or not b.any():
            assert_close(name, a, b, 1e-11, largest)
        else:
            assert b.abs().max() <= 1e-12 * largest, name


CASES = {
    "dense": dict(n_a=9, n_v=70),
    "masked": dict(n_a=33, n_v=70, masked="av"),
    "packed": dict(n_a=40, n_v=12, lengths={"a": [40, 0, 7]}),
    "both packed": dict(n_a=9, n_v=66, lengths={"a": [0, 0, 9], "v": [1, 66, 0]}),
    "packed and masked": dict(n_a=5, n_v=34, lengths={"a": [5, 2, 0]}, masked="v"),
    "empty": dict(n_a=0, n_v=4),
    "nothing": dict(n_a=0, n_v=0),
}


def case(name, queries, dim, dim_v, dtype, device="cpu", heads=2):
    problem = draw(3, heads, queries, dim=dim, dim_v=dim_v, dtype=dtype, device=device, **CASES[name])
    for mask in problem.options.values():
        mask[1] = False  # a sample without a token of this modality
    return problem
