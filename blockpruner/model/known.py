"""Our model types, made known to transformers: after `import blockpruner`, a pruned checkpoint
loads without its code.

Decides which types these are: those that only our exports write. A type of others is never
registered, since transformers would then read their models by our class. transformers is not
imported for it: its table of configs gets the types when it is made, and a class is loaded when a
checkpoint asks for it.
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
"""The number of a pruned checkpoint's format, in its config.json; one without it is of the
first."""


def require_format(fields: Mapping[str, Any]) -> None:
    """Raise ValueError for a config.json of a format that this version does not read."""
    if (number := fields.get(FORMAT_KEY, FORMAT)) != FORMAT:
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
    """Finds nothing, but has `add_types` called when transformers' module of configs is loaded."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != TABLE:
            return None
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
    """Add our types now, if transformers has its table, or as soon as it has."""
    if TABLE in sys.modules:
        add_types(sys.modules[TABLE])
    else:
        sys.meta_path.insert(0, TableWatch())
