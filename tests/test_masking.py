from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avfast.masking import DrawKey, Kept, assign_ratios, keep_patches, num_kept, ratio_pairs

SIX = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)


@pytest.mark.parametrize(
    "patches, ratio, kept",
    [(512, 0.6, 204), (512, 0.6000000000000001, 204), (100, 0.9, 10), (10, 0.7, 3), (196, 0.75, 49), (512, 0, 512)],
)
def test_num_kept_has_no_float_trap(patches, ratio, kept):
    assert num_kept(patches, ratio) == kept


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5])
def test_a_ratio_outside_zero_to_one_is_refused(ratio):
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        num_kept(10, ratio)


@given(st.integers(0, 30), st.integers(1, 12))
def test_a_block_uses_every_ratio_once_per_modality(block, count):
    pairs = ratio_pairs(SIX, min(count, 6), block)
    for modality in zip(*pairs, strict=True):
        assert len(set(modality)) == len(pairs)


def test_blocks_together_meet_all_pairs():
    assert len({pair for block in range(6) for pair in ratio_pairs(SIX, 6, block)}) == 36


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 99), st.integers(1, 40), st.data())
def test_the_split_over_processes_does_not_matter(seed, step, total, data):
    cut = data.draw(st.integers(0, total))
    whole = assign_ratios(SIX, DrawKey(seed, step, range(total), total))
    parts = [assign_ratios(SIX, DrawKey(seed, step, p, total)) for p in (range(cut), range(cut, total))]
    assert parts[0] + parts[1] == whole
    for modality in zip(*whole, strict=True):
        assert max(Counter(modality).values()) <= -(-total // 6)


def test_shapes_are_the_same_at_every_step_and_the_assignment_is_not():
    assigned = [assign_ratios(SIX, DrawKey(3, step, range(12), 12)) for step in range(20)]
    assert len({tuple(sorted(pairs)) for pairs in assigned}) == 1
    assert len({tuple(pairs) for pairs in assigned}) > 10


@settings(deadline=None)
@given(
    st.sampled_from(["unstructured", "time", "frequency", "time_frequency"]),
    st.sampled_from([0.0, 0.1, 0.5, 0.75, 0.9]),
    st.integers(0, 1000),
)
def test_kept_patches_are_distinct_sorted_and_counted(structure, ratio, seed):
    ids = keep_patches((8, 64), ratio, np.random.default_rng(seed), structure)
    assert len(ids) == num_kept(512, ratio) and ids.dtype == torch.int64
    assert torch.equal(ids, ids.unique()) and (len(ids) == 0 or (0 <= ids[0] and ids[-1] < 512))


@pytest.mark.parametrize("structure, axis", [("time", 0), ("frequency", 1)])
def test_structured_masks_drop_whole_columns_or_rows(structure, axis):
    ids = keep_patches((8, 64), 0.5, np.random.default_rng(0), structure)
    kept = torch.zeros(512, dtype=torch.bool).index_fill(0, ids, True).view(8, 64)
    assert (~kept).all(axis).sum() == kept.shape[1 - axis] // 2


def test_an_unknown_structure_is_refused():
    with pytest.raises(ValueError, match="structure must be one of .*'diagonal'"):
        keep_patches((2, 2), 0.5, np.random.default_rng(0), "diagonal")


def test_kept_packs_longest_first_and_finds_back():
    lists = [torch.tensor(x, dtype=torch.int64) for x in ([3], [], [0, 2, 5], [1, 4])]
    kept = Kept.pack(lists)
    assert kept.lengths == (3, 2, 1, 0) and kept.order == (2, 3, 0, 1) and kept.batch_lengths() == [1, 0, 3, 2]
    assert kept.ids.tolist() == [0, 2, 5, 1, 4, 3] and kept.rows.tolist() == [2, 2, 2, 3, 3, 0]
    assert [ids.tolist() for ids in kept.to_list()] == [ids.tolist() for ids in lists]
    assert torch.tensor(kept.lengths)[kept.inverse].tolist() == kept.batch_lengths()
    assert kept.masked(6)[2].tolist() == [False, True, False, True, True, False]
    assert Kept.all(2, 3).masked(3).sum() == 0
