"""Packages and extras. Nothing is compiled at install time and torch is never imported here."""

import re
import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def version() -> str:
    text = (ROOT / "avfast" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if match is None:
        raise RuntimeError('avfast/__init__.py: expected a line __version__ = "X.Y.Z"')
    return match.group(1)


# An editable install is a plain path to this folder, where avfast/kernels.py finds the kernels and avfast/build.py the
# sources of compiled code. A package_dir would make it an import hook, which loses to any folder called avfast, such as
# the clone seen from its parent.
packages, package_dir = find_packages(include=["avfast", "avfast.*"]), {"": "."}
if "editable_wheel" not in sys.argv:
    packages += ["avfast.kernels", "avfast.csrc"]
    package_dir |= {"avfast.kernels": "kernels", "avfast.csrc": "csrc"}

setup(
    name="avfast",
    version=version(),
    description="Fast audio-visual self-supervised learning: AVSiam, MAViL / DiffMAViL, AVBERT and DeepAVFusion",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=packages,
    package_dir=package_dir,
    package_data={"avfast": ["py.typed"], "avfast.csrc": ["*.h", "*.cpp", "*.cu"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.11",
        "torchvision",
        "numpy",
        "timm",
        "av",
        "safetensors",
        "tqdm",
        "matplotlib",
    ],
    extras_require={
        "test": ["pytest", "pytest-xdist", "hypothesis", "scikit-learn", "pyarrow"],
        "eval": ["scikit-learn", "torchmetrics", "mir_eval<0.9"],
        "dev": ["ruff", "mypy", "pre-commit", "tensorboard"],
        "flash": ["flash-attn"],
        "xformers": ["xformers"],
        "export": ["onnx", "onnxscript", "onnxruntime"],
        "shards": ["ray[data]"],
        "parquet": ["pyarrow"],
        "tensorboard": ["tensorboard"],
        "wandb": ["wandb"],
        "trackio": ["trackio"],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
