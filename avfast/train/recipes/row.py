"""One row of a paper's table: the command that trains it, beside the paper's figures."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from avfast.train.config import Config

# placeholders for the user's own manifests
AS_2M, VGG, ACAV, K700 = "audioset_2m.json", "vggsound_train.json", "acav.json", "kinetics_700.json"
AS_EVAL, VGG_EVAL, VGG_TEST = "audioset_retrieval.json", "vggsound_retrieval.json", "vggsound_test.json"
KS_TEST = "kinetics_sounds_test.json"
FINE_TUNE = "pre-training; accuracies need fine-tuning, not here yet"

Figures = Mapping[str, float | str]


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Args:
        table: a key of the paper's ``TABLES``.
        label: of the row, as in the paper.
        recipe: what it changes.
        figures: the paper's, by column.
        overrides: what differs from the recipe, by name on the command line (``model.x`` for arguments of the model).
        note: what the figures need beyond the command, or what the paper leaves open.
        data: manifests to train on; the names are placeholders for the user's own.
        eval_data: held-out manifest, on which the run ends with zero-shot retrieval.
    """

    table: str
    label: str
    recipe: Callable[[], Config]
    figures: Figures
    overrides: Mapping[str, Any] = field(default_factory=dict)
    note: str = FINE_TUNE
    data: tuple[str, ...] = (AS_2M,)
    eval_data: str = AS_EVAL

    def arguments(self) -> list[str]:
        """The words after ``python -m avfast.train``."""
        words = [self.recipe.__name__]
        for name, value in {**self.overrides, "data": self.data, "eval_data": (self.eval_data,)}.items():
            words += [f"--{name}", *(map(_word, value) if isinstance(value, tuple) else [_word(value)])]
        return words

    @property
    def processes(self) -> int:
        """How many processes of the recipe's batch make the paper's batch; 1 where that is waived."""
        recipe = self.recipe()
        paper_batch = self.overrides.get("paper_batch", recipe.paper_batch)
        each = recipe.batch_size * self.overrides.get("accumulate", recipe.accumulate)
        return max((paper_batch or 1) // each, 1)

    def command(self) -> str:
        """The command line that trains it, for machines of eight GPUs."""
        nodes, each = max(self.processes // 8, 1), min(self.processes, 8)
        launch = ["torchrun", *([f"--nnodes={nodes}"] if nodes > 1 else []), f"--nproc_per_node={each}"]
        return shlex.join([*launch, "-m", "avfast.train", *self.arguments()])


def _word(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
