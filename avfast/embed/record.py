"""Embeddings of clips as a record, and as files of three formats."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from avfast.tasks.features import KINDS


@dataclass(frozen=True)
class Embeddings:
    """Features of clips, a row per clip or per window; ``found["audio"]`` is the array of that name.

    Attributes:
        id, path: of each row's clip.
        start: ``(N,)`` float64, of the row's window in seconds; 0 where a row is the mean of a clip's windows.
        features: by kind (``audio``, ``visual``, ``fused``), ``(N, D)`` float32, or ``(N, tokens, D)``. NaN where a
            clip lacks a modality that they need. A kind that no clip has is not there.
        failures: why, by the path of a clip that could not be read; it has no row.
        settings: how they were made.
    """

    id: list[str]
    path: list[str]
    start: Tensor
    features: dict[str, Tensor]
    failures: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.id)

    def __getitem__(self, name: str) -> Any:
        """``id``, ``path``, ``start`` or a kind of features."""
        return self.columns()[name]

    def keys(self) -> list[str]:
        """The names of :meth:`columns`."""
        return list(self.columns())

    def columns(self) -> dict[str, Any]:
        """All that has a value for each row."""
        return {"id": self.id, "path": self.path, "start": self.start, **self.features}

    def save(self, file: str | os.PathLike[str]) -> Path:
        """Writes a ``.safetensors``, ``.npz`` or ``.parquet`` file, whole or not at all.

        Each holds the :meth:`columns`, and failures and settings as JSON: ``avfast`` of the metadata (of the schema's
        in Parquet), an array ``avfast`` in ``.npz``. ``.safetensors`` holds no text: ``id`` and ``path`` are ``(N,
        longest)`` uint8 of UTF-8, padded with zeros. In Parquet features are lists, null in place of NaN rows.

        Raises:
            ValueError: another ending. ImportError: Parquet without pyarrow.
        """
        path = Path(file)
        writer, _ = _format(path)
        about = json.dumps({"settings": self.settings, "failures": self.failures})
        temporary = path.with_name(f".writing-{path.name}")
        try:
            temporary.touch()
            mode = temporary.stat().st_mode
            writer(self, about, str(temporary))
            temporary.chmod(mode)  # safetensors lets nobody else read its files
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return path

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> Embeddings:
        """What :meth:`save` wrote.

        Raises:
            ValueError: another ending, or a file of something else. ImportError: Parquet without pyarrow.
        """
        path = Path(file)
        columns, about = _format(path)[1](path)
        if about is None or not {"id", "path", "start"} <= columns.keys():
            raise ValueError(f"{path} holds no embeddings of avfast")
        names, paths, start = (columns.pop(name) for name in ("id", "path", "start"))
        features = {kind: columns[kind] for kind in KINDS if kind in columns}
        return cls(names, paths, start, features, **json.loads(about))


def check_name(file: str | os.PathLike[str]) -> None:
    """Raises what :meth:`Embeddings.save` would raise for this name of a file, before there is anything to write."""
    path = Path(file)
    _format(path)
    if path.suffix == ".parquet":
        _arrow()
    if not path.parent.is_dir():
        raise FileNotFoundError(2, "no such folder", str(path.parent))


def _arrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError('.parquet needs pyarrow: pip install "avfast[parquet]"') from error
    return pyarrow, parquet


_Columns = tuple[dict[str, Any], str | None]


def _to_safetensors(found: Embeddings, about: str, file: str) -> None:
    from safetensors.torch import save_file

    text = {name: _bytes(found[name]) for name in ("id", "path")}
    tensors = {**text, "start": found.start, **found.features}
    save_file({name: x.contiguous() for name, x in tensors.items()}, file, metadata={"avfast": about})


def _from_safetensors(file: Path) -> _Columns:
    from safetensors import safe_open

    with safe_open(str(file), "pt") as opened:
        columns: dict[str, Any] = {name: opened.get_tensor(name) for name in opened.keys()}
        about = (opened.metadata() or {}).get("avfast")
    for name in {"id", "path"} & columns.keys():
        columns[name] = [os.fsdecode(bytes(row).rstrip(b"\0")) for row in columns[name].numpy()]
    return columns, about


def _bytes(names: list[str]) -> Tensor:
    """``(N, longest)`` uint8."""
    if not names:
        return torch.zeros(0, 0, dtype=torch.uint8)
    rows = np.array([os.fsencode(name) for name in names])
    return torch.from_numpy(rows.view(np.uint8).reshape(len(names), -1).copy())


def _to_npz(found: Embeddings, about: str, file: str) -> None:
    arrays: dict[str, Any] = {
        name: x.numpy() if isinstance(x, Tensor) else np.array(x, str) for name, x in found.columns().items()
    }
    np.savez(file, **arrays, avfast=np.array(about))


def _from_npz(file: Path) -> _Columns:
    with np.load(file, allow_pickle=False) as opened:
        arrays = dict(opened)
    about = arrays.pop("avfast", None)
    columns = {k: x.tolist() if k in ("id", "path") else torch.from_numpy(x) for k, x in arrays.items()}
    return columns, None if about is None else str(about)


def _to_parquet(found: Embeddings, about: str, file: str) -> None:
    arrow, parquet = _arrow()
    text = {name: [os.fsencode(x).decode(errors="backslashreplace") for x in found[name]] for name in ("id", "path")}
    columns: dict[str, Any] = {**text, "start": found.start.numpy()}
    for kind, x in found.features.items():
        absent = x.flatten(1).isnan().all(1).numpy()
        column = arrow.array(x.numpy().reshape(-1))
        for size in reversed(x.shape[2:]):
            column = arrow.FixedSizeListArray.from_arrays(column, size)
        columns[kind] = arrow.FixedSizeListArray.from_arrays(column, x.shape[1], mask=arrow.array(absent))
    table = arrow.table(columns).replace_schema_metadata({"avfast": about})
    parquet.write_table(table, file)


def _from_parquet(file: Path) -> _Columns:
    arrow, parquet = _arrow()
    table = parquet.read_table(file)
    columns: dict[str, Any] = {}
    for name in table.column_names:
        column = table[name].combine_chunks()
        if name in ("id", "path"):
            columns[name] = column.to_pylist()
            continue
        shape, there, values = [len(column)], column.is_valid().to_numpy(zero_copy_only=False), column
        while arrow.types.is_fixed_size_list(values.type):
            shape.append(values.type.list_size)
            values = values.flatten()
        flat = torch.from_numpy(values.to_numpy(zero_copy_only=False).copy())
        if len(shape) > 1:
            filled = torch.full(shape, torch.nan, dtype=flat.dtype)
            filled[torch.from_numpy(there)] = flat.view(-1, *shape[1:])
            flat = filled
        columns[name] = flat
    about = (table.schema.metadata or {}).get(b"avfast")
    return columns, None if about is None else about.decode()


_FORMATS: Mapping[str, tuple[Callable[[Embeddings, str, str], None], Callable[[Path], _Columns]]] = {
    ".safetensors": (_to_safetensors, _from_safetensors),
    ".npz": (_to_npz, _from_npz),
    ".parquet": (_to_parquet, _from_parquet),
}


def _format(file: Path) -> tuple[Callable[[Embeddings, str, str], None], Callable[[Path], _Columns]]:
    if file.suffix not in _FORMATS:
        raise ValueError(f"{file}: expected a name that ends in {', '.join(_FORMATS)}")
    return _FORMATS[file.suffix]
