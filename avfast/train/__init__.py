"""Training: ``torchrun -m avfast.train`` runs a recipe; :func:`load_model` gives the model of a run back."""

from avfast.train.checkpoint import load_model
from avfast.train.config import Config

__all__ = ["Config", "load_model"]
