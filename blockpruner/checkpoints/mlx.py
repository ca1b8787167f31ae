"""The `mlx` export: the weights of the `hf` export for mlx-lm, which runs its own model of the
family without the removed blocks.

Decides which models mlx-lm computes as transformers does. The folder holds `mlx_blockpruned.py`,
which mlx-lm runs with `--trust-remote-code`.
"""

import shutil
from pathlib import Path

import torch

from blockpruner.checkpoints import verify_mlx
from blockpruner.checkpoints.hf import code_file, remark, save_other_files, save_pruned
from blockpruner.checkpoints.nas import TOLERANCE, TOLERANCE_ROUNDED
from blockpruner.checkpoints.packing import Limits, require_fit
from blockpruner.checkpoints.registry import MLX, WINDOWED
from blockpruner.checkpoints.verification import load_pruned, write_verified
from blockpruner.core.errors import InputError
from blockpruner.methods.apply import Pruning
from blockpruner.model.classes import MLX_CODE, read_config
from blockpruner.store.files import read_json, write_json

LOADING = """The weights are those of the `hf` export, for mlx-lm:

```sh
mlx_lm.generate --model <this directory>{} --prompt "..."
```
"""
TRUSTED = """
`--trust-remote-code` runs the file `mlx_blockpruned.py` beside this card and no other.
"""

ROTATED = ("ministral3", "hunyuan_v1_dense")
"""Families with a rotary scaling of their own, which mlx-lm computes, too."""


def export_mlx(pruning: Pruning, out: Path) -> None:
    config = read_config(pruning.dense, pruning.trust_remote_code).to_dict()
    model_type = config["model_type"]
    window = config.get("sliding_window")
    # A window as long as the context does nothing.
    if model_type in WINDOWED or (window or 0) >= config["max_position_embeddings"]:
        window = None
    # mlx-lm has the activation of each family itself.
    limits: Limits = {
        "model_type": (model_type, MLX),
        "sliding_window": (window, (None,)),
        "hidden_act": (None, (None,)),
    }
    if model_type in ROTATED:
        limits["rope_type"] = (None, (None,))
    require_fit("mlx", config, pruning.plan, **limits)

    def write(directory: Path, reference: Path) -> float:
        pruned = load_pruned(pruning, reference)
        if remark(pruned, pruning.dense):
            raise InputError(
                "export mlx: the layers that are left attend in another order than mlx-lm counts;"
                " leave mlx out",
                rule="export-limits",
                key="export",
                value="mlx",
            )
        save_pruned(pruned, directory)
        loading = LOADING.format("")
        if code_file(pruned) is not None:
            _replace_code(directory)
            loading = LOADING.format(" --trust-remote-code") + TRUSTED
        save_other_files(pruning, directory, "mlx", loading=loading)
        # mlx-lm rounds the factor of Gemma's embedding to bfloat16, as a bfloat16 model does,
        # whatever the dtype.
        scale = torch.tensor(float(config["hidden_size"])).sqrt()
        is_rounded = model_type == "gemma3_text" and scale.bfloat16() != scale
        return TOLERANCE_ROUNDED if is_rounded else TOLERANCE

    write_verified(out, write, verify_mlx)


def _replace_code(directory: Path) -> None:
    """Put mlx-lm's modelling file in place of that of transformers."""
    for path in directory.glob("*.py"):
        path.unlink()
    shutil.copyfile(MLX_CODE, directory / MLX_CODE.name)
    config = read_json(directory / "config.json")
    del config["auto_map"]
    write_json(directory / "config.json", config | {"model_file": MLX_CODE.name})
