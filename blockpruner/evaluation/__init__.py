"""Evaluation: held-out perplexity, zero-shot tasks and speed, cached by content."""
