"""csrc/: what a compiled library is named by, who builds it, and what happens where nothing can be compiled."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from avfast import backend, build
from avfast.ops import NoiseSchedule, diffuse_patches

ROOT = Path(__file__).parents[1]
COMPILER = shutil.which(os.environ.get("CXX") or "g++")
NVCC = shutil.which(os.environ.get("NVCC") or "nvcc")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """An empty cache, and no memory of what was loaded or failed."""
    monkeypatch.setenv("AVFAST_CACHE", str(tmp_path / "a cache"))
    build.load.cache_clear()
    yield tmp_path / "a cache" / "native"
    build.load.cache_clear()


def noised():
    x = torch.linspace(-1, 1, 64).view(1, 8, 8)
    return diffuse_patches(x, torch.tensor([[3, 0]]), torch.tensor([100]), NoiseSchedule(), 1, patch=(4, 4))


def fake_compiler(folder: Path, script: str) -> Path:
    """A program that answers --version and otherwise runs ``script``."""
    path = folder / "compiler"
    path.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then echo fake 1; exit 0; fi\n{script}\n')
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("fault", ["no compiler", "an error", "no folder", "no home"])
def test_without_a_library_there_is_one_warning_and_the_eager_body(fresh, monkeypatch, tmp_path, fault):
    if fault == "no compiler":
        monkeypatch.setenv("CXX", "a-compiler-that-is-not-there")
        message = "compiled for cpu: there is no a-compiler-that-is-not-there .*name another compiler by CXX"
    elif fault == "an error":
        monkeypatch.setenv("CXX", str(fake_compiler(tmp_path, "echo 'x.h:1: fatal error: no headers' >&2; exit 1")))
        message = "compiled for cpu: x.h:1: fatal error: no headers"
    elif fault == "no home":
        monkeypatch.setenv("AVFAST_CACHE", "~nobody-of-this-name/cache")
        message = "compiled for cpu: Could not determine home directory"
    else:
        (tmp_path / "file").touch()
        monkeypatch.setenv("AVFAST_CACHE", str(tmp_path / "file"))
        message = "compiled for cpu: .*file"
    if fault in ("no folder", "no home") and COMPILER is None:
        pytest.skip("needs a C++ compiler")
    with pytest.warns(UserWarning, match=f"{message}.*: operators run without compiled code"):
        got = noised()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        noised()
    assert not list(fresh.glob("*.so")) and not list(fresh.glob("*.tmp"))
    before = backend.get_backend()
    backend.set_backend("reference")
    try:
        assert torch.equal(got, noised())
        backend.set_backend("native")
        with pytest.raises(RuntimeError, match="AVFAST_BACKEND=native: csrc/ could not be compiled"):
            noised()
    finally:
        backend.set_backend(before)


def test_native_says_what_it_does_not_take(monkeypatch):
    monkeypatch.setattr(backend, "_backend", "native")
    with pytest.raises(RuntimeError, match="does not take torch.float64 to torch.float32 on cpu"):
        backend.use_native("diffuse_patches", torch.zeros(1).double(), (torch.float64, torch.float32))


@pytest.mark.parametrize(
    "device, triton, name, runs",
    [
        ("cpu", True, "auto", True),
        ("cpu", True, "cudnn", True),
        ("cpu", True, "reference", False),
        ("cpu", True, "triton", False),
        ("cuda", True, "auto", False),
        ("cuda", True, "native", True),
        ("cuda", False, "auto", True),
        ("meta", False, "auto", False),
    ],
)
def test_when_compiled_code_runs(monkeypatch, device, triton, name, runs):
    asked = []
    monkeypatch.setattr(build, "load", lambda kind: asked.append(kind) or True)
    monkeypatch.setattr(backend, "_HAS_TRITON", triton)
    monkeypatch.setattr(backend, "_backend", name)

    class Input:
        def __init__(self):
            self.device = torch.device(device)

    assert backend.use_native("diffuse_patches", Input(), (torch.float32, torch.bfloat16)) == runs
    assert asked == ([device] if runs else [])


def test_a_library_is_named_by_what_it_depends_on(fresh, monkeypatch, tmp_path):
    compiler = fake_compiler(tmp_path, 'for last; do :; done; echo > "$last"')
    monkeypatch.setenv("CXX", str(compiler))
    sources = tmp_path / "csrc"
    sources.mkdir()
    (sources / "a.cpp").write_text("int a;")
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setattr(build, "_processor", lambda: "avx2")
    names = [build.build("cpu")]
    (sources / ".notes").write_bytes(b"\xff")  # what a file browser or an editor leaves there
    (sources / "b.cu").write_text("int b;")
    assert build.build("cpu") == names[0]
    monkeypatch.setitem(build.OPTIONS, "cpu", ["-O2"])
    names.append(build.build("cpu"))
    monkeypatch.setattr(build, "_processor", lambda: "avx2 avx512f")
    names.append(build.build("cpu"))
    (sources / "a.cpp").write_text("int b;")
    names.append(build.build("cpu"))
    (sources / "a.h").write_text("int c;")
    names.append(build.build("cpu"))
    monkeypatch.setattr(torch, "__version__", "9.9")
    names.append(build.build("cpu"))
    compiler.write_text(compiler.read_text().replace("fake 1", "fake 2"))
    names.append(build.build("cpu"))
    assert len(set(names)) == len(names)
    monkeypatch.undo()
    assert "avx" in build._processor() or build._processor()


def test_a_machine_without_a_compiler_takes_what_was_built_ahead(fresh, monkeypatch, tmp_path):
    """All may read it, as far as the umask allows."""
    monkeypatch.setenv("CXX", str(fake_compiler(tmp_path, 'for last; do :; done; echo > "$last"')))
    before = os.umask(0o022)
    try:
        path = build.build("cpu")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o644
    assert not list(fresh.glob("*.tmp"))
    monkeypatch.setenv("CXX", "a-compiler-that-is-not-there")
    assert build.build("cpu") == path
    monkeypatch.setattr(build, "_processor", lambda: "another")
    with pytest.raises(build.BuildError, match="there is no a-compiler-that-is-not-there"):
        build.build("cpu")


def test_those_that_build_at_once_compile_once_and_see_whole_files(fresh, monkeypatch, tmp_path):
    """A compiler that takes a while and writes to its output twice; threads lock one another out as processes do."""
    script = 'for last; do :; done; echo x >> "$COUNT"; printf half > "$last"; sleep 0.3; printf whole > "$last"'
    monkeypatch.setenv("CXX", str(fake_compiler(tmp_path, script)))
    monkeypatch.setenv("COUNT", str(tmp_path / "count"))
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda kind: build.build(kind).read_text(), ["cpu"] * 3))
    assert found == ["whole"] * 3
    assert (tmp_path / "count").read_text().count("x") == 1
    assert not list(fresh.glob("*.tmp"))


@needs_compiler
def test_the_command_builds_ahead_and_says_where(fresh, monkeypatch, capsys):
    assert build.main([]) == 0
    out, err = capsys.readouterr()
    path = Path(out.strip())
    assert path.parent == fresh and path.name.startswith("cpu-") and "compiling" in err
    monkeypatch.setenv("NVCC", "no-nvcc-here")
    assert build.main(["--cuda", "90"]) == 1
    out, err = capsys.readouterr()
    assert out.strip() == str(path) and "compiling" not in err and "there is no no-nvcc-here" in err
    with pytest.raises(SystemExit):
        build.main(["--cuda", "hopper"])
    assert "--cuda takes numbers such as 80,90, got 'hopper'" in capsys.readouterr().err


@pytest.mark.skipif(NVCC is None or COMPILER is None, reason="needs nvcc")
@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_cuda_compiles_without_spills(fresh, arch):
    path = build.build("cuda", [arch])
    folder = Path(pytest.importorskip("triton").__file__).parent / "backends" / "nvidia" / "bin"
    report, code = (
        subprocess.run([folder / "cuobjdump", option, path], capture_output=True, text=True, check=True).stdout
        for option in ("-res-usage", "-sass")
    )
    assert f"sm_{arch}" in code
    usage = re.findall(r"Function \S*diffuse\S*:\s+REG:(\d+) STACK:(\d+)", report)
    assert len(usage) == 9, report  # float32, float16 and bfloat16, read and written
    assert all(int(registers) <= 64 and stack == "0" for registers, stack in usage), usage
    assert not re.search(r"\b(LDL|STL)\b", code)


@pytest.mark.skipif(NVCC is None or COMPILER is None, reason="needs nvcc")
@pytest.mark.slow
def test_the_cuda_library_loads_without_a_gpu(fresh):
    path = build.build("cuda", [90])
    code = f"import torch; torch.ops.load_library({str(path)!r}); print(torch.ops.avfast_native.diffuse_patches_cuda)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0 and "diffuse_patches_cuda" in run.stdout, run.stderr


def test_the_sources_are_part_of_the_package(tmp_path):
    """Of a source tree and of what pip makes of it."""
    assert build.SOURCES == ROOT / "csrc"
    copied = shutil.copytree(
        ROOT, tmp_path / "tree", ignore=shutil.ignore_patterns(".git", "runs", "*.egg-info", "tests")
    )
    command = [sys.executable, "setup.py", "-q", "build", "--build-lib", str(tmp_path / "lib")]
    run = subprocess.run(command, cwd=copied, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    names = {path.name for path in (ROOT / "csrc").iterdir()}
    assert names == {path.name for path in (tmp_path / "lib" / "avfast" / "csrc").iterdir()}
    code = "from avfast import build; print(build.SOURCES)"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "lib", capture_output=True, text=True)
    assert run.stdout.strip() == str(tmp_path / "lib" / "avfast" / "csrc")
