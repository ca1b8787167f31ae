"""The command `blockpruner`."""
