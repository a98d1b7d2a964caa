from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avfast.masking import Kept, assign_ratios, keep_patches, num_kept, ratio_pairs
from avfast.random import DrawKey

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


def key_of(seed, positions=range(1), total=None):
    return DrawKey(seed, 0, positions, total or max(positions) + 1)


@settings(deadline=None)
@given(
    st.sampled_from(["unstructured", "time", "frequency", "time_frequency"]),
    st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.75, 0.9]), min_size=1, max_size=4),
    st.integers(0, 1000),
)
def test_kept_patches_are_distinct_sorted_and_counted(structure, ratios, seed):
    kept = keep_patches((8, 64), ratios, key_of(seed, range(len(ratios))), "audio", structure)
    for ids, ratio in zip(kept.to_list(), ratios, strict=True):
        assert len(ids) == num_kept(512, ratio) and ids.dtype == torch.int64
        assert torch.equal(ids, ids.unique()) and 0 <= ids[0] and ids[-1] < 512


@pytest.mark.parametrize("structure, axis", [("time", 0), ("frequency", 1)])
def test_structured_masks_drop_whole_columns_or_rows(structure, axis):
    kept = ~keep_patches((8, 64), [0.5], key_of(0), "audio", structure).masked(512)[0].view(8, 64)
    assert (~kept).all(axis).sum() == kept.shape[1 - axis] // 2


def test_time_and_frequency_share_the_masked_patches():
    masked = keep_patches((8, 64), [0.5], key_of(0), "audio", "time_frequency").masked(512)[0].view(8, 64)
    # 0.35 of 64 columns and of 8 rows hold 260 patches: all but four of them make up the half that is masked
    assert masked.sum() == 256 and masked.all(0).sum() >= 18
    assert (masked.sum(1) >= 60).sum() == 2 and (masked.sum(1) <= 28).sum() == 6


def test_every_patch_is_kept_equally_often():
    counts = (~keep_patches((4, 8), [0.75] * 4096, key_of(1, range(4096)), "visual").masked(32)).sum(0)
    assert counts.sum() == 4096 * 8 and (counts - 1024).abs().max() < 5 * (4096 * 0.25 * 0.75) ** 0.5


def test_an_unknown_structure_is_refused():
    with pytest.raises(ValueError, match="structure must be one of .*'diagonal'"):
        keep_patches((2, 2), [0.5], key_of(0), "audio", "diagonal")


def test_kept_packs_longest_first_and_finds_back():
    lists = [torch.tensor(x, dtype=torch.int64) for x in ([3], [], [0, 2, 5], [1, 4])]
    kept = Kept.pack(lists)
    assert kept.lengths == (3, 2, 1, 0) and kept.permutation == (2, 3, 0, 1) and kept.batch_lengths() == [1, 0, 3, 2]
    assert kept.ids.tolist() == [0, 2, 5, 1, 4, 3] and kept.batch_rows.tolist() == [2, 2, 2, 3, 3, 0]
    assert [ids.tolist() for ids in kept.to_list()] == [ids.tolist() for ids in lists]
    assert torch.tensor(kept.lengths)[kept.inverse].tolist() == kept.batch_lengths()
    assert kept.masked(6)[2].tolist() == [False, True, False, True, True, False]
    assert Kept.all(2, 3).masked(3).sum() == 0


def test_kept_of_a_mask_array_and_another_order_agree_with_lists():
    mask = np.array([[0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 1, 1], [0, 1, 1, 0]], dtype=bool)
    kept, want = Kept.where(mask), Kept.pack([torch.from_numpy(row.nonzero()[0]) for row in mask])
    for other in (want, kept.reordered((1, 3, 0, 2)).reordered(kept.permutation)):
        assert (kept.lengths, kept.permutation) == (other.lengths, other.permutation)
        assert all(torch.equal(getattr(kept, x), getattr(other, x)) for x in ("ids", "batch_rows", "inverse"))
    moved = kept.reordered((1, 3, 0, 2))
    assert moved.ids.tolist() == [1, 2, 1, 0, 2, 3] and moved.batch_rows.tolist() == [3, 3, 0, 2, 2, 2]
    assert moved.inverse.tolist() == [2, 0, 3, 1] and moved.starts().tolist() == [2, 0, 3, 0]


@pytest.mark.parametrize(
    "keep, error, words",
    [
        (torch.zeros(2, 4, dtype=torch.bool), TypeError, "by their ids, got a bool mask for instance 0"),
        ([torch.tensor([0]), torch.tensor([0.5])], TypeError, "float32 for instance 1"),
        (torch.zeros(2, 1, 1, dtype=torch.int64), ValueError, r"\(1, 1\) for instance 0"),
        (torch.tensor([[0, -1]]), ValueError, "count from 0, got -1"),
        (torch.tensor([[2, 3], [1, 1]]), ValueError, "distinct"),
    ],
)
def test_what_is_no_list_of_ids_is_refused(keep, error, words):
    with pytest.raises(error, match=words):
        Kept.pack(keep)
