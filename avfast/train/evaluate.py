"""Retrieval, linear probe and nearest neighbours of a trained model on held-out clips.

``python -m avfast.train.evaluate RUN [--eval_data PATH] [--field value ...]`` evaluates the newest checkpoint of a run
folder (or the given checkpoint folder) and writes ``evaluation-step-N.json`` there; where the flags name other clips
than the run's own, ``evaluation-step-N-CLIPS-DIGEST.json``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from avfast.data.clips import ClipDataset, Failure, eval_loader
from avfast.data.frontend import Frontend
from avfast.data.manifest import ClipList
from avfast.models import Model
from avfast.tasks.features import KINDS, Pooled, pooled
from avfast.tasks.knn import knn
from avfast.tasks.probe import linear_probe
from avfast.tasks.retrieval import retrieval
from avfast.train import checkpoint, data, parallel
from avfast.train.config import Config, SettingError, command, fail, help_text, parse, user_error
from avfast.train.log import plain_warnings
from avfast.train.recipes import RECIPES

USAGE = "python -m avfast.train.evaluate RUN [--field value ...]"
# Settings by which other clips than the run's own are judged.
CLIPS = {"data", "media", "class_csv", "eval_data", "eval_fraction", "eval_clips", "demo_set", "demo_clips"}


def features(model: Model, config: Config, clips: ClipList | ClipDataset, device: torch.device) -> Pooled:
    """Pooled features of every clip without augmentation, see :func:`avfast.tasks.features.pooled`."""
    dataset = clips if isinstance(clips, ClipDataset) else judged(clips, config, model.frontend)
    loader = eval_loader(
        dataset, config.batch_size, config.workers, rank=parallel.rank(), world_size=parallel.world_size()
    )
    dtype = parallel.precision(config, device)
    return pooled(model, loader, device, lambda: parallel.autocast(dtype, device))


def evaluate(
    model: Model, config: Config, train: ClipList, held_out: ClipList, device: torch.device
) -> tuple[dict[str, Any], list[Failure]]:
    """Scores of a model and the files that could not be read.

    Returns:
        What :func:`nothing` names, and the failures. What the model or the clips do not offer is None, and ``notes``
        say why: retrieval needs a model that contrasts the modalities, the others classes. ``retrieval`` has
        ``within_group`` where ``group_parts`` is set and the clips have classes. ``diverged`` says which features are
        not finite; there are no scores then.
    """
    scores = nothing()
    held_out = data.first(held_out, config.eval_clips)
    if len(held_out) < 2:
        scores["notes"].append(f"{len(held_out)} clips held out; give --eval_data or a larger --eval_fraction")
        return scores, []
    test = features(model, config, held_out, device)
    failures = list(test.failures)
    broken = [kind for kind, x in test.features.items() if not torch.isfinite(x).all()]
    if broken:
        scores["diverged"] = f"the {' and '.join(broken)} features are not finite"
        scores["notes"].append(f"{scores['diverged']}: no scores")
        return scores, failures
    pairs = test.have("audio", "visual")
    if not model.contrasts:
        scores["notes"].append("the model does not contrast audio and visual: no retrieval")
    elif pairs.sum() < 2:
        scores["notes"].append("fewer than 2 held-out clips have both audio and visual: no retrieval")
    else:
        audio, visual = test.features["audio"][pairs], test.features["visual"][pairs]
        scores["retrieval"] = retrieval(audio, visual)
        groups = group_ids(held_out, test.index[pairs], config.group_parts)
        if groups is not None and len(groups.unique()) < len(groups):
            scores["retrieval"]["within_group"] = retrieval(audio, visual, groups)
    scores["knn"] = knn_scores(test, scores["notes"])
    if test.labels is None or not config.probe_clips:
        scores["notes"].append(
            "the clips have no classes: no linear probe" if config.probe_clips else "probe_clips is 0: no linear probe"
        )
        return scores, failures
    fitted = features(model, config, data.first(train, config.probe_clips), device)
    failures += fitted.failures
    scores["probe"] = probes(fitted, test, config.probe_l2, scores["notes"])
    return scores, failures


def nothing() -> dict[str, Any]:
    """The record of an evaluation before anything is known."""
    return {"retrieval": None, "probe": None, "knn": None, "notes": [], "diverged": None}


def knn_scores(found: Pooled, notes: list[str]) -> dict[str, Any] | None:
    """:func:`avfast.tasks.knn.knn` among the clips that have a class and every kind of features."""
    if found.labels is None:
        return None
    try:
        return knn(*found.labelled(*found.features))
    except ValueError as error:
        notes.append(f"nearest neighbours: {error}")
        return None


def judged(clips: ClipList, config: Config, frontend: Frontend, cache: bool = False) -> ClipDataset:
    """The clips as a model is judged by them, without augmentation."""
    return ClipDataset(clips, frontend=frontend, train=False, seed=config.seed, cache=cache)


class KNN:
    """Accuracy of nearest neighbours among the held-out clips, again and again while a model is trained.

    Args:
        config: of the run; ``cache_media`` keeps the decoded clips.
        held_out: the clips.
        frontend: of the model.
    """

    def __init__(self, config: Config, held_out: ClipList, frontend: Frontend) -> None:
        self.config = config
        clips = data.first(held_out, config.eval_clips)
        self.dataset = judged(clips, config, frontend, config.cache_media)

    def __call__(self, model: Model, device: torch.device) -> dict[str, Any] | None:
        """What :func:`knn_scores` gives now. Every process must call it."""
        return knn_scores(features(model, self.config, self.dataset, device), [])


def probes(train: Pooled, test: Pooled, l2: float, notes: list[str]) -> dict[str, Any] | None:
    """Linear probes of the joint features (audio and visual side by side) and of each kind of features alone.

    Returns:
        The figures of the first that can be fitted, joint ones where there are, its name as ``of``; and the score of
        the others under ``fused``, ``audio`` and ``visual``. Each probe uses the clips that have the modalities it
        reads.
    """
    kinds = [kind for kind in ("fused", "audio", "visual") if kind in train.features.keys() | test.features.keys()]
    joint = {"joint": ("audio", "visual")} if {"audio", "visual"} <= {*kinds} else {}
    found: dict[str, Any] = {}
    for name, parts in (joint | {kind: (kind,) for kind in kinds}).items():
        (fitted, fitted_labels), (judged, judged_labels) = train.labelled(*parts), test.labelled(*parts)
        try:
            if fitted.keys() != judged.keys():
                raise ValueError(f"the clips of one side have no {' and '.join(fitted.keys() ^ judged.keys())}")
            x, y = (torch.cat(list(side.values()), 1) for side in (fitted, judged))
            found[name] = linear_probe(x, fitted_labels, y, judged_labels, l2=l2)
        except ValueError as error:
            notes.append(f"{name} probe: {error}")
    if not found:
        return None
    first = next(iter(found))
    key = "accuracy" if "accuracy" in found[first] else "mAP"
    return {"of": first} | found[first] | {name: found[name].get(key) for name in found if name != "joint"}


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


READS = {
    "joint": "audio and visual features side by side",
    "fused": "tokens in which both have met",
    "sum": "similarities of all kinds added",
}
MEAN_SHARE = "mean share of clips with the class"


def table(scores: dict[str, Any]) -> str:
    """The scores as a small table, chance beside them, and what the words in it mean."""
    lines: list[str] = []
    shown: set[str] = set()
    found = scores["retrieval"]
    for title, part in (("retrieval", found), ("within group", (found or {}).get("within_group"))):
        if part:
            lines.append(
                f"{title + ', ' + str(part['gallery']) + ' clips':30}" + "".join(f"{k:>9}" for k in part["chance"])
            )
            for direction in ("audio_to_visual", "visual_to_audio", "chance"):
                values = [f"{v:9.1f}" if k == "MdR" else f"{v:9.1%}" for k, v in part[direction].items()]
                reason = ""
                if direction == "chance":
                    of = "the group" if title == "within group" else f"{part['gallery']}"
                    reason = f"  (one partner among {of}, ranked at random)"
                lines.append(f"  {direction.replace('_', ' '):28}" + "".join(values) + reason)
    if probe := scores["probe"]:
        key = "accuracy" if "accuracy" in probe else "mAP"
        lines.append(f"{'linear probe':30}{key:>9}")
        rows = {probe["of"]: probe[key], **{kind: probe[kind] for kind in KINDS if kind in probe}}
        lines += [f"  {name:28}{value:9.1%}" for name, value in rows.items()]
        why = f"1 of {round(1 / probe['chance'])} classes" if key == "accuracy" else MEAN_SHARE
        lines.append(f"  {'chance':28}{probe['chance']:9.1%}  ({why})")
        shown |= rows.keys()
    if near := scores["knn"]:
        lines.append(f"{'nearest neighbour':30}{near['score']:>9}")
        rows = {name: near[name] for name in (*KINDS, "sum") if name in near}
        lines += [f"  {name:28}{value:9.1%}" for name, value in rows.items()]
        one = "another clip drawn at random has the class"
        why = one if near["score"] == "accuracy" else MEAN_SHARE
        lines.append(f"  {'chance':28}{near['chance']:9.1%}  ({why})")
        shown |= rows.keys()
    if words := [f"{name}: {text}" for name, text in READS.items() if name in shown]:
        lines.append("; ".join(words))
    return "\n".join(lines + [f"note: {note}" for note in scores["notes"]])


def report_path(path: Path, changes: dict[str, Any], held_out: ClipList) -> Path:
    """Where the scores of a checkpoint go: a file of its own for each set of clips that is not the run's."""
    folder = path.parent.parent if path.parent.name == "checkpoints" else path
    name = f"evaluation-{path.name}"
    if CLIPS & set(changes):
        given = "-".join(Path(p).stem for p in changes.get("eval_data") or changes.get("data") or ()) or "clips"
        words = re.sub(r"[^\w.-]+", "_", given)[:60]
        name += f"-{words}-{data.digest(held_out).split()[-1]}"
    return folder / f"{name}.json"


def main(arguments: Sequence[str]) -> int:
    """The command line. Returns the exit code: 0, 1 for a model that has diverged, 2 for wrong settings."""
    if {"-h", "--help"} & set(arguments) or not arguments:
        print(help_text(USAGE, RECIPES["demo"]()))
        return 0
    with plain_warnings():
        try:
            where, changes = parse(arguments, positional="run")
            if where is None:
                raise SettingError(f"expected a run folder: {USAGE}")
            if unfit := {"config", "model", "model_args"} & set(changes):
                raise SettingError(f"--{min(unfit)}: the run's own settings say what the model is")
            path = checkpoint.find(where).absolute()
            config = replace(checkpoint.settings_of(path), **changes)
            device = parallel.start(config.device)
            train, held_out = data.sources(config)
            model = cast(Model, checkpoint.load_model(path).to(device))
            scores, failures = evaluate(model, config, train, held_out, device)
            if parallel.rank() == 0:
                shown = {name: value for name, value in changes.items() if name in CLIPS}
                scores["clips"] = {"held_out": data.digest(data.first(held_out, config.eval_clips)), **shown}
                scores["bad_files"] = {failure.path: failure.reason for failure in failures}
                report = report_path(path, changes, data.first(held_out, config.eval_clips))
                report.write_text(json.dumps(scores, indent=2) + "\n")
                print(f"{table(scores)}\nwritten to {report}")
            parallel.stop(together=True)
        except Exception as error:
            if not user_error(error):
                raise
            return fail(error)
        finally:
            parallel.stop()
    return 1 if scores["diverged"] else 0


if __name__ == "__main__":
    command(main)
