"""Searches: generators over facts that know neither model nor trial store, and how one is run to
its budgets."""
