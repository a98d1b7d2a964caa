"""Many shards at a time, in processes here or on a Ray cluster; both run :func:`avfast.shards.build_shard`."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from avfast.data.shard_layout import ShardError
from avfast.shards.build import ShardSpec, build_shard

_TRIES = 2  # of a shard whose process died: killed from outside the first time, perhaps, but hardly twice
# Imported once, not in every process
_PRELOADED = ["avfast.shards.pool", "av", "PIL.Image", "torchvision.io", "torchvision.transforms.v2"]
_CONTEXT = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


class BuildError(RuntimeError):
    """Some shards could not be built; the message says which and why."""


# -- this machine ---------------------------------------------------------------------------------------------------


@dataclass
class _Job:
    """A process that builds one shard, and what it has said so far."""

    spec: ShardSpec
    tries: int
    process: Any
    done: int = 0  # clips
    problem: OSError | None = None


def processes(specs: Iterator[ShardSpec], count: int, tick: Callable[[int], None], *, workers: int = 0) -> None:
    """A process for each shard, so that one that dies takes no other with it.

    Args:
        specs: what to build.
        count: how many they are.
        tick: called with the number of clips done, a negative one where they are lost.
        workers: processes at a time; 0 for one per CPU core that this process may use.

    Raises:
        OSError: a shard cannot be written; the others under way are given up.
        BuildError: processes died over the same shard twice. All others are built by then.
    """
    context: Any = multiprocessing.get_context(_CONTEXT)
    if _CONTEXT == "forkserver":
        context.set_forkserver_preload(_PRELOADED)
    workers = workers or _cores()
    again: list[tuple[ShardSpec, int]] = []
    jobs: dict[Connection, _Job] = {}
    lost: list[str] = []
    try:
        while True:
            while len(jobs) < workers:
                spec, tries = again.pop() if again else (next(specs, None), 0)
                if spec is None:
                    break
                here, there = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(there, spec), daemon=True)
                process.start()
                there.close()
                jobs[here] = _Job(spec, tries + 1, process)
            if not jobs:
                break
            for connection in wait(list(jobs)):
                assert isinstance(connection, Connection)
                job = jobs[connection]
                try:
                    said = connection.recv()
                except (EOFError, OSError):
                    del jobs[connection]
                    connection.close()
                    job.process.join()
                    if job.problem is not None:
                        raise job.problem from None
                    if code := job.process.exitcode:
                        tick(-job.done)
                        if job.tries < _TRIES:
                            again.append((job.spec, job.tries))
                        else:
                            lost.append(f"{job.spec.path.name} ({_ending(code)} at clip {_at(job)})")
                    continue
                if isinstance(said, OSError):
                    job.problem = said
                else:
                    job.done += 1
                    tick(1)
    finally:
        for job in jobs.values():
            job.process.terminate()
        for connection, job in jobs.items():
            job.process.join()
            connection.close()
    if lost:
        raise BuildError(f"could not build {', '.join(lost)}; the same command tries again")


def _cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _work(connection: Connection, spec: ShardSpec) -> None:
    """What a process does; it ends with the one that started it, however that ends."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ^C reaches the whole group: the first process ends the others
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    def say(what: OSError | None) -> None:
        try:
            connection.send(what)
        except BrokenPipeError:
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    torch.set_num_threads(1)
    try:
        build_shard(spec, partial(say, None))
    except OSError as error:
        say(_plain(error, spec.path))


def _plain(error: OSError, path: Path) -> OSError:
    """The error as it may go from process to process; it names the shard."""
    return OSError(error.errno, error.strerror or str(error), str(error.filename or path))


def _ending(code: int) -> str:
    if code > 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _at(job: _Job) -> str:
    clip = job.spec.clips[min(job.done, len(job.spec.clips) - 1)]
    return f"{clip.id}, {clip.path}"


# -- a cluster ------------------------------------------------------------------------------------------------------


def ray(specs: Iterator[ShardSpec], count: int, tick: Callable[[int], None], *, address: str) -> None:
    """Ray Data over the specifications, a row for each, on a cluster whose machines all see the folder and the clips.

    Args:
        specs, count, tick: as for :func:`processes`.
        address: of a running cluster; ``auto`` for the one that this machine belongs to, ``local`` to start one here.

    Raises:
        ImportError: Ray is not installed.
        OSError: a shard cannot be written.
        ShardError: no cluster at ``address``, or it gave up.
    """
    try:
        import ray as package
        import ray.data
    except ImportError:
        raise ImportError('--ray needs Ray: pip install "avfast[shards]"') from None
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        with package.init(address, log_to_driver=False, logging_level="error", include_dashboard=False):
            rows = ray.data.from_items([{"spec": pickle.dumps(spec)} for spec in specs], override_num_blocks=count)
            for row in rows.map(_row).iter_rows():
                if row["errno"]:
                    raise OSError(row["errno"], row["strerror"], row["filename"])
                tick(row["clips"])
    except (package.exceptions.RayError, ConnectionError, RuntimeError) as error:
        raise ShardError(f"Ray at {address}: {' '.join(str(error).split())[:500]}") from None


def _row(row: dict[str, Any]) -> dict[str, Any]:
    """A specification built; what went wrong comes back as a value, as Ray would try again."""
    spec = pickle.loads(row["spec"])
    error = OSError(0, "", "")
    try:
        build_shard(spec)
    except OSError as caught:
        error = _plain(caught, spec.path)
    return {
        "clips": len(spec.clips),
        "errno": error.errno or 0,
        "strerror": error.strerror,
        "filename": str(error.filename),
    }
