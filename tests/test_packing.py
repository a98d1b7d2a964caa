from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avfast import PackedTokens
from avfast.packing import permute_rows

LENGTHS = st.lists(st.integers(0, 5), min_size=1, max_size=6)


def packed(lengths, dim=3) -> PackedTokens:
    return PackedTokens(torch.randn(sum(lengths), dim, generator=torch.Generator().manual_seed(0)), tuple(lengths))


@settings(deadline=None)
@given(LENGTHS)
def test_boundaries_and_sequences(lengths):
    tokens = packed(lengths)
    assert tokens.cu_seqlens.dtype == torch.int32 and tokens.cu_seqlens.diff().tolist() == lengths
    assert [len(x) for x in tokens.to_list()] == lengths and torch.equal(torch.cat(tokens.to_list()), tokens.values)


def test_permuted_rows_and_their_gradient():
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    permutation = torch.tensor([3, 1, 4, 0, 2])
    permuted = permute_rows(x, permutation, permutation.argsort())
    assert torch.equal(permuted, x[permutation])
    torch.autograd.gradcheck(permute_rows, (x, permutation, permutation.argsort()))


@settings(deadline=None)
@given(LENGTHS)
def test_mean_of_each_sequence_and_of_an_empty_one(lengths):
    tokens = packed(lengths)
    want = torch.stack([s.mean(0) if len(s) else torch.zeros(3) for s in tokens.to_list()])
    torch.testing.assert_close(tokens.mean(), want)


def test_select_reorders():
    tokens = packed([1, 2, 3])
    assert tokens.select([0, 1, 2]) is tokens
    picked = tokens.select([2, 0])
    assert picked.lengths == (3, 1) and torch.equal(picked.values, tokens.values[[3, 4, 5, 0]])


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: PackedTokens(torch.zeros(4, 2), (1, 2)), "add up to 3 tokens"),
        (lambda: PackedTokens(torch.zeros(1, 2), (2, -1)), "negative"),
    ],
)
def test_errors_name_what_was_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()
