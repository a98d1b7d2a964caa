"""One paper, one file."""

from avfast.models.avsiam import AVSiam
from avfast.models.cav_mae import CAVMAE
from avfast.models.contract import Draws, Features, Figures, Model, Output
from avfast.models.deepavfusion import DeepAVFusion
from avfast.models.registry import create_model, list_models

__all__ = [
    "AVSiam",
    "CAVMAE",
    "DeepAVFusion",
    "Draws",
    "Features",
    "Figures",
    "Model",
    "Output",
    "create_model",
    "list_models",
]
