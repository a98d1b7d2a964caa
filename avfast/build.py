"""Compiles csrc/: operators in C++ for CPUs, and in CUDA for GPUs where Triton does not run or is not asked for.

    python -m avfast.build [--cuda [ARCHITECTURES]]

Nothing is compiled when avfast is installed. The first operator that wants compiled code builds it, in seconds, and
every later process finds it in ``$AVFAST_CACHE/native`` (AVFAST_CACHE is ``~/.cache/avfast`` if unset); this command
builds ahead. A library is named by everything it depends on: sources, options, torch, the CPU's instruction sets or the
GPU's architectures, and compiler, so one folder may serve machines that differ; one without a compiler takes what any
compiler made for a machine like it. ``CXX`` and ``NVCC`` name other compilers than g++ and nvcc.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

_HERE = Path(__file__).resolve().parent
SOURCES = _HERE / "csrc" if (_HERE / "csrc").is_dir() else _HERE.parent / "csrc"  # in a wheel, in a source tree
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # of torch 2.11
OPTIONS = {
    # Errors and traps of mathematical functions are what keeps loops over them from being vectorised.
    "cpu": "-O3 -march=native -fno-math-errno -fno-trapping-math -std=c++17 -shared -fPIC -fvisibility=hidden".split(),
    "cuda": "-O3 -std=c++17 -shared -cudart static -DUSE_CUDA -Xcompiler -fPIC,-fvisibility=hidden".split(),
}
LIBRARIES = {"cpu": ("torch_cpu",), "cuda": ("torch_cpu", "torch_cuda")}
COMPILERS = {"cpu": ("g++", "CXX"), "cuda": ("nvcc", "NVCC")}  # and what names another
SUFFIX = {"cpu": "*.cpp", "cuda": "*.cu"}


class BuildError(RuntimeError):
    """csrc/ cannot be compiled here; the message says what is missing, or what the compiler said."""


@cache
def load(kind: str) -> bool:
    """Builds ``cpu`` or ``cuda`` if need be and loads it; False, after a warning, where that is impossible.

    ``torch.ops.avfast_native`` holds its operators then.
    """
    try:
        torch.ops.load_library(str(build(kind)))
    except (BuildError, OSError) as problem:
        warnings.warn(f"{problem}: operators run without compiled code, and are slower so", stacklevel=2)
        return False
    return True


def build(kind: str, architectures: Sequence[int] = ()) -> Path:
    """The library of a kind, compiled unless it is there.

    Args:
        kind: ``cpu`` or ``cuda``.
        architectures: for CUDA, such as 90; default those of the GPUs present.

    Raises:
        BuildError: where it fails, and without a compiler and a library that one has made.
    """
    if kind == "cuda" and not architectures:
        architectures = _present()
    options = [*OPTIONS[kind], STABLE_ABI]
    options += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in sorted(architectures)]
    name, compiler = f"{kind}-{_key(kind, options)}", _compiler(kind)
    try:
        folder = Path(os.environ.get("AVFAST_CACHE") or "~/.cache/avfast").expanduser() / "native"
        if compiler is None:
            return _built_elsewhere(kind, folder, name)
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
        path = folder / f"{name}-{_hash(compiler, version)[:8]}.so"
        if path.exists():
            return path
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f"{path.stem}.lock"):
            if not path.exists():  # another process may have built it meanwhile
                _compile(kind, [compiler, *options], path)
    except BuildError:
        raise
    except (OSError, RuntimeError) as problem:  # the latter where there is no home directory
        raise BuildError(f"csrc/ was not compiled for {kind}: {problem}") from problem
    return path


def _built_elsewhere(kind: str, folder: Path, name: str) -> Path:
    """The newest library of this name, whatever compiler made it."""
    found = sorted(folder.glob(f"{name}-*.so"), key=lambda path: path.stat().st_mtime)
    if not found:
        program, variable = COMPILERS[kind]
        raise BuildError(
            f"csrc/ was not compiled for {kind}: there is no {os.environ.get(variable) or program} (install it, or "
            f"name another compiler by {variable})"
        )
    return found[-1]


def _compile(kind: str, command: list[str], path: Path) -> None:
    """The library appears whole: it is written elsewhere and then renamed."""
    print(f"avfast: compiling {SOURCES} for {kind}, once", file=sys.stderr, flush=True)
    root = Path(torch.__file__).parent
    where = [f"-I{root / 'include'}", f"-L{root / 'lib'}", *(f"-l{name}" for name in LIBRARIES[kind])]
    # In a folder of its own, so that the compiler creates the file, with the permissions that others may read.
    with tempfile.TemporaryDirectory(dir=path.parent, suffix=".tmp") as folder:
        made = str(Path(folder) / path.name)
        sources = [str(source) for source in sorted(SOURCES.glob(SUFFIX[kind]))]
        run = subprocess.run([*command, *sources, *where, "-o", made], capture_output=True, text=True)
        if run.returncode:
            said = next((line for line in run.stderr.splitlines() if "error" in line), run.stderr.strip()[-200:])
            raise BuildError(f"csrc/ was not compiled for {kind}: {said}")
        os.replace(made, path)


def _compiler(kind: str) -> str | None:
    """Where it is."""
    program, variable = COMPILERS[kind]
    return shutil.which(os.environ.get(variable) or program)


def _key(kind: str, options: Sequence[str]) -> str:
    """Names what a library depends on besides the compiler."""
    parts = [*options, torch.__version__, platform.machine(), _processor() if kind == "cpu" else ""]
    sources = sorted([*SOURCES.glob("*.h"), *SOURCES.glob(SUFFIX[kind])])
    return _hash(*parts, *(source.name + source.read_text(encoding="utf-8") for source in sources))


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """What -march=native goes by: the instruction sets, or the model where the system does not list them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    named = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {name.strip(): value for name, value in named.items()}
    return "".join(fields.get(name, "") for name in ("vendor_id", "cpu family", "model", "flags", "Features"))


def _present() -> list[int]:
    """Architectures of the GPUs here."""
    devices = range(torch.cuda.device_count())
    found = sorted({10 * major + minor for major, minor in map(torch.cuda.get_device_capability, devices)})
    if not found:
        raise BuildError("csrc/ was not compiled for cuda: there is no GPU here to compile for")
    return found


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time, where the system has such locks."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main(argv: Sequence[str] | None = None) -> int:
    parse = argparse.ArgumentParser(prog="python -m avfast.build", description=(__doc__ or "").splitlines()[0])
    parse.add_argument(
        "--cuda",
        nargs="?",
        const="",
        metavar="ARCHITECTURES",
        help="CUDA too: for the GPUs present, or a library for each of a list such as 80,90",
    )
    cuda = parse.parse_args(argv).cuda
    wanted: list[tuple[str, list[int]]] = [("cpu", [])]
    if cuda is not None:
        if not all(word.isdigit() for word in cuda.split(",") if cuda):
            parse.error(f"--cuda takes numbers such as 80,90, got {cuda!r}")
        wanted += [("cuda", [int(word)]) for word in cuda.split(",")] if cuda else [("cuda", [])]
    failed = 0
    for kind, architectures in wanted:
        try:
            print(build(kind, architectures))
        except BuildError as problem:
            print(problem, file=sys.stderr)
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
