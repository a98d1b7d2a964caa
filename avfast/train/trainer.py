"""One optimiser step: passes, accumulation, mixed precision, groups of parameters."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from avfast.data.clips import Batch
from avfast.distributed import world_size
from avfast.models import Draws, Model
from avfast.train import checkpoint, parallel
from avfast.train.config import Config, SettingError
from avfast.train.graph import GraphedPass, Pass


def parameter_groups(model: Model, config: Config) -> list[dict[str, Any]]:
    """The parameters for an optimiser, by ``unimodal`` (does the ramp apply), ``factor`` of the rate, and decay.

    Raises:
        SettingError: a setting is about parts that the model does not name.
    """
    unimodal: set[int] = set()
    orthogonal: set[int] = set()
    if config.unimodal_ramp:
        unimodal = _named(model, config, "unimodal", f"--unimodal_ramp {config.unimodal_ramp}", "0")
    if config.orthogonal_lr != 1:
        orthogonal = _named(model, config, "orthogonal", f"--orthogonal_lr {config.orthogonal_lr}", "1")
    elif not config.decay_orthogonal:
        orthogonal = _named(model, config, "orthogonal", "--no-decay_orthogonal", "--decay_orthogonal")
    groups: dict[tuple[bool, bool, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        rotates = id(parameter) in orthogonal
        decays = config.decay_orthogonal if rotates else config.decay_1d or parameter.ndim > 1
        groups.setdefault((id(parameter) in unimodal, rotates, decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "unimodal": ramped,
            "factor": config.orthogonal_lr if rotates else 1.0,
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for (ramped, rotates, decays), parameters in groups.items()
    ]


def _named(model: Model, config: Config, group: str, flag: str, neutral: str) -> set[int]:
    """The ids of the parameters in a group of the model's, which must have some for ``flag`` to be about."""
    found = {id(parameter) for parameter in model.parameter_groups().get(group, ())}
    if not found:
        raise SettingError(f"{flag}: {config.model} names no {group} parts; use {neutral}")
    return found


METRICS = "metrics/"  # what names begin with that are no losses


class Trainer:
    """A model with its optimisers, one per pass of the model, each with a loss scaler of its own.

    Args:
        model: see :class:`avfast.models.Model`, on ``device``.
        config: of the run.
        device: of the model.
    """

    def __init__(self, model: Model, config: Config, device: torch.device) -> None:
        self.model, self.config, self.device = model, config, device
        self.dtype = parallel.precision(config, device)
        if config.checkpoint_activations:
            model.set_grad_checkpointing(True)
        self.wrapped = parallel.wrap(model, config, device)
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
        fused = True if device.type == "cuda" else None
        self.optimizers = [
            kind(parameter_groups(model, config), lr=config.lr, betas=config.betas, amsgrad=config.amsgrad, fused=fused)
            for _ in model.passes
        ]
        half = self.dtype is torch.float16
        self.scalers = [torch.amp.GradScaler(device.type, enabled=half) for _ in model.passes]
        self.runs: list[Pass] = [partial(self.forward_backward, scaler) for scaler in self.scalers]
        if config.cuda_graph:
            parallel.check_graph(config, device)
            self.runs = [GraphedPass(run, model.parameters()) for run in self.runs]

    def step(self, batches: list[Batch], lr: float, unimodal_factor: float = 1.0) -> dict[str, Tensor]:
        """One optimiser step per pass on the same batches.

        Returns:
            The mean losses, ``loss`` among them, and metrics as ``metrics/NAME``; still on the device.
        """
        self.wrapped.train()
        means: dict[str, Tensor] = {}
        for only, optimizer, scaler, run in zip(
            self.model.passes, self.optimizers, self.scalers, self.runs, strict=True
        ):
            optimizer.zero_grad(set_to_none=True)
            for i, batch in enumerate(batches):
                with parallel.accumulating(self.wrapped, last=i == len(batches) - 1):
                    losses = run(*self.inputs(batch, only), len(batches))
                for name, value in losses.items():
                    means[name] = means.get(name, 0) + value / len(batches)
            if self.config.clip_grad is not None:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("factor", 1.0) * (unimodal_factor if group.get("unimodal") else 1.0)
            scaler.step(optimizer)
            scaler.update()
        return means

    def forward_backward(
        self, scaler: torch.amp.GradScaler, inputs: dict[str, Tensor], draws: Draws, parts: int
    ) -> dict[str, Tensor]:
        """Adds the gradients of one of a step's ``parts`` forward passes; what :meth:`step` returns of it."""
        with parallel.autocast(self.dtype, self.device):
            output = self.wrapped(**inputs, draws=draws)
        scaler.scale(output.loss / parts).backward()
        metrics = {f"{METRICS}{name}": x for name, x in output.metrics.items()}
        return {name: x.detach().float() for name, x in ({"loss": output.loss} | output.losses | metrics).items()}

    def inputs(self, batch: Batch, only: str, train: bool = True) -> tuple[dict[str, Tensor], Draws]:
        """A model's inputs by name and draws for a batch of clips, on the device.

        Every random choice is keyed by the batch's step and positions.
        """
        batch = batch if len(batch) else blank(batch)
        key = batch.key(self.config.seed)
        # Drawn first, while the device still works on the step before. Nothing here waits for it.
        draws = self.model.draw(
            len(batch),
            key=key,
            only=only,
            has_audio=batch.has_audio.tolist(),
            has_visual=batch.has_visual.tolist(),
        ).to(self.device)
        with torch.no_grad():
            return self.model.frontend(batch.to(self.device), train=train, key=key), draws

    def model_state(self, everywhere: bool = False) -> dict[str, Tensor]:
        """The full state dict; every process must call it.

        Where parameters are sharded, only rank 0 gets it, on the CPU, unless ``everywhere`` is set.
        """
        if self.config.shard == "none":
            return self.model.state_dict()
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=not everywhere)
        return cast(dict[str, Tensor], get_model_state_dict(self.wrapped, options=options))

    def state(self) -> dict[str, Any]:
        """Optimisers, scalers and the random state of every process; every process must call it."""
        if self.config.shard == "none":
            optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        else:
            from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            optimizers = [get_optimizer_state_dict(self.wrapped, o, options=options) for o in self.optimizers]
        return {
            "optimizers": optimizers,
            "scalers": [scaler.state_dict() for scaler in self.scalers],
            "rng": parallel.gather(checkpoint.rng_state()),
        }

    def load(self, model: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Continues from what :meth:`model_state` and :meth:`state` gave."""
        if self.config.shard == "none":
            self.model.load_state_dict(model)
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
        else:
            from torch.distributed.checkpoint import state_dict as full

            full.set_model_state_dict(
                self.wrapped, cast(dict[str, Any], model), options=full.StateDictOptions(full_state_dict=True)
            )
            # not strict: an optimiser of one pass has no state for the parameters that only others train
            options = full.StateDictOptions(full_state_dict=True, strict=False)
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                full.set_optimizer_state_dict(self.wrapped, optimizer, saved, options=options)
        for scaler, saved in zip(self.scalers, state["scalers"], strict=True):
            scaler.load_state_dict(saved)
        if len(state["rng"]) == world_size():
            checkpoint.set_rng_state(state["rng"][parallel.rank()])


def blank(batch: Batch) -> Batch:
    """A batch of which nothing could be decoded, as one row without audio and without frames.

    No loss counts the row, but the forward pass touches every parameter and joins every collective.
    """
    absent = torch.zeros(1, dtype=torch.bool)
    return replace(
        batch,
        waveform=torch.zeros(1, 1, dtype=torch.float32),
        num_samples=torch.zeros(1, dtype=torch.long),
        frames=batch.frames.new_zeros(1, *batch.frames.shape[1:]),
        has_audio=absent,
        has_visual=absent,
        positions=(batch.failures[0].position,),
    )
