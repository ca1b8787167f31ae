"""The tables and figures of arXiv 2406.10594, made again."""
