"""Versions of results: one constant for each kind of result.

Raise a constant in the commit that changes the results it covers. Stored results of the old version are then not used
again, and DVC runs the stages that depend on the constant. tests/test_golden.py fails when a number moves without its
version, and names the constant to raise.
"""

SETTINGS_VERSION = 6
"""Defaults of the settings, and what a value of a run file means."""

FETCH_VERSION = 1
"""Texts and benchmark items read from their sources."""

CONVERT_VERSION = 3
"""The content of a checkpoint that is fetched: what is kept, converted and recorded. Part of its key in the cache."""

CALIBRATION_VERSION = 3
"""Calibration rows: which samples are drawn, how they are packed, which tokens are scored."""

SCORE_VERSION = 2
"""Losses of masks and influences of units. Part of the fingerprint of a trial store."""

SEARCH_VERSION = 3
"""What a search decides from the same trials. Part of the fingerprint of a search."""

LACO_VERSION = 1
"""LaCo's merges and similarities. Part of the fingerprint of a similarity log, and of the key of a merged model."""

SLICEGPT_VERSION = 1
"""SliceGPT's widths and sliced weights. Part of the key of a sliced model."""

LATENCY_VERSION = 1
"""How the time of generation and of single blocks is measured. Part of the key of a measured latency."""

PLAN_VERSION = 2
"""Which prefix of a search meets a budget, and what a plan holds."""

COMPENSATION_VERSION = 3
"""The weights that make up for what is gone, without training."""

EXPORT_VERSION = 5
"""The content of exported checkpoints, in every format."""

RECOVERY_VERSION = 4
"""The weights that come out of training. Part of the key of its states."""

EVAL_VERSION = 3
"""Perplexities, task scores and timings. Part of the key of every stored result."""

SAMPLES_VERSION = 1
"""Sample texts, and what else stands in results.json beside the stored results. Part of the key of the texts."""

REPORT_VERSION = 10
"""Tables, figures and pages made from results."""
