"""Rules that hold for every test: two threads, fixed seeds, no silent reads of memory nobody wrote."""

from __future__ import annotations

import os

_threads = 1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1)
os.environ.setdefault("OMP_NUM_THREADS", str(_threads))  # before torch is imported; subprocesses inherit it
# Threads that spin while they wait are ten times slower where another process wants the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import functools  # noqa: E402
import random  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable  # noqa: E402
from types import SimpleNamespace  # noqa: E402
from typing import Any  # noqa: E402

import numpy  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """The whole suite runs in two processes, a file in one of them; what is named on the command line in this one.

    ``-n 0`` keeps all of it here, where pytest-xdist is missing it stays here, and on a GPU nobody shares it.
    """
    if "PYTEST_XDIST_WORKER" in os.environ or not config.pluginmanager.hasplugin("xdist"):
        return
    named = config.args_source is not pytest.Config.ArgsSource.TESTPATHS
    if not (named or config.option.collectonly or torch.cuda.is_available()) and config.option.numprocesses is None:
        config.option.numprocesses, config.option.dist = 2, "loadscope"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same random state, so it does not depend on which tests ran before."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """16 + 8 clips of the built-in kind."""
    from avfast.demo import build

    root = tmp_path_factory.mktemp("clips")
    made = build("tiny", root, clips=16, test_clips=8, workers=1, progress=False)
    return SimpleNamespace(train=str(made.train), test=str(made.test), classes=str(made.class_csv), folder=root)


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(allocate)
    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return allocate(*args, **kwargs)
        out = allocate(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.split(".")[0] == "avfast" and (out.is_floating_point() or out.is_complex()):
            with torch.no_grad():
                out.fill_(float("nan"))
        return out

    return wrapper


def poison() -> None:
    """Floating-point memory that avfast allocates uninitialised holds NaN, so an element nobody wrote is seen.

    Once and for all rather than per test: PyTorch keeps tables of its own functions, built on first use.
    """
    with torch.device("cpu"):
        torch.empty(0)  # builds the table of what a device context redirects, which must hold the originals
    for name in ("empty", "empty_like", "empty_strided"):
        setattr(torch, name, _poisoned(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        setattr(torch.Tensor, name, _poisoned(getattr(torch.Tensor, name)))


poison()
