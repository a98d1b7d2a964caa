"""An account of the files that could not be decoded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from avfast.data.dataset import Failure


class TooManyBadFiles(RuntimeError):
    """More files than tolerated could not be decoded; the message names them."""


@dataclass
class BadFiles:
    """Account of the files that could not be decoded.

    Args:
        total: clips in the data.
        max_share: of them that may be bad.
    """

    total: int
    max_share: float = 0.05
    reasons: dict[str, str] = field(default_factory=dict)

    def add(self, failures: Iterable[Failure]) -> list[Failure]:
        """Counts each path once; returns those that are new, for the log."""
        new = []
        for failure in failures:
            if failure.path not in self.reasons:
                self.reasons[failure.path] = failure.reason
                new.append(failure)
        return new

    def check(self) -> None:
        """Raises TooManyBadFiles when more than ``max_share`` of all clips are bad."""
        count = len(self.reasons)
        if count > self.max_share * self.total:
            shown = [f"{path}: {reason}" for path, reason in list(self.reasons.items())[:10]]
            more = [f"and {count - 10} more"] if count > 10 else []
            raise TooManyBadFiles(
                f"{count} of {self.total} clips cannot be decoded, more than the {self.max_share:.3g} share allowed: "
                + "; ".join(shown + more)
            )

    def summary(self) -> dict[str, Any]:
        """For summary.json: ``{"count", "total", "files": {path: reason}}``."""
        return {"count": len(self.reasons), "total": self.total, "files": dict(self.reasons)}
