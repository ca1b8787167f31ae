"""The block-pruned classes of a family, which are transformers' own classes with holes in them, and
whose code a checkpoint has.

`modeling_blockpruned.py` makes the classes of every family of ours and ships inside checkpoints. A
family that another package adds needs no code of its own: the line that adds it is derived from its
row, and written after a copy of that file.
"""

import atexit
import importlib.util
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
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
"""The code that mlx-lm runs of an `mlx` export; its config.json names it as `model_file`."""

ENTRIES = ("AutoConfig", *(auto.__name__ for auto in modeling_blockpruned.AUTO_CLASSES))
"""The keys of `auto_map` in our checkpoints."""

ADDED_FAMILY = """

add_family("{prefix}", ({mha!r}, {mlp!r}), "{layers}")
"""

for _prefix in ("Llama", "Mistral", "Qwen2", "Qwen3"):
    AutoModelForCausalLM.register(
        getattr(modeling_slicegpt, f"{_prefix}SliceGPTConfig"),
        getattr(modeling_slicegpt, f"{_prefix}SliceGPTForCausalLM"),
    )

# transformers has no class for Baichuan 13B. The model is registered for our config class alone,
# and the config class for no model type.
AutoModelForCausalLM.register(
    modeling_blockpruned.BaichuanConfig, modeling_blockpruned.BaichuanForCausalLM
)


def read_config(directory: Path, trust_remote_code: bool = False) -> Any:
    """The config of a checkpoint directory, of our own class where transformers has none of the
    family."""
    config_class: Any = AutoConfig
    model_type = read_json(directory / "config.json").get("model_type")
    if model_type == modeling_blockpruned.BaichuanConfig.model_type:
        config_class = modeling_blockpruned.BaichuanConfig
    return config_class.from_pretrained(
        directory, local_files_only=True, trust_remote_code=trust_remote_code
    )


def own_config_class(model_type: str) -> type[Any]:
    """The config class of one of our model types (`known`)."""
    name, _, kind = model_type.rpartition("_")
    family = FAMILIES[name]
    if kind == "slicegpt":
        sliced: type[Any] | None = getattr(
            modeling_slicegpt, f"{family.prefix}SliceGPTConfig", None
        )
        if sliced is not None:
            return sliced
    pruned: type[Any] = model_class(family).config_class
    return pruned


def model_class(family: Family) -> type[Any]:
    """The causal LM class of the family's block-pruned models."""
    module = _module(family.model_type)
    pruned: type[Any] = getattr(module, f"{family.prefix}BlockPrunedForCausalLM")
    return pruned


def has_our_code(directory: Path) -> bool:
    """Whether an export needs code to be loaded, which is then ours, byte for byte.

    Raises InputError for an export that holds or names any code but one file of the installed
    package: no other code would run.
    """
    path = directory / "config.json"
    config = read_json(path) if path.exists() else {}
    auto_map = config.get("auto_map")
    code_files = sorted(code.relative_to(directory) for code in directory.rglob("*.py"))
    if not auto_map and not code_files:
        return False
    is_mlx = config.get("model_file") == MLX_CODE.name and not auto_map
    if is_mlx and _is_copy(directory, code_files, MLX_CODE):
        return True
    for module in _shipped_modules(config):
        source = Path(str(module.__file__))
        if _names_only(auto_map, source.stem) and _is_copy(directory, code_files, source):
            return True
    raise InputError(
        f"{directory} holds or names code that is not the installed blockpruner's"
        f" ({auto_map or code_files[0]}), and it is not run; export it again with this version (its"
        " stage materialize)"
    )


def _shipped_modules(config: Mapping[str, Any]) -> list[Any]:
    """The modules that a checkpoint with this config may hold."""
    modules = [modeling_slicegpt, configuration_decilm]
    family = str(config.get("model_type", "")).removesuffix("_blockpruned")
    if family in FAMILIES:
        modules.append(_module(family))
    return modules


def _names_only(auto_map: Any, module: str) -> bool:
    """Whether a config's `auto_map` has classes of this module alone, under keys that we write."""
    if not isinstance(auto_map, dict):
        return False
    for entry, path in auto_map.items():
        if entry not in ENTRIES or str(path).rpartition(".")[0] != module:
            return False
    return True


def _is_copy(directory: Path, code_files: Sequence[Path], source: Path) -> bool:
    """Whether a file of ours is all code of a checkpoint, byte for byte."""
    if code_files != [Path(source.name)]:
        return False
    return file_sha256(directory / source.name) == file_sha256(source)


@cache
def _module(model_type: str) -> Any:
    """The module that holds a family's classes."""
    family = FAMILIES[model_type]
    if hasattr(modeling_blockpruned, f"{family.prefix}BlockPrunedConfig"):
        return modeling_blockpruned
    # transformers copies the file of a class into its checkpoints, so this module needs a file.
    folder = Path(tempfile.mkdtemp(prefix="blockpruner-family-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = folder / "modeling_blockpruned.py"
    source = Path(modeling_blockpruned.__file__).read_text(encoding="utf-8")
    added_family = ADDED_FAMILY.format(
        prefix=family.prefix,
        layers=family.layers,
        mha=(family.mha.module, *family.mha.norms),
        mlp=(family.mlp.module, *family.mlp.norms),
    )
    path.write_text(source + added_family, encoding="utf-8")
    # The end of the module's name is the file's name in a checkpoint.
    name = f"{__name__}.{model_type}.modeling_blockpruned"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
