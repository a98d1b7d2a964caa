"""Random choices are named: same name, same bits, however a batch is split."""

import zlib
from dataclasses import replace

import numpy as np
import pytest

from avfast.random import DrawKey, progress


@pytest.mark.parametrize("positions", [[0], [95], [3, 4, 9], [9, 2, 3], range(40, 96), []])
@pytest.mark.parametrize("count", [1, 4, 50])
def test_bits_are_those_of_numpys_philox_and_belong_to_a_position(positions, count):
    seed, step, blocks = 2**64 - 1, 2**32 + 3, -(-count // 4)
    got = DrawKey(seed, step, positions, 96).bits("audio", count)
    assert got.shape == (len(positions), count) and got.dtype == np.uint64
    for position, row in zip(positions, got, strict=True):
        key = np.array([seed, zlib.crc32(b"audio")], dtype=np.uint64)
        philox = np.random.Philox(key=key, counter=[position * blocks, 0, 0, step])
        assert (row == philox.random_raw(count)).all()
    assert positions == [] or (got != DrawKey(seed, step, positions, 96).bits("visual", count)).any()


def test_uniform_numbers_lie_in_the_unit_interval():
    x = DrawKey(0, 1, range(1000), 1000).uniform("gain", 3)
    assert 0 <= x.min() < 0.01 and 0.99 < x.max() < 1 and abs(x.mean() - 0.5) < 0.03


def test_the_progress_of_training_names_no_bits():
    key = DrawKey(3, 5, range(4), 4)
    later = replace(key, progress=0.5)
    assert key.progress == 0 and (key.bits("audio", 7) == later.bits("audio", 7)).all()
    assert key.generator("clip", 2).random() == later.generator("clip", 2).random()


def test_progress_reaches_both_ends_and_stays_there():
    assert [progress(epoch, 5) for epoch in range(7)] == [0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert [progress(epoch, epochs) for epochs in (0, 1) for epoch in range(3)] == [0] * 6
