"""Checkpoints of pruned models: one file a format, each verified by the engine that reads it."""
