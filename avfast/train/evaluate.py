"""Retrieval and linear probe of a trained model on held-out clips.

``python -m avfast.train.evaluate RUN [--eval_data PATH] [--field value ...]`` evaluates the newest checkpoint of a run
folder (or the given checkpoint folder) and writes ``RUN/evaluation-step-N.json``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from avfast.data.clips import ClipDataset, Failure, eval_loader
from avfast.data.manifest import ClipList
from avfast.tasks.features import pooled
from avfast.tasks.probe import linear_probe
from avfast.tasks.retrieval import retrieval
from avfast.train import checkpoint, data, parallel
from avfast.train.config import Config, SettingError, fail, from_json, help_text, parse, user_error
from avfast.train.recipes import RECIPES

USAGE = "python -m avfast.train.evaluate RUN [--field value ...]"


def features(model: nn.Module, config: Config, clips: ClipList, device: torch.device) -> dict[str, Any]:
    """Pooled features of every clip without augmentation, see :func:`avfast.tasks.features.pooled`."""
    dataset = ClipDataset(clips, frontend=model.frontend, train=False, seed=config.seed)
    loader = eval_loader(
        dataset, config.batch_size, config.workers, rank=parallel.rank(), world_size=parallel.world_size()
    )
    dtype = parallel.precision(config, device)
    return pooled(model, loader, device, lambda: parallel.autocast(dtype, device))


def evaluate(
    model: nn.Module, config: Config, train: ClipList, held_out: ClipList, device: torch.device
) -> tuple[dict[str, Any], list[Failure]]:
    """Scores of a model and the files that could not be read.

    Returns:
        ``{"retrieval": {...} | None, "probe": {...} | None, "notes": [...]}`` and the failures. ``retrieval`` has
        ``within_group`` where ``group_parts`` is set and the clips have classes; ``notes`` say what is missing.
    """
    scores: dict[str, Any] = {"retrieval": None, "probe": None, "notes": []}
    held_out = data.first(held_out, config.eval_clips)
    if len(held_out) < 2:
        scores["notes"].append(f"{len(held_out)} clips held out; give --eval_data or a larger --eval_fraction")
        return scores, []
    test = features(model, config, held_out, device)
    failures = list(test["failures"])
    pairs = test["has_audio"] & test["has_visual"]
    if pairs.sum() < 2:
        scores["notes"].append("fewer than 2 held-out clips have both sound and pictures: no retrieval")
    else:
        audio, visual = test["audio"][pairs], test["visual"][pairs]
        scores["retrieval"] = retrieval(audio, visual)
        groups = group_ids(held_out, test["index"][pairs], config.group_parts)
        if groups is not None and len(groups.unique()) < len(groups):
            scores["retrieval"]["within_group"] = retrieval(audio, visual, groups)
    if test["labels"] is None or not config.probe_clips:
        scores["notes"].append(
            "the clips have no classes: no linear probe" if config.probe_clips else "probe_clips is 0"
        )
        return scores, failures
    fitted = features(model, config, data.first(train, config.probe_clips), device)
    failures += fitted["failures"]
    scores["probe"] = probes(fitted, test, config.probe_l2, scores["notes"])
    return scores, failures


def probes(train: dict[str, Any], test: dict[str, Any], l2: float, notes: list[str]) -> dict[str, Any] | None:
    """Linear probes of the joint features (audio and visual side by side) and of each modality.

    Returns:
        The joint probe's figures, and those of the others under ``audio`` and ``visual``. Each probe uses the clips
        that have the modalities it reads.
    """
    found: dict[str, Any] = {}
    for name in ("joint", "audio", "visual"):
        sides = []
        for rows in (train, test):
            needed = ("audio", "visual") if name == "joint" else (name,)
            usable = torch.stack([rows[f"has_{m}"] for m in needed]).all(0) & (rows["labels"].sum(1) > 0)
            sides += [torch.cat([rows[m][usable] for m in needed], 1), rows["labels"][usable]]
        try:
            found[name] = linear_probe(*sides, l2=l2)
        except ValueError as error:
            notes.append(f"{name} probe: {error}")
    if "joint" not in found:
        return None
    key = "accuracy" if "accuracy" in found["joint"] else "mAP"
    return found["joint"] | {name: found[name].get(key) for name in ("audio", "visual") if name in found}


def group_ids(clips: ClipList, index: Tensor, parts: int) -> Tensor | None:
    """An integer per clip, equal where class names share their first comma-separated parts; None without classes."""
    if not parts or not clips.class_names:
        return None
    names = [
        tuple(sorted(tuple(clips.class_names[c].split(",")[:parts]) for c in clips.clips[i].labels))
        for i in index.tolist()
    ]
    numbers = {name: n for n, name in enumerate(sorted(set(names)))}
    return torch.tensor([numbers[name] for name in names])


def table(scores: dict[str, Any]) -> str:
    """The scores as a small table, chance beside them."""
    lines = []
    found = scores["retrieval"]
    for title, part in (("retrieval", found), ("within group", (found or {}).get("within_group"))):
        if part:
            lines.append(
                f"{title + ', ' + str(part['gallery']) + ' clips':30}" + "".join(f"{k:>9}" for k in part["chance"])
            )
            for direction in ("audio_to_visual", "visual_to_audio", "chance"):
                values = [f"{v:9.1f}" if k == "MdR" else f"{v:9.1%}" for k, v in part[direction].items()]
                lines.append(f"  {direction.replace('_', ' '):28}" + "".join(values))
    if probe := scores["probe"]:
        key = "accuracy" if "accuracy" in probe else "mAP"
        lines.append(f"{'linear probe':30}{key:>9}")
        for name, value in {"joint": probe[key], **{k: probe[k] for k in ("audio", "visual") if k in probe}}.items():
            lines.append(f"  {name:28}{value:9.1%}")
        lines.append(f"  {'chance':28}{probe['chance']:9.1%}")
    return "\n".join(lines + [f"note: {note}" for note in scores["notes"]])


def main(arguments: Sequence[str]) -> int:
    """The command line. Returns the exit code."""
    if {"-h", "--help"} & set(arguments) or not arguments:
        print(help_text(USAGE, RECIPES["demo"]()))
        return 0
    try:
        where, changes = parse(arguments, RECIPES, positional="run")
        if where is None:
            raise SettingError(f"expected a run folder: {USAGE}")
        if unfit := {"config", "model", "model_args"} & set(changes):
            raise SettingError(f"--{min(unfit)}: the run's own settings say what the model is")
        path = checkpoint.find(where)
        config = replace(from_json(path.parent.parent / "config.json"), **changes)
        device = parallel.start(config.device)
        train, held_out = data.sources(config)
        model = checkpoint.load_model(path).to(device)
        scores, failures = evaluate(model, config, train, held_out, device)
    except Exception as error:
        if not user_error(error):
            raise
        return fail(error)
    finally:
        parallel.stop()
    if parallel.rank() == 0:
        scores["bad_files"] = {failure.path: failure.reason for failure in failures}
        report = Path(path.parent.parent / f"evaluation-{path.name}.json")
        report.write_text(json.dumps(scores, indent=2) + "\n")
        print(f"{table(scores)}\nwritten to {report}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
