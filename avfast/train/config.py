"""The settings of a run and how they are given on the command line.

The parser is written by hand. What decides against tyro and jsonargparse: ``--model.x`` changes one entry of a recipe's
``model_args`` and takes its type from the constructor of the model that another setting names, in whatever order the
two are given; tyro (1.0) fixes types before it reads values, and jsonargparse (4.53) takes any value for an entry of a
dictionary or asks for ``class_path`` and ``init_args``. Of the rest, tyro would lose ``none``, ``a,b`` and errors of
one line, jsonargparse ``none``, values without brackets, flags without a value, dashes and the nearest names.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from pathlib import Path
from typing import Any, Literal, NoReturn


class SettingError(ValueError):
    """Something the user gave is wrong; the message says what and what was expected."""


def setting(default: Any, text: str, low: float | None = None, high: float | None = None, *, free: bool = False) -> Any:
    """A field of :class:`Config` which makes a run what it is: a resumed one keeps it.

    Args:
        default: its value; a dictionary is copied.
        text: one line of documentation.
        low: least value of a number, which then is finite.
        high: largest.
        free: see :func:`free`.
    """
    metadata = {"doc": text, "low": low, "high": high, "free": free}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


# A field that may change when a run is resumed: where it runs, how long, what it says, how it is judged. Which clips it
# trains on is compared by the clips, not by these names of them.
free = partial(setting, free=True)


@dataclass(frozen=True)
class Config:
    """Every setting of a run. Recipes return one; ``--field value`` changes a field."""

    recipe: str = setting("demo", "name of the recipe these settings come from, or where it stands: file.py:function")
    out: str | None = free(None, "run folder (default: runs/<recipe>-<time>)")
    resume: str | None = free(
        None, "run or checkpoint folder to continue, with its settings; 'auto': what is in --out, or a fresh start"
    )
    requeue: bool = free(False, "under SLURM: after SIGUSR1 and the checkpoint the job asks to be started again")
    other_clips: bool = free(False, "let --resume go on with other training clips than the checkpoint's")
    seed: int = setting(0, "of weights, order, augmentation and masking", low=0, high=2**63)

    data: tuple[str, ...] = free(
        (),
        "folders of media files, shard sets (or URLs), CAV-MAE JSON manifests, CSVs of AudioSet or VGGSound; none: "
        "demo clips",
    )
    data_weights: tuple[float, ...] = free(
        (), "how often each of --data is drawn from, such as 3,1; clips drawn with replacement"
    )
    media: tuple[str, ...] = free(
        (), "folders with the files of a CSV's clips, <id>.* or <id>_<start>.*; vggsound.csv:train takes one split"
    )
    class_csv: str | None = free(None, "classes of the manifests: index,mid,display_name")
    weights_csv: tuple[str, ...] = free((), "sampling weights, a CSV per manifest: clips drawn with replacement")
    eval_data: tuple[str, ...] = free(
        (), "folders, manifests or CSVs (vggsound.csv:test) of held-out clips; none: eval_fraction of --data"
    )
    eval_fraction: float = free(0.1, "share of --data held out, chosen by a hash of the clip's id", low=0, high=1)
    demo_set: str = free("tiny", "which built-in demo clips are made")
    demo_clips: int | None = free(None, "number of demo clips (default: the set's own)", low=1)
    crop_scale: tuple[float, float] = setting((0.2, 1.0), "area share of the random crop of training frames")
    shuffle_pairs: bool = setting(False, "control: train on the audio of one clip with the video of another, fixed")
    shuffle_shards: int | None = setting(
        None, "shuffle so many shards at a time, clips within them, for storage that reads whole shards", low=1
    )
    shard_cache: str | None = free(
        None, "local folder for shards of URLs such as s3://bucket/set (default: ~/.cache/avfast/shards)"
    )
    shard_cache_gb: float = free(100.0, "gigabytes of shards in it; those used longest ago are removed", low=0)
    gpu_jpeg: bool = setting(False, "decode the frames of shard sets on the GPU (nvJPEG), in place of the workers")
    cache_media: bool = free(False, "keep decoded clips in memory, so that each file is decoded once")
    workers: int = free(8, "processes per rank that decode clips; 0: in the training process", low=0)
    max_bad_files: float = free(0.05, "share of undecodable files beyond which the run ends", low=0, high=1)

    model: str = setting("avsiam_base", "name of a model: see python -m avfast.models")
    model_args: dict[str, Any] = setting(
        {}, "arguments of the model, as JSON or one by one: --model.mask_ratios '[0.5]'"
    )
    timm: str | None = free(None, "start from the weights of this timm Vision Transformer (timm downloads them)")
    init_ast: str | None = free(None, "start the encoder from this AST checkpoint file (in place of --timm)")
    init_audio: str | None = free(None, "start the audio encoder from this AudioMAE checkpoint file")
    init_video: str | None = free(None, "start the video encoder from this mae_st checkpoint file")
    init_from: str | None = free(None, "start from the weights of this checkpoint folder (not its optimiser)")
    resizing: Literal["cut", "interpolate"] = free(
        "cut", "of the positions of --init_from for other sizes: a shorter spectrogram's are the first, or interpolated"
    )

    epochs: float = free(20.0, "passes over the training clips", low=0)
    steps: int | None = free(None, "optimiser steps, in place of epochs; 0: evaluate the untrained model", low=0)
    batch_size: int = free(96, "clips per process and forward pass", low=1)
    adaptive_batch: bool = setting(
        False, "larger batches while more is masked, as many visible tokens in each; batch_size is the smallest"
    )
    accumulate: int = setting(1, "forward passes per optimiser step (adds no contrastive negatives)", low=1)
    optimizer: Literal["adam", "adamw"] = setting("adam", "adam adds weight decay to the gradient, adamw to the weight")
    lr: float = setting(1e-4, "learning rate", low=0)
    lr_batch: int | None = setting(
        None, "clips of a step that --lr is meant for; it grows in proportion to the own", low=1
    )
    betas: tuple[float, float] = setting((0.95, 0.999), "of Adam")
    amsgrad: bool = setting(False, "AMSGrad: divide by the largest second moment so far (both optimisers)")
    weight_decay: float = setting(5e-7, "weight decay", low=0)
    decay_1d: bool = setting(True, "decay biases, norms and other one-dimensional parameters too")
    decay_orthogonal: bool = setting(True, "decay the logarithms of orthogonal matrices: they tend to the identity")
    orthogonal_lr: float = setting(1.0, "factor of the learning rate of the model's orthogonal matrices", low=0)
    clip_grad: float | None = setting(None, "largest norm of the gradient", low=0)
    schedule: Literal["step", "cosine", "linear"] = setting(
        "step", "of the learning rate: steps by epochs, one cosine, or one line"
    )
    warmup_steps: int = setting(0, "optimiser steps of linear warm-up", low=0)
    warmup_epochs: float = setting(0.0, "the same in epochs; the longest counts", low=0)
    warmup_share: float = setting(0.0, "the same as a share of all steps", low=0, high=1)
    unimodal_ramp: float = setting(
        0.0,
        "share of training over which the learning rate of the model's unimodal parts rises from 0; 0: none",
        low=0,
        high=1,
    )
    decay_start: float = setting(10.0, "step schedule: epochs before the first decay", low=0)
    decay_every: float = setting(5.0, "step schedule: epochs between decays", low=1e-9)
    decay_rate: float = setting(0.5, "step schedule: factor of each decay", low=0)
    min_lr: float = setting(0.0, "cosine and linear schedules: learning rate at the end", low=0)
    paper_batch: int | None = free(
        None, "clips of a step in the paper; a contrastive loss over far fewer is warned about"
    )

    device: str = free("auto", "cpu, cuda, mps; auto: cuda where there is one, else cpu")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting("auto", "of autocast; auto: bf16 where the GPU has it")
    shard: Literal["none", "fsdp2"] = free("none", "fsdp2: parameters sharded over processes, block by block")
    compile: bool = free(False, "torch.compile of the model's pass")
    cuda_graph: bool = free(False, "replay the pass as a CUDA graph; with and without --compile, one process")
    checkpoint_activations: bool = free(False, "recompute activations in the backward pass to save memory")
    deterministic: bool = setting(False, "deterministic kernels only; a run repeats bit for bit on one device")

    log_every: int = free(50, "steps between log lines", low=1)
    count_flops: bool = free(True, "FLOP/s in the log, beside a matmul rate measured at the start; a second or two")
    checkpoint_every: int | None = free(None, "steps between checkpoints (default: one per epoch)", low=1)
    keep_checkpoints: int = free(2, "newest checkpoints kept; 0: all", low=0)
    tracker: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = free(
        (), "where metrics go beside metrics.jsonl: tensorboard, wandb, trackio, several of them or none"
    )
    figures: int = free(4, "held-out clips whose reconstruction is drawn at the end; 0: none", low=0)
    evaluate: bool = free(True, "retrieval, linear probe and nearest neighbours at the end")
    eval_clips: int | None = free(None, "at most so many held-out clips (the first by id hash)", low=2)
    probe_clips: int = free(20000, "at most so many training clips for the linear probe; 0: no probe", low=0)
    knn_every: float | None = free(
        None, "epochs between the accuracies of nearest neighbours among the held-out clips in metrics.jsonl", low=1e-9
    )
    probe_l2: float = free(1e-2, "weight penalty of the linear probe", low=0)
    group_parts: int = free(
        0, "also rank among clips whose class names share so many first comma-separated parts", low=0
    )

    def __post_init__(self) -> None:
        for name, field in fields().items():
            value, low, high = getattr(self, name), field.metadata["low"], field.metadata["high"]
            if low is not None and value is not None and not (low <= value < inf and (high is None or value <= high)):
                bound = f"at least {low}" if high is None else f"between {low} and {high}"
                raise SettingError(f"--{name} {value}: expected a number {bound}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise SettingError(f"--betas {' '.join(map(str, self.betas))}: expected 2 numbers from 0 to below 1")
        if self.timm and self.init_ast:
            raise SettingError(f"--init_ast {self.init_ast} and --timm {self.timm} both start the encoder: --timm none")

    @property
    def name(self) -> str:
        """Of the recipe, without the file it stands in."""
        return self.recipe.rpartition(":")[2]

    def to_json(self) -> str:
        """All settings, readable by :func:`from_json`."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def fields() -> dict[str, dataclasses.Field]:
    """The settings by name."""
    return {f.name: f for f in dataclasses.fields(Config)}


def from_json(path: str | Path, flag: str = "") -> Config:
    """Reads what :meth:`Config.to_json` wrote; ``flag`` is what errors begin with."""
    try:
        values = json.loads(Path(path).read_text())
    except OSError as error:
        raise SettingError(f"{flag}{path}: {error.strerror}") from None
    except ValueError as error:
        raise SettingError(f"{flag}{path}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise SettingError(f"{flag}{path}: expected an object of settings, got {type(values).__name__}")
    return from_dict(values, f"{flag}{path}")


def from_dict(values: Mapping[str, Any], source: str = "config") -> Config:
    """A Config from plain values, as JSON gives them."""
    hints = typing.get_type_hints(Config)
    for name in values:
        if name not in hints:
            raise SettingError(f"{source}: {unknown('setting', name, hints)}")
    return Config(**{name: _convert(name, value, hints[name]) for name, value in values.items()})


def unknown(kind: str, name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """One line that names the nearest of ``known``: by the letters, and where ``known`` has texts, by their words."""
    words = set(name.lower().replace("-", " ").replace("_", " ").split())
    texts = {k: v for k, v in known.items() if isinstance(v, str)} if isinstance(known, Mapping) else {}
    told = [k for k, text in texts.items() if words <= set(text.lower().replace(":", " ").replace(",", " ").split())]
    told = sorted(told, key=lambda k: len(texts[k]))[:3]
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    near = list(dict.fromkeys(told + close)) or sorted(known)
    listed = ", ".join(near[:8]) + (", ..." if len(near) > 8 else "")
    return f"unknown {kind} {name!r}; did you mean: {listed}?"


def parse(arguments: Sequence[str], positional: str = "recipe") -> tuple[str | None, dict]:
    """Splits a command line into its positional argument and the settings it changes.

    ``--field value``, ``--field=value``, several values for tuples, ``--flag`` / ``--no-flag`` for booleans, ``none``
    for None, ``--model.name value`` for one of ``model_args``, as text: see :func:`model_settings`. Dashes and
    underscores in names are alike. ``--config FILE`` is returned as the key ``config``; ``--recipe NAME`` says the
    positional argument where that is a recipe.
    """
    hints = typing.get_type_hints(Config) | {"config": str | None}
    first: str | None = None
    changes: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            if first is not None or word.startswith("-"):
                raise SettingError(f"unexpected argument {word!r}; expected [{positional.upper()}] [--field value ...]")
            first = word
            continue
        flag, given, inline = word[2:].partition("=")
        if flag.startswith("model."):
            key, text = flag[6:].replace("-", "_"), inline if given else _next(rest, flag)
            changes.setdefault("model_args", {})[key] = text
            continue
        name = flag.replace("-", "_")
        hint = hints.get(name)
        if hint is bool or (name.startswith("no_") and hints.get(name[3:]) is bool):
            wanted = not (name.startswith("no_") and name not in hints)
            if not given and rest and rest[0].lower() in ("true", "false"):
                given, inline = "=", rest.pop(0)
            value = _convert(name, inline, bool) if given else True
            changes[name if wanted else name[3:]] = value is wanted
        elif name == positional == "recipe":
            if first is not None:
                raise SettingError(f"--recipe: the recipe is given already, {first}")
            first = inline if given else _next(rest, flag)
        elif hint is None or name == "recipe":
            known = {f"--{n}": f.metadata["doc"] for n, f in fields().items() if n != "recipe"} | {"--config": ""}
            raise SettingError(unknown("flag", "--" + flag, known))
        elif typing.get_origin(hint) is tuple:
            values = [inline] if given else []
            while not given and rest and not rest[0].startswith("--"):
                values.append(rest.pop(0))
            if len(values) == 1:
                values = [] if values[0].lower() == "none" else values[0].split(",")
            changes[name] = _convert(name, values, hint)
        else:
            text = inline if given else _next(rest, flag)
            if typing.get_origin(hint) is dict:
                changes[name] = changes.get(name, {}) | _convert(name, text, hint)
            else:
                changes[name] = _convert(name, text, hint)
    return first, changes


def _next(rest: list[str], flag: str) -> str:
    if not rest or rest[0].startswith("--"):
        raise SettingError(f"--{flag} needs a value")
    return rest.pop(0)


def model_settings(model: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a model, given as text or as JSON gives them, in the types that its constructor declares.

    Raises:
        SettingError: the model has no such argument, or the value is none of it; the line names ``--model.NAME``.
    """
    from avfast.models.registry import PRESETS

    if model not in PRESETS:  # said where the model is built
        return dict(values)
    hints = typing.get_type_hints(PRESETS[model][0].__init__)
    hints.pop("return", None)
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name not in hints:
            raise SettingError(unknown(f"setting of {model}", f"--model.{name}", [f"--model.{h}" for h in hints]))
        typed = _convert(f"model.{name}", value, hints[name])
        if isinstance(typed, int | float) and not 0 <= typed < inf:
            raise SettingError(f"--model.{name} {value}: expected 0 or more")
        found[name] = list(typed) if isinstance(typed, tuple) else typed
    return found


def _convert(name: str, value: Any, hint: Any) -> Any:
    """``value`` (text, or what JSON gave) as the type of the field."""
    wrong = SettingError(f"--{name} {value}: expected {describe(hint)}")
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        none = value is None or (isinstance(value, str) and value.lower() == "none")
        if none and type(None) in arguments:
            return None
        for kind in sorted(arguments, key=lambda a: a is str):  # any text is text: last
            try:
                return _convert(name, value, kind)
            except SettingError:
                continue
        raise wrong
    if origin is Literal:
        if value not in arguments:
            raise wrong
        return value
    if isinstance(value, str) and (hint is dict or origin in (tuple, dict, Sequence)):
        try:
            value = json.loads(value)
        except ValueError:
            raise wrong from None
    if origin in (tuple, Sequence):
        if not isinstance(value, list | tuple):
            raise wrong
        many = origin is Sequence or arguments[-1] is Ellipsis
        kinds = [arguments[0]] * len(value) if many else list(arguments)
        if len(kinds) != len(value):
            raise wrong
        return tuple(_convert(name, v, kind) for v, kind in zip(value, kinds, strict=True))
    if hint is dict or origin is dict:
        if not isinstance(value, dict):
            raise wrong
        return value
    if hint is bool:
        if isinstance(value, str):
            value = {"true": True, "false": False}.get(value.lower(), value)
        if not isinstance(value, bool):
            raise wrong
        return value
    if hint is str:
        if not isinstance(value, str):
            raise wrong
        return value
    if hint is type(None):
        raise wrong
    try:
        number = float(value)
        if isinstance(value, bool) or (hint is int and number != int(number)):
            raise wrong
        return int(value) if hint is int and isinstance(value, str) and value.lstrip("+-").isdigit() else hint(number)
    except (TypeError, ValueError, OverflowError):
        raise wrong from None


def describe(hint: Any) -> str:
    """A type in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(describe(a) for a in arguments)
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if origin is tuple:
        many = arguments[-1] is Ellipsis
        return f"any number of values ({describe(arguments[0])})" if many else f"{len(arguments)} numbers"
    if origin is Sequence:
        return f"a JSON list, each {describe(arguments[0])}"
    if hint is dict or origin is dict:
        return "a JSON object"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "none"}
    return names.get(hint, str(hint))


def help_text(usage: str, base: Config) -> str:
    """What ``--help`` prints: every field with its default in ``base`` and its documentation."""
    lines = [usage, "", f"settings (defaults of recipe {base.recipe}):"]
    for name, f in fields().items():
        if name == "recipe":
            continue
        value = getattr(base, name)
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        lines.append(f"  --{name} [{shown or '-'}]".ljust(34) + f" {f.metadata['doc']}")
    lines.append("  --config FILE".ljust(34) + " start from a config.json in place of a recipe")
    return "\n".join(lines)


def command(main: Callable[[list[str]], int]) -> NoReturn:
    """Runs a command line and exits with its code; quietly where the reader of a pipe left (``| head``)."""
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        mute()
        code = 141  # as a shell reports SIGPIPE
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # Threads of a process group may still ask for the interpreter while it is taken down, and are ended then in a
        # way that aborts the process: one run of two processes in 30 failed so after its last step.
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def mute() -> None:
    """From here on standard output goes nowhere, the interpreter's last flush included."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def user_error(error: Exception) -> bool:
    """Whether one line is enough: the system or this package says that something given is wrong or missing."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    ours = trace is None or trace.tb_frame.f_globals.get("__name__", "").partition(".")[0] == "avfast"
    if isinstance(error, BrokenPipeError):
        return False
    return isinstance(error, OSError) or (ours and isinstance(error, ValueError | ImportError))


def fail(error: BaseException, code: int = 2) -> int:
    """Prints one line on stderr and returns the exit code.

    What is wrong on every process alike (a setting, the run as a whole) is said by the first only.
    """
    rank = int(os.environ.get("RANK", 0))
    if rank == 0 or not isinstance(error, SettingError | RuntimeError | KeyboardInterrupt):
        where = f"rank {rank}: " if rank else ""
        print(f"avfast: {where}{' '.join(str(error).split())}", file=sys.stderr, flush=True)
    return code
