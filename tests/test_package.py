"""The promises of the package as a whole: what importing it costs and needs, and that its papers agree."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import avfast

ROOT = Path(__file__).parent.parent
TRAIN_COMMAND = "pip install -e . && torchrun -m avfast.train"
TEST_COMMAND = 'pip install -e ".[test]" && pytest'

BLOCKED = (
    "timm torchvision torchaudio av numpy PIL matplotlib sklearn scipy safetensors tqdm tensorboard triton "
    "flash_attn xformers torchmetrics mir_eval"
).split()

IMPORT_PROBE = f"""
import sys, time

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

if "block" in sys.argv:
    sys.meta_path.insert(0, Missing())
import torch
before = set(sys.modules)
start = time.perf_counter()
import avfast
seconds = time.perf_counter() - start
import json
new = sorted({{name.split(".")[0] for name in set(sys.modules) - before}} - set(sys.stdlib_module_names) - {{"json"}})
triton = sorted(name for name in set(sys.modules) - before if name.split(".")[0] == "triton")
print(json.dumps({{"seconds": seconds, "new": new, "triton": triton, "cuda": torch.cuda.is_initialized()}}))
"""


def _import(*arguments: str) -> dict:
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IMPORT_PROBE, *arguments], capture_output=True, text=True, cwd=ROOT
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_import_needs_torch_alone():
    assert set(_import("block")["new"]) <= {"avfast", "torch"}


def test_import_is_quick_and_touches_neither_cuda_nor_triton():
    probes = [_import() for _ in range(3)]
    assert min(probe["seconds"] for probe in probes) < 0.5
    assert not probes[0]["cuda"]
    assert probes[0]["triton"] == []
    assert set(probes[0]["new"]) <= {"avfast", "torch"}


def test_a_script_beside_the_clone_finds_the_package(tmp_path: Path):
    """The clone's folder is called avfast too; seen from its parent it must not pass for the package."""
    (tmp_path / "avfast").mkdir()
    script = tmp_path / "script.py"
    script.write_text("import avfast, avfast.kernels\nprint(avfast.__version__, *avfast.kernels.__path__)")
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    version, kernels = run.stdout.strip().split(" ", 1)
    assert version == avfast.__version__ and (Path(kernels) / "packed_attention.py").is_file()


def test_readme_and_ci_agree():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = [block.strip() for block in re.findall(r"```sh\n(.*?)```", readme, re.DOTALL)]
    assert TRAIN_COMMAND in blocks
    assert TEST_COMMAND in blocks
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert [line.strip() for line in script.splitlines()].count(TEST_COMMAND) == 1
    assert 'export PIP_CONSTRAINT="$PWD/constraints.txt"' in script


def test_readme_example_runs(tmp_path, monkeypatch):
    from avfast.demo import build

    made = build("tiny", tmp_path, clips=1, test_clips=0, workers=1, progress=False)
    next(made.root.rglob("*.mp4")).rename(tmp_path / "clip.mp4")
    monkeypatch.chdir(tmp_path)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len(example.strip().splitlines()) <= 12
    exec(compile(example, "README.md", "exec"), {})


def test_version_is_the_same_everywhere():
    assert re.fullmatch(r"\d+\.\d+\.\d+", avfast.__version__)
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (.+)$", citation, re.MULTILINE).group(1) == avfast.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## (\S+)", changelog, re.MULTILINE).group(1) == avfast.__version__


def test_constraints_are_exact_and_cover_what_the_package_asks_for():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.match(r"[a-z0-9-]+==[\d.]+(; |$)", pin) for pin in pins)
    pinned = {pin.split("==")[0] for pin in pins}
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    required = re.search(r"install_requires=\[(.*?)\]", setup, re.DOTALL).group(1) + re.search(
        r'"test": \[(.*?)\]', setup
    ).group(1)
    assert {re.match(r"[\w-]+", name).group() for name in re.findall(r'"([^"]+)"', required)} <= pinned


def test_readme_links_to_files_that_exist():
    for page in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", (ROOT / page).read_text(encoding="utf-8")):
            assert (ROOT / target).exists(), f"{page}: {target}"


def test_no_name_is_exported_that_does_not_exist():
    assert [name for name in avfast.__all__ if not hasattr(avfast, name)] == []


@pytest.mark.skipif(importlib.util.find_spec("ruff") is None, reason="needs ruff")
def test_ruff():
    run = subprocess.run([sys.executable, "-m", "ruff", "check", "."], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stdout


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="needs mypy")
def test_mypy():
    run = subprocess.run([sys.executable, "-m", "mypy"], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stdout
