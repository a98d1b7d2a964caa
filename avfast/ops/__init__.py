"""One file per op: its maths, its shapes and its eager reference."""

from avfast.ops.add_layer_norm import add_layer_norm
from avfast.ops.diffuse_patches import NoiseSchedule, diffuse_patches
from avfast.ops.flash_attn_varlen import flash_attn_varlen_func
from avfast.ops.info_nce import info_nce
from avfast.ops.local_attention import local_attention
from avfast.ops.low_rank_linear import low_rank_linear
from avfast.ops.masked_patch_mse import masked_patch_mse
from avfast.ops.packed_attention import AttentionPlan, packed_attention, packed_attention_qkv
from avfast.ops.pair_attention import pair_attention, pair_weights
from avfast.ops.patch_embed_kept import patch_embed_kept
from avfast.ops.skew_exp import skew_exp

__all__ = [
    "AttentionPlan",
    "NoiseSchedule",
    "add_layer_norm",
    "diffuse_patches",
    "flash_attn_varlen_func",
    "info_nce",
    "local_attention",
    "low_rank_linear",
    "masked_patch_mse",
    "packed_attention",
    "packed_attention_qkv",
    "pair_attention",
    "pair_weights",
    "patch_embed_kept",
    "skew_exp",
]
