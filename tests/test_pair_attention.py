from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_close, interpreter, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from pair_cases import CASES, HALVES, NAMES, Problem, assert_identical, assert_right, case, draw, ours, outcome
from torch import nn

from avfast import backend, flops
from avfast.nn.fusion import PairAttention
from avfast.ops import pair_attention, pair_weights
from avfast.packing import cumulative

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import materialised  # noqa: E402

sys.path.pop(0)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


# The identity.


SIZES = st.tuples(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 6), st.integers(1, 9), st.integers(1, 9),
    st.sampled_from([1, 3, 16]), st.sampled_from([1, 4, 16]),
)  # fmt: skip


@pytest.mark.skipif(INTERPRETED, reason="float64 does not run on the kernels")
@settings(deadline=None, max_examples=60, derandomize=True)  # logits of a large scale can lose more digits than asked
@given(SIZES, st.sampled_from(["", "a", "v", "av"]), st.sampled_from([None, 0.125, 2.0]), st.integers(0, 10**6))
def test_two_softmaxes_are_the_softmax_over_formed_pairs(sizes, masked, scale, seed):
    torch.manual_seed(seed)
    problem = draw(*sizes, masked=masked)
    for mask in problem.options.values():
        mask[:, 0] = True
    if scale is not None:
        problem.options["scale"] = scale
    weight = torch.randn(*problem.tensors[0].shape[:3], sizes[-1], dtype=torch.float64)
    bias_k = torch.randn(sizes[1], sizes[5], dtype=torch.float64)

    def formed(tensors):
        return materialised.pair_attention(*tensors, bias_k=bias_k, **problem.options)

    assert_identical(ours(problem, weight), outcome(formed, problem.tensors, weight))


@pytest.mark.skipif(INTERPRETED, reason="float64 does not run on the kernels")
@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=5), st.sampled_from(["a", "av"]))
def test_packed_keys_are_the_same_pairs(lengths, packed):
    n_a, n_v = (max(pair[i] for pair in lengths) for i in range(2))
    chosen = {side: [pair[i] for pair in lengths] for i, side in enumerate("av") if side in packed}
    problem = draw(len(lengths), 2, 3, n_a, n_v, 4, 5, lengths=chosen)
    weight = torch.randn(len(lengths), 2, 3, 5, dtype=torch.float64)
    masks = {f"mask_{side}": mask for side, mask in problem.masks().items()}
    want = outcome(lambda x: materialised.pair_attention(*x, **masks), problem.tensors, weight)
    assert_identical(ours(problem, weight), want)


@pytest.mark.skipif(INTERPRETED, reason="float64 does not run on the kernels")
@pytest.mark.parametrize("form", ["pair_module", "summed_pair_module", "two_attentions"])
def test_module_on_concatenated_pairs_with_biases_on_keys_and_values(form):
    module = PairAttention(24, 2, 8, 24, scale=0.4).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    inputs = [torch.randn(2, n, 24, dtype=torch.float64) for n in (4, 5, 7)]
    leaves = [*inputs, *module.parameters()]
    weight = torch.randn(2, 4, 24, dtype=torch.float64)

    def step(call):
        xs = [x.requires_grad_() for x in inputs]
        out = call(*xs)
        return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]

    got, want = step(module), step(lambda *xs: getattr(materialised, form)(module, *xs))
    names = ["out", "dx", "daudio", "dvisual", *(name for name, _ in module.named_parameters())]
    for grads in (got, want):  # that of the key bias cancels
        bias = grads.pop(names.index("kv.bias"))
        grads += bias.split([8, 24])
    assert_identical(got, want, [*(name for name in names if name != "kv.bias"), "key bias", "value bias"])


# The contract.


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("name", CASES)
def test_every_dtype(name, dtype):
    assert_right(case(name, 5, 16, 64, dtype) if not INTERPRETED else case(name, 5, 16, 16, dtype, heads=1))


def test_an_absent_modality_contributes_nothing():
    q, k, v, _, _, bias = draw(2, 2, 3, 4, 1, 8, 6, torch.float32).tensors
    want = (q @ k.mT * 8**-0.5).softmax(-1) @ v
    assert_close("first", pair_attention(q, k, v, None, None), want, 1e-6)
    assert_close("second", pair_attention(q, None, None, k, v, bias), want + bias[:, None], 1e-6)
    p, r = pair_weights(q, k, None)
    assert p.shape == (2, 2, 3, 4) and r.shape == (2, 2, 3, 0)


def test_what_masked_tokens_hold_is_not_read():
    problem = draw(2, 2, 3, 5, 6, 16, 16, torch.float32, masked="av")
    clean, weight = ours(problem, torch.ones(())), torch.ones(())
    q, *others = problem.tensors
    for x, side in zip(others[:4], "aavv", strict=True):
        x.transpose(1, 2)[~problem.options[f"mask_{side}"]] = float("nan")
    for name, a, b in zip(NAMES, ours(problem, weight), clean, strict=True):
        assert torch.equal(a, b), name
    p, r = pair_weights(q, others[0], others[2], **problem.options)
    assert not p.isnan().any() and not r.isnan().any()


def test_fully_masked_modalities_have_zero_gradients():
    problem = draw(2, 2, 3, 5, 6, 16, 16, torch.float32)
    problem.options = {"mask_a": torch.zeros(2, 5, dtype=torch.bool), "mask_v": torch.zeros(2, 6, dtype=torch.bool)}
    out, *grads = ours(problem, torch.ones(()))
    assert torch.equal(out, problem.tensors[-1][:, None].expand_as(out))
    assert not any(x.any() for x in grads[:5]) and (grads[5] == 6).all()


def test_packed_rows_beyond_the_last_sequence_get_zero_gradients():
    q, _, _, k_v, v_v, _ = draw(2, 1, 3, 1, 4, 16, 16, torch.float32).tensors
    k, v = torch.randn(2, 9, 1, 16).requires_grad_().unbind()
    for lengths in ([2, 4], [0, 0]):
        out = pair_attention(q, k, v, k_v, v_v, cu_seqlens_a=cumulative(lengths))
        for x in torch.autograd.grad(out.square().sum(), (k, v)):
            assert x[: sum(lengths)].any() == (sum(lengths) > 0) and not x[sum(lengths) :].any()
    empty = pair_attention(q[:0], k, v, k_v[:0], v_v[:0], cu_seqlens_a=cumulative([]))
    assert not any(x.any() for x in torch.autograd.grad(empty.sum(), (k, v)))


def test_weights_are_the_factors_of_the_pair_map():
    problem = draw(2, 2, 3, 5, 6, 4, 4, masked="a", lengths={"v": [2, 6]})
    problem.options["mask_a"][:, 1] = True
    q, k_a, v_a, k_v, v_v, _ = problem.arguments(problem.tensors)
    p, r = pair_weights(q.requires_grad_(), k_a, k_v, scale=0.7, **problem.keywords())
    assert not p.requires_grad and p.shape == (2, 2, 3, 5) and r.shape == (2, 2, 3, 6)
    masks = problem.masks()
    for weights, k, mask in ((p, problem.tensors[1], masks["a"]), (r, problem.tensors[3], masks["v"])):
        want = (0.7 * q @ k.mT).masked_fill(~mask[:, None, None], float("-inf")).softmax(-1)
        assert_close("weights", weights, want, 1e-12)
    out = pair_attention(q, k_a, v_a, k_v, v_v, scale=0.7, **problem.keywords())
    assert_close("read-out", out, p @ problem.tensors[2] + r @ problem.tensors[4], 1e-12)


@pytest.mark.parametrize("shape", [(2, 16), (16,), (1,), (2, 1)])
def test_bias_shapes(shape):
    problem = draw(2, 2, 3, 5, 6, 16, 16, torch.float32)
    bias = torch.randn(shape, requires_grad=True)
    got = pair_attention(*problem.tensors[:5], bias)
    want = pair_attention(*problem.tensors[:5]) + bias.expand(2, 16)[:, None]
    assert_close("out", got, want, 1e-6)
    grads = [torch.autograd.grad((x * x.detach()).sum(), bias)[0] for x in (got, want)]
    assert_close("gradient", *grads, 1e-5)


@pytest.mark.parametrize("layout", ["contiguous", "sliced", "expanded", "strided"])
def test_any_strides(layout):
    tensors = draw(2, 2, 3, 5, 6, 16, 16, torch.float32).tensors
    weight = torch.randn(2, 2, 3, 16)
    want = ours(Problem(tensors), weight)
    change = {
        "contiguous": lambda x: x.contiguous(),
        "sliced": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
        "expanded": lambda x: x,
        "strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    }[layout]
    if layout == "expanded":
        tensors = [x[:1].expand_as(x) if x.ndim == 4 else x for x in tensors]
        want = ours(Problem([x.contiguous() for x in tensors]), weight)
    got = ours(Problem([change(x) for x in tensors]), weight)
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert_close(name, a, b, 1e-6)


@pytest.mark.skipif(INTERPRETED, reason="compares with fake tensors")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", ["dense", "masked", "packed"])
def test_opcheck(name, device):
    problem = case(name, 3, 16, 32, torch.float32, device)
    q, k_a, v_a, k_v, v_v, bias = (x.requires_grad_() for x in problem.arguments(problem.tensors))
    keywords = problem.keywords()
    keys = [keywords.get(f"mask_{s}", keywords.get(f"cu_seqlens_{s}")) for s in "av"]
    arguments = (q, k_a, v_a, keys[0], k_v.contiguous(), v_v, keys[1], bias.detach(), 0.25)
    torch.library.opcheck(torch.ops.avfast.pair_attention.default, arguments)
    arguments = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    out, lse_a, lse_v = torch.ops.avfast.pair_attention(*arguments)
    backward = (out.contiguous(), *arguments[:7], lse_a, lse_v, 0.25)
    torch.library.opcheck(torch.ops.avfast.pair_attention_backward.default, backward)


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are slow to compile around")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("autocast", [None, *HALVES])
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float32, torch.float16)])
def test_compiled_equals_eager_inside_and_outside_autocast(autocast, dtypes, device):
    if autocast is None and len(set(dtypes)) > 1:
        pytest.skip("mixed dtypes need autocast")
    problem = case("masked", 3, 16, 16, torch.float32, device)
    q, *keys, bias = problem.tensors
    inputs = [q.to(dtypes[0]), *(x.to(dtypes[1]) for x in keys), bias]
    inputs = [x.detach().requires_grad_() for x in inputs]

    def step(*inputs):
        with torch.autocast(device, autocast, enabled=autocast is not None):
            return pair_attention(*inputs, **problem.options)

    want, got = step(*inputs), torch.compile(step, fullgraph=True, backend="aot_eager")(*inputs)
    assert got.dtype == want.dtype == (autocast or dtypes[0]) and got.stride() == want.stride()
    assert torch.equal(got, want)
    grads = [torch.autograd.grad(x.float().square().sum(), inputs) for x in (got, want)]
    for name, a, b, x in zip(NAMES[1:], *grads, inputs, strict=True):
        assert a.dtype == b.dtype == x.dtype
        assert torch.equal(a, b) if name != "dbias" else relative_error(a, b) < 1e-6, name  # a sum in another order


@pytest.mark.skipif(INTERPRETED, reason="compares compilations")
def test_new_lengths_do_not_recompile():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(
        lambda q, k, v, cu, a, b: pair_attention(q, k, v, a, b, cu_seqlens_a=cu), fullgraph=True, backend=counter
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        lengths = torch.randint(1, 9, (3,), generator=generator).tolist()
        problem = draw(3, 2, 4, max(lengths), 5, 4, 4, torch.float32, lengths={"a": lengths})
        q, k, v, a, b, _ = problem.arguments(problem.tensors)
        cu = cumulative(lengths)
        assert torch.equal(compiled(q, k, v, cu, a, b), pair_attention(q, k, v, a, b, cu_seqlens_a=cu))
    assert counter.frame_count <= 3


def test_a_second_derivative_is_refused():
    for masked, message in (("a", "no second derivative"), ("", "no second derivative|is not implemented")):
        problem = draw(1, 1, 2, 3, 3, 16, 16, torch.float32, masked=masked)
        tensors = [x.requires_grad_() for x in problem.tensors]
        out = pair_attention(*tensors, **problem.options)
        (grad,) = torch.autograd.grad(out.square().sum(), tensors[1], create_graph=True)
        with pytest.raises(RuntimeError, match=message):
            grad.sum().backward()


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"dropout_p": 0.1}, NotImplementedError, r"dropout_p=0\.1: a pair map with dropped entries is no product"),
        ({"scale": 0.0}, ValueError, r"scale must be positive, got 0\.0"),
        ({"q": torch.zeros(2, 3, 4)}, ValueError, r"q must be \(B, H, F, Dqk\), got \(2, 3, 4\)"),
        ({"k_a": None}, ValueError, "an absent modality has none of k_a, v_a"),
        ({"k_a": None, "v_a": None, "mask_a": torch.ones(2, 5) > 0}, ValueError, "has none of k_a"),
        ({"k_a": None, "v_a": None, "k_v": None, "v_v": None}, ValueError, "at least one modality"),
        ({"v_a": torch.zeros(2, 2, 4, 8)}, ValueError, r"k_a and v_a must be \(B, H, N, D\) to fit q"),
        ({"k_v": torch.zeros(2, 2, 6, 3)}, ValueError, r"k_v and v_v must be \(B, H, N, D\)"),
        ({"k_v": torch.zeros(2, 2, 6, 4).half()}, ValueError, "q, k_v, v_v must share a dtype"),
        ({"mask_a": torch.ones(2, 1, 5) > 0}, ValueError, r"mask_a must be bool of shape \(2, 5\), one per token"),
        ({"mask_v": torch.ones(2, 6)}, ValueError, "mask_v must be bool"),
        ({"cu_seqlens_a": cumulative([3, 2])}, ValueError, r"must be \(T, H, D\), being packed"),
        ({"bias_v": torch.zeros(3)}, ValueError, r"bias_v must broadcast to \(H, Dv\) = \(2, 8\), got \(3,\)"),
    ],
)
def test_errors_name_what_was_wrong(change, error, message):
    q, k_a, v_a, k_v, v_v, _ = draw(2, 2, 3, 5, 6, 4, 8, torch.float32).tensors
    arguments = {"q": q, "k_a": k_a, "v_a": v_a, "k_v": k_v, "v_v": v_v} | change
    with pytest.raises(error, match=message):
        pair_attention(**arguments)


def test_errors_of_packed_keys():
    q, k, v, k_v, v_v, _ = draw(2, 2, 3, 5, 6, 16, 16, torch.float32).tensors
    k, v = k[0].transpose(0, 1), v[0].transpose(0, 1)
    with pytest.raises(ValueError, match=r"cu_seqlens_a must be int32 of shape \(3,\), got torch.int64"):
        pair_attention(q, k, v, k_v, v_v, cu_seqlens_a=cumulative([3, 2]).long())
    with pytest.raises(ValueError, match="packed keys have no padding to mask"):
        pair_attention(q, k, v, k_v, v_v, cu_seqlens_a=cumulative([3, 2]), mask_a=torch.ones(2, 5) > 0)
    if not INTERPRETED:
        with pytest.raises(ValueError, match="at most the 5 rows"):
            pair_attention(q, k, v, k_v, v_v, cu_seqlens_a=cumulative([3, 4]))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("packed", [False, True])
def test_flops(device, packed):
    problem = draw(2, 3, 4, 5, 7, 16, 8, torch.float32, lengths={"a": [5, 2]} if packed else None)
    tensors = [x.to(device).requires_grad_() for x in problem.arguments(problem.tensors)]
    options = {name: x.to(device) for name, x in problem.keywords().items()}
    keys = (5 + 2 if packed else 2 * 5) + 2 * 7
    forward = 2 * 3 * 4 * keys * (16 + 8)
    assert flops.count(pair_attention, *tensors, **options) == forward
    assert flops.count(lambda: pair_attention(*tensors, **options).sum(), backward=True) == 3 * forward


# Kernels: on a GPU, and interpreted in a process of their own.

SMALL = [
    ("dense", 5, 24, 48, torch.float32),
    ("masked", 20, 64, 16, torch.float32),
    ("packed", 33, 16, 16, torch.float16),
    ("both packed", 5, 80, 32, torch.bfloat16),
    ("packed and masked", 70, 16, 16, torch.float16),
    ("nothing", 4, 16, 16, torch.float32),
]
INTERPRETED_TOO = "interpreted or masked_tokens or fully_masked or beyond_the_last or strides or bias_shapes"


@pytest.mark.skipif(not INTERPRETED, reason="run by test_kernels_in_the_interpreter")
@pytest.mark.parametrize("name, queries, dim, dim_v, dtype", SMALL)
def test_interpreted_kernels(name, queries, dim, dim_v, dtype):
    assert_right(case(name, queries, dim, dim_v, dtype, heads=1))


@pytest.mark.skipif(not INTERPRETED, reason="run by test_kernels_in_the_interpreter")
def test_interpreted_kernels_name_what_they_do_not_take():
    with pytest.raises(ValueError, match="head dimensions up to 128 in float32.*got 136, 16 in torch.float32"):
        pair_attention(*draw(1, 1, 2, 3, 3, 136, 16, torch.float32).tensors)
    with pytest.raises(ValueError, match="got 16, 16 in torch.float64"):
        pair_attention(*draw(1, 1, 2, 3, 3, 16, 16, torch.float64).tensors)


@pytest.mark.skipif(not INTERPRETED, reason="run by test_kernels_in_the_interpreter")
def test_interpreted_kernels_leave_to_the_reference_what_they_do_not_take(monkeypatch):
    monkeypatch.setattr(backend, "_backend", "auto")
    monkeypatch.setattr(backend, "which", lambda device: "triton")  # as on a GPU
    assert_right(draw(1, 1, 2, 3, 3, 16, 16, torch.float64), 1e-11)
    with pytest.warns(UserWarning, match="head dimensions up to 128 .* got 136, 16 .* runs without kernels"):
        assert_right(draw(1, 1, 2, 3, 3, 136, 16, torch.float32))


@interpreter
@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", INTERPRETED_TOO, __file__],
        env=os.environ | {"TRITON_INTERPRET": "1", "AVFAST_BACKEND": "triton"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-6000:]
    assert f"{len(SMALL) + 2 + 3 + 4 + 4} passed" in result.stdout


ALL = [
    *itertools.product(["packed and masked"], [50], (16, 32, 64, 80, 128), (16, 32, 64, 80, 128)),
    *itertools.product(CASES, (1, 16, 32, 50, 100), [16], [64]),
]


@pytest.mark.gpu
@pytest.mark.parametrize("name, queries, dim, dim_v", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_kernels(name, queries, dim, dim_v, dtype):
    problem = case(name, queries, dim, dim_v, dtype, "cuda", heads=3)
    got, weight = assert_right(problem)
    assert all(torch.equal(a, b) for a, b in zip(got, ours(problem, weight), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_gradients_are_the_same_every_time(dtype):
    problem = draw(16, 12, 32, 96, 196, 16, 16, dtype, "cuda")
    weight = torch.randn(16, 12, 32, 16, device="cuda").to(dtype)
    first = ours(problem, weight)
    for _ in range(30):
        assert all(torch.equal(a, b) for a, b in zip(first, ours(problem, weight), strict=True))


@pytest.mark.gpu
def test_a_cuda_graph_replays_with_new_lengths_and_the_host_never_waits():
    old, new = [60, 0, 30], [10, 50, 25]
    q, _, _, k_v, v_v, bias = draw(3, 2, 32, 1, 40, 64, 64, torch.bfloat16, "cuda").tensors
    k, v = torch.randn(2, sum(old), 2, 64, device="cuda", dtype=torch.bfloat16).unbind()
    leaves = [x.detach().requires_grad_() for x in (q, k, v, k_v, v_v, bias)]
    bounds, weight = cumulative(old).cuda(), torch.randn(3, 2, 32, 64, device="cuda", dtype=torch.bfloat16)

    def step():
        out = pair_attention(*leaves, cu_seqlens_a=bounds)
        return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]

    torch.cuda.set_sync_debug_mode("error")
    try:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for lengths in (old, new):
        bounds.copy_(cumulative(lengths))
        graph.replay()
        for name, got, want in zip(NAMES, captured, step(), strict=True):
            assert torch.equal(got, want), name


@pytest.mark.gpu
def test_the_reference_on_a_gpu_agrees():
    problem = case("packed and masked", 32, 16, 64, torch.float32, "cuda")
    got, weight = assert_right(problem)
    saved = backend.get_backend()
    backend.set_backend("reference")
    try:
        for name, a, b in zip(NAMES, got, ours(problem, weight), strict=True):
            assert_close(name, a, b, 1e-4)
    finally:
        backend.set_backend(saved)
