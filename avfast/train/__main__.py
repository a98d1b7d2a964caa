"""``python -m avfast.train [RECIPE] [--field value ...]``, or ``torchrun --nproc_per_node=N -m avfast.train ...``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from avfast.train import parallel
from avfast.train.config import Config, SettingError, fail, from_json, help_text, parse, unknown, user_error
from avfast.train.recipes import RECIPES

USAGE = "torchrun [--nproc_per_node=N] -m avfast.train [RECIPE] [--field value ...]"


def resolve(arguments: Sequence[str]) -> Config:
    """The settings a command line asks for.

    They start from the recipe, from ``--config FILE``, or, when a run is resumed without naming either, from the
    config.json in ``--out``.
    """
    recipe, changes = parse(arguments, RECIPES)
    if recipe is not None and recipe not in RECIPES:
        raise SettingError(unknown("recipe", recipe, RECIPES))
    path = changes.pop("config", None)
    if recipe and path:
        raise SettingError(f"give a recipe ({recipe}) or --config ({path}), not both")
    stored = Path(changes.get("out") or "") / "config.json"
    if path is None and recipe is None and changes.get("resume") and changes.get("out") and stored.exists():
        path = str(stored)
    base = from_json(path) if path else RECIPES[recipe or "demo"]()
    if path and "out" not in changes:
        base = replace(base, out=None)
    if "model_args" in changes:
        changes["model_args"] = base.model_args | changes["model_args"]
    return replace(base, **({"resume": None} | changes))


def main(arguments: Sequence[str]) -> int:
    """The command line. Returns the exit code: 0, 1 for a run that had to end, 2 for wrong settings."""
    if {"-h", "--help"} & set(arguments):
        recipe = next((a for a in arguments if a in RECIPES), "demo")
        listed = "\n".join(f"  {name:26} {function.__doc__}" for name, function in RECIPES.items())
        print(help_text(f"{USAGE}\n\nrecipes:\n{listed}", RECIPES[recipe]()))
        return 0
    try:
        config = resolve(arguments)
    except SettingError as error:
        return fail(error)
    from avfast.train.loop import run
    from avfast.train.monitor import RunError

    try:
        run(config)
    except Exception as error:
        stopped = isinstance(error, RunError)
        if not stopped and not user_error(error):
            raise
        return fail(error, 1 if stopped else 2)
    finally:
        parallel.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
