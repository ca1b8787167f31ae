"""The tables and figures of arXiv 2406.10594, made again. It imports the library; nothing imports
it."""
