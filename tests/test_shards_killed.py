"""Builders that are killed at random moments lose nothing."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from shard_files import files, groups

from avfast.shards.verify import verify


def children(pid: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(status.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(status.parent.name))
        except (OSError, ValueError):
            pass
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("who", ["driver", "worker"])
def test_killed_at_ten_random_moments(clips: object, tmp_path: Path, who: str) -> None:
    data = Path(clips.train).parent / "clips"  # type: ignore[attr-defined]
    command = [sys.executable, "-m", "avfast.shards", "build", "--data", str(data), "--shard_bytes", "1e6", "--workers"]
    start = time.perf_counter()
    subprocess.run([*command, "2", "--out", str(tmp_path / "whole")], check=True, capture_output=True)
    lasts, rng = time.perf_counter() - start, random.Random(0)
    expected, out, kills = files(tmp_path / "whole"), tmp_path / "set", 0
    if who == "driver":
        while kills < 10:
            driver = subprocess.Popen([*command, "2", "--out", str(out)], stderr=subprocess.DEVNULL)
            time.sleep(lasts * rng.uniform(0.1, 0.9))
            driver.kill()
            if driver.wait() == -signal.SIGKILL:
                kills += 1
            else:  # it was faster, and nothing is left to interrupt
                shutil.rmtree(out)
    else:
        while kills < 10:
            driver = subprocess.Popen([*command, "2", "--out", str(out)], stderr=subprocess.DEVNULL)
            while driver.poll() is None and kills < 10:
                time.sleep(rng.uniform(0, lasts / 5))
                workers = [pid for server in children(driver.pid) for pid in children(server)]
                if workers:
                    os.kill(rng.choice(workers), signal.SIGKILL)
                    kills += 1
            driver.wait()
            if kills < 10:
                shutil.rmtree(out, ignore_errors=True)
    done = subprocess.run([*command, "2", "--out", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not list(verify(out)) and files(out) == expected
    assert len({key for key, _ in groups(out)}) == len(np.unique([key for key, _ in groups(out)]))
