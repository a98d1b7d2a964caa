"""``python -m avfast.train [RECIPE] [--field value ...]``, or ``torchrun --nproc_per_node=N -m avfast.train ...``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from avfast.train import checkpoint, parallel, recipes
from avfast.train.config import (
    Config,
    SettingError,
    command,
    fail,
    from_json,
    help_text,
    model_settings,
    parse,
    user_error,
)
from avfast.train.log import plain_warnings
from avfast.train.recipes import RECIPES

USAGE = "python -m avfast.train [RECIPE] [--field value ...], or torchrun --nproc_per_node=N -m avfast.train ..."


def resolve(arguments: Sequence[str]) -> Config:
    """The settings a command line asks for.

    They start from the recipe, from ``--config FILE``, or, when a run is resumed without naming either, from the run's
    own. A run that is resumed goes on in its folder unless ``--out`` names another.
    """
    recipe, changes = parse(arguments)
    path = changes.pop("config", None)
    if recipe and path:
        raise SettingError(f"give a recipe ({recipe}) or --config ({path}), not both")
    resumed = changes.get("resume")
    if resumed == "auto":
        resumed = changes.get("out")
        resumed = resumed if resumed and (Path(resumed) / "config.json").exists() else None
    elif resumed and "out" not in changes and (Path(resumed) / "checkpoints").is_dir():
        changes["out"] = resumed
    if path:
        base = recipes.load_model_of(from_json(path, "--config "))
    elif recipe or not resumed:
        base = recipes.find(recipe or "demo")()
    elif (Path(resumed) / "config.json").exists():
        base = recipes.load_model_of(from_json(Path(resumed) / "config.json"))
    else:
        base = checkpoint.settings_of(checkpoint.find(resumed))
    if "out" not in changes:
        base = replace(base, out=None)
    if "model_args" in changes:
        given = model_settings(changes.get("model", base.model), changes["model_args"])
        changes["model_args"] = base.model_args | given
    return replace(base, **({"resume": None} | changes))


def main(arguments: Sequence[str]) -> int:
    """The command line.

    Returns:
        The exit code: 0, also after SIGTERM or SIGUSR1 with a checkpoint; 1 for a run that had to end, 2 for wrong
        settings, 130 for ^C.
    """
    if {"-h", "--help"} & set(arguments):
        words = [word.removeprefix("--recipe=") for word in arguments]
        recipe = next((word for word in words if word in RECIPES or (":" in word and word[0] != "-")), "demo")
        listed = "\n".join(f"  {name:30} {function.__doc__}" for name, function in RECIPES.items())
        listed += "\n  FILE.py:FUNCTION".ljust(33) + " your own, in a file or MODULE:FUNCTION; it returns a Config"
        try:
            print(help_text(f"{USAGE}\n\nrecipes:\n{listed}", recipes.find(recipe)()))
        except SettingError as error:
            return fail(error)
        return 0
    from avfast.train.loop import run
    from avfast.train.monitor import Stopped
    from avfast.train.run import RunError

    with plain_warnings():
        try:
            run(resolve(arguments))
            parallel.stop(together=True)
        except Stopped as stopped:
            parallel.stop(stopped.together)
            return fail(stopped, stopped.code)
        except Exception as error:
            ended = isinstance(error, RunError)
            if not ended and not user_error(error):
                raise
            return fail(error, 1 if ended else 2)
        finally:
            parallel.stop()
    return 0


if __name__ == "__main__":
    command(main)
