"""Layouts of the checkpoints that the authors of each paper released: one file per paper."""
