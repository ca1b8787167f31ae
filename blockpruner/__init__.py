"""BlockPruner: smaller LLMs without retraining, by removing MLP channels, layers or blocks."""

import importlib
from typing import TYPE_CHECKING, Any

from blockpruner.model.known import watch

if TYPE_CHECKING:
    from blockpruner.api import Pruned, evaluate, prune

__all__ = ["Pruned", "evaluate", "prune"]
__version__ = "0.1.0"

watch()


def __getattr__(name: str) -> Any:
    """Load the API on first use: importing one module must not import the library."""
    if name in __all__:
        return getattr(importlib.import_module("blockpruner.api"), name)
    raise AttributeError(f"module 'blockpruner' has no attribute {name!r}")
