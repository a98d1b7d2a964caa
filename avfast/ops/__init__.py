"""One file per op: its maths, its shapes and its eager reference."""

from avfast.ops.info_nce import info_nce
from avfast.ops.masked_patch_mse import masked_patch_mse
from avfast.ops.packed_attention import AttentionPlan, packed_attention

__all__ = ["AttentionPlan", "info_nce", "masked_patch_mse", "packed_attention"]
