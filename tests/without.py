"""`python tests/without.py av,sklearn ARGUMENTS`: pytest where these packages are not found, as if never installed."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

import pytest


class Without:
    """Finds what :class:`PathFinder` finds, apart from some packages."""

    def __init__(self, packages: str) -> None:
        self.packages = set(packages.split(","))

    def find_spec(self, name: str, *args: Any) -> ModuleSpec | None:
        return None if name.split(".")[0] in self.packages else PathFinder.find_spec(name, *args)


if __name__ == "__main__":
    sys.meta_path[sys.meta_path.index(PathFinder)] = Without(sys.argv[1])  # type: ignore[call-overload]
    sys.exit(pytest.main(sys.argv[2:]))
