"""The block-pruned classes of a family: transformers' own classes with holes in them; and whose code a checkpoint has.

`modeling_blockpruned.py` holds the pair of every family of ours and ships inside checkpoints. A family that another
package adds needs no code of its own: its pair is written behind a copy of that file, from the family's row.
"""

from __future__ import annotations

import atexit
import importlib.util
import shutil
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from blockpruner.core.errors import InputError
from blockpruner.core.families import FAMILIES, Branch, Family
from blockpruner.model import modeling_blockpruned, modeling_slicegpt
from blockpruner.store.files import read_json

OUR_MODULES = ("modeling_blockpruned", "modeling_slicegpt")
"""The modules that ship inside checkpoints."""

PAIR = """

from transformers import {config}, {model}  # noqa: E402


class {prefix}BlockPrunedConfig(BlockPrunedConfigMixin, {config}):
    model_type = "{model_type}_blockpruned"


class {prefix}BlockPrunedForCausalLM(BlockPrunedMixin, {model}):
    config_class = {prefix}BlockPrunedConfig
    decoder_layers = "{layers}"
    layer_branches = ({mha!r}, {mlp!r})
"""


def config_class(family: Family) -> type[Any]:
    """The config class of the family's block-pruned models."""
    found: type[Any] = getattr(_module(family.model_type), f"{family.prefix}BlockPrunedConfig")
    return found


def model_class(family: Family) -> type[Any]:
    """The causal LM class of the family's block-pruned models."""
    found: type[Any] = getattr(_module(family.model_type), f"{family.prefix}BlockPrunedForCausalLM")
    return found


def has_our_code(directory: Path) -> bool:
    """Whether an export needs code to be loaded. That is then ours, byte for byte, and nothing else would run.

    Raises:
        InputError: the export holds or names other code than the one file of the installed package.
    """
    path = directory / "config.json"
    config = read_json(path) if path.exists() else {}
    asked, found = config.get("auto_map"), sorted(each.relative_to(directory) for each in directory.rglob("*.py"))
    if not asked and not found:
        return False
    family = str(config.get("model_type", "")).removesuffix("_blockpruned")
    ours = [Path(str(modeling_slicegpt.__file__))]
    if family in FAMILIES:
        ours.append(Path(str(_module(family).__file__)))
    for file in ours:
        names_it = isinstance(asked, dict) and all(
            str(text).rpartition(".")[0] == file.stem and entry in ("AutoConfig", "AutoModelForCausalLM")
            for entry, text in asked.items()
        )
        if found == [Path(file.name)] and names_it and (directory / file.name).read_bytes() == file.read_bytes():
            return True
    raise InputError(
        f"{directory} holds or names code that is not the installed blockpruner's ({asked or found[0]}), and it is not "
        "run; export it again with this version (its stage materialize)"
    )


@cache
def _module(model_type: str) -> Any:
    """The module that holds a family's pair."""
    family = FAMILIES[model_type]
    if hasattr(modeling_blockpruned, f"{family.prefix}BlockPrunedConfig"):
        return modeling_blockpruned
    folder = Path(tempfile.mkdtemp(prefix="blockpruner-family-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = folder / "modeling_blockpruned.py"
    path.write_text(Path(modeling_blockpruned.__file__).read_text(encoding="utf-8") + _pair(family), encoding="utf-8")
    name = f"{__name__}.{model_type}.modeling_blockpruned"  # its last part names the file in a checkpoint
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _pair(family: Family) -> str:
    def names(branch: Branch) -> tuple[str, ...]:
        return (branch.module, *branch.norms)

    return PAIR.format(
        prefix=family.prefix,
        config=f"{family.prefix}Config",
        model=f"{family.prefix}ForCausalLM",
        model_type=family.model_type,
        layers=family.layers,
        mha=names(family.mha),
        mlp=names(family.mlp),
    )
