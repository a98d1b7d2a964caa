"""Clips in, tensors out: manifests, media decoding, log-mel filter banks, augmentation and the built-in demo clips."""
