"""What is finished of a long list of clips: a file for each block of them, so that an interrupted run goes on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from avfast.distributed import world_size
from avfast.train import parallel
from avfast.train.config import SettingError


@dataclass
class Block:
    """The rows of consecutive clips.

    Attributes:
        index: ``(n,)`` int64, which clip.
        start: ``(n,)`` float64, in seconds of the clip.
        features: by kind, ``(n, ...)`` float32, NaN where a clip has none.
        failures: clips that could not be read: path and reason.
    """

    index: Tensor
    start: Tensor
    features: dict[str, Tensor]
    failures: list[tuple[str, str]] = field(default_factory=list)


class InMemory:
    """Finished blocks of all processes, which each process has in the end."""

    def __init__(self) -> None:
        self._own: dict[int, Block] = {}

    def finished(self) -> set[int]:
        """Their numbers."""
        return set(self._own)

    def add(self, number: int, block: Block) -> None:
        """Keeps a block."""
        self._own[number] = block

    def gather(self) -> None:
        """Every process must call it."""
        for other in parallel.gather(self._own) if world_size() > 1 else []:
            self._own |= other

    def __iter__(self) -> Iterator[Block]:
        return (self._own[number] for number in sorted(self._own))


class OnDisk:
    """Finished blocks in a folder that all processes see. Every process must make one.

    Args:
        folder: of the blocks; one left by an interrupted run is gone on with.
        plan: what the blocks are of.

    Raises:
        SettingError: the folder holds blocks of another plan.
    """

    def __init__(self, folder: Path, plan: Mapping[str, Any]) -> None:
        self.folder = folder

        def open_folder() -> set[int]:
            folder.mkdir(exist_ok=True)
            file, text = folder / "plan.json", json.dumps(plan, sort_keys=True)
            if file.exists() and (before := json.loads(file.read_text())) != json.loads(text):
                changed = ", ".join(sorted(k for k in {*before, *plan} if before.get(k) != json.loads(text).get(k)))
                raise SettingError(
                    f"{folder} is of an interrupted run with other settings ({changed}); repeat that run, or remove "
                    "the folder to begin anew"
                )
            _whole(file, lambda path: path.write_text(text))
            return {int(path.stem) for path in folder.glob("*.safetensors") if path.stem.isdigit()}

        self._finished = parallel.first_only(open_folder)

    def finished(self) -> set[int]:
        """Their numbers, as they were at the start."""
        return self._finished

    def add(self, number: int, block: Block) -> None:
        """Writes a block; it is there only when it is complete."""
        from safetensors.torch import save_file

        tensors = {"index": block.index, "start": block.start, **block.features}
        metadata = {"failures": json.dumps(block.failures)}
        file = self.folder / f"{number:08d}.safetensors"
        _whole(file, lambda path: save_file({k: x.contiguous() for k, x in tensors.items()}, path, metadata=metadata))

    def gather(self) -> None:
        """Every process must call it."""
        parallel.gather(None)

    def __iter__(self) -> Iterator[Block]:
        from safetensors import safe_open

        for file in sorted(self.folder.glob("*.safetensors")):
            with safe_open(str(file), "pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}
                failures = json.loads(opened.metadata()["failures"])
            index, start = tensors.pop("index"), tensors.pop("start")
            yield Block(index, start, tensors, [(path, reason) for path, reason in failures])

    def remove(self) -> None:
        """Deletes the folder."""
        shutil.rmtree(self.folder)


def _whole(file: Path, write: Any) -> None:
    temporary = file.with_name(f".writing-{file.name}")
    write(temporary)
    os.replace(temporary, file)


def assemble(blocks: Any) -> Block:
    """One block of several: a kind that one of them lacks is NaN there."""
    shapes: dict[str, torch.Size] = {}
    rows = 0
    for block in blocks:
        rows += len(block.index)
        shapes |= {kind: x.shape[1:] for kind, x in block.features.items()}
    found = Block(
        torch.empty(rows, dtype=torch.int64),
        torch.empty(rows, dtype=torch.float64),
        {kind: torch.full((rows, *shape), torch.nan) for kind, shape in sorted(shapes.items())},
    )
    first = 0
    for block in blocks:
        last = first + len(block.index)
        found.index[first:last], found.start[first:last] = block.index, block.start
        for kind, x in block.features.items():
            found.features[kind][first:last] = x
        found.failures += block.failures
        first = last
    return found
