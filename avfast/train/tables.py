"""``python -m avfast.train.tables [--table NAME]``: rows of the papers' tables, the papers' figures, the commands.

A row stands here when this library can express its pre-training. ``note`` says what its figures need beyond that.
Figures are the papers', measured on their machines; nothing here was measured with this library.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from avfast.train.config import SettingError, fail, unknown
from avfast.train.recipes import RECIPES

AVSIAM = "AVSiam (arXiv:2403.19638)"
TITLES = {
    "main": "main table: accuracy against the cost of pre-training",
    "ablation": "masking and objective",
    "encoders": "shared against separate encoders, ViT against AST weights (a: sound, v: pictures)",
    "retrieval": "zero-shot retrieval",
    "missing-modality": "one modality at test time (a: sound, v: pictures)",
    "throughput": "clips per second in training",
    "supplement-1": "supplement, Table 1: from scratch",
    "supplement-2": "supplement, Table 2: fine-tuned on one modality (a: sound, v: pictures)",
    "supplement-3": "supplement, Table 3: multi-ratio masking in CAV-MAE",
    "supplement-4-6": "supplement, Tables 4-6: hyper-parameters of pre-training, which are the recipes",
}

HEADER = """\
Figures are the papers'. Manifests (CAV-MAE JSON) are placeholders; with --class_csv a run ends with a linear probe.
Nodes x processes x --batch_size is the paper's batch: on fewer GPUs raise --batch_size in turn. Several nodes need
torchrun's rendezvous arguments.

"""

AS_2M, VGG, ACAV = "audioset_2m.json", "vggsound_train.json", "acav.json"
AS_EVAL, VGG_EVAL = "audioset_retrieval.json", "vggsound_retrieval.json"
FINE_TUNE = "pre-training; accuracies need fine-tuning, not here yet"
MULTI_RATIO = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]

Figures = Mapping[str, float | str]


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Args:
        table: a key of ``TITLES``.
        label: of the row, as in the paper.
        recipe: a key of :data:`avfast.train.recipes.RECIPES`.
        figures: the paper's, by column.
        overrides: what differs from the recipe, by name on the command line (``model.x`` for arguments of the model).
        note: what the figures need beyond the command, or what the paper leaves open.
        data: manifests to train on; the names are placeholders for the user's own.
        eval_data: held-out manifest, on which the run ends with zero-shot retrieval.
        paper: title and address.
    """

    table: str
    label: str
    recipe: str
    figures: Figures
    overrides: Mapping[str, Any] = field(default_factory=dict)
    note: str = FINE_TUNE
    data: tuple[str, ...] = (AS_2M,)
    eval_data: str = AS_EVAL
    paper: str = AVSIAM

    def arguments(self) -> list[str]:
        """The words after ``python -m avfast.train``."""
        words = [self.recipe]
        for name, value in {**self.overrides, "data": self.data, "eval_data": (self.eval_data,)}.items():
            words += [f"--{name}", *(map(_word, value) if isinstance(value, tuple) else [_word(value)])]
        return words

    @property
    def processes(self) -> int:
        """How many processes of the recipe's batch make the paper's contrastive batch; 1 where that is waived."""
        recipe = RECIPES[self.recipe]()
        paper_batch = self.overrides.get("paper_batch", recipe.paper_batch)
        return max((paper_batch or 1) // recipe.batch_size, 1)

    def command(self) -> str:
        """The command line that trains it, for machines of eight GPUs."""
        nodes, each = max(self.processes // 8, 1), min(self.processes, 8)
        launch = ["torchrun", *([f"--nnodes={nodes}"] if nodes > 1 else []), f"--nproc_per_node={each}"]
        return shlex.join([*launch, "-m", "avfast.train", *self.arguments()])


def _word(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _main(hours: float, parameters: float, as_20k: float, as_2m: float, vgg: float) -> Figures:
    return {
        "V100 hours": hours, "parameters (M)": parameters,
        "AS-20K mAP": as_20k, "AS-2M mAP": as_2m, "VGGSound acc": vgg,
    }  # fmt: skip


def _settings(batch: int, gpus: str) -> Figures:
    return {
        "optimizer": "Adam", "betas": "0.95, 0.999", "weight decay": 5e-7, "lr": 1e-4, "decay from": 10, "by": 0.5,
        "every": 5, "epochs": 20, "batch per GPU": batch, "GPUs": gpus, "mean": -5.081, "std": 4.485,
    }  # fmt: skip


BASE, LARGE, HUGE = "avsiam_base_pretrain", "avsiam_large_pretrain", "avsiam_huge_pretrain"
RELEASED, CAV_MAE = "avsiam_base_released", "cav_mae_base_pretrain"
CAV_MAE_START = "from random weights, where the paper starts from images'; "
SIZE = "model size not known: Large, as in the comparison of encoders"

ROWS: tuple[Row, ...] = (
    Row("main", "AVSiam-Base", BASE, _main(177, 100, 41.6, 50.1, 64.9)),
    Row(
        "main", "AVSiam-Base (released code)", RELEASED, _main(177, 100, 41.6, 50.1, 64.9),
        note="the same row with the two passes and two optimisers of the released code; " + FINE_TUNE,
    ),
    Row(
        "main", "AVSiam-Base+", BASE, _main(450, 100, 43.0, 51.4, 66.7), data=(AS_2M, VGG, ACAV),
        note="sets as in the name of the released checkpoint, as+vgg+acav; " + FINE_TUNE,
    ),
    Row("main", "AVSiam-Large", LARGE, _main(310, 332, 44.1, 52.1, 67.1)),
    Row("main", "AVSiam-Huge", HUGE, _main(800, 672, 45.0, 54.1, 68.0)),
    Row("main", "CAV-MAE", CAV_MAE, _main(672, 164, 42.0, 51.2, 65.5), note=CAV_MAE_START + FINE_TUNE),

    Row("ablation", "fixed ratio 25 %", BASE, {"AS-20K mAP": 40.8, "V100 hours": 362}, {"model.mask_ratios": [0.25]}),
    Row("ablation", "fixed ratio 50 %", BASE, {"AS-20K mAP": 39.5, "V100 hours": 142}, {"model.mask_ratios": [0.5]}),
    Row("ablation", "fixed ratio 75 %", BASE, {"AS-20K mAP": 38.6, "V100 hours": 120}, {"model.mask_ratios": [0.75]}),
    Row(
        "ablation", "contrastive only, no masking", BASE, {"AS-20K mAP": 40.4, "V100 hours": 510},
        {"model.mask_ratios": [0.0], "model.reconstruction_weight": 0},
    ),
    Row("ablation", "multi-ratio (theirs)", BASE, {"AS-20K mAP": 41.3, "V100 hours": 160}),

    Row(
        "encoders", "AVSep-Large (separate)", LARGE, {"AS-2M a+v": 52.0, "parameters (M)": 640, "memory (GB)": 20.6},
        {"model": "avsep_large"},
    ),
    Row(
        "encoders", "AVSiam-Large (shared)", LARGE, {"AS-2M a+v": 52.1, "parameters (M)": 332, "memory (GB)": 10.9},
    ),
    Row("encoders", "shared, ViT weights", BASE, {"a": "reference", "v, a+v": "reference"}),
    Row(
        "encoders", "shared, AST weights", BASE, {"a": "+1 mAP", "v, a+v": "much worse"},
        {"timm": None, "init_ast": "ast.pth"}, note="known in words only; " + FINE_TUNE,
    ),

    Row("retrieval", "AVSiam (shared)", LARGE, {"VGGSound a->v R@1 (%)": 20.4}, note=SIZE, eval_data=VGG_EVAL),
    Row(
        "retrieval", "AVSep (separate)", LARGE, {"VGGSound a->v R@1 (%)": 12.8}, {"model": "avsep_large"}, note=SIZE,
        eval_data=VGG_EVAL,
    ),

    Row(
        "missing-modality", "AVSiam", BASE, {"VGGSound a": 55.7, "VGGSound v": 46.0},
        note="model size not known: Base, as CAV-MAE's; " + FINE_TUNE,
    ),
    Row(
        "missing-modality", "CAV-MAE", CAV_MAE, {"VGGSound a": 51.8, "VGGSound v": 27.3},
        note=CAV_MAE_START + FINE_TUNE,
    ),

    *(
        Row(
            "throughput", label, recipe, {"clips/s": speed},
            {"paper_batch": None, "steps": 200, "evaluate": False, "pictures": 0},
            note="clips_per_second in summary.json; the paper's is taken to be of one V100; its batch is unknown",
        )
        for label, recipe, speed in (("AVSiam-Base", BASE, 75.4), ("CAV-MAE", CAV_MAE, 22.5))
    ),

    Row(
        "supplement-1", "AVSiam", BASE, {"V100 hours": 475, "VGGSound acc": 64.4}, {"timm": None},
        note="neither the set nor the epochs of this run are given (20 epochs took 177 hours); " + FINE_TUNE,
    ),
    Row(
        "supplement-2", "AVSiam-Large", LARGE,
        {"V100 hours": 310, "AS-2M a": 48.5, "AS-2M v": 32.0, "VGGSound a": 61.2, "VGGSound v": 51.9},
    ),
    Row(
        "supplement-3", "CAV", CAV_MAE, {"AS-20K mAP": 38.5, "VGGSound acc": 64.1},
        {"model.contrastive_weight": 1, "model.reconstruction_weight": 0}, note=CAV_MAE_START + FINE_TUNE,
    ),
    Row(
        "supplement-3", "+ MAE loss", CAV_MAE, {"AS-20K mAP": 42.0, "VGGSound acc": 65.5},
        note=CAV_MAE_START + FINE_TUNE,
    ),
    Row(
        "supplement-3", "+ multi-ratio masking", CAV_MAE, {"AS-20K mAP": 42.8, "VGGSound acc": 66.4},
        {"model.mask_ratios": MULTI_RATIO}, note=CAV_MAE_START + FINE_TUNE,
    ),
    Row("supplement-4-6", "AVSiam-Base", BASE, _settings(96, "16 A5000"), note=""),
    Row("supplement-4-6", "AVSiam-Large", LARGE, _settings(48, "32 A5000"), note=""),
    Row("supplement-4-6", "AVSiam-Huge", HUGE, _settings(24, "64 V100"), note=""),
)  # fmt: skip


def listing(rows: Sequence[Row]) -> str:
    """The rows, a block per table: figures in columns, under each row its command and its note."""
    blocks = []
    for table in dict.fromkeys(row.table for row in rows):
        members = [row for row in rows if row.table == table]
        columns = list(dict.fromkeys(name for row in members for name in row.figures))
        widths = [max(len(name), *(len(_figure(row, name)) for row in members)) for name in columns]
        first = max(len(row.label) for row in members)
        lines = [f"{table} | {members[0].paper}, {TITLES[table]}"]
        lines.append("  ".join([" " * (first + 2), *(f"{n:>{w}}" for n, w in zip(columns, widths, strict=True))]))
        for row in members:
            figures = (f"{_figure(row, n):>{w}}" for n, w in zip(columns, widths, strict=True))
            lines.append("  ".join([f"  {row.label:{first}}", *figures]))
            lines.append(f"      {row.command()}")
            if row.note:
                lines.append(f"      ({row.note})")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _figure(row: Row, column: str) -> str:
    return str(row.figures.get(column, "-"))


def main(arguments: Sequence[str]) -> int:
    """The command line. Returns the exit code: 0, or 2 for an unknown table."""
    rows = ROWS
    if arguments:
        words = [part for word in arguments for part in word.split("=", 1)]
        if len(words) != 2 or words[0] != "--table":
            return fail(SettingError(f"unexpected {shlex.join(arguments)!r}; expected [--table NAME]"))
        if words[1] not in TITLES:
            return fail(SettingError(unknown("table", words[1], TITLES)))
        rows = tuple(row for row in ROWS if row.table == words[1])
    print(HEADER + listing(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
