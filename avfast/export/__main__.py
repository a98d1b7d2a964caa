"""``encode`` of a model as a program, for batches of any size.

python -m avfast.export MODEL --out FILE                    of a run folder, a folder of save_pretrained, a Hub id
python -m avfast.export CHECKPOINT --out FILE --preset NAME of a released checkpoint

FILE ends in .pt2, which torch.export.load reads without avfast, or in .onnx. The program takes what the model's front
end makes of clips and gives the features by name.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> int:
    """The command line. Returns the exit code: 0, or 2 where something given is wrong."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m avfast.export", description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("model", metavar="MODEL", help="run folder, folder of save_pretrained, Hub id; with --preset a released file")
    add("--out", required=True, metavar="FILE", help=".pt2 or .onnx")
    add("--preset", metavar="NAME", help="a model of the released checkpoint's paper, such as avsiam_base")
    add("--modality", choices=("audio", "visual", "both"), default="both", help="what is looked at (default both)")
    given = parser.parse_args(arguments)
    from avfast.embed import load
    from avfast.export import checked, export, need_onnx, save
    from avfast.train.config import fail, user_error
    from avfast.train.log import plain_warnings

    with plain_warnings():
        try:
            if checked(given.out).suffix == ".onnx":
                need_onnx()
            program = export(load(given.model, given.preset), modality=given.modality)
            save(program, given.out)
        except Exception as error:
            if not user_error(error):
                raise
            return fail(error)
    sizes = (f"{name} (B, {', '.join(map(str, x.shape[1:]))})" for name, x in program.example_inputs[1].items())
    print(f"{given.out}: takes {', '.join(sizes)}")
    return 0


if __name__ == "__main__":
    from avfast.train.config import command

    command(main)
