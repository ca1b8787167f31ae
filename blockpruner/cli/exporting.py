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
from blockpruner.cli.pruning import Place, own_dtype, read_plan
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
from blockpruner.methods.healed import Healed, kept_facts
from blockpruner.methods.registry import KINDS
from blockpruner.model.classes import has_our_code, model_class
from blockpruner.model.models import load_model
from blockpruner.store.files import require_free, write_json
from blockpruner.store.manifest import CARD_FILE, SOURCE_FILE, require_verified
from blockpruner.store.plans import plan_fields

PRUNED = (
    "auto_map",
    "architectures",
    "layers_without_mha",
    "layers_without_mlp",
    "layer_types",
    "no_rope_layers",
)
"""Fields of a pruned model's config that its dense model has not, or has otherwise."""

BASE = re.compile(r"^`(.+?)` ", re.MULTILINE)
"""The base, in a card of ours."""


def export(folder: Path, place: Place) -> dict[str, Any]:
    """Write the place's formats at FOLDER-FORMAT, of a checkpoint as it was verified."""
    plan = read_plan(folder)[1]
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{folder} is no hf checkpoint; give the one that it was made of", rule="no-format"
        )
    config = read_fields(folder)
    require_verified(folder)
    family, dtype = str(config["model_type"]).removesuffix("_blockpruned"), own_dtype(config)
    forms = place.checked_formats()
    places = {form: folder.with_name(f"{folder.name}-{form}") for form in forms if form != "hf"}
    if not places:
        raise InputError(
            f"{folder} is the hf checkpoint itself; name other formats: nas, mlx, gguf",
            rule="no-format",
        )
    require_packages(list(places))
    require_exports(list(places), KINDS[plan.kind], dtype)
    require_families(list(places), config)
    for path in places.values():
        require_free(path)
    # formats know our own classes, not those of the file beside the weights
    if has_our_code(folder):
        model = (
            model_class(FAMILIES[family])
            .from_pretrained(folder, dtype=getattr(torch, dtype))
            .eval()
        )
    else:
        model = load_model(folder, dtype, "cpu")
    with TemporaryDirectory() as directory:
        dense = Path(directory)
        own = {name: value for name, value in config.items() if name not in PRUNED}
        write_json(
            dense / "config.json", own | {"model_type": family, "num_hidden_layers": plan.layers}
        )
        copy_files(folder, dense, (*TOKENIZER_FILES, GENERATION_FILE, *LICENCE_FILES))
        healed = _stand_in(folder, dense)
        made = Made(dense, plan, CalibrationSet(()), dtype, "cpu", healed=healed, model=model)
        pipeline.export(made, places, forms)
    told = {"plan": plan_fields(plan), "taken_out": KINDS[plan.kind].taken_out(plan)}
    return told | {"written": [pipeline.exported(*each) for each in places.items()]}


def _stand_in(folder: Path, dense: Path) -> Healed | None:
    """Write what a card names of the base; returns what the checkpoint keeps of its healing."""
    card = folder / CARD_FILE
    front = card_fields(folder)
    found = BASE.search(card.read_text(encoding="utf-8")) if card.exists() else None
    base = front.get("base_model") or (found[1] if found else folder.name)
    if not isinstance(base, str):
        raise InputError(
            f"{card}: base_model is {base!r}; valid: one name", rule="settings", value=base
        )
    source = (
        {"source": "hub", "repo": base}
        if "base_model" in front
        else {"source": "path", "path": base}
    )
    write_json(dense / SOURCE_FILE, {"source": source, "licence": licence_beside(folder)})
    return kept_facts(folder)
