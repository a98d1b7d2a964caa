"""The judges themselves."""

from __future__ import annotations

import math
import sys
import types

import pytest
import torch
from helpers import assert_close, relative_error


def test_relative_error_is_relative_to_the_largest_value_with_a_floor():
    want = torch.tensor([1e-3, -4.0])
    assert relative_error(want + torch.tensor([0.0, 0.04]), want) == pytest.approx(0.01, rel=1e-4)
    tiny = torch.tensor([1e-9])
    assert relative_error(2 * tiny, tiny) == pytest.approx(1.0, rel=1e-4)
    assert relative_error(2 * tiny, tiny, scale=1.0) == pytest.approx(1e-5, rel=1e-4)
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0.0
    assert relative_error(torch.empty(0), torch.empty(0)) == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_only_match_themselves(bad):
    want = torch.tensor([1.0, 2.0])
    got = torch.tensor([1.0, bad])
    assert relative_error(got, want) == math.inf
    assert relative_error(want, got) == math.inf
    if not math.isnan(bad):
        assert relative_error(got, got) == 0.0
        assert relative_error(got, -got) == math.inf


def test_assert_close_names_the_worst_element():
    want = torch.arange(6.0).view(2, 3)
    got = want.clone()
    got[1, 0] += 1
    assert_close("fine", got, want, tol=0.21)
    with pytest.raises(AssertionError, match=r"grad: error 0.2 > 0.1; worst at \(1, 0\): got 4, expected 3"):
        assert_close("grad", got, want, tol=0.1)
    with pytest.raises(AssertionError, match=r"shape \(3, 2\), expected \(2, 3\)"):
        assert_close("grad", got.view(3, 2), want, tol=0.1)


@pytest.mark.parametrize(
    "call",
    [
        "torch.empty(3)",
        "torch.empty(2, 3, dtype=torch.bfloat16)",
        "torch.empty_like(x)",
        "x.new_empty(5)",
        "torch.empty_strided((2, 2), (2, 1))",
    ],
)
def test_memory_that_avfast_leaves_unwritten_is_nan(call):
    def allocate(module: str) -> torch.Tensor:
        scope = {"__name__": module, "torch": torch, "x": torch.ones(2)}
        exec(f"def f(): return {call}", scope)
        return scope["f"]()

    assert allocate("avfast.ops.some_op").isnan().all()
    torch.ones(1000)
    assert allocate("avfast.ops.some_op").dtype == allocate("torch.nn").dtype


def test_integers_and_meta_tensors_are_left_alone():
    scope = {"__name__": "avfast.packing", "torch": torch}
    exec("def f(**kwargs): return torch.empty(3, **kwargs)", scope)
    assert scope["f"](dtype=torch.int32).dtype == torch.int32
    assert scope["f"](device="meta").is_meta
    with torch.device("meta"):
        assert scope["f"]().is_meta


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_poison_does_not_break_a_compiled_graph(backend, monkeypatch):
    module = types.ModuleType("avfast.allocates")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec("import torch\ndef f(x): return torch.empty(3).zero_() + x.new_empty(3).fill_(2) + x", module.__dict__)
    torch.compiler.reset()
    compiled = torch.compile(module.f, backend=backend, fullgraph=True)
    assert compiled(torch.ones(3)).tolist() == [3.0, 3.0, 3.0]
