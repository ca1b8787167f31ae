"""The `hf` export: a directory that `AutoModelForCausalLM.from_pretrained(...,
trust_remote_code=True)` loads.

Decides what lies in it: safetensors without the removed weights, config with `auto_map`, the
modelling file, the base model's tokenizer, chat template, generation config and licence, a model
card, and `verification.json`, the report of a fresh process that compared it with the masked dense
model. A directory that failed does not exist. Of all code, only our modelling file may lie in it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from blockpruner.checkpoints.card import model_card
from blockpruner.checkpoints.verification import load_pruned, tolerance_of, write_verified
from blockpruner.inputs.checkpoints import (
    GENERATION_FILE,
    LICENCE_FILES,
    TOKENIZER_FILES,
    copy_files,
    drop_code_,
)
from blockpruner.methods.apply import Pruning
from blockpruner.methods.healed import HEALED_FILE
from blockpruner.model.classes import OUR_MODULES, read_config
from blockpruner.model.known import FORMAT, FORMAT_KEY
from blockpruner.model.models import without_bars
from blockpruner.store.files import let_others_read, read_json, write_json, write_text
from blockpruner.store.manifest import CARD_FILE
from blockpruner.store.plans import PLAN_FILE, save_plan

DENSE_FILES = (*TOKENIZER_FILES, GENERATION_FILE)
"""Patterns of the dense model's files that a checkpoint takes over."""

COUNTED = """
Its layers attend in more than one way, in another order than the base model's. transformers and
vLLM read the order in `config.json`. llama.cpp, and mlx-lm for some families, count layers instead,
and would compute another model.
"""


def export_hf(pruning: Pruning, out: Path) -> None:
    def write(directory: Path, reference: Path) -> float:
        # The model is gone when the fresh process loads its own.
        pruned = load_pruned(pruning, reference)
        save_pruned(pruned, directory)
        module = code_file(pruned)
        note = remark(pruned, pruning.dense)
        save_other_files(pruning, directory, "hf", module=module, note=note)
        return tolerance_of(pruned)

    write_verified(out, write)


def remark(pruned: PreTrainedModel, dense: Path) -> str:
    """The warning in a plain checkpoint's card for engines that know its family."""
    if code_file(pruned) is not None:
        return ""
    dense_config = read_config(dense)
    for field in ("layer_types", "no_rope_layers"):
        kinds = getattr(pruned.config, field, None) or []
        dense_kinds = getattr(dense_config, field, None) or []
        if kinds != dense_kinds[: len(kinds)]:
            return COUNTED
    return ""


def save_other_files(
    pruning: Pruning,
    directory: Path,
    form: str,
    patterns: Sequence[str] = DENSE_FILES,
    **card_options: Any,
) -> None:
    """The card of a checkpoint (`card_options`: as `model_card` takes them), its plan, and files of
    the dense model, without code: the licence, and those of `patterns`."""
    copy_files(pruning.dense, directory, (*patterns, *LICENCE_FILES))
    healed = pruning.healed
    card = model_card(pruning.plan, pruning.dense, form, healed=healed, **card_options)
    write_text(directory / CARD_FILE, card)
    save_plan(pruning.plan, directory / PLAN_FILE)
    if healed is not None:
        facts = {
            "words": healed.words,
            "datasets": healed.datasets,
            "perplexity": healed.perplexity,
        }
        write_json(directory / HEALED_FILE, facts)


def save_pruned(model: PreTrainedModel, directory: Path) -> None:
    """Save a pruned model in a directory that is being made. If its class is ours, its modelling
    file is saved too, and `auto_map` names it. Other code, and `auto_map` of others, is left
    out."""
    code = code_file(model)
    with without_bars(), ExitStack() as stack:
        if code is not None:
            stack.enter_context(_registered(type(model), "AutoModelForCausalLM"))
            stack.enter_context(_registered(type(model.config), "AutoConfig"))
        model.save_pretrained(directory, max_shard_size="5GB")
    drop_code_(directory, code)
    config = read_json(directory / "config.json")
    config |= _rope_fields_before_v5(config)
    if code is not None:
        config[FORMAT_KEY] = FORMAT
        assert (directory / code).exists()
    write_json(directory / "config.json", config)
    let_others_read(directory)


@contextmanager
def _registered(kind: Any, auto_class: str) -> Iterator[None]:
    """Within, transformers saves the code of a class; later saves of the class are without it."""
    previous = kind._auto_class
    kind.register_for_auto_class(auto_class)
    try:
        yield
    finally:
        kind._auto_class = previous


def _rope_fields_before_v5(config: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_parameters` by the names that configs had before transformers 5. mlx-lm still reads
    those: without them it takes its own base, and computes something else."""
    rope = config.get("rope_parameters") or {}
    fields: dict[str, Any] = {}
    # Gemma 3 has one rotation for each kind of attention.
    if rope.get("sliding_attention"):
        fields["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    rope = rope.get("full_attention", rope)
    if rope.get("rope_type", "default") != "default":
        scaling = dict(rope)
        scaling.pop("rope_theta", None)
        fields["rope_scaling"] = scaling
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in rope:
            fields[key] = rope[key]
    return fields


def code_file(model: PreTrainedModel) -> str | None:
    """The modelling file that the model's checkpoint needs; None for a class that is not ours."""
    module = type(model).__module__.rpartition(".")[2]
    return f"{module}.py" if module in OUR_MODULES else None
