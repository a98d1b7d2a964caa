"""Peak memory of a call, and what it keeps for its backward pass."""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

MIB = 2**20


def peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """Bytes that ``run`` needs at its peak beyond what was there before.

    On the CPU call it in a process of its own (:func:`memory_in_subprocess`) after a warm-up.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    before = _peak_resident(reset=True)
    run()
    return _peak_resident() - before


def _peak_resident(reset: bool = False) -> int:
    """Peak resident bytes since the last reset.

    ru_maxrss starts from the resident size of the process that spawned this one, so Linux's own mark is used there.
    """
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text()).group(1)) * 1024
    except (OSError, AttributeError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def saved_bytes(run: Callable[[], object], present: Iterable[Tensor]) -> int:
    """Bytes that ``run`` keeps for its backward pass, each storage once, without those of ``present``."""
    known = {x.untyped_storage().data_ptr() for x in present}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = run()
    del result
    return sum(kept.values())


Memory = dict[str, tuple[float, float]]


def memory_in_subprocess(script: str, arguments: Sequence[str], variant: str) -> Memory:
    """``{"case dtype": (peak MiB, saved MiB)}`` of one variant, measured in a fresh process of the same script."""
    if "--bare" in arguments:
        return {}
    # A fixed threshold gives freed tensors back to the system; otherwise they would hide in the baseline.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, script, *arguments, "--memory-of", variant]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        print(f"memory of {variant} not measured: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return {}
    return {key: tuple(value) for key, value in json.loads(done.stdout.splitlines()[-1]).items()}
