"""The settings of a run: their sections, how a project's files are read, and what is refused."""
