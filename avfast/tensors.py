"""Where tensors are made and how they reach a device."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """``x`` on a device; a copy to a CUDA device leaves from page-locked memory, and nobody waits for it."""
    device = torch.device(device)
    if device.type == "cuda" and x.device.type == "cpu" and not x.is_pinned():
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def tensor_cache(make: Callable[..., T]) -> Callable[..., T]:
    """Keeps the 64 results used last of a function that makes tensors, such as tables and plans, of its arguments.

    They serve training even where they were first made under ``inference_mode``. Where tensors are not plain ones
    (while a model is traced, exported, or run on fake tensors) the function is called each time and nothing is kept.
    """
    keep = lru_cache(maxsize=64)(make)

    @wraps(make)
    def cached(*args: Any) -> T:
        with torch.inference_mode(False):
            if torch.compiler.is_compiling() or not _plain(torch.empty(0, device="cpu")):
                return make(*args)
            return keep(*args)

    cached.cache_clear = keep.cache_clear  # type: ignore[attr-defined]
    return cached


def _plain(x: Tensor) -> bool:
    return type(x) is Tensor and not torch._is_functional_tensor(x)


def float32_weights(init: Callable[P, None]) -> Callable[P, None]:
    """Decorates a model's constructor: its weights and tables are float32 whatever ``torch.set_default_dtype`` says.

    The model keeps the arguments by name, defaults included, as ``settings``.
    """
    said = inspect.signature(init)

    @wraps(init)
    def constructor(*args: P.args, **kwargs: P.kwargs) -> None:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            init(*args, **kwargs)
        finally:
            torch.set_default_dtype(before)
        given = said.bind(*args, **kwargs)
        given.apply_defaults()
        (_, model), *settings = given.arguments.items()
        cast(Any, model).settings = dict(settings)

    return constructor


def with_defaults(init: Callable[..., None], **defaults: Any) -> Callable[..., None]:
    """The constructor ``init``, of keywords alone, with other defaults, which its signature tells."""

    @wraps(init)
    def constructor(self: Any, **settings: Any) -> None:
        init(self, **{**defaults, **settings})

    said = inspect.signature(init)
    parameters = [p.replace(default=defaults.get(name, p.default)) for name, p in said.parameters.items()]
    constructor.__signature__ = said.replace(parameters=parameters)  # type: ignore[attr-defined]
    return constructor


def exporting() -> bool:
    """Whether ``torch.export`` traces what runs; of itself ``torch.compile`` says so too, and is not meant."""
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def untraced(function: Callable[P, T]) -> Callable[P, T]:
    """Decorates what works on the host alone, such as draws and their packing: ``torch.compile`` leaves it as it is.

    Unlike ``torch.compiler.disable`` on the function itself it does not load the compiler before one is in use. In an
    exported program it is traced, as nothing runs beside that.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_compiling() and not exporting():
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return call
