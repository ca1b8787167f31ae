"""The `hf` export: a directory that `AutoModelForCausalLM.from_pretrained(...,
trust_remote_code=True)` loads.

Decides what lies in it: safetensors without the removed weights, config with `auto_map`, the
modelling file, the base model's tokenizer, chat template, generation config and licence, a model
card, and `verification.json`, the report of a fresh process that compared it with the masked dense
model. A directory that failed does not exist. Of all code, only our modelling file may lie in it.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import PreTrainedModel

from blockpruner.checkpoints.card import model_card
from blockpruner.checkpoints.verification import reference_outputs, tolerance_of, write_verified
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

MORE = (*TOKENIZER_FILES, GENERATION_FILE)

COUNTED = """
Its layers attend in more than one way, in another order than the base model's. transformers and
vLLM read the order in `config.json`. llama.cpp, and mlx-lm for some families, count layers instead,
and would compute another model.
"""


def export_hf(pruning: Pruning, out: Path) -> None:
    plan = pruning.plan

    def write(directory: Path, reference: Path) -> float:
        model = pruning.load_for_export()  # gone when the fresh process loads its own
        pruned = pruning.prune_(
            model, lambda reduced: save_file(reference_outputs(reduced.cpu(), plan), reference)
        )
        save_pruned(pruned, directory)
        save_other_files(
            pruning, directory, "hf", module=code_file(pruned), note=remark(pruned, pruning.dense)
        )
        return tolerance_of(model)

    write_verified(out, write)


def remark(pruned: PreTrainedModel, dense: Path) -> str:
    """What a plain checkpoint's card must say of engines that know its family."""
    if code_file(pruned) is not None:
        return ""
    configs = (pruned.config, read_config(dense))
    for field in ("layer_types", "no_rope_layers"):
        left, before = (getattr(config, field, None) or [] for config in configs)
        if left != before[: len(left)]:
            return COUNTED
    return ""


def save_other_files(
    pruning: Pruning, directory: Path, form: str, more: Sequence[str] = MORE, **told: Any
) -> None:
    """The card of a checkpoint (`told`: what else `model_card` takes), its plan, and files of the
    dense model, without code: licence and `more`."""
    copy_files(pruning.dense, directory, (*more, *LICENCE_FILES))
    write_text(
        directory / CARD_FILE,
        model_card(pruning.plan, pruning.dense, form, healed=pruning.healed, **told),
    )
    save_plan(pruning.plan, directory / PLAN_FILE)
    if (healed := pruning.healed) is not None:
        kept = {"words": healed.words, "datasets": healed.datasets, "perplexity": healed.perplexity}
        write_json(directory / HEALED_FILE, kept)


def save_pruned(model: PreTrainedModel, directory: Path) -> None:
    """Save a pruned model in a directory that is being made. If its class is ours, its modelling
    file is saved too, and `auto_map` names it. Other code, and `auto_map` of others, is left
    out."""
    code = code_file(model)
    kinds = {type(model): "AutoModelForCausalLM", type(model.config): "AutoConfig"} if code else {}
    with without_bars(), ExitStack() as stack:
        for kind, entry in kinds.items():
            # another save of the class asks for no code
            stack.callback(setattr, kind, "_auto_class", kind._auto_class)
            kind.register_for_auto_class(entry)
        model.save_pretrained(directory, max_shard_size="5GB")
    drop_code_(directory, code)
    config = read_json(directory / "config.json")
    own = {FORMAT_KEY: FORMAT} if code else {}
    write_json(directory / "config.json", config | _for_older_readers(config) | own)
    let_others_read(directory)
    assert not code or (directory / code).exists()


def _for_older_readers(config: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_parameters` by the names that configs had before transformers 5, which mlx-lm still
    reads: without them it takes its own base, and computes something else."""
    rotary = config.get("rope_parameters") or {}
    local = rotary.get("sliding_attention", {})
    rotary = rotary.get("full_attention", rotary)
    old = {"rope_local_base_freq": local["rope_theta"]} if local else {}
    if rotary.get("rope_type", "default") != "default":
        old["rope_scaling"] = {key: value for key, value in rotary.items() if key != "rope_theta"}
    return old | {
        key: rotary[key] for key in ("rope_theta", "partial_rotary_factor") if key in rotary
    }


def code_file(model: PreTrainedModel) -> str | None:
    """The modelling file that the model's checkpoint needs; None for a class that is not ours."""
    module = type(model).__module__.rpartition(".")[2]
    return f"{module}.py" if module in OUR_MODULES else None
