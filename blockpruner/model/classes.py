"""The block-pruned classes of a family: transformers' own classes with holes in them; and whose
code a checkpoint has.

`modeling_blockpruned.py` makes the classes of every family of ours and ships inside checkpoints. A
family that another package adds needs no code of its own: the line that adds it is written behind a
copy of that file, from its row.
"""

import atexit
import importlib.util
import shutil
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM

from blockpruner.core.errors import InputError
from blockpruner.core.families import FAMILIES, Family
from blockpruner.model import configuration_decilm, modeling_blockpruned, modeling_slicegpt
from blockpruner.store.files import read_json
from blockpruner.store.provenance import file_sha256

OUR_MODULES = ("modeling_blockpruned", "modeling_slicegpt")
"""The modules that ship inside checkpoints."""

MLX_CODE = Path(modeling_blockpruned.__file__).with_name("mlx_blockpruned.py")
"""What mlx-lm runs of an `mlx` export; its config.json names it as `model_file`."""

ENTRIES = ("AutoConfig", *(auto.__name__ for auto in modeling_blockpruned.AUTO_CLASSES))
"""The keys of `auto_map` in our checkpoints."""

ADDED = """

from transformers import {prefix}Config  # noqa: E402

add_family({prefix}Config, "{prefix}", ({mha!r}, {mlp!r}), "{layers}")
"""


for _prefix in ("Llama", "Mistral", "Qwen2", "Qwen3"):
    AutoModelForCausalLM.register(
        *(
            getattr(modeling_slicegpt, f"{_prefix}SliceGPT{part}")
            for part in ("Config", "ForCausalLM")
        )
    )

# transformers has no class for Baichuan 13B. The model is registered for our config class alone,
# and that for no name.
AutoModelForCausalLM.register(
    modeling_blockpruned.BaichuanConfig, modeling_blockpruned.BaichuanForCausalLM
)


def read_config(directory: Path, trust_remote_code: bool = False) -> Any:
    """The config of a checkpoint directory; by our own class where transformers has none of the
    family."""
    own = (
        read_json(directory / "config.json").get("model_type")
        == modeling_blockpruned.BaichuanConfig.model_type
    )
    reader = modeling_blockpruned.BaichuanConfig if own else AutoConfig
    return reader.from_pretrained(
        directory, local_files_only=True, trust_remote_code=trust_remote_code
    )


def own_config_class(model_type: str) -> type[Any]:
    """The config class of a type of `known`."""
    name, _, kind = model_type.rpartition("_")
    family = FAMILIES[name]
    sliced: type[Any] | None = getattr(modeling_slicegpt, f"{family.prefix}SliceGPTConfig", None)
    pruned: type[Any] = model_class(family).config_class
    return sliced if kind == "slicegpt" and sliced else pruned


def model_class(family: Family) -> type[Any]:
    """The causal LM class of the family's block-pruned models."""
    found: type[Any] = getattr(_module(family.model_type), f"{family.prefix}BlockPrunedForCausalLM")
    return found


def has_our_code(directory: Path) -> bool:
    """Whether an export needs code to be loaded. That is then ours, byte for byte, and nothing else
    would run; raises InputError for an export that holds or names other code than one file of the
    installed package."""
    path = directory / "config.json"
    config = read_json(path) if path.exists() else {}
    asked, found = (
        config.get("auto_map"),
        sorted(each.relative_to(directory) for each in directory.rglob("*.py")),
    )
    if not asked and not found:
        return False
    is_mlx = (
        config.get("model_file") == MLX_CODE.name and not asked and found == [Path(MLX_CODE.name)]
    )
    if is_mlx and file_sha256(directory / MLX_CODE.name) == file_sha256(MLX_CODE):
        return True
    family = str(config.get("model_type", "")).removesuffix("_blockpruned")
    ours = [Path(str(module.__file__)) for module in (modeling_slicegpt, configuration_decilm)]
    if family in FAMILIES:
        ours.append(Path(str(_module(family).__file__)))
    for file in ours:
        names_it = isinstance(asked, dict) and all(
            str(text).rpartition(".")[0] == file.stem and entry in ENTRIES
            for entry, text in asked.items()
        )
        is_it = found == [Path(file.name)] and file_sha256(directory / file.name) == file_sha256(
            file
        )
        if names_it and is_it:
            return True
    raise InputError(
        f"{directory} holds or names code that is not the installed blockpruner's"
        f" ({asked or found[0]}), and it is not run; export it again with this version (its stage"
        " materialize)"
    )


@cache
def _module(model_type: str) -> Any:
    """The module that holds a family's classes."""
    family = FAMILIES[model_type]
    if hasattr(modeling_blockpruned, f"{family.prefix}BlockPrunedConfig"):
        return modeling_blockpruned
    folder = Path(tempfile.mkdtemp(prefix="blockpruner-family-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = folder / "modeling_blockpruned.py"
    mha, mlp = ((branch.module, *branch.norms) for branch in (family.mha, family.mlp))
    added = ADDED.format(prefix=family.prefix, layers=family.layers, mha=mha, mlp=mlp)
    path.write_text(
        Path(modeling_blockpruned.__file__).read_text(encoding="utf-8") + added, encoding="utf-8"
    )
    name = (  # its last part names the file in a checkpoint
        f"{__name__}.{model_type}.modeling_blockpruned"
    )
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
