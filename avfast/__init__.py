"""avfast: fast audio-visual self-supervised learning."""

from avfast.models import AVBERT, CAVMAE, AudioMAE, AVSiam, DeepAVFusion, DiffMAViL, MAViL, create_model, list_models
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
    "list_models",
]
