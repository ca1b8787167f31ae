"""Studies: what asks and answers the questions of docs/results.md and of the paper's tables.

`studies` reads studies/*.yaml, `experiments` measures many models in one process, and `points`
holds what they lost. `answers` and `paper` make tables and figures of it, and `publish` fills the
docs. Stages and flows import this package. The library does not, and the wheel leaves it out.
"""
