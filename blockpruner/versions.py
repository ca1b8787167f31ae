"""Versions of results: one constant for each kind of result.

Raise a constant in the commit that changes the results it covers. Stored results of the old version
are then not used again, and DVC runs the stages that depend on the constant. tests/test_golden.py
fails when a number moves without its version, and names the constant to raise.
"""

FETCH_VERSION = 6
"""Texts, benchmark items and checkpoints as they are fetched: what is read, kept, converted and
recorded."""

CALIBRATION_VERSION = 7
"""Calibration rows: which samples are drawn, how they are packed, which tokens are scored."""

SCORE_VERSION = 3
"""Losses of masks and influences of units. Part of the fingerprint of a trial store."""

SEARCH_VERSION = 6
"""What a search decides from the same trials, and the searches of a recipe. Part of the fingerprint
of a search."""

PLAN_VERSION = 9
"""Which prefix of a search meets a budget, LaCo's merges, widths of MLPs and SliceGPT's, and what a
plan holds."""

WEIGHTS_VERSION = 10
"""The weights of a pruned model: merged, sliced, compensated or trained. Part of the keys under
which they are kept."""

EXPORT_VERSION = 13
"""The content of exported checkpoints, in every format."""

EVAL_VERSION = 4
"""Perplexities, task scores, sample texts and timings. Part of the key of every stored result."""

REPORT_VERSION = 20
"""Tables, figures and pages made from results."""
