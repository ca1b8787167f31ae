"""The model in memory, and the code that ships inside checkpoints."""
