"""Checkpoint formats: EXPORTS, one row each. Every export verifies what it wrote."""

import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from blockpruner.core.errors import InputError, missing
from blockpruner.core.families import FAMILIES, Config
from blockpruner.core.registry import Registry
from blockpruner.methods.kind import Kind
from blockpruner.store.files import read_json

if TYPE_CHECKING:
    from blockpruner.methods.apply import Pruning


Writer = Callable[["Pruning", Path], None]
"""Writes a pruned model, with its healed weights, as a directory at a path, verified. It raises
InputError, and leaves nothing there, where the format cannot hold the model or its engine does not
reproduce it."""


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
    """What its writer imports and only an extra installs, which has the same name; "" for
    nothing."""

    @property
    def write(self) -> Writer:
        found: Writer = (
            pkgutil.resolve_name(self.writer) if isinstance(self.writer, str) else self.writer
        )
        return found


def require_exports(names: Sequence[str], kind: Kind, dtype: str) -> None:
    """Raise InputError for formats that are unknown, or do not fit the kind of method or the dtype
    of a run."""
    for name in names:
        row = EXPORTS[name]
        if not _holds(row, kind):
            valid = ", ".join(other.name for other in EXPORTS.values() if _holds(other, kind))
            raise InputError(
                f"export: {name} cannot hold what {kind.title} makes of a model; valid with it:"
                f" {valid}"
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
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    for row in map(EXPORTS.__getitem__, names):
        if row.families is not None and model_type not in row.families:
            raise InputError(
                f"export: {row.name} ({', '.join(row.engines)}) has no {model_type} models that"
                f" lack blocks; it has {', '.join(row.families)}; {_others(row, model_type)}"
            )
        if row.families == READABLE and window is not None:
            raise InputError(
                f"export: {row.name} has no models with a sliding window (here {window}); leave"
                " it out"
            )


def _others(row: Export, model_type: str) -> str:
    """What to do about a format that cannot hold a family."""
    for other in EXPORTS.values():
        common = [engine for engine in row.engines if engine in other.engines]
        if other.families is not None and model_type in other.families and common:
            return f"for {common[0]} name {other.name}"
    return "leave it out (docs/serving.md says what other engines load)"


def engines_of(form: str, model: Path) -> tuple[str, ...]:
    """The engines that load a format of the model of a folder, its own or the dense model's. Of the
    `hf` format vLLM lacks some families, and SliceGPT's models."""
    row, path = EXPORTS[form], model / "config.json"
    base = (
        str(read_json(path).get("model_type")).removesuffix("_blockpruned") if path.exists() else ""
    )
    is_unknown = base.endswith("_slicegpt") or (base in FAMILIES and not FAMILIES[base].in_vllm)
    return tuple(name for name in row.engines if name != "vLLM" or not is_unknown)


def require_packages(names: Sequence[str]) -> None:
    """Raise MissingPackageError for a format that cannot be written here, before a search takes
    hours."""
    for package in filter(None, (EXPORTS[name].package for name in names)):
        if find_spec(package) is None:
            raise missing(package, package)


def _holds(row: Export, kind: Kind) -> bool:
    return kind.exports is None or row.name in kind.exports


HERE, NARROW = "blockpruner.checkpoints.", ("float32", "float16", "bfloat16")
READABLE = ("llama", "mistral", "qwen2")
"""Families that readers of DeciLM know, in which a layer may lack blocks: mlx-lm and llama.cpp."""

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
"""Those of whose sliding windows it knows."""

QUANTIZER = "llama-quantize"
"""llama.cpp's program, which no Python package brings along."""

EXPORTS: Registry[Export] = Registry(
    "export",
    Export,
    [
        Export(
            "hf",
            "transformers checkpoint",
            ("transformers", "vLLM"),
            HERE + "hf:export_hf",
            commands=("blockpruner chat {path}", "vllm serve {path} --host 127.0.0.1 --port 8000"),
        ),
        Export(
            "nas",
            "DeciLM checkpoint",
            ("vLLM without our plugin", "mlx-lm"),
            HERE + "nas:export_nas",
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
            HERE + "mlx:export_mlx",
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
            HERE + "gguf:export_gguf",
            families=READABLE,
            commands=("llama-server -m {path}/model-Q8_0.gguf --port 8080",),
            package="gguf",
        ),
    ],
)
