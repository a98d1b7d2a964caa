"""Triton without a device: kernels are specialised as on an H100, and neither compiled (unless asked) nor run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver


class _Utils:
    """What a compiled kernel asks of a device."""

    def load_binary(self, *args: Any) -> tuple[int, int, int, int, int]:
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, most threads

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}


class _Launcher:
    def __init__(self, *args: Any) -> None:
        pass

    def __call__(self, *args: Any) -> None:
        pass


class _Driver:
    utils = _Utils()
    launcher_cls = _Launcher

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Launches:
    """What was asked of the JIT, per kernel name.

    Args:
        forms: the distinct specialisations, each of which is a compilation on a device.
        programs: of every launch, in order.
        unguarded: kernels that were launched without a device guard.
    """

    def __init__(self) -> None:
        self.forms: dict[str, set[str]] = defaultdict(set)
        self.programs: dict[str, list[int]] = defaultdict(list)
        self.unguarded: set[str] = set()

    def counts(self) -> dict[str, int]:
        return {name: len(forms) for name, forms in self.forms.items()}


@contextmanager
def mock_driver(monkeypatch: Any, compile: bool = False) -> Iterator[Launches]:
    """Ops take CPU tensors to their kernels while the context lasts; their results are what memory held before.

    Args:
        monkeypatch: pytest's.
        compile: whether each form is compiled for sm_90, a second or two each.
    """
    from avfast import backend
    from avfast.kernels import common

    launches, guards, original = Launches(), [], common.launch

    def hook(*, key: str, fn: Any, **kwargs: Any) -> bool:
        launches.forms[fn.name.rpartition(".")[2]].add(key)
        if not guards:
            launches.unguarded.add(fn.name)
        return not compile

    @contextmanager
    def guard(x: torch.Tensor) -> Iterator[None]:
        guards.append(x)
        yield
        guards.pop()

    def launch(kernel: Any, programs: int, *arguments: Any, **settings: Any) -> None:
        launches.programs[kernel.__name__].append(programs)
        original(kernel, programs, *arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(driver, "_active", _Driver())
        patch.setattr(triton.knobs.runtime, "jit_cache_hook", hook)
        patch.setattr(triton.compiler.compiler, "max_shared_mem", lambda device: 227 * 1024)
        patch.setattr(torch.cuda, "device_of", guard)
        patch.setattr(backend, "which", lambda device: "triton")
        patch.setattr(backend, "_backend", "triton")
        from avfast.kernels import add_layer_norm, diffuse_patches, low_rank_linear, patch_embed_kept

        for module in (common, add_layer_norm, diffuse_patches, low_rank_linear, patch_embed_kept):
            patch.setattr(module, "launch", launch)
        yield launches
