"""Registers our model types in transformers: after `import blockpruner`, a pruned checkpoint loads
without its code.

Decides which types these are: those that only our exports write. A type of others is never
registered, since transformers would then read their models by our class. Importing blockpruner does
not import transformers: its table of configs gets the types when it is loaded, and our classes are
loaded with the first checkpoint that needs them.
"""

import sys
from collections.abc import Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

TABLE = "transformers.models.auto.configuration_auto"
FORMAT_KEY, FORMAT = "blockpruner_format", 1
"""The number of a pruned checkpoint's format, in its config.json; without one it is 1."""


def require_format(fields: Mapping[str, Any]) -> None:
    """Raise ValueError for a config.json of a format that this version does not read."""
    number = fields.get(FORMAT_KEY, FORMAT)
    if number != FORMAT:
        raise ValueError(
            f"this checkpoint is of blockpruner's format {number!r}, and this version reads"
            f" {FORMAT}; install a newer blockpruner"
        )


class OwnConfig:
    """Reads the config.json of one of our types by a class of the installed package."""

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], **kwargs: Any) -> Any:
        from blockpruner.model.classes import own_config_class

        require_format(fields)
        return own_config_class(fields["model_type"]).from_dict(fields, **kwargs)


def add_types(table: ModuleType) -> None:
    """Register our types, of every family that there may be, in transformers' module of configs."""
    for family in (*table.CONFIG_MAPPING_NAMES, "baichuan"):
        for kind in ("blockpruned", "slicegpt"):
            table.AutoConfig.register(f"{family}_{kind}", OwnConfig, exist_ok=True)


class TableWatch(MetaPathFinder):
    """Calls `add_types` when transformers' module of configs is loaded, and finds no module
    itself."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != TABLE:
            return None
        # Once is enough, and `find_spec` below would find this finder again.
        sys.meta_path.remove(self)
        spec = find_spec(name)
        assert spec is not None and spec.loader is not None
        load = spec.loader.exec_module

        def load_and_add(module: ModuleType) -> None:
            load(module)
            add_types(module)

        spec.loader.exec_module = load_and_add  # type: ignore[method-assign]  # an import hook
        return spec


def watch() -> None:
    """Add our types to transformers' table, at once or when it is loaded."""
    if TABLE in sys.modules:
        add_types(sys.modules[TABLE])
    else:
        sys.meta_path.insert(0, TableWatch())
