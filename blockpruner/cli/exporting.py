"""`blockpruner export`: other formats of a finished checkpoint, without the dense model.

Decides what stands in for the dense model: the checkpoint's own config, tokenizer, licence and
card.
"""

import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from blockpruner import pipeline
from blockpruner.checkpoints.registry import require_exports, require_families, require_packages
from blockpruner.cli.pruning import Command, checkpoint_facts, own_dtype, read_plan
from blockpruner.core.errors import InputError
from blockpruner.core.families import FAMILIES
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.inputs.checkpoints import (
    GENERATION_FILE,
    LICENCE_FILES,
    TOKENIZER_FILES,
    card_fields,
    copy_files,
    licence_beside,
    read_fields,
)
from blockpruner.methods.apply import Made
from blockpruner.methods.healed import kept_facts
from blockpruner.methods.registry import KINDS
from blockpruner.model.classes import has_our_code, model_class
from blockpruner.model.models import load_model
from blockpruner.store.files import require_free, write_json
from blockpruner.store.manifest import CARD_FILE, SOURCE_FILE, require_verified

PRUNED = (
    "auto_map",
    "architectures",
    "layers_without_mha",
    "layers_without_mlp",
    "layer_types",
    "no_rope_layers",
)
"""Fields of a pruned model's config that are absent from its dense model's, or differ."""

BASE = re.compile(r"^`(.+?)` ", re.MULTILINE)
"""The base model in a card of ours."""


def export(folder: Path, command: Command) -> dict[str, Any]:
    """Write the workspace's formats at FOLDER-FORMAT, of a checkpoint as it was verified; returns
    what `--json` prints."""
    plan = read_plan(folder)[1]
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{folder} is no hf checkpoint; give the one that it was made of", rule="no-format"
        )
    config = read_fields(folder)
    require_verified(folder)
    command.require_formats()
    formats = [form for form in command.formats if form != "hf"]
    folders = {form: folder.with_name(f"{folder.name}-{form}") for form in formats}
    if not folders:
        raise InputError(
            f"{folder} is the hf checkpoint itself; name other formats: nas, mlx, gguf",
            rule="no-format",
        )
    dtype = own_dtype(config)
    require_packages(formats)
    require_exports(formats, KINDS[plan.kind], dtype)
    require_families(formats, config)
    for path in folders.values():
        require_free(path)
    family = str(config["model_type"]).removesuffix("_blockpruned")
    # Exports know our own classes, and not their copy in the file next to the weights.
    if has_our_code(folder):
        our_class = model_class(FAMILIES[family])
        model = our_class.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    else:
        model = load_model(folder, dtype, "cpu")
    with TemporaryDirectory() as directory:
        dense = Path(directory)
        dense_config = {name: value for name, value in config.items() if name not in PRUNED}
        dense_config |= {"model_type": family, "num_hidden_layers": plan.layers}
        write_json(dense / "config.json", dense_config)
        copy_files(folder, dense, (*TOKENIZER_FILES, GENERATION_FILE, *LICENCE_FILES))
        _write_source(folder, dense)
        finished = Made(
            dense,
            plan,
            CalibrationSet(()),
            dtype,
            "cpu",
            healed=kept_facts(folder),
            model=model,
        )
        pipeline.export(finished, folders, command.formats)
    return checkpoint_facts(plan, folders)


def _write_source(folder: Path, dense: Path) -> None:
    """Write the base model and its licence, as the checkpoint's card names them, where an export
    looks for those of a dense model."""
    card = folder / CARD_FILE
    front = card_fields(folder)
    if "base_model" in front:
        # Cards name a base of the hub in their front matter, and a folder in their text alone.
        base = front["base_model"]
        source = {"source": "hub", "repo": base}
    else:
        match = BASE.search(card.read_text(encoding="utf-8")) if card.exists() else None
        base = match[1] if match else folder.name
        source = {"source": "path", "path": base}
    if not isinstance(base, str):
        raise InputError(
            f"{card}: base_model is {base!r}; valid: one name", rule="settings", value=base
        )
    write_json(dense / SOURCE_FILE, {"source": source, "licence": licence_beside(folder)})
