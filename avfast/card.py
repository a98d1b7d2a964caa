"""The card of a published model: what it is, how it was trained, its figures beside chance, its licence."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

USE = """\
```python
import avfast

model = avfast.from_pretrained("FOLDER or OWNER/NAME").eval()
inputs = model.frontend.load("clip.mp4")
features = model.encode(**inputs)  # .audio, .visual, .fused: every patch or clip, after the final norms
```"""


def card(model: type, arguments: dict[str, Any], run: str | Path | None = None, license: str | None = None) -> str:
    """Markdown with the Hub's metadata on top.

    Args:
        model: its class, whose file begins with name and paper.
        arguments: of its constructor.
        run: folder of the run that trained it.
        license: of the weights.

    Raises:
        ValueError: ``run`` is no run folder.
    """
    from huggingface_hub import ModelCardData

    tags = ["audio-visual", "self-supervised-learning", model.__name__.lower()]
    data = ModelCardData(library_name="avfast", license=license, pipeline_tag="feature-extraction", tags=tags)
    head = (sys.modules[model.__module__].__doc__ or "").strip().split("\n\n")[:2]
    sections = [f"---\n{data.to_yaml()}\n---", f"# {model.__name__}", *head, f"## Use\n\n{USE}"]
    if run is not None:
        sections += of_run(Path(run))
    rows = [[f"`{name}`", f"`{json.dumps(value)}`"] for name, value in arguments.items()]
    sections.append("## Settings\n\n" + grid(["argument", "value"], rows))
    sections.append(f"## Licence of the weights\n\n{license or 'Not stated by who published them.'}")
    return "\n\n".join(sections) + "\n"


def of_run(run: Path) -> list[str]:
    """How a run trained, and the scores it ended with."""
    try:
        config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict) or not {"recipe", "model"} <= config.keys():
        raise ValueError(f"{run} is no run folder: it has no config.json of a run")
    path = run / "summary.json"
    summary = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    clips = summary.get("clips") or {}
    given = [Path(name).name for name in config["data"]]  # paths are the machine's own business
    starts = ("timm", "init_ast", "init_audio", "init_video", "init_from")
    rows = [
        ["recipe", config["recipe"].rpartition(":")[2]],
        ["model", config["model"]],
        ["data", ", ".join(given) or f"avfast's built-in clips ({config['demo_set']})"],
        ["clips trained on", clips.get("train")],
        ["clips held out", clips.get("held_out")],
        ["modalities", ", ".join(f"{k} {v}" for k, v in (summary.get("modalities") or {}).items())],
        ["files that could not be read", (summary.get("bad_files") or {}).get("count")],
        ["optimiser steps", summary.get("steps")],
        ["clips per step", config["batch_size"] * config["accumulate"] * (summary.get("processes") or 1)],
        ["optimiser", f"{config['optimizer']}, lr {config['lr']:g}, weight decay {config['weight_decay']:g}"],
        ["started from", ", ".join(f"{k} {Path(config[k]).name}" for k in starts if config.get(k))],
        ["seed", config["seed"]],
    ]
    if config.get("shuffle_pairs"):
        rows.append(["control", "trained on shuffled pairs"])
    training = "## Training\n\n" + grid(["", ""], [[name, str(x)] for name, x in rows if x not in (None, "")])
    return [training, *scores(summary)]


def scores(summary: dict[str, Any]) -> list[str]:
    """The scores of a ``summary.json``, each beside what chance gives."""
    parts = []
    found = summary.get("retrieval")
    for title, part in (("Retrieval", found), ("Retrieval within a group", (found or {}).get("within_group"))):
        if part:
            columns = list(part["chance"])
            rows = []
            for kind in ("audio_to_visual", "visual_to_audio", "chance"):
                values = [f"{part[kind][k]:.1f}" if k == "MdR" else percent(part[kind][k]) for k in columns]
                rows.append([kind.replace("_", " "), *values])
            parts.append(f"{title} among {part['gallery']} held-out clips:\n\n" + grid(["", *columns], rows))
    for key, title in (("probe", "Linear probe"), ("knn", "Nearest neighbour")):
        if part := summary.get(key):
            score = part.get("score") or ("accuracy" if "accuracy" in part else "mAP")
            named = {part["of"]: part[score]} if "of" in part else {}
            named |= {
                k: part[k] for k in ("fused", "audio", "visual", "sum", "majority", "chance") if part.get(k) is not None
            }
            parts.append(f"{title}:\n\n" + grid(["features", score], [[k, percent(v)] for k, v in named.items()]))
    parts += [f"Note: {note}." for note in summary.get("notes") or []]
    return ["## Figures", *parts] if parts else []


def percent(value: float) -> str:
    """``12.5%``."""
    return f"{value:.1%}"


def grid(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(x.replace("|", "\\|") for x in line) + " |" for line in lines)
