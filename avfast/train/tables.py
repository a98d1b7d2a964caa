"""``python -m avfast.train.tables [--table NAME]``: rows of the papers' tables, the papers' figures, the commands.

A row stands here when this library can express its pre-training. ``note`` says what its figures need beyond that.
Figures are the papers', measured on their machines; nothing here was measured with this library.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from avfast.train.config import SettingError, command, fail, unknown
from avfast.train.recipes import avbert, avsiam, deepavfusion, mavil
from avfast.train.recipes.row import Row

USAGE = "python -m avfast.train.tables [--table NAME]"
_PAPERS = (avsiam, deepavfusion, mavil, avbert)
PAPERS = {table: paper.PAPER for paper in _PAPERS for table in paper.TABLES}
TITLES = avsiam.TABLES | deepavfusion.TABLES | mavil.TABLES | avbert.TABLES
ROWS: tuple[Row, ...] = avsiam.ROWS + deepavfusion.ROWS + mavil.ROWS + avbert.ROWS

HEADER = """\
Figures are the papers'. Manifests (CAV-MAE JSON) are placeholders; with --class_csv a run ends with a linear probe.
Nodes x processes x --batch_size x --accumulate is the paper's batch: on fewer GPUs raise one of the last two in turn,
--batch_size where a contrastive loss compares clips. Several nodes need torchrun's rendezvous arguments.

"""


def listing(rows: Sequence[Row]) -> str:
    """The rows, a block per table: figures in columns, under each row its command and its note."""
    blocks = []
    for table in dict.fromkeys(row.table for row in rows):
        members = [row for row in rows if row.table == table]
        columns = list(dict.fromkeys(name for row in members for name in row.figures))
        widths = [max(len(name), *(len(_figure(row, name)) for row in members)) for name in columns]
        first = max(len(row.label) for row in members)
        lines = [f"{table} | {PAPERS[table]}, {TITLES[table]}"]
        lines.append("  ".join([" " * (first + 2), *(f"{n:>{w}}" for n, w in zip(columns, widths, strict=True))]))
        for row in members:
            figures = (f"{_figure(row, n):>{w}}" for n, w in zip(columns, widths, strict=True))
            lines.append("  ".join([f"  {row.label:{first}}", *figures]))
            lines.append(f"      {row.command()}")
            if row.note:
                lines.append(f"      ({row.note})")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _figure(row: Row, column: str) -> str:
    return str(row.figures.get(column, "-"))


def main(arguments: Sequence[str]) -> int:
    """The command line. Returns the exit code: 0, or 2 for an unknown table."""
    rows = ROWS
    if {"-h", "--help"} & set(arguments):
        print(USAGE + "\n\ntables:\n" + "\n".join(f"  {name:18} {title}" for name, title in TITLES.items()))
        return 0
    if arguments:
        words = [part for word in arguments for part in word.split("=", 1)]
        if len(words) != 2 or words[0] != "--table":
            return fail(SettingError(f"unexpected {shlex.join(arguments)!r}; expected [--table NAME]"))
        if words[1] not in TITLES:
            return fail(SettingError(unknown("table", words[1], TITLES)))
        rows = tuple(row for row in ROWS if row.table == words[1])
    print(HEADER + listing(rows))
    return 0


if __name__ == "__main__":
    command(main)
