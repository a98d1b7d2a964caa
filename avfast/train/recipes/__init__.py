"""Recipes: functions that return the settings of a run. A file per paper holds its recipes and its tables' rows."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from avfast.train.config import Config, SettingError, unknown
from avfast.train.recipes import audio_mae, avbert, avsiam, cav_mae, deepavfusion, mavil
from avfast.train.recipes.avsiam import demo

__all__ = ["RECIPES", "demo", "find", "load_model_of"]

RECIPES: dict[str, Callable[[], Config]] = {
    recipe.__name__: recipe
    for paper in (avsiam, cav_mae, deepavfusion, audio_mae, mavil, avbert)
    for recipe in paper.RECIPES
}


def find(name: str) -> Callable[[], Config]:
    """The recipe of a name: a key of :data:`RECIPES`, or the user's own, ``module:function`` or ``path.py:function``.

    The settings of a user's own remember where it stands, a file by its absolute path.

    Raises:
        SettingError: there is none; the line names the nearest, or the file that is missing.
    """
    where, colon, function = name.rpartition(":")
    if not colon:
        if name not in RECIPES:
            raise SettingError(unknown("recipe", name, RECIPES))
        return RECIPES[name]
    module = _load(where, name)
    own = getattr(module, function, None)
    if not callable(own):
        near = [k for k, v in vars(module).items() if callable(v) and v.__module__ == module.__name__]
        raise SettingError(f"--recipe {name}: {unknown('function', function, near)}")
    place = f"{Path(where).absolute()}:{function}" if where.endswith(".py") else name

    def recipe() -> Config:
        config = own()
        if not isinstance(config, Config):
            raise SettingError(f"--recipe {name}: expected a Config from {function}(), got {type(config).__name__}")
        return replace(config, recipe=place)

    recipe.__doc__ = own.__doc__
    return recipe


def _load(where: str, name: str) -> ModuleType:
    """Imports a module, or a file by its stem. Where it stands joins the end of the path of imports."""
    file = Path(where).absolute() if where.endswith(".py") else None
    if file is not None and not file.is_file():
        raise SettingError(f"--recipe {name}: no file {where}")
    folder, module = (str(file.parent), file.stem) if file is not None else (os.getcwd(), where)
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        found = importlib.import_module(module)
    except (ModuleNotFoundError, ValueError) as error:
        missing = getattr(error, "name", None) or module
        if not f"{module}.".startswith(f"{missing}."):
            raise  # of something that the user's own module imports
        raise SettingError(f"--recipe {name}: no module {module!r} here or among those installed") from None
    if file is not None and Path(found.__file__ or "").resolve() != file.resolve():
        raise SettingError(f"--recipe {name}: {module!r} is another module already, {found.__file__}; rename the file")
    return found


def load_model_of(config: Config) -> Config:
    """``config`` itself, once the file of a user's own recipe is imported, where that file defines the model."""
    from avfast.models.registry import PRESETS

    if ":" in config.recipe and config.model not in PRESETS:
        find(config.recipe)
    return config
