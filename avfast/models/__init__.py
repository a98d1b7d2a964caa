"""One paper, one file."""

from avfast.models.audio_mae import AudioMAE
from avfast.models.avbert import AVBERT
from avfast.models.avsiam import AVSiam
from avfast.models.cav_mae import CAVMAE
from avfast.models.contract import Draws, Features, Figures, Model, Output
from avfast.models.deepavfusion import DeepAVFusion
from avfast.models.mavil import DiffMAViL, MAViL
from avfast.models.registry import create_model, from_pretrained, list_models

__all__ = [
    "AVBERT",
    "AVSiam",
    "AudioMAE",
    "CAVMAE",
    "DeepAVFusion",
    "DiffMAViL",
    "Draws",
    "Features",
    "Figures",
    "MAViL",
    "Model",
    "Output",
    "create_model",
    "from_pretrained",
    "list_models",
]
