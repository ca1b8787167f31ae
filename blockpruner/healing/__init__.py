"""Healing: kept weights change without training (`compensate`) or by it (`train`), towards the
dense model or texts."""
