"""Scoring beyond one process in memory: layer by layer from disk, or on many workers."""
