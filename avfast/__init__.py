"""avfast: fast audio-visual self-supervised learning."""

from avfast.models import CAVMAE, AudioMAE, AVSiam, DeepAVFusion, DiffMAViL, MAViL, create_model, list_models
from avfast.packing import PackedTokens

__version__ = "0.1.0"

__all__ = [
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
