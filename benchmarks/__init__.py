"""Scripts that measure; each prints what it ran on, and compares within one run."""
