"""The methods that change weights instead of removing blocks: TRANSFORMS, with their options and defaults.

Each works in place and leaves a model that saves. What a run of one decides before anything is changed, its details,
is found in `planning`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blockpruner.methods.laco.walk import DEFAULTS

TRANSFORMS: dict[str, Mapping[str, Any]] = {"laco": DEFAULTS, "slicegpt": {}}
