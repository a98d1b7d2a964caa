"""Where a run's metrics go beside metrics.jsonl, which stays their source: TensorBoard, Weights & Biases, Trackio."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from avfast.train import parallel
from avfast.train.config import Config, SettingError


class Tracker(Protocol):
    """What the log asks of one."""

    def add(self, step: int, values: dict[str, float]) -> None:
        """The metrics after ``step`` optimiser steps."""

    def close(self) -> None:
        """Nothing follows."""


class TensorBoard:
    """Events in the run folder; those of steps that a resumed run makes again are dropped."""

    def __init__(self, config: Config, out: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(out / "tensorboard"), purge_step=start + 1 if start else None)

    def add(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WandB:
    """A run of Weights & Biases, which a resumed run goes on with: its id stands in the run folder."""

    def __init__(self, config: Config, out: Path, start: int) -> None:
        import wandb

        named = out / "wandb_id"
        if not (start and named.exists()):
            named.write_text(uuid.uuid4().hex[:12])
        self.run = wandb.init(
            project="avfast", name=out.name, id=named.read_text(), resume="allow", dir=str(out),
            config=json.loads(config.to_json()),
        )  # fmt: skip

    def add(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """A run of Trackio; a resumed one goes on under its name."""

    def __init__(self, config: Config, out: Path, start: int) -> None:
        import trackio

        resume = "allow" if start else "never"
        self.run = trackio.init(project="avfast", name=out.name, resume=resume, config=json.loads(config.to_json()))

    def add(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


KINDS: dict[str, Callable[[Config, Path, int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
}


def check(names: Sequence[str]) -> None:
    """Raises SettingError for a tracker that is not installed; its package has its name."""
    for name in names:
        if find_spec(name) is None:
            raise SettingError(f"--tracker {name}: {name} is not installed (pip install {name})")


def start(config: Config, out: Path, done: int) -> dict[str, Tracker]:
    """The run's trackers by name, on rank 0; none on the others. Every process must call it.

    Args:
        config: its settings.
        out: its folder.
        done: optimiser steps of the checkpoint it goes on from, 0 at first.

    Raises:
        SettingError: one of them does not start, for lack of an account, say.
    """
    trackers: dict[str, Tracker] = {}

    def begin() -> None:
        for name in dict.fromkeys(config.tracker):
            try:
                trackers[name] = KINDS[name](config, out, done)
            except Exception as error:  # each package has its own
                raise SettingError(f"--tracker {name}: {type(error).__name__}: {error}") from error

    parallel.first_only(begin)
    return trackers


def scalars(row: dict[str, Any]) -> dict[str, float]:
    """A row of metrics.jsonl as one number per name."""
    plain = {k: v for k, v in row.items() if k not in ("losses", "metrics", "knn")}
    found = {f"knn/{k}": v for k, v in (row.get("knn") or {}).items() if k != "score"}
    return plain | row["losses"] | row["metrics"] | found
