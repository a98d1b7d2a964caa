"""The Triton kernels, in kernels/ beside this package in a source tree and in this place in a wheel."""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parent.parent / "kernels")]
