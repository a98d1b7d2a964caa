"""avfast: fast audio-visual self-supervised learning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from avfast.models import (
    AVBERT,
    CAVMAE,
    AudioMAE,
    AVSiam,
    DeepAVFusion,
    DiffMAViL,
    MAViL,
    create_model,
    from_pretrained,
    list_models,
)
from avfast.packing import PackedTokens

__version__ = "0.1.0"

__all__ = [
    "AVBERT",
    "AVSiam",
    "AudioMAE",
    "CAVMAE",
    "DeepAVFusion",
    "DiffMAViL",
    "MAViL",
    "PackedTokens",
    "__version__",
    "create_model",
    "embed",
    "from_pretrained",
    "list_models",
]

if TYPE_CHECKING:
    from avfast.embed import embed


def __getattr__(name: str) -> Any:
    """``avfast.embed`` needs more than torch, and is imported where it is used."""
    if name != "embed":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return importlib.import_module("avfast.embed")
