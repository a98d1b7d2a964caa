"""How fast a run is beside what its device can do."""

from __future__ import annotations

import resource
import sys
import time
import warnings
from functools import cache
from typing import Any

import torch

from avfast import backend, flops
from avfast.data.clips import Batch
from avfast.distributed import alone
from avfast.train.config import SettingError
from avfast.train.trainer import Trainer

MAKE_UPS = 8  # of a batch: so many are counted


def backends(device: torch.device) -> str:
    """Which implementation of the ops that have several runs on a device; some have native code as well.

    Raises:
        SettingError: the one that ``AVFAST_BACKEND`` names cannot run there.
    """
    try:
        every, named = backend.which(device), backend.get_backend()
    except RuntimeError as error:
        raise SettingError(str(error)) from None
    if every == "reference" and named in ("auto", "native"):
        every = "native or reference"  # native where csrc/ has the op and a compiler is there
    if named in backend.ATTENTION_LIBRARIES:
        return f"packed_attention by {named}, other ops by {every}"
    return f"every op by {every}"


@cache
def matmul_rate(device: torch.device, dtype: torch.dtype | None) -> float:
    """FLOP/s of one large square product in ``dtype`` (None: float32), measured once a process within a second.

    The product is the smallest that takes 5 ms, of 1024 to 8192 rows, and the best of five counts: a shorter one would
    measure what else a CPU has to do.
    """
    generator = torch.Generator(device).manual_seed(0)  # the run's own generators stay as they are
    rows = 1024
    while True:
        a = torch.randn(rows, rows, device=device, generator=generator).to(dtype or torch.float32)
        seconds = []
        for _ in range(6):
            began = time.perf_counter()
            _ = (a @ a)[0, 0].item()  # waits for the device
            seconds.append(time.perf_counter() - began)
        best = min(seconds[1:])  # the first one chooses an algorithm
        if best > 5e-3 or rows >= 8192:
            break
        rows *= 2
    del a
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # this is not the run's
    return 2 * rows**3 / best


def peak_memory(device: torch.device) -> int:
    """Most bytes held at once so far: of tensors on a CUDA device, else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Work:
    """FLOPs of an optimiser step for each of its clips: forward and backward passes without any recomputation.

    A copy of the model on ``meta`` counts them, once for each make-up of a batch: its clips, and how many of them have
    audio and visual. Of the first few make-ups, that is; clips of others are taken to cost what these do on average. It
    counts anew where the model sees another share of its tokens than before.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.known: dict[Any, float] = {}
        self.visible, self.countable = 0.0, True

    def per_clip(self, batch: Batch) -> float:
        """Of a batch like this one; 0 where the model cannot run on ``meta``, which is warned about once."""
        key = (len(batch), int(batch.has_audio.sum()), int(batch.has_visual.sum()))
        if (visible := self.trainer.model.visible(batch.progress)) != self.visible:
            self.visible, self.known = visible, {}
        if key not in self.known and len(batch) and len(self.known) < MAKE_UPS and self.countable:
            try:
                self.known[key] = self.count(batch) / len(batch)
            except Exception as error:  # a user's own model may ask for values; no run ends for a figure of speed
                name = self.trainer.config.model
                warnings.warn(f"no FLOP/s: {name} cannot be counted on meta: {error}", stacklevel=2)
                self.known, self.countable = {}, False
        return self.known.get(key, sum(self.known.values()) / max(len(self.known), 1))

    def count(self, batch: Batch) -> int:
        """FLOPs of a step on one batch. The other processes need not call it."""
        from avfast.models import create_model

        config, total = self.trainer.config, 0
        with alone(), torch.random.fork_rng(devices=[]):
            with torch.device("meta"):
                model = create_model(config.model, **config.model_args).train()
            for only in model.passes:
                inputs, draws = self.trainer.inputs(batch, only)
                named = {name: x.to("meta") for name, x in inputs.items()}
                total += flops.count(model, **named, draws=draws.to("meta"), backward=True)
        return total
