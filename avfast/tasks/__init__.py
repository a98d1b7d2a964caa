"""What a representation is used for: pooled features, retrieval between modalities, probes, neighbours."""
