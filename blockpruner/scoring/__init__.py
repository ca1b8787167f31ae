"""Scoring: the engine that computes trials, and the objectives that ask for them."""
