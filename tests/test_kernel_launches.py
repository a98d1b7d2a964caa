"""How kernels are launched, seen by a mock driver: what recompiles them, on which device, and over which grids."""

from __future__ import annotations

import itertools
import os
import random
from dataclasses import replace

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not specialised", allow_module_level=True)
pytest.importorskip("triton")

from avfast.kernels.work_lists import ROWS  # noqa: E402
from mock_driver import mock_driver  # noqa: E402

from avfast.kernels import packed_attention as kernels  # noqa: E402
from avfast.ops import (  # noqa: E402
    AttentionPlan,
    NoiseSchedule,
    add_layer_norm,
    diffuse_patches,
    local_attention,
    low_rank_linear,
    masked_patch_mse,
    packed_attention,
    packed_attention_qkv,
    pair_attention,
)
from avfast.ops.packed_attention import _exact_work  # noqa: E402


def with_work(lengths_q, lengths_k=None):
    """A plan as on a CUDA device, on the CPU."""
    plan = AttentionPlan.from_lengths(lengths_q, lengths_k)
    return replace(plan, work=_exact_work(plan.cu_seqlens_q, plan.cu_seqlens_k))


def backward(*outputs):
    sum(x.float().sum() for x in outputs).backward()


def test_packed_attention_compiles_once_per_tile_whatever_the_lengths(monkeypatch):
    draw = random.Random(0)
    with mock_driver(monkeypatch) as launches:
        for number in range(24):
            lengths = [draw.randint(0, draw.choice((60, 250, 700))) for _ in range(1 + number)]
            rest = number % 3
            qkv = torch.empty(sum(lengths) + rest, 3, 2, 64, dtype=torch.bfloat16, requires_grad=True)
            plan = with_work(lengths) if number % 2 else AttentionPlan.from_lengths(lengths)
            backward(packed_attention_qkv(qkv, plan=plan))
        assert launches.counts() == {
            "packed_forward_kernel": 2, "packed_dq_kernel": 2, "packed_dkv_kernel": 1, "packed_whole_kernel": 1,
        }  # fmt: skip
        assert not launches.unguarded


@pytest.mark.parametrize(
    "lengths, classes",
    [([300, 260], {"forward": [6], "dq": [6], "dkv": [12]}),
     ([49, 64, 1], {"forward": [3], "whole": [3]}),
     ([300, 200, 49, 0], {"forward": [3, 4, 1], "dq": [3, 4], "dkv": [6, 4], "whole": [1]})],
)  # fmt: skip
def test_grids_are_exact_long_sequences_first_and_no_class_is_empty(monkeypatch, lengths, classes):
    heads = 2
    q = torch.empty(sum(lengths), heads, 64, dtype=torch.bfloat16, requires_grad=True)
    with mock_driver(monkeypatch) as launches:
        backward(packed_attention(q, q, q, plan=with_work(lengths)))
    found = {name.split("_")[1]: [n // heads for n in launches.programs[name]] for name in launches.programs}
    # One program more clears the rows past the last sequence, in the first launch of a kernel whose part that is.
    for name, items in classes.items():
        clears = name != "whole" or "dq" not in classes
        assert found.pop(name) == [items[0] + clears, *items[1:]], name
    assert not found


def test_every_tile_of_the_table_fits_its_length_class(monkeypatch):
    for row in kernels.TABLE:
        for size, tile in itertools.product(row.sizes, row.tiles):
            monkeypatch.setitem(ROWS, "tiny", 128 if row.kernel == "whole" and tile.own == 128 else 64)
            with kernels.override(row.kernel, size, tile):
                kernels.constants(row.kernel, row.columns, torch.float32, size)
    with kernels.override("forward", "short", kernels.Tile(128, 64, 8, 2)):
        with pytest.raises(ValueError, match=r"forward kernel cannot have Tile\(own=128.* for items of 64 rows"):
            kernels.constants("forward", 64, torch.float32, "short")


def test_pair_attention_compiles_once_per_kind_of_keys(monkeypatch):
    with mock_driver(monkeypatch) as launches:
        for number in range(12):
            batch, n_a, n_v = 1 + number % 5, 7 + number, 3 * number + 1
            q, k, v = (torch.empty(batch, 2, n, 32, requires_grad=True) for n in (3 + number % 4, n_a, n_v))
            bounds = torch.zeros(batch + 1 + number % 2, dtype=torch.int32)[number % 2 :]
            packed = torch.empty(n_v, 2, 32)
            mask = torch.zeros(batch + number % 2, n_a, dtype=torch.bool)[number % 2 :]
            backward(pair_attention(q, k, k, packed, packed, mask_a=mask, cu_seqlens_v=bounds))
            backward(pair_attention(q, k, k, v, v))
    assert launches.counts() == {"pair_forward_kernel": 2, "pair_backward_kernel": 2}
    assert not launches.unguarded


def test_add_layer_norm_compiles_once_whatever_the_rows(monkeypatch):
    draw = random.Random(0)
    with mock_driver(monkeypatch) as launches:
        for _ in range(30):
            sizes = [draw.randint(0, 3000), draw.randint(1, 300)]
            x = torch.empty(sum(sizes), 48, requires_grad=True)
            weight = torch.ones(2, 48, requires_grad=True)
            backward(*add_layer_norm(x, x, weight, weight, sizes))
    assert launches.counts() == {"norm_forward_kernel": 1, "norm_backward_kernel": 1}
    assert not launches.unguarded


def test_gather_patches_compiles_once_whatever_the_grid(monkeypatch):
    with mock_driver(monkeypatch) as launches:
        for number in range(1, 8):
            images = torch.empty(2, 3, 16 * number, 128)
            torch.ops.avfast.gather_patches(images, torch.zeros(number + 1, dtype=torch.int64)[1:], 16, torch.bfloat16)
    assert launches.counts() == {"gather_patches_kernel": 1}
    assert not launches.unguarded


def test_diffuse_patches_compiles_once_whatever_the_batch_the_mask_and_the_stream(monkeypatch):
    schedule = NoiseSchedule()
    with mock_driver(monkeypatch) as launches:
        for number in range(1, 8):
            x = torch.empty(number, 3, 2, 16 * number, 128)
            ids = torch.zeros(number, 3 * number + 1, dtype=torch.int64)
            t = torch.zeros(number + 1, dtype=torch.int64)[1:]
            diffuse_patches(
                x, ids, t, schedule, number, patch=(2, 16, 16), stream=16 * (number % 2), dtype=torch.bfloat16
            )
    assert launches.counts() == {"diffuse_kernel": 1}
    assert not launches.unguarded


def test_masked_patch_mse_compiles_once_whatever_the_grid(monkeypatch):
    with mock_driver(monkeypatch) as launches:
        for number in range(1, 8):
            x = torch.empty(2, 3, 2 * number, 32 + 16 * number, 32)
            prediction = torch.empty(2, number, 1536, requires_grad=True)
            ids = torch.zeros(2, number + 1, dtype=torch.int64)[:, 1:]
            backward(masked_patch_mse(prediction, x, ids, patch=(2, 16, 16)))
    assert launches.counts() == {"patch_mse_forward_kernel": 1, "patch_mse_backward_kernel": 1}
    assert not launches.unguarded


def test_local_attention_compiles_once_per_kind_of_window(monkeypatch):
    with mock_driver(monkeypatch) as launches:
        for number in range(1, 8):
            qkv = torch.empty(number, 32 * number, 3, 2, 32, dtype=torch.bfloat16, requires_grad=True)
            bias, scale = torch.empty(3, 16, 16)[number % 2 :][:2], torch.empty(2 + number % 2)[number % 2 :]
            for shift in ((2, 0), (2 + number % 2, 1)):
                backward(local_attention(qkv, bias, scale, grid=(8 * number, 4), shift=shift))
    assert launches.counts() == {"local_forward_kernel": 1, "local_backward_kernel": 1}
    assert not launches.unguarded


def test_low_rank_linear_compiles_once_whatever_the_rows_and_fills_the_device(monkeypatch):
    v, g, bias = torch.empty(3 * 32, 64), torch.empty(3, 32, 768), torch.empty(9, 768)
    with mock_driver(monkeypatch) as launches:
        for rows in (0, 1, 31, 62, 496, 1984, 9000):
            x = torch.empty(rows, 80, dtype=torch.bfloat16, requires_grad=True)[:, :64]
            unaligned = bias.view(-1)[rows % 3 : rows % 3 + 3 * 768].view(3, 768)
            backward(torch.stack(low_rank_linear(x, v, g, unaligned)))
    assert launches.counts() == {"low_rank_forward_kernel": 1, "low_rank_backward_kernel": 1}
    # Tiles of 64 rows and three chunks, their 12 tiles of columns split while there are fewer programs than room.
    assert launches.programs["low_rank_forward_kernel"] == [0, 36, 36, 36, 96, 93, 423]
    assert launches.programs["low_rank_backward_kernel"] == [0, 3, 3, 3, 24, 93, 423]
    assert not launches.unguarded


def test_a_launch_compiles_for_hopper(monkeypatch):
    """Through the JIT as on a device: options and arguments are what it takes."""
    q = torch.empty(300, 1, 16, dtype=torch.bfloat16)
    with mock_driver(monkeypatch, compile=True) as launches:
        packed_attention(q, q, q, plan=with_work([20, 30]))
    assert launches.counts() == {"packed_forward_kernel": 1}
