"""The `mlx` export: the weights of the `hf` export for mlx-lm, whose own model of the family runs
with holes.

Decides which models mlx-lm computes as transformers does. The folder holds `mlx_blockpruned.py`,
which mlx-lm runs with `--trust-remote-code`.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from blockpruner.checkpoints import verify_mlx
from blockpruner.checkpoints.hf import code_file, remark, save_other_files, save_pruned
from blockpruner.checkpoints.nas import TOLERANCE, TOLERANCE_ROUNDED
from blockpruner.checkpoints.packing import require_fit
from blockpruner.checkpoints.registry import MLX, WINDOWED
from blockpruner.checkpoints.verification import reference_outputs, write_verified
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
    kind, window = config["model_type"], config.get("sliding_window")
    if kind in WINDOWED or (window or 0) >= config["max_position_embeddings"]:
        window = None
    limits: dict[str, tuple[Any, Sequence[Any]]] = {
        "model_type": (kind, MLX),
        "sliding_window": (window, (None,)),
    }
    if kind in ROTATED:
        limits["rope_type"] = (None, (None,))
    require_fit("mlx", config, pruning.plan, **limits, hidden_act=(None, (None,)))

    def write(directory: Path, reference: Path) -> float:
        model = pruning.load_for_export()
        pruned = pruning.prune_(
            model, lambda reduced: save_file(reference_outputs(reduced, pruning.plan), reference)
        )
        if remark(pruned, pruning.dense):
            message = (
                "export mlx: the layers that are left attend in another order than mlx-lm counts;"
                " leave mlx out"
            )
            raise InputError(message, rule="export-limits", key="export", value="mlx")
        save_pruned(pruned, directory)
        loading = (
            LOADING.format("")
            if code_file(pruned) is None
            else LOADING.format(" --trust-remote-code") + TRUSTED
        )
        for path in directory.glob("*.py"):
            path.unlink()
            shutil.copyfile(MLX_CODE, directory / MLX_CODE.name)
            fields = read_json(directory / "config.json")
            del fields["auto_map"]
            write_json(directory / "config.json", fields | {"model_file": MLX_CODE.name})
        save_other_files(pruning, directory, "mlx", loading=loading)
        # mlx-lm rounds the factor of Gemma's embedding to bfloat16, as a bfloat16 model does,
        # whatever the dtype
        scale = torch.tensor(float(config["hidden_size"])).sqrt()
        is_rounded = kind == "gemma3_text" and scale.bfloat16() != scale
        return TOLERANCE_ROUNDED if is_rounded else TOLERANCE

    write_verified(out, write, verify_mlx)
