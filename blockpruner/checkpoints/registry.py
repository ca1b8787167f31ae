"""Checkpoint formats: EXPORTS, one row each. Every export verifies what it wrote."""

import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, cast

from blockpruner.core.errors import InputError, missing
from blockpruner.core.families import FAMILIES, Config
from blockpruner.core.registry import Registry
from blockpruner.methods.kind import Kind
from blockpruner.store.files import read_json

if TYPE_CHECKING:
    from blockpruner.methods.apply import Pruning


Writer = Callable[["Pruning", Path], None]
"""Writes a pruned model, with its healed weights, as a verified directory. It raises InputError and
writes nothing if the format cannot hold the model or its engine does not reproduce it."""


@dataclass(frozen=True)
class Export:
    name: str
    """As in `export` of a run file, and the name of its folder."""
    title: str
    engines: tuple[str, ...]
    """What loads it."""
    writer: str | Writer
    """Text, "module:function", is imported when it is first used."""
    dtypes: tuple[str, ...] | None = None
    """The values of `model.dtype` that it can hold; None: all."""
    families: tuple[str, ...] | None = None
    """The values of `model_type` that it can hold; None: all."""
    commands: tuple[str, ...] = ()
    """How to start its engines, in their order; {path} is the checkpoint's folder."""
    package: str = ""
    """The package that its writer imports and only the extra of the same name installs."""

    @property
    def write(self) -> Writer:
        # A name keeps the engine's package from being imported before it is used.
        if isinstance(self.writer, str):
            return cast(Writer, pkgutil.resolve_name(self.writer))
        return self.writer


def require_exports(names: Sequence[str], kind: Kind, dtype: str) -> None:
    """Raise InputError for formats that are unknown, or do not fit the kind of method or the dtype
    of a run."""
    for name in names:
        row = EXPORTS[name]
        if not _holds(row, kind):
            valid = [export.name for export in EXPORTS.values() if _holds(export, kind)]
            raise InputError(
                f"export: {name} cannot hold what {kind.title} makes of a model; valid with it:"
                f" {', '.join(valid)}"
            )
        if row.dtypes is not None and dtype not in row.dtypes:
            raise InputError(
                f"export: {name} has no model.dtype: {dtype}; set {' or '.join(row.dtypes)}, or"
                f" leave {name} out"
            )


def require_families(names: Sequence[str], config: Config) -> None:
    """Raise InputError for a format that cannot hold models of a family or window, before anything
    is computed."""
    model_type = str(config["model_type"]).removesuffix("_blockpruned")
    window = None
    if config.get("use_sliding_window", True):
        window = config.get("sliding_window")
    for name in names:
        row = EXPORTS[name]
        if row.families is not None and model_type not in row.families:
            raise InputError(
                f"export: {row.name} ({', '.join(row.engines)}) has no {model_type} models that"
                f" lack blocks; it has {', '.join(row.families)}; {_alternative(row, model_type)}"
            )
        # mlx-lm has windows of its own for some families: the export checks them.
        if row.families == READABLE and window is not None:
            raise InputError(
                f"export: {row.name} has no models with a sliding window (here {window}); leave"
                " it out"
            )


def _alternative(row: Export, model_type: str) -> str:
    """The fix for a format that cannot hold a family."""
    for candidate in EXPORTS.values():
        common = [engine for engine in row.engines if engine in candidate.engines]
        if common and model_type in (candidate.families or ()):
            return f"for {common[0]} name {candidate.name}"
    return "leave it out (docs/serving.md says what other engines load)"


def engines_of(form: str, model: Path) -> tuple[str, ...]:
    """The engines that load a format of the model of a folder, pruned or dense. Of the `hf` format
    vLLM lacks some families, and SliceGPT's models."""
    config_path = model / "config.json"
    model_type = ""
    if config_path.exists():
        model_type = str(read_json(config_path).get("model_type")).removesuffix("_blockpruned")
    # SliceGPT's models, and folders without a config, are of no family.
    family = FAMILIES.get(model_type)
    is_unsupported = family is not None and not family.in_vllm
    engines = EXPORTS[form].engines
    if is_unsupported or model_type.endswith("_slicegpt"):
        return tuple(name for name in engines if name != "vLLM")
    return engines


def require_packages(names: Sequence[str]) -> None:
    """Raise MissingPackageError for a format whose package is not installed, before a search takes
    hours."""
    for name in names:
        package = EXPORTS[name].package
        if package and find_spec(package) is None:
            raise missing(package, package)


def _holds(row: Export, kind: Kind) -> bool:
    return kind.exports is None or row.name in kind.exports


PACKAGE = "blockpruner.checkpoints."
NARROW = ("float32", "float16", "bfloat16")
"""The dtypes of mlx."""

READABLE = ("llama", "mistral", "qwen2")
"""Families that mlx-lm and llama.cpp read in the format of DeciLM, whose layers may lack blocks."""

MLX = (
    *READABLE,
    "qwen3",
    "phi3",
    "gemma3_text",
    "olmo2",
    "exaone4",
    "smollm3",
    "seed_oss",
    "ernie4_5",
    "hunyuan_v1_dense",
    "ministral3",
    "glm4",
    "granite",
    "cohere2",
)
"""Families that mlx-lm computes as transformers does, blocks removed or not."""

WINDOWED = ("gemma3_text", "exaone4", "cohere2", "ministral3")
"""The families of `MLX` whose sliding windows mlx-lm computes."""

QUANTIZER = "llama-quantize"
"""llama.cpp's program, which no Python package contains."""

EXPORTS: Registry[Export] = Registry(
    "export",
    Export,
    [
        Export(
            "hf",
            "transformers checkpoint",
            ("transformers", "vLLM"),
            PACKAGE + "hf:export_hf",
            commands=("blockpruner chat {path}", "vllm serve {path} --host 127.0.0.1 --port 8000"),
        ),
        Export(
            "nas",
            "DeciLM checkpoint",
            ("vLLM without our plugin", "mlx-lm"),
            PACKAGE + "nas:export_nas",
            NARROW,
            READABLE,
            commands=(
                "vllm serve {path} --trust-remote-code --host 127.0.0.1 --port 8000",
                "mlx_lm.server --model {path} --host 127.0.0.1 --port 8080",
            ),
        ),
        Export(
            "mlx",
            "checkpoint for mlx-lm",
            ("mlx-lm",),
            PACKAGE + "mlx:export_mlx",
            NARROW,
            MLX,
            commands=(
                "mlx_lm.server --model {path} --trust-remote-code --host 127.0.0.1 --port 8080",
            ),
        ),
        Export(
            "gguf",
            "GGUF files in 16 and 8 bits",
            ("llama.cpp",),
            PACKAGE + "gguf:export_gguf",
            families=READABLE,
            commands=("llama-server -m {path}/model-Q8_0.gguf --port 8080",),
            package="gguf",
        ),
    ],
)
