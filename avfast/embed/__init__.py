"""Embeddings: ``avfast.embed(model, clips)``, and ``python -m avfast.embed MODEL CLIPS --out FILE``."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from avfast.embed.record import Embeddings
from avfast.embed.run import embed, load

__all__ = ["Embeddings", "embed", "load"]


class _Embed(ModuleType):
    """The command wants a module of this name, and Python a function: the module can be called."""

    def __call__(self, *given: Any, **named: Any) -> Embeddings:
        return embed(*given, **named)


sys.modules[__name__].__class__ = _Embed
