"""Checkpoints of the papers' own code as folders that ``avfast.from_pretrained`` reads.

python -m avfast.released convert FILE --preset NAME --out FOLDER [--license NAME] [--model.ARGUMENT VALUE ...]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from avfast.train.config import SettingError, command, fail, model_settings, user_error


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m avfast.released", description=__doc__, formatter_class=form, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    convert = commands.add_parser("convert", help="a released checkpoint into a folder", allow_abbrev=False)
    convert.add_argument("file", metavar="FILE", help=".pth, .pt, .bin or .safetensors")
    convert.add_argument("--preset", required=True, metavar="NAME", help="see python -m avfast.models")
    convert.add_argument("--out", required=True, metavar="FOLDER", help="weights, config.json and a model card")
    convert.add_argument("--license", metavar="NAME", help="of the weights, for the card: theirs, not avfast's")
    return parser


def _overrides(words: Sequence[str]) -> dict[str, str]:
    """``--model.name value`` or ``--model.name=value``, as often as given."""
    rest, found = list(words), {}
    while rest:
        flag, given, value = rest.pop(0).partition("=")
        if not flag.startswith("--model.") or not (given or rest):
            raise SettingError(f"unexpected {flag}; expected --model.ARGUMENT VALUE")
        found[flag.removeprefix("--model.")] = value if given else rest.pop(0)
    return found


def main(arguments: Sequence[str]) -> int:
    """The command line. Returns the exit code: 0, or 2 where something given is wrong."""
    given, rest = _parser().parse_known_args(arguments)
    from avfast.models.registry import from_released
    from avfast.train.log import plain_warnings

    with plain_warnings():
        try:
            model = from_released(given.file, given.preset, **model_settings(given.preset, _overrides(rest)))
            folder = model.save_pretrained(given.out, license=given.license)
        except Exception as error:
            if not user_error(error):
                raise
            return fail(error)
    print(f"{type(model).__name__} written to {folder}; avfast.from_pretrained({str(folder)!r}) reads it")
    return 0


if __name__ == "__main__":
    command(main)
