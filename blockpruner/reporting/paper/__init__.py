"""The report of a set of studies: the paper's tables and figures, and what goes beyond them."""
