"""Words and values: blocks, families, budgets, plans, settings. No torch, no files."""
