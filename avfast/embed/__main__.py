"""Embeddings of clips of any length, as a trained model gives them.

python -m avfast.embed RUN CLIPS --out FILE                            of a run folder or one of its checkpoints
python -m avfast.embed CHECKPOINT CLIPS --out FILE --preset NAME       of a released checkpoint
python -m avfast.embed FOLDER CLIPS --out FILE                         of save_pretrained, or OWNER/NAME on the Hub
torchrun --nproc_per_node=N -m avfast.embed ...                        each process does a share of the clips

FILE ends in .safetensors, .npz or .parquet and has a row for each clip: id, path, start, and the features that the
model has of audio, visual and fused tokens, NaN (in Parquet null) where a clip lacks a modality. What could not be read
is named in it. An interrupted command is gone on with by the same command.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from avfast.train import data, parallel
from avfast.train.config import command, fail, user_error
from avfast.train.log import encodable, plain_warnings


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m avfast.embed", description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("model", metavar="MODEL", help="run folder, folder of save_pretrained, Hub id; with --preset a released file")
    add("clips", metavar="CLIPS", nargs="+", help="media files, folders, shard sets or their URLs, manifests")
    add("--out", required=True, metavar="FILE", help=".safetensors, .npz or .parquet")
    add("--preset", metavar="NAME", help="a model of the released checkpoint's paper, such as avsiam_base")
    add("--modality", choices=("audio", "visual", "both"), default="both", help="what is looked at (default both)")
    add("--tokens", action="store_true", help="all tokens, in place of one vector")
    add("--pool", choices=("mean", "max"), default="mean", help="what makes one vector of tokens (default mean)")
    add("--hop", type=float, metavar="SECONDS", help="from one window of a long clip to the next (default: the window)")
    add("--per_window", action="store_true", help="a row for each window, in place of the mean over a clip's")
    add("--frames", type=int, default=1, metavar="N", help="of a window, for models of one: the mean over them")
    add("--media", nargs="+", default=(), metavar="FOLDER", help="where the files of a CSV's clips are")
    add("--shard_cache", metavar="DIR", help="for shards of sets that URLs name (default ~/.cache/avfast/shards)")
    add("--shard_cache_gb", type=float, default=100.0, metavar="N", help="gigabytes of shards in it (default 100)")
    add("--batch_size", type=int, default=32, metavar="N", help="windows encoded at once (default 32)")
    add("--workers", type=int, default=8, metavar="N", help="processes per rank that decode clips (default 8)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default auto)")
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="auto: half on a GPU (default)")
    return parser


def main(arguments: Sequence[str]) -> int:
    """The command line. Returns the exit code: 0, 2 for wrong settings, 130 for ^C."""
    from avfast.data.csv_lists import MediaFiles
    from avfast.data.shard_cache import Cache
    from avfast.embed import embed

    given = vars(_parser().parse_args(arguments))
    with plain_warnings():
        try:
            device = parallel.start(given.pop("device"))
            model, media = given.pop("model"), given.pop("media")
            cache = Cache(given.pop("shard_cache"), given.pop("shard_cache_gb"))
            files = MediaFiles(media) if media else None
            clips = data.read(given.pop("clips"), media=files, cache=cache, flag="CLIPS")
            found = embed(model, clips, device=device, **given)
            if parallel.rank() == 0:
                for path, reason in found.failures.items():
                    print(encodable(f"could not be read: {path}: {reason}"))
                sizes = ", ".join(f"{kind} {'x'.join(map(str, x.shape[1:]))}" for kind, x in found.features.items())
                print(encodable(f"{given['out']}: {len(found)} rows of {len(clips)} clips: {sizes}"))
            parallel.stop(together=True)
        except KeyboardInterrupt:
            return fail(KeyboardInterrupt("interrupted; the same command goes on"), 130)
        except Exception as error:
            if not user_error(error):
                raise
            return fail(error)
        finally:
            parallel.stop()
    return 0


if __name__ == "__main__":
    command(main)
