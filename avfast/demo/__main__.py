"""``python -m avfast.demo``: writes a demo set and prints what chance, knowledge and shortcuts reach on it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from . import PRESETS, build
from .baselines import report


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; ``arguments`` default to the command line's."""
    parser = argparse.ArgumentParser(prog="python -m avfast.demo", description=__doc__)
    parser.add_argument("name", nargs="?", default="tiny", choices=PRESETS)
    parser.add_argument("--clips", type=int, help="training clips (default: the set's own)")
    parser.add_argument("--test-clips", type=int, help="held-out clips (default: the set's own)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--root", help="folder of the sets (default: $AVFAST_CACHE/demo)")
    given = parser.parse_args(arguments)
    try:
        demo = build(given.name, given.root, clips=given.clips, test_clips=given.test_clips, seed=given.seed)
    except ValueError as error:
        parser.error(str(error))
    print(report(demo))


if __name__ == "__main__":
    main()
