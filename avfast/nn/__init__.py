"""Modules over :mod:`avfast.ops`, with timm's argument and parameter names."""

from avfast.nn.audio_resnet import AudioResNet
from avfast.nn.block import Mlp, PackedAttention, PackedBlock, run_blocks
from avfast.nn.cross_block import CrossBlock, CrossBlocks
from avfast.nn.decoder import Decoder, JointDecoder, PatchDecoder, SelfBlocks
from avfast.nn.drop_path import DropPath, KeptSequences
from avfast.nn.fusion import ContextBlock, CrossAttention, FusionBlock, PairAttention, TokenLayout
from avfast.nn.local_block import LocalAttention, LocalBlock, LocalBlocks
from avfast.nn.norm import SplitLayerNorm
from avfast.nn.patches import PatchEmbed, SpaceTimePositions, patchify, positions, sincos, unpatchify
from avfast.nn.shared_transformer import SharedLowRankTransformer
from avfast.nn.video_resnet import SlowFast, VideoResNet

__all__ = [
    "AudioResNet",
    "ContextBlock",
    "CrossAttention",
    "CrossBlock",
    "CrossBlocks",
    "Decoder",
    "DropPath",
    "FusionBlock",
    "JointDecoder",
    "KeptSequences",
    "LocalAttention",
    "LocalBlock",
    "LocalBlocks",
    "Mlp",
    "PackedAttention",
    "PackedBlock",
    "PairAttention",
    "PatchDecoder",
    "PatchEmbed",
    "SelfBlocks",
    "SharedLowRankTransformer",
    "SlowFast",
    "SpaceTimePositions",
    "SplitLayerNorm",
    "TokenLayout",
    "VideoResNet",
    "patchify",
    "positions",
    "run_blocks",
    "sincos",
    "unpatchify",
]
