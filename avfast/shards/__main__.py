"""Shard sets: clips decoded once, read back many times faster.

python -m avfast.shards build --data CLIPS --out DIR    builds a set, or what is missing of it
python -m avfast.shards verify DIR                      names what is damaged; delete such a shard and build again
python -m avfast.shards info DIR                        says what is in it; both take a URL too, such as s3://bucket/set
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from functools import partial

from avfast.data.shard_cache import Cache
from avfast.data.shard_layout import ShardSettings

_SETTINGS = {
    "sample_rate": "of the audio, in Hz",
    "frames": "frames of a clip, in the middles of equal parts",
    "fps": "in their place, frames per second, for models of video",
    "short_side": "of the frames, in pixels; smaller ones stay as they are",
    "quality": "of their JPEGs, 1 to 100",
}


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m avfast.shards", description=__doc__, formatter_class=form)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    build = commands.add_parser("build", help="build a set, or what is missing of it")
    build.add_argument("--data", nargs="+", required=True, metavar="CLIPS", help="folders, media files, manifests")
    build.add_argument(
        "--out", dest="folder", required=True, metavar="DIR", help="folder of the set; an unfinished one is completed"
    )
    build.add_argument("--class_csv", metavar="FILE", help="classes of the manifests: index,mid,display_name")
    build.add_argument("--weights_csv", nargs="+", default=(), metavar="FILE", help="weights, a CSV per manifest")
    build.add_argument("--workers", type=int, default=0, metavar="N", help="processes (default: one per core)")
    build.add_argument("--ray", metavar="ADDRESS", help="build on this Ray cluster: an address, auto or local")
    build.add_argument("--shard_bytes", type=float, default=1e9, metavar="N", help="of a shard, about (default 1e9)")
    for field in dataclasses.fields(ShardSettings):
        doc = f"{_SETTINGS[field.name]} (default {field.default})"
        build.add_argument(f"--{field.name}", type=type(field.default), default=field.default, metavar="N", help=doc)
    for name, doc in (
        ("verify", "compare it with its checksums, name what is damaged"),
        ("info", "what it holds"),
    ):
        command = commands.add_parser(name, help=doc)
        command.add_argument("folder", metavar="DIR", help="folder of the set, or its URL (s3://...)")
        command.add_argument("--shard_cache", metavar="DIR", help="for the index of a URL's set")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, 1 for damage or lost shards, 2 for wrong arguments, 130 for ^C."""
    from avfast.shards.pool import BuildError
    from avfast.shards.verify import info

    given = _parser().parse_args(arguments)
    try:
        if given.command == "build":
            _build(given)
        elif given.command == "info":
            print(info(given.folder, Cache(given.shard_cache)))
        else:
            return _verify(given.folder, Cache(given.shard_cache))
    except BuildError as error:
        return _fail(str(error), 1)
    except OSError as error:
        goes_on = "; what is finished stays, and the same command goes on" if given.command == "build" else ""
        return _fail(f"{error.filename or given.folder}: {error.strerror}{goes_on}", 1)
    except (ValueError, ImportError) as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on", 130)
    return 0


def _verify(folder: str, cache: Cache) -> int:
    from avfast.shards.verify import verify

    count = 0
    for line in verify(folder, progress=sys.stderr.isatty(), cache=cache):
        print(line, flush=True)
        count += 1
    print(f"{folder}: {f'{count} things are wrong' if count else 'as it was built'}")
    return int(count > 0)


def _fail(message: str, code: int) -> int:
    print(f"avfast: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return code


def _build(given: argparse.Namespace) -> None:
    from avfast.data.manifest import read_all
    from avfast.data.shard_layout import UNREADABLE
    from avfast.shards import build, pool

    if given.workers < 0:
        raise ValueError(f"--workers: expected 0 or more, got {given.workers}")
    settings = ShardSettings(**{name: getattr(given, name) for name in _SETTINGS})
    clips = read_all(given.data, given.class_csv, given.weights_csv, source="--data")
    run = partial(pool.ray, address=given.ray) if given.ray else partial(pool.processes, workers=given.workers)
    built = build(clips, given.folder, settings=settings, shard_bytes=given.shard_bytes, run=run)
    counts, shards = built["clips"], built["shards"]
    size = sum(shard["bytes"] for shard in shards) / 1e9
    print(f"{given.folder}: {counts['built']} of {counts['listed']} clips in {len(shards)} shards, {size:.3g} GB")
    if bad := counts["listed"] - counts["built"]:
        print(f"{given.folder}: {bad} clips could not be read: see {UNREADABLE}")


if __name__ == "__main__":
    sys.exit(main())
