"""Modules over :mod:`avfast.ops`, with timm's argument and parameter names."""

from avfast.nn.block import Mlp, PackedAttention, PackedBlock, run_blocks
from avfast.nn.decoder import JointDecoder
from avfast.nn.drop_path import DropPath, KeptSequences
from avfast.nn.fusion import ContextBlock, CrossAttention, FusionBlock, PairAttention, TokenLayout
from avfast.nn.norm import SplitLayerNorm
from avfast.nn.patch_decoder import PatchDecoder
from avfast.nn.patch_embed import PatchEmbed, patchify, unpatchify
from avfast.nn.pos_embed import sincos_2d

__all__ = [
    "ContextBlock",
    "CrossAttention",
    "DropPath",
    "FusionBlock",
    "JointDecoder",
    "KeptSequences",
    "Mlp",
    "PackedAttention",
    "PackedBlock",
    "PairAttention",
    "PatchDecoder",
    "PatchEmbed",
    "SplitLayerNorm",
    "TokenLayout",
    "patchify",
    "run_blocks",
    "sincos_2d",
    "unpatchify",
]
