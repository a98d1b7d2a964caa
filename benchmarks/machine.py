"""Where and with what something was measured: the device, its versions and the sources."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Machine:
    """Where and with what a row was measured."""

    device: str
    cpu_flags: str
    threads: int
    python: str
    torch: str
    triton: str
    commit: str
    date: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%S"))

    @classmethod
    def here(cls, device: torch.device) -> Machine:
        try:
            import triton

            triton_version = triton.__version__
        except ImportError:
            triton_version = "none"
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu-{_cpu_model()}"
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        units = f"{torch.backends.cpu.get_cpu_capability()}; {cpu_units()}"
        versions = (platform.python_version(), torch.__version__, triton_version)
        return cls(slug, units, torch.get_num_threads(), *versions, _commit())


def cpu_units() -> str:
    """Which half-precision matrix units this CPU has; bf16 figures of CPUs without any say nothing about others."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return "avx512_bf16 unknown, amx unknown"
    return ", ".join(
        f"{unit} {'yes' if flag in flags else 'no'}" for unit, flag in (("avx512_bf16",) * 2, ("amx", "amx_bf16"))
    )


def _cpu_model() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found.group(1) if found else platform.machine()


def _commit() -> str:
    """Short commit, with a + when the measured sources differ from it; without a repository :func:`without_commit`."""
    run = {"cwd": ROOT, "capture_output": True, "text": True}
    try:
        head = subprocess.run(["git", "rev-parse", "--show-toplevel", "--short", "HEAD"], **run)
        status = subprocess.run(["git", "status", "--porcelain", "--", "avfast", "kernels", "benchmarks/*.py"], **run)
    except OSError:
        return without_commit()
    found = head.stdout.split()
    # A copy of the sources inside somebody else's repository has no commit of its own.
    if head.returncode or Path(found[0]) != ROOT:
        return without_commit()
    return found[-1] + ("+" if status.stdout.strip() else "")


def without_commit() -> str:
    """AVFAST_COMMIT, or a name made of the sources themselves, the same for the same sources anywhere."""
    return os.environ.get("AVFAST_COMMIT") or f"tree-{sources()}"


@cache
def sources() -> str:
    """A hash of what is measured and what measures it."""
    digest = hashlib.sha256()
    files = [path for folder in ("avfast", "kernels", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    for path in sorted(files):
        digest.update(f"{path.relative_to(ROOT).as_posix()} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]
