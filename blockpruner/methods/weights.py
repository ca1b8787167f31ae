"""Methods that change weights: what one will do for a budget, its details, is found first, kept in a file, and becomes a
plan. The details are JSON of the method's own, which nothing else reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockpruner.core.blocks import DENSE, Mask
from blockpruner.core.budgets import Budget, Resources, parse_budget
from blockpruner.core.errors import InputError
from blockpruner.core.families import Config
from blockpruner.core.options import read_options
from blockpruner.core.plan import Plan
from blockpruner.core.settings import Score
from blockpruner.methods.kind import Job, Kind, Material, make_plan
from blockpruner.methods.stores import open_stores
from blockpruner.scoring.engine_of import dense_scorer
from blockpruner.scoring.metrics import PERPLEXITY
from blockpruner.scoring.objectives import Counts, Objective
from blockpruner.search.trace import Current, search_fingerprint, trace_directory
from blockpruner.store.files import read_json, write_json

Details = dict[str, Any]
"""What a method will do: JSON. Under "nll" it may hold each calibration row's mean NLL in the pruned model."""
