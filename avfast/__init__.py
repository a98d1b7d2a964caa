"""avfast: fast audio-visual self-supervised learning."""

__version__ = "0.1.0"

from avfast.models import AVSiam, CAVMAE, create_model, list_models
from avfast.packing import PackedTokens

__all__ = ["AVSiam", "CAVMAE", "PackedTokens", "__version__", "create_model", "list_models"]
