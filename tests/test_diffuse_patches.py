"""Noised patches against noise written out word by word; that the noise is named by its place alone."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from compiled import compile_for_hopper
from helpers import assert_close, interpreter

from avfast import backend, build
from avfast.ops import NoiseSchedule, diffuse_patches
from avfast.ops.diffuse_patches import philox

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SCHEDULE = NoiseSchedule()
SHAPES = {
    "video": ((2, 3, 4, 32, 48), (2, 16, 16)),
    "image": ((3, 3, 32, 32), (16, 16)),
    "spectrogram": ((2, 48, 32), (16, 16)),
    "odd": ((2, 2, 3, 10, 6), (1, 5, 3)),  # 30 values: 8 blocks, the last two with a word too many
    "volume": ((1, 4, 4, 4), (2, 2, 2)),
}


@pytest.fixture(params=["triton"] if INTERPRETED else ["reference", "native"])
def implementation(request, monkeypatch):
    """Every test that takes it runs on each implementation."""
    before = backend.get_backend()
    if INTERPRETED:
        from avfast.kernels import diffuse_patches as kernels

        monkeypatch.setattr(kernels, "BLOCK", 2048)  # the interpreter is as quick with many lanes as with few
    if request.param == "native" and not build.load("cpu"):
        pytest.skip("needs a C++ compiler")
    backend.set_backend(request.param)
    yield request.param
    backend.set_backend(before)


def reference(*args, **kwargs):
    before = backend.get_backend()
    backend.set_backend("reference")
    try:
        return diffuse_patches(*args, **kwargs)
    finally:
        backend.set_backend(before)


@cache
def philox_words(counter: tuple[int, ...], key: tuple[int, ...]) -> list[int]:
    """On Python's integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32) ^ c[1] ^ k[0], b % 2**32, (a >> 32) ^ c[3] ^ k[1], a % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def naive_noise(seed: int, sample: int, stream: int, patch: int, values: int) -> list[float]:
    """As the head of the op's file has it, one element after the other."""
    blocks, z = math.ceil(values / 4), []
    for e in range(values):
        word, block = divmod(e, blocks)
        counter = ((patch * blocks + block) % 2**32, stream, sample % 2**32, sample // 2**32 % 2**32)
        words = philox_words(counter, (seed % 2**32, seed // 2**32))
        v, w = words[word // 2 * 2 : word // 2 * 2 + 2]
        angle = 2 * math.pi * w / 2**32
        z.append(math.sqrt(-2 * math.log((v // 2**8 + 1) / 2**24)) * (math.sin if word % 2 else math.cos)(angle))
    return z


def naive(x, ids, t, seed, patch, sample_ids, stream):
    share, out = SCHEDULE.alpha_bar(), []
    for b in range(len(x)):
        sample = x[b].double()
        if x.ndim == len(patch) + 1:
            sample = sample[None]
        grid = [n // size for n, size in zip(sample.shape[1:], patch, strict=True)]
        for n in ids[b].tolist():
            at = torch.unravel_index(torch.tensor(n), grid)
            cut = tuple(slice(int(i) * size, int(i + 1) * size) for i, size in zip(at, patch, strict=True))
            values = sample[(slice(None), *cut)].flatten()
            z = torch.tensor(naive_noise(seed, int(sample_ids[b]), stream, n, len(values)), dtype=torch.float64)
            out.append(share[t[b]].sqrt() * values + (1 - share[t[b]]).sqrt() * z)
    return torch.stack(out).view(*ids.shape, -1)


def random_case(name, seed=0):
    """x, ids in random order with repeats, t with both ends, and the patch."""
    generator = torch.Generator().manual_seed(seed)
    shape, patch = SHAPES[name]
    x = torch.randn(shape, generator=generator)
    count = math.prod(n // size for n, size in zip(shape[-len(patch) :], patch, strict=True))
    ids = torch.randint(count, (shape[0], 5), generator=generator)
    ids[0, :2] = torch.tensor([0, count - 1])
    return x, ids, torch.tensor([0, 120, 1000, 1])[: shape[0]], patch


def noise(patches=64, samples=8, values=256, seed=7, ids=None, **kwargs):
    """Pure noise of ``(samples, patches, values)``: the input is 0 and the last step keeps nothing of it."""
    x = torch.zeros(samples, patches, values)
    ids = torch.arange(patches).expand(samples, -1) if ids is None else ids
    t = torch.full((samples,), SCHEDULE.steps)
    return diffuse_patches(x, ids, t, SCHEDULE, seed, patch=(1, values), **kwargs)


def test_the_schedule_has_the_papers_numbers():
    share = SCHEDULE.alpha_bar()
    assert share.dtype == torch.float64 and share.shape == (1001,) and share[0] == 1
    paper = {1: 0.999369, 100: 0.660196, 250: 0.125954, 500: 8.00922e-4, 750: 3.87167e-7, 1000: 1.7077e-11}
    assert {t: float(f"{share[t].item():.6g}") for t in paper} == paper
    assert float(f"{NoiseSchedule(exponent=1.0).alpha_bar()[1000].item():.6g}") == 4.03583e-5
    signal, level = SCHEDULE.tables()
    assert signal.dtype == torch.float32
    torch.testing.assert_close(signal.double().square() + level.double().square(), torch.ones(1001).double())
    with pytest.raises(ValueError, match=r"variances between 0 and 1.*last=1.5"):
        NoiseSchedule(last=1.5)


@pytest.mark.skipif(INTERPRETED, reason="of the reference")
@pytest.mark.parametrize(
    "counter, key, words",
    [
        ((0,) * 4, (0,) * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, words):
    want = [int(word, 16) for word in words.split()]
    assert philox_words(counter, key) == want
    got = philox([torch.tensor([c]) for c in counter], [torch.tensor([k]) for k in key])
    assert [int(word) for word in got] == want


@pytest.mark.parametrize("name", SHAPES)
def test_against_noise_written_out(implementation, name):
    x, ids, t, patch = random_case(name)
    ids = ids[:, :3]
    seed, stream = 2**62 + 12345678901, 2**31 - 1
    sample_ids = torch.tensor([3, 2**40 + 5, 2**63 - 1])[: len(x)]
    got = diffuse_patches(x, ids, t, SCHEDULE, seed, patch=patch, sample_ids=sample_ids, stream=stream)
    want = naive(x, ids, t, seed, patch, sample_ids, stream)
    assert got.dtype == torch.float32 and got.shape == want.shape
    error = (got.double() - want).abs() / want.abs().clamp(min=1)
    assert error.max() <= 2e-6
    by_default = diffuse_patches(x, ids, t, SCHEDULE, seed, patch=patch, stream=stream)
    assert torch.equal(by_default, diffuse_patches(x, ids, t, SCHEDULE, torch.tensor(seed), patch=patch, stream=stream,
                                                   sample_ids=torch.arange(len(x))))  # fmt: skip


def test_large_counters_wrap(implementation):
    """Patch numbers times blocks beyond 2^32 would not fit a word; the last that does is right."""
    got = noise(patches=40, samples=1, values=255, seed=2**63 - 1, ids=torch.tensor([[39, 0]]), stream=5)
    want = torch.tensor([naive_noise(2**63 - 1, 0, 5, n, 255) for n in (39, 0)], dtype=torch.float64)
    assert ((got[0].double() - want).abs() / want.abs().clamp(min=1)).max() <= 2e-6


def test_an_element_has_one_name(implementation):
    """Another mask, order or split of the batch leaves the bits of what is common; each part of the name matters."""
    x, _, _, patch = random_case("odd" if INTERPRETED else "video")  # both have 12 patches
    t, ids = torch.tensor([200, 700]), torch.arange(12).expand(2, -1)
    names = torch.tensor([11, 4])

    def call(rows=slice(None), chosen=ids, seed=5, names=names, **kwargs):
        return diffuse_patches(x[rows], chosen[rows], t[rows], SCHEDULE, seed, patch=patch,
                               sample_ids=names[rows], **kwargs)  # fmt: skip

    every = call(stream=3)
    some = torch.tensor([[7, 2, 2, 9], [0, 11, 5, 1]])
    assert torch.equal(call(chosen=some, stream=3), every.gather(1, some[..., None].expand(-1, -1, every.shape[2])))
    for b in range(2):
        assert torch.equal(call(slice(b, b + 1), stream=3), every[b : b + 1])
    for other in (call(stream=4), call(seed=6, stream=3), call(seed=5 + 2**32, stream=3),
                  call(names=names + 2**32, stream=3), call(names=names + 1, stream=3)):  # fmt: skip
        assert (other != every).float().mean() > 0.99
    assert torch.equal(call(stream=3), every)


@pytest.mark.skipif(not INTERPRETED, reason="of the Triton kernel, in the interpreter")
def test_the_kernel_alone(monkeypatch):
    """The bits do not depend on the size of a program; what is out of range comes back as NaN, beside what is not."""
    from avfast.kernels import diffuse_patches as kernels

    x, ids, t, patch = random_case("odd")
    tables, seed = SCHEDULE.tables(), torch.tensor([3])

    def call(ids, t):
        return kernels.diffuse(x, ids, t, tables, seed, torch.arange(2), 1, list(patch), torch.float32)

    want = call(ids, t)
    for size in (16, 1024):
        monkeypatch.setattr(kernels, "BLOCK", size)
        assert torch.equal(call(ids, t), want)
    wrong = ids.clone()
    wrong[0, 1], wrong[1, 3] = -1, 12
    got, fine = call(wrong, t), torch.ones(2, 5, dtype=torch.bool)
    fine[0, 1] = fine[1, 3] = False
    assert got[~fine].isnan().all() and torch.equal(got[fine], want[fine])
    got = call(ids, torch.tensor([1001, int(t[1])]))
    assert got[0].isnan().all() and torch.equal(got[1], want[1])


@interpreter
@pytest.mark.skipif(INTERPRETED, reason="is the run itself")
def test_the_kernel_under_the_interpreter():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "AVFAST_BACKEND": "triton"}
    chosen = "written_out or one_name or large_counters or strides or rounded_once or nothing_to_do or kernel_alone"
    command = [sys.executable, "-m", "pytest", "-q", "-k", chosen, __file__]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert run.returncode == 0, run.stdout + run.stderr
    assert "13 passed" in run.stdout


@pytest.mark.skipif(INTERPRETED, reason="interpreted functions do not compile")
@pytest.mark.parametrize(
    "source, target, patch, arch",
    [
        ("fp32", "bf16", (2, 16, 16), 90),
        ("fp32", "fp32", (1, 16, 16), 90),
        ("fp32", "bf16", (2, 16, 16), 80),
        ("fp32", "bf16", (2, 16, 16), 100),
        *(
            pytest.param(source, target, patch, arch, marks=pytest.mark.slow)
            for arch in (80, 90, 100)
            for patch in ((2, 16, 16), (1, 16, 16), (1, 5, 3))
            for source in ("fp32", "bf16", "fp16")
            for target in ("fp32", "bf16", "fp16")
        ),
    ],
)
def test_the_kernel_compiles_without_spills(source, target, patch, arch):
    pytest.importorskip("triton")
    usage = compile_for_hopper(*kernel_form(source, target, patch), arch=arch)
    assert usage.stack == 0 and usage.registers <= 96, usage
    if patch[2] == 16:
        assert max(usage.accesses) == (128 if target == "fp32" else 64), usage


def kernel_form(source, target, patch):
    from avfast.kernels import diffuse_patches as kernels

    types = {"x_ptr": f"*{source}", "out_ptr": f"*{target}", "tables_ptr": "*fp32"}
    types |= dict.fromkeys(("ids_ptr", "t_ptr", "seed_ptr", "names_ptr"), "*i64")
    values = 3 * math.prod(patch)
    sizes = dict(zip(("PT", "PH", "PW"), patch, strict=True))
    constants = {**sizes, "w_stride": 1, "VALUES": values, "BLOCK": kernels.BLOCK}  # Triton makes a constant of 1
    return kernels.diffuse_kernel, types, constants, kernels.WARPS


@pytest.mark.parametrize("layout", ["channels last", "transposed", "sliced"])
def test_any_strides(implementation, layout):
    x, ids, t, patch = random_case("image")
    strided = {
        "channels last": lambda: x.contiguous(memory_format=torch.channels_last),
        "transposed": lambda: x.mT.contiguous().mT,
        "sliced": lambda: torch.stack([x, x], -1)[..., 1],
    }[layout]()
    assert strided.stride() != x.stride()
    got = diffuse_patches(strided, ids, t, SCHEDULE, 1, patch=patch)
    assert torch.equal(got, diffuse_patches(x, ids, t, SCHEDULE, 1, patch=patch))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(implementation, dtype):
    if implementation == "native":
        if dtype == torch.float16:
            pytest.skip("csrc/ writes no float16 on a CPU")
        backend.set_backend("auto")  # which leaves input in half precision to the reference
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter cuts off where it should round")
    x, ids, t, patch = random_case("image")
    x[0] = 1 + (2 * torch.arange(x[0].numel()).view_as(x[0]) + 1) % 256 * torch.finfo(dtype).eps / 2  # ties, at t = 0
    x.view(torch.int32)[0, 0, 0, 0] = 0x7FFFFFFF  # a NaN that rounding up would carry into the sign
    exact = diffuse_patches(x, ids, t, SCHEDULE, 1, patch=patch)
    rounded = diffuse_patches(x, ids, t, SCHEDULE, 1, patch=patch, dtype=dtype)
    assert rounded[0, 0, 0].isnan() and torch.equal(rounded.nan_to_num(), exact.to(dtype).nan_to_num())
    x = x.nan_to_num()
    half = diffuse_patches(x.to(dtype), ids, t, SCHEDULE, 1, patch=patch)
    assert half.dtype == dtype
    want = diffuse_patches(x.to(dtype).float(), ids, t, SCHEDULE, 1, patch=patch)
    assert_close("half input", half, want.to(dtype), torch.finfo(dtype).eps)


@pytest.mark.skipif(INTERPRETED, reason="float64 does not run on the kernels")
def test_float64_stays_float64():
    x, ids, t, patch = random_case("odd")
    got = diffuse_patches(x.double(), ids, t, SCHEDULE, 1, patch=patch)
    want = naive(x, ids, t, 1, patch, range(len(x)), 0)
    assert got.dtype == torch.float64
    assert_close("float64", got, want, 1e-7)  # of the tables, float32


def test_nothing_to_do(implementation):
    x, ids, t, patch = random_case("image")
    assert diffuse_patches(x, ids[:, :0], t, SCHEDULE, 1, patch=patch).shape == (3, 0, 768)
    assert diffuse_patches(x[:0], ids[:0], t[:0], SCHEDULE, 1, patch=patch).shape == (0, 5, 768)


@pytest.mark.skipif(INTERPRETED, reason="compares PyTorch paths")
def test_opcheck():
    x, ids, t, patch = random_case("video")
    arguments = (x.mT.contiguous().mT, ids, t, SCHEDULE.tables(), torch.tensor([3]), torch.arange(2), 1, list(patch))
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(torch.ops.avfast.diffuse_patches, (*arguments, dtype))


@pytest.mark.skipif(INTERPRETED, reason="compares PyTorch paths")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_eager_equals_compiled_with_and_without_autocast(dtype):
    x, ids, t, patch = random_case("video")

    def call(x, seed):
        return diffuse_patches(x, ids, t, SCHEDULE, seed, patch=patch)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        got, want = compiled(x, torch.tensor(3)), call(x, 3)
    assert got.dtype == want.dtype == (dtype or torch.float32)
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.update(ids=c["ids"].int()), r"ids must be \(3, M\) int64, got torch.int32 of \(3, 5\)"),
        (lambda c: c.update(ids=c["ids"] + 1), "ids must be from 0 to 3, got 1 to 4"),
        (lambda c: c.update(t=c["t"] + 1), "t must be from 0 to 1000, got 1 to 1001"),
        (lambda c: c.update(t=c["t"].float()), r"t must be \(3,\) integers, got torch.float32"),
        (lambda c: c.update(t=c["t"][:2]), r"t must be \(3,\) integers, got torch.int64 of \(2,\)"),
        (lambda c: c.update(seed=-1), "seed must be from 0 to 2.63 - 1, got -1"),
        (lambda c: c.update(seed=torch.zeros(2)), r"one int64, got torch.float32 of \(2,\)"),
        (lambda c: c.update(stream=2**31), "stream must be from 0 to 2.31 - 1, got 2147483648"),
        (lambda c: c.update(sample_ids=torch.arange(2)), r"sample_ids must be \(3,\) int64"),
        (lambda c: c.update(sample_ids=torch.arange(3, device="meta")), "x is on cpu, but sample_ids on meta"),
        (lambda c: c.update(patch=(16,)), r"patch must be two or three positive sizes, got \(16,\)"),
        (lambda c: c.update(patch=(16, 12)), r"patches of \(16, 12\) do not divide x \(3, 3, 32, 32\)"),
        (lambda c: c.update(x=c["x"].long()), "x must be floating-point .* got torch.int64"),
        (lambda c: c.update(x=c["x"][0, 0]), r"for patches of \(16, 16\), got torch.float32 of \(32, 32\)"),
        (lambda c: c.update(x=c["x"].requires_grad_()), "diffuse_patches has no gradient, pass x.detach"),
    ],
)
def test_errors_name_what_was_wrong(change, message):
    x, ids, t, patch = random_case("image")
    case = {"x": x, "ids": ids, "t": t, "seed": 1, "patch": patch}
    change(case)
    with pytest.raises(ValueError, match=message):
        diffuse_patches(case.pop("x"), case.pop("ids"), case.pop("t"), SCHEDULE, case.pop("seed"), **case)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["triton", "native"])
@pytest.mark.parametrize("case", SHAPES)
def test_on_a_gpu(monkeypatch, name, case):
    """Against the reference on the CPU; in half precision the bits of the cast; every part twice with equal bits."""
    if name == "native" and not build.load("cuda"):
        pytest.skip("needs nvcc")
    x, ids, t, patch = random_case(case)
    names = torch.tensor([3, 2**40 + 5, 2**63 - 1])[: len(x)]
    monkeypatch.setattr(backend, "_backend", "reference")
    want = diffuse_patches(x, ids, t, SCHEDULE, 2**62 + 5, patch=patch, sample_ids=names, stream=7).double()
    monkeypatch.setattr(backend, "_backend", name)
    x, ids, t, names = (y.cuda() for y in (x, ids, t, names))
    seed = torch.tensor(2**62 + 5, device="cuda")

    def call(**kwargs):
        return diffuse_patches(x, ids, t, SCHEDULE, seed, patch=patch, sample_ids=names, stream=7, **kwargs)

    got = call()
    assert ((got.cpu().double() - want).abs() / want.abs().clamp(min=1)).max() <= 2e-6
    assert torch.equal(got, call())
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(call(dtype=dtype), got.to(dtype))
    ids[0, 0] = -1
    missing = call()
    assert missing[0, 0].isnan().all() and torch.equal(missing[0, 1:], got[0, 1:])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["triton", "native"])
def test_a_cuda_graph_replays_with_another_seed(monkeypatch, name):
    if name == "native" and not build.load("cuda"):
        pytest.skip("needs nvcc")
    monkeypatch.setattr(backend, "_backend", name)
    x, ids, t, patch = random_case("video")
    x, ids, t, seed = x.cuda(), ids.cuda(), t.cuda(), torch.tensor(1, device="cuda")

    def call():
        return diffuse_patches(x, ids, t, SCHEDULE, seed, patch=patch)

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for number in (2, 3):
        seed.fill_(number)
        graph.replay()
        assert torch.equal(out, call())
