"""``python -m avfast.shards build``: clips in, a shard set out."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from avfast.data.shard_layout import ShardSettings

_SETTINGS = {
    "sample_rate": "of the audio, in Hz",
    "frames": "frames of a clip, in the middles of equal parts",
    "fps": "in their place, frames per second, for models of video",
    "short_side": "of the frames, in pixels",
    "quality": "of their JPEGs, 1 to 100",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m avfast.shards", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="build a shard set, or what is missing of it")
    build.add_argument("--data", nargs="+", required=True, metavar="CLIPS", help="folders, media files, manifests")
    build.add_argument("--out", required=True, metavar="DIR", help="folder of the set; an unfinished one is completed")
    build.add_argument("--class_csv", help="classes of the manifests: index,mid,display_name")
    build.add_argument("--weights_csv", nargs="+", default=(), help="sampling weights, a CSV per manifest")
    build.add_argument("--shard_bytes", type=float, default=1e9, help="about how large a shard is (default 1e9)")
    for field in dataclasses.fields(ShardSettings):
        kind = type(field.default)
        build.add_argument(
            f"--{field.name}",
            type=kind,
            default=field.default,
            help=f"{_SETTINGS[field.name]} (default {field.default})",
        )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, 1 for something amiss, 2 for wrong arguments, 130 for ^C."""
    given = _parser().parse_args(arguments)
    try:
        return _build(given)
    except (ValueError, OSError) as error:
        print(f"avfast: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _build(given: argparse.Namespace) -> int:
    from avfast.data.manifest import read_all
    from avfast.shards.build import build

    settings = ShardSettings(**{name: getattr(given, name) for name in _SETTINGS})
    clips = read_all(given.data, given.class_csv, given.weights_csv, source="--data")
    built = build(clips, given.out, settings=settings, shard_bytes=given.shard_bytes)
    print(
        f"{given.out}: {built['clips']['built']} of {built['clips']['listed']} clips in {len(built['shards'])} shards"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
