"""A job of SLURM that asks to be started again before its time is over.

SIGUSR1 alone does so: ``#SBATCH --signal=USR1@120`` sends it ahead of the time limit. SIGTERM is what ``scancel`` and a
preemption send; the first is meant to end the job, and after the second SLURM starts it again itself.
"""

from __future__ import annotations

import os
import shutil
import subprocess

from avfast.train.config import Config, SettingError


def check(config: Config) -> None:
    """Raises SettingError where the job could not be started again, or would not go on where it was."""
    if not os.environ.get("SLURM_JOB_ID"):
        raise SettingError("--requeue needs a job of SLURM: SLURM_JOB_ID is not set")
    if shutil.which("scontrol") is None:
        raise SettingError("--requeue needs scontrol on PATH (in a container too)")
    if config.resume != "auto" or config.out is None:
        raise SettingError("--requeue needs --out RUN --resume auto, with which the same command continues the run")


def requeue() -> str | None:
    """Asks SLURM to start this job again; returns what went wrong, in one line, or None."""
    words = ["scontrol", "requeue", os.environ["SLURM_JOB_ID"]]
    try:
        found = subprocess.run(words, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{' '.join(words)} failed: {error}"
    return f"{' '.join(words)} failed: {found.stderr.strip() or found.stdout.strip()}" if found.returncode else None
