"""``python -m avfast.train.tables [--table NAME]``: rows of the papers' tables, the papers' figures, the commands.

A row stands here when this library can express its pre-training. ``note`` says what its figures need beyond that.
Figures are the papers', measured on their machines; nothing here was measured with this library.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from avfast.train.config import SettingError, command, fail, unknown
from avfast.train.recipes import RECIPES

USAGE = "python -m avfast.train.tables [--table NAME]"
AVSIAM = "AVSiam (arXiv:2403.19638)"
FUSION = "DeepAVFusion (arXiv:2312.01017)"
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
    "fusion-4": "Table 4: unimodal pre-training, early fusion, interactions",
    "fusion-5": "Table 5: dense against factorised interactions",
    "fusion-6a": "Table 6a: fusion layers",
    "fusion-6b": "Table 6b: fusion tokens",
    "fusion-6c": "Table 6c: aggregation tokens of each modality",
    "fusion-7": "Table 7: unimodal pre-training, other figures",
    "fusion-figure-3": "Figure 3: nearest neighbours by audio, image and fusion tokens while training",
}

HEADER = """\
Figures are the papers'. Manifests (CAV-MAE JSON) are placeholders; with --class_csv a run ends with a linear probe.
Nodes x processes x --batch_size x --accumulate is the paper's batch: on fewer GPUs raise one of the last two in turn,
--batch_size where a contrastive loss compares clips. Several nodes need torchrun's rendezvous arguments.

"""

AS_2M, VGG, ACAV = "audioset_2m.json", "vggsound_train.json", "acav.json"
AS_EVAL, VGG_EVAL, VGG_TEST = "audioset_retrieval.json", "vggsound_retrieval.json", "vggsound_test.json"
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
        """How many processes of the recipe's batch make the paper's batch; 1 where that is waived."""
        recipe = RECIPES[self.recipe]()
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


def _fusion(table: str, label: str, linear: float, sdr: float, miou: float, *, note: str = "", **more: Any) -> Row:
    """A row of DeepAVFusion's studies: VGGSound, 200 epochs of 512 clips a step on 2 GPUs (section 4.1).

    ``more``: arguments of the model, ``timm`` for another start than MAE's, ``speed`` for Table 5's other columns.
    """
    start = {"timm": None} if "timm" in more else {"init_audio": "audiomae.pth"}
    settings = {f"model.{name}": value for name, value in more.items() if name not in ("timm", "speed")}
    return Row(
        table, label, "deepavfusion_vggsound_pretrain",
        {**more.get("speed", {}), "linear acc": linear, "SDR": sdr, "mIoU": miou},
        {"epochs": 200.0, "accumulate": 4, "paper_batch": 512, **start, **settings},
        note="; ".join(filter(None, (note, PROBE_FUSION))), data=(VGG,), eval_data=VGG_TEST, paper=FUSION,
    )  # fmt: skip


def _speed(videos: float, memory: float) -> Figures:
    return {"videos/s": videos, "memory (GB)": memory}


BASE, LARGE, HUGE = "avsiam_base_pretrain", "avsiam_large_pretrain", "avsiam_huge_pretrain"
RELEASED, CAV_MAE = "avsiam_base_released", "cav_mae_base_pretrain"
CAV_MAE_START = "from random weights, where the paper starts from images'; "
PROBE_FUSION = (
    "linear accuracy: see this run's probe, where theirs is trained by LARS on augmented clips; SDR (separation) and "
    "mIoU (segmentation) need fine-tuning, not here yet"
)
MID = "the text says layers 9-12, the figures are those of 3 layers in Table 6a"
NO_FUSION = "called no early fusion; the figures are those of fusion at the last layer alone in Table 6a"
SPEED = "speed and memory of inference: python benchmarks/deepavfusion.py"
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

    _fusion("fusion-4", "(1) full", 53.08, 6.53, 52.05),
    _fusion("fusion-4", "(2) no unimodal pre-training", 44.36, 2.03, 29.55, timm=None),
    _fusion("fusion-4", "(3) no interactions: token fusion", 51.19, 6.15, 48.71, fusion_arch="token"),
    _fusion("fusion-4", "(4) mid fusion", 51.21, 5.85, 48.04, fusion_layers=3, note=MID),
    _fusion("fusion-4", "(5) late fusion", 46.52, 5.32, 44.32, fusion_layers=1),
    _fusion("fusion-4", "(6) no fusion", 39.67, 4.23, 38.32, fusion_layers=0),

    _fusion(
        "fusion-5", "no early fusion", 46.52, 5.32, 44.32, fusion_layers=1, speed=_speed(14.5, 10.3),
        note=f"{NO_FUSION}; {SPEED}",
    ),
    _fusion(
        "fusion-5", "dense", 52.82, 6.30, 52.13, fusion_arch="dense", speed=_speed(4.3, 31.6),
        note=f"here without forming a pair, exactly; {SPEED}",
    ),
    _fusion("fusion-5", "factorised", 53.08, 6.53, 52.05, speed=_speed(12.8, 13.1), note=SPEED),

    _fusion("fusion-6a", "12", 53.08, 6.53, 52.05, fusion_layers=12),
    _fusion("fusion-6a", "9", 52.76, 6.15, 49.93, fusion_layers=9),
    _fusion("fusion-6a", "6", 52.29, 6.12, 49.02, fusion_layers=6),
    _fusion("fusion-6a", "3", 51.21, 5.85, 48.04, fusion_layers=3),
    _fusion("fusion-6a", "1", 46.52, 5.32, 44.32, fusion_layers=1),
    _fusion("fusion-6a", "0", 39.67, 4.23, 38.32, fusion_layers=0),

    _fusion("fusion-6b", "1", 51.86, 5.94, 50.67, num_fusion_tokens=[1, 8, 8]),
    _fusion("fusion-6b", "8", 51.97, 5.83, 51.14, num_fusion_tokens=[8, 8, 8]),
    _fusion("fusion-6b", "16", 53.08, 6.53, 52.05, num_fusion_tokens=[16, 8, 8]),
    _fusion("fusion-6b", "32", 52.18, 6.43, 50.60, num_fusion_tokens=[32, 8, 8]),

    _fusion("fusion-6c", "4", 51.78, 5.68, 49.59, num_fusion_tokens=[16, 4, 4]),
    _fusion("fusion-6c", "8", 53.08, 6.53, 52.05, num_fusion_tokens=[16, 8, 8]),
    _fusion("fusion-6c", "16", 52.25, 6.16, 50.89, num_fusion_tokens=[16, 16, 16]),

    *(
        Row(
            "fusion-7", label, "deepavfusion_vggsound_pretrain", figures,
            {"epochs": 200.0, "accumulate": 4, "paper_batch": 512, **start}, data=(VGG,), eval_data=VGG_TEST,
            note="contradicts Table 4, rows 1 and 2; all but the linear accuracy need fine-tuning, not here yet",
            paper=FUSION,
        )
        for label, start, figures in (
            (
                "no unimodal pre-training", {"timm": None},
                {"linear acc": 40.65, "fine-tuned acc": 52.79, "localisation": 57.16, "SDR": 4.53, "mIoU": 35.05},
            ),
            (
                "unimodal pre-training", {"init_audio": "audiomae.pth"},
                {"linear acc": 42.75, "fine-tuned acc": 55.28, "localisation": 58.78, "SDR": 4.83, "mIoU": 36.41},
            ),
        )
    ),
    Row(
        "fusion-figure-3", "nearest neighbours", "deepavfusion_vggsound_pretrain",
        {"fusion": "far above both", "audio, image": "reference"}, {"init_audio": "audiomae.pth"}, data=(VGG,),
        eval_data=VGG_TEST, note="a curve, known in words only; neighbours in metrics.jsonl, every 10 epochs",
        paper=FUSION,
    ),
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
    if {"-h", "--help"} & set(arguments):
        print(USAGE + "\n\ntables:\n" + "\n".join(f"  {name:18} {title}" for name, title in TITLES.items()))
        return 0
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
    command(main)
