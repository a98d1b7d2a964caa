"""What happens when: the steps of a run, its epochs, its learning rates, its batch sizes. All of it depends on the step
alone, so that resuming needs no state.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from avfast.data.clips import StepBatches
from avfast.distributed import world_size
from avfast.random import progress
from avfast.train.config import Config


def batch_sizes(config: Config, visible: Callable[[float], float]) -> int | Callable[[int], int]:
    """Clips of a forward pass over all processes: a number; with ``adaptive_batch`` a function of the epoch (from 0).

    DiffMAViL's B_e = (1 - min rho) / (1 - rho_e) B_0 keeps the number of tokens that the encoders see: the batch is
    ``batch_size`` times processes where least is masked (with the paper's curriculum in the last epoch) and larger
    while more is.

    Args:
        config: of the run.
        visible: of the model, see :class:`avfast.models.Model`.
    """
    least = config.batch_size * world_size()
    if not config.adaptive_batch:
        return least
    epochs = math.ceil(config.epochs)
    tokens = least * max(visible(progress(epoch, epochs)) for epoch in range(max(epochs, 1)))
    return lambda epoch: round(tokens / visible(progress(epoch, epochs)))


def learning_rate(config: Config, step: float, steps_per_epoch: float, total: float) -> float:
    """The learning rate of optimiser step ``step`` (from 0).

    The step schedule is ``MultiStepLR`` with milestones ``decay_start + i decay_every`` in finished epochs.
    """
    peak = config.lr
    if config.lr_batch is not None:
        peak *= config.batch_size * config.accumulate * world_size() / config.lr_batch
    warmup = max(config.warmup_steps, round(config.warmup_epochs * steps_per_epoch), round(config.warmup_share * total))
    if step < warmup:
        return peak * (step + 1) / warmup
    if config.schedule == "step":
        epoch = step // steps_per_epoch
        decays = 0 if epoch < config.decay_start else int((epoch - config.decay_start) // config.decay_every) + 1
        return peak * config.decay_rate**decays
    share = min((step - warmup) / max(total - warmup, 1), 1.0)
    left = 1 - share if config.schedule == "linear" else (1 + math.cos(math.pi * share)) / 2
    return config.min_lr + (peak - config.min_lr) * left


def unimodal_factor(config: Config, step: float, total: float) -> float:
    """What the learning rate of the unimodal parts is multiplied by: half a cosine from 0 to 1 (DeepAVFusion)."""
    share = step / (config.unimodal_ramp * total) if config.unimodal_ramp * total else 1.0
    return (1 - math.cos(math.pi * min(share, 1.0))) / 2


class Schedule:
    """The optimiser steps of a run, laid over its epochs.

    Epochs need not have equally many steps, as batches may change between them; a step of several forward passes may
    begin in one and end in the next.

    Args:
        config: of the run.
        batches: a step of theirs is one forward pass.
        start: optimiser steps done before.
    """

    def __init__(self, config: Config, batches: StepBatches, start: int = 0) -> None:
        self.config, self.batches = config, batches
        self.total = max(self.steps(config.epochs) if config.steps is None else config.steps, start)

    def steps(self, epochs: float) -> int:
        """Optimiser steps that make so many epochs; begun ones count."""
        whole = int(epochs)
        first, after = self.batches.first_step(whole), self.batches.first_step(whole + 1)
        return math.ceil((first + (epochs - whole) * (after - first)) / self.config.accumulate)

    def epochs(self, step: int) -> float:
        """Epochs done before an optimiser step."""
        epoch, place, passes = self._place(step)
        return epoch + place / passes

    def ends(self, step: int, every: float) -> bool:
        """Whether an optimiser step is the last one of each ``every`` epochs."""
        before, after = ((self.epochs(s) / every + 1e-9) // 1 for s in (step, step + 1))  # 0.3 / 0.1 is below 3
        return after > before

    def rates(self, step: int) -> tuple[float, float]:
        """The learning rate of an optimiser step (from 0) and the factor of the unimodal parts.

        Both follow the epochs done: an epoch of larger batches moves as far along its curve as one of smaller ones, and
        steps in the settings are those of the first epoch.
        """
        now, end = self._clock(step), self._clock(self.total)
        per_epoch = self.batches.first_step(1) / self.config.accumulate
        return learning_rate(self.config, now, per_epoch, end), unimodal_factor(self.config, now, end)

    def _clock(self, step: int) -> float:
        """Epochs done, in steps of the first: where all batches are of one size, ``step`` to the last bit."""
        (epoch, place, passes), first = self._place(step), self.batches.first_step(1)
        return (epoch * first + place * first / passes) / self.config.accumulate

    def _place(self, step: int) -> tuple[int, int, int]:
        """The epoch in which an optimiser step begins, forward passes done of that epoch, and passes it has."""
        done = step * self.config.accumulate
        epoch = self.batches.epoch(done)
        first = self.batches.first_step(epoch)
        return epoch, done - first, self.batches.first_step(epoch + 1) - first
