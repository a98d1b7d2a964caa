"""Processes and devices: start-up under torchrun or alone, wrapping a model, small exchanges between ranks."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn

from avfast.distributed import world_size
from avfast.models import Model
from avfast.train.config import Config, SettingError

T = TypeVar("T")
_store: dist.Store | None = None  # of the process group


def rank() -> int:
    """Number of this process, 0 where there is only one."""
    return dist.get_rank() if world_size() > 1 else 0


def start(name: str) -> torch.device:
    """Joins the process group torchrun describes, if any, and returns this process's device.

    Small objects travel over gloo on the CPU, gradients over nccl on CUDA.
    """
    local = int(os.environ.get("LOCAL_RANK", 0))
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda":
            device = torch.device("cuda", local if device.index is None else device.index)
            torch.cuda.set_device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise SettingError(f"--device {name}: {str(error).splitlines()[0]}") from None
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        global _store
        _store, own, size = next(dist.rendezvous("env://"))
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=_store, rank=own, world_size=size)
    return device


def stop(together: bool = False) -> None:
    """Leaves the process group; ``together``: not before every process has come here.

    A process that leaves closes its connections, which the others may still be writing to at the end of their last
    exchange. No collective can tell when that is over for all, so the processes count themselves in the store.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    if together and _store is not None:
        with suppress(RuntimeError):  # the store ends with the first process, which may go once all are counted
            if _store.add("avfast/left", 1) == world_size():
                _store.set("avfast/all left", "")
            _store.wait(["avfast/all left"], timedelta(seconds=60))
    dist.destroy_process_group()


def gather(value: T) -> list[T]:
    """The value of every process, in rank order, on every process."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def first_only(function: Callable[[], T]) -> T:
    """Runs on rank 0 alone while the others wait, and returns its result on all; where it raises, all do."""
    if world_size() == 1:
        return function()
    box: list[Any] = [None, None]
    error: Exception | None = None
    if rank() == 0:
        try:
            box[0] = function()
        except Exception as caught:
            error, box[1] = caught, str(caught)
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    if error is not None:
        raise error
    if box[1] is not None:
        raise SettingError(box[1])
    return box[0]


def check_graph(config: Config, device: torch.device) -> None:
    """Raises SettingError where a step cannot be captured in a CUDA graph."""
    if device.type != "cuda":
        raise SettingError(f"--cuda_graph needs a CUDA device, the run is on {device}")
    if world_size() > 1:
        raise SettingError(
            f"--cuda_graph captures a step of one process, this run has {world_size()}; use --compile there"
        )


def wrap(model: Model, config: Config, device: torch.device) -> nn.Module:
    """The model as the loop calls it: itself or compiled, in DDP, or sharded in place by FSDP2.

    One process compiles the whole pass; several compile what lies between the exchanges of the losses, and sharded ones
    each block. Batches of many more shapes than usual (clips that lack a modality) run as they are in the end.
    """
    module = cast(nn.Module, model)
    if config.shard == "fsdp2":
        if world_size() == 1:
            raise SettingError("--shard fsdp2 needs more than one process: torchrun --nproc_per_node=N")
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device.type, (world_size(),))
        for block in model.blocks():
            if config.compile:
                block.compile()
            fully_shard(block, mesh=mesh)
        fully_shard(module, mesh=mesh)
        return module
    if config.compile:
        module = cast(nn.Module, torch.compile(module))
    if world_size() == 1:
        return module
    # one small position table is laid out otherwise than DDP's buckets; copying it costs nothing worth a warning
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    return nn.parallel.DistributedDataParallel(
        module,
        device_ids=[device.index] if device.type == "cuda" else None,
        find_unused_parameters=model.has_unused_parameters,
    )


def accumulating(wrapped: nn.Module, last: bool) -> AbstractContextManager:
    """Context of one forward and backward pass; only the last of a step exchanges gradients."""
    if isinstance(wrapped, nn.parallel.DistributedDataParallel):
        return nullcontext() if last else wrapped.no_sync()
    if world_size() > 1:
        from torch.distributed.fsdp import FSDPModule

        cast(FSDPModule, wrapped).set_requires_gradient_sync(last)
    return nullcontext()


def precision(config: Config, device: torch.device) -> torch.dtype | None:
    """The dtype of autocast, None for plain float32."""
    if config.precision == "auto":
        if device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[config.precision]


def autocast(dtype: torch.dtype | None, device: torch.device) -> AbstractContextManager:
    """Autocast to ``dtype``, or nothing."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)
