"""The methods that change weights: LaCo merges layers. Each ends in a plain model of its own family."""
