"""LaCo: layers merged into one another (arXiv 2402.11187)."""
