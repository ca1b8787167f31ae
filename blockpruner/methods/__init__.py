"""Methods of pruning, one folder a kind, and how a run of one is scored and committed."""
