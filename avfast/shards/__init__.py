"""Shard sets: clips decoded once and read back a hundred times faster, see :mod:`avfast.data.shard_layout`."""

from avfast.data.shard_layout import ShardClip, ShardError, ShardSet, ShardSettings, open_set
from avfast.shards.build import ShardSpec, build, build_shard

__all__ = ["ShardClip", "ShardError", "ShardSet", "ShardSettings", "ShardSpec", "build", "build_shard", "open_set"]
