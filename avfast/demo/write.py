"""Scenes as files: H.264 or MPEG-4 video and AAC audio in mp4, manifests, and the cache they lie in."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .long import Film, film_class_names
from .sampling import SPLITS, Preset, sample, sample_films
from .scene import Scene, class_names, write_scenes

VERSION = 4  # raise it whenever the same arguments give other clips
CLIPS = "clips"
_WRITER = """
import importlib.util, sys
folder, work, worker, workers = sys.argv[1:]
spec = importlib.util.spec_from_file_location("demo", folder + "/__init__.py", submodule_search_locations=[folder])
sys.modules["demo"] = demo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(demo)
demo.write.work(work, int(worker), int(workers))
"""


def write_clip(scene: Scene | Film, path: str | os.PathLike[str]) -> None:
    """Renders and encodes one scene or film.

    Decoded, the audio starts with the first sample of ``scene.waves()``; up to 1023 samples of silence fill its last
    AAC frame.
    """
    import av

    with av.open(os.fspath(path), "w", format="mp4") as container:
        # H.264 where the wheel has it; MPEG-4 part 2 is in every FFmpeg. No B-frames: the first frame stays at 0.
        if "libx264" in av.codecs_available:
            options = {"preset": "superfast", "crf": "18", "bf": "0", "threads": "1"}
            video: Any = container.add_stream("libx264", rate=scene.fps, options=options)
        else:
            video = container.add_stream("mpeg4", rate=scene.fps, options={"qscale": "3", "flags": "+qscale"})
        video.width, video.height, video.pix_fmt = scene.width, scene.height, "yuv420p"
        video.gop_size = scene.fps
        audio: Any = container.add_stream("aac", rate=scene.sample_rate, options={"aac_coder": "fast"})
        audio.layout = "mono"
        audio.bit_rate = 4 * scene.sample_rate
        for index, image in enumerate(scene.frames()):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = index
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        # The encoder puts 1024 samples of silence in front; the mp4 edit list makes every decoder drop them again.
        samples = av.AudioFrame.from_ndarray(scene.waves().mixture[None], format="fltp", layout="mono")
        samples.sample_rate = scene.sample_rate
        samples.pts = 0
        container.mux(audio.encode(samples))
        container.mux(audio.encode(None))


def cache_folder(preset: Preset, seed: int, root: str | os.PathLike[str] | None) -> Path:
    """``<root>/<name>-<hash>``, the hash taken over the generator's version and all arguments."""
    if root is None:
        root = Path(os.environ.get("AVFAST_CACHE") or "~/.cache/avfast").expanduser() / "demo"
    arguments = json.dumps({"version": VERSION, "seed": seed, **asdict(preset)}, sort_keys=True)
    return Path(root) / f"{preset.name}-{hashlib.sha256(arguments.encode()).hexdigest()[:12]}"


def build_folder(preset: Preset, seed: int, folder: Path, workers: int, progress: bool) -> None:
    """Fills ``folder`` unless it exists. It appears complete or not at all, whoever is interrupted or builds it too."""
    if folder.exists():
        return
    lock = folder.with_name(f".{folder.name}.lock")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
    except OSError as error:
        raise OSError(
            f"demo clips cannot be written to {folder.parent} ({error.strerror}); set AVFAST_CACHE to a writable folder"
        ) from None
    with _lock(lock):
        if folder.exists():
            return
        for stale in folder.parent.glob(f".{folder.name}.*.tmp"):
            shutil.rmtree(stale, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
        try:
            work.chmod(0o755)
            _fill(work, preset, seed, workers, progress)
            try:
                work.rename(folder)
            except OSError:
                if not folder.exists():  # else another process without our lock was first
                    raise
        finally:
            shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One builder at a time on a machine; where files cannot be locked the first rename wins."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(path, "w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fill(work: Path, preset: Preset, seed: int, workers: int, progress: bool) -> None:
    films = preset.clips > 1
    scenes: list[Scene | Film] = []
    with open(work / "classes.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(("index", "mid", "display_name"))
        rows.writerows(
            (index, _mid(index), name) for index, name in enumerate(film_class_names() if films else class_names())
        )
    for split in SPLITS:
        part = sample_films(preset, split, seed) if films else sample(preset, split, seed)
        scenes += part
        write_scenes(work / f"{split}.jsonl", part)
        with open(work / f"{split}.json", "w", encoding="utf-8") as file:
            json.dump({"data": [_entry(scene) for scene in part]}, file, indent=1)
    (work / CLIPS).mkdir()
    if workers <= 1:
        for scene in _bar(scenes, progress, preset.name):
            write_clip(scene, work / CLIPS / f"{scene.id}.mp4")
    else:
        _fill_clips(work, len(scenes), workers, progress, preset.name)


def _mid(index: int) -> str:
    return f"/m/demo{index:02d}"


def _entry(scene: Scene | Film) -> dict[str, str]:
    path = f"{CLIPS}/{scene.id}.mp4"
    return {
        "video_id": scene.id,
        "wav": path,
        "video_path": path,
        "labels": ",".join(_mid(label) for label in scene.labels),
    }


def _bar(iterable: Any, progress: bool, name: str, **options: Any) -> Any:
    from tqdm import tqdm

    title = f"writing demo clips ({name})"
    return tqdm(iterable, desc=title, unit="clip", disable=not progress, mininterval=1.0, **options)


def writer(work: Path, worker: int, workers: int) -> list[str]:
    """The command that writes every ``workers``-th clip of a folder's scenes."""
    return [sys.executable, "-c", _WRITER, str(Path(__file__).parent), str(work), str(worker), str(workers)]


def _fill_clips(work: Path, total: int, workers: int, progress: bool, name: str) -> None:
    """Spreads the clips over processes, which are plain ones: multiprocessing would run the user's script again.

    They import this package under a name of its own, without avfast and so without torch, which takes seconds to load.
    """
    logs = [tempfile.TemporaryFile() for _ in range(workers)]
    processes = [
        subprocess.Popen(
            writer(work, worker, workers),
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,  # its end tells them that we are gone
            stdout=log,
            stderr=log,
        )
        for worker, log in enumerate(logs)
    ]
    try:
        with _bar(None, progress, name, total=total) as bar:
            running = True
            while running:
                codes = [process.poll() for process in processes]
                running = None in codes
                bar.update(sum(1 for _ in (work / CLIPS).iterdir()) - bar.n)
                for code, log in zip(codes, logs, strict=True):
                    if code:
                        log.seek(0)
                        raise RuntimeError(f"writing demo clips failed:\n{log.read().decode(errors='replace')[-2000:]}")
                time.sleep(0.1 if running else 0)
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
            process.communicate()
        for log in logs:
            log.close()


def work(folder: str, worker: int, workers: int) -> None:
    """What a process of :func:`writer` does, until its work is done or its standard input ends."""

    def watch() -> None:
        os.read(0, 1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    lines = [line for split in SPLITS for line in (Path(folder) / f"{split}.jsonl").read_text("utf-8").splitlines()]
    scenes = [Film.from_json(line) if "scenes" in json.loads(line) else Scene.from_json(line) for line in lines]
    for scene in scenes[worker::workers]:
        write_clip(scene, Path(folder) / CLIPS / f"{scene.id}.mp4")
