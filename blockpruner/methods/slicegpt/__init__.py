"""SliceGPT: a narrower residual stream (arXiv 2401.15024)."""
