"""Healed weights: the tensors of a pruned model that are not what its plan alone makes of the dense
ones.

Decides how they are kept (one file, under the names of the pruned model's parameters), which model
they belong to, and how they get into it. How weights are healed is decided in `healing`.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blockpruner.core.errors import InputError
from blockpruner.core.plan import Plan
from blockpruner.core.settings import Hub, MixedTexts, Texts, read_settings
from blockpruner.methods.registry import KINDS
from blockpruner.model.models import replace_parameters_
from blockpruner.store.files import DIGEST, damaged, read_json
from blockpruner.store.manifest import COMPENSATE_FACTS, TRAIN_FACTS
from blockpruner.store.tensors import read_facts, read_tensors, tensor_bytes, write_tensors

FILE = "weights.safetensors"
HEALED_FILE = "blockpruner_healed.json"
"""What a checkpoint keeps of its healing: words, datasets and perplexity, as in `Healed`."""


@dataclass(frozen=True)
class Healed:
    """A file of healed weights."""

    path: Path
    of: str
    """The model that they belong to, as `Pruning.identity`."""
    words: str
    """What was done, as a clause of the model card."""
    datasets: tuple[str, ...]
    """Repositories of the hub whose texts decided the weights."""
    digest: str
    """The digest of the weights and of their description."""
    perplexity: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """By what was done: that of rows held out from it, `before` and `after`, and `dense` where it
    was measured."""
    kinds: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """By kind of text, where it was measured after the last step: as in a plan."""

    def plan(self, plan: Plan) -> Plan:
        """The plan with what was measured last."""
        return replace(plan, kinds=self.kinds) if self.kinds else plan


def kept_facts(checkpoint: Path) -> Healed | None:
    """What a checkpoint keeps of its healing, without the weights; raises InputError for other
    facts."""
    path = checkpoint / HEALED_FILE
    if not path.exists():
        return None
    return read_settings(
        Healed, {"path": path, "of": "", "digest": "", **read_json(path)}, f"{path}: "
    )


def save_healed(
    folder: Path,
    weights: Mapping[str, Tensor],
    of: str,
    words: str,
    data: Texts,
    since: Healed | None = None,
    perplexity: Mapping[str, Mapping[str, float]] | None = None,
    kinds: Mapping[str, Mapping[str, float]] | None = None,
) -> None:
    """Write the file of `weights` in `folder`; `of`, `words`, `perplexity` and `kinds` are as in
    `Healed`, `data` is the source of the texts that decided the weights, and `since` what had been
    done before."""
    datasets = list[str]()
    perplexities = dict(perplexity or {})
    # Training continues from compensated weights: the card names both steps.
    if since is not None:
        datasets += since.datasets
        words = f"{since.words}, {words}"
        perplexities = {**since.perplexity, **perplexities}
    sources = data.of if isinstance(data, MixedTexts) else (data,)
    for source in sources:
        # A model card can link data sets of the hub only.
        if isinstance(source, Hub):
            datasets.append(source.repo)
    # The header of a safetensors file holds texts only.
    facts = {
        "of": of,
        "words": words,
        "datasets": json.dumps(list(dict.fromkeys(datasets))),
        "perplexity": json.dumps(perplexities),
        "kinds": json.dumps(dict(kinds or {})),
    }
    write_tensors(folder / FILE, weights, facts)


def has_weights(folder: Path) -> bool:
    """Whether a folder holds healed weights; raises InputError if its facts tell of some and they
    are gone."""
    if (folder / FILE).exists():
        return True
    for path in (folder / COMPENSATE_FACTS, folder / TRAIN_FACTS):
        facts = read_json(path) if path.exists() else {}
        if facts.get("share") or facts.get("enabled"):
            raise InputError(
                f"{folder} has no {FILE}, and its {path.name} tells of changed weights: they are"
                " gone; delete the folder and run again (a stage: `dvc repro`)",
                rule="lost-weights",
            )
    return False


def find_healed(folders: Iterable[Path], of: str) -> Healed | None:
    """The file in the first of `folders` that has one; raises InputError if it is damaged, gone, or
    of another model than `of`."""
    path = next((folder / FILE for folder in folders if has_weights(folder)), None)
    if path is None:
        return None
    facts = read_facts(path)
    # Weights of another plan may have the same shapes, and would load without an error.
    if facts.get("of") != of:
        raise damaged(path, "belongs to another model, plan or calibration than this target's")
    return Healed(
        path,
        of,
        facts["words"],
        tuple(json.loads(facts["datasets"])),
        facts[DIGEST],
        json.loads(facts.get("perplexity", "{}")),
        json.loads(facts.get("kinds", "{}")),
    )


def load_healed_(model: PreTrainedModel, path: Path, shared: bool = False) -> None:
    """Put a file of healed weights into a pruned model; its tensors are replaced and not written to
    if they are `shared` with another model. Raises InputError if the file is damaged, or has a
    weight that the model has not."""
    weights, _ = read_tensors(path)
    try:
        set_weights_(model, weights, shared)
    except InputError as error:
        raise damaged(path, f"does not fit: {error}") from error


@torch.no_grad()
def set_weights_(
    model: PreTrainedModel, weights: Mapping[str, Tensor], shared: bool = False
) -> None:
    """Give the parameters of these names these values, in the model's dtype; raises InputError if
    one does not fit. `shared` is as in `load_healed_`."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    replacements = {}
    for name, weight in weights.items():
        shape = list(parameters[name].shape) if name in parameters else None
        if shape != list(weight.shape):
            raise InputError(
                f"{name} is {list(weight.shape)} here and {shape or 'absent'} in the pruned model"
            )
        parameter = parameters[name]
        # A write in place would change the other model that shares the tensor.
        if shared:
            replacements[parameter] = nn.Parameter(weight.to(parameter), requires_grad=False)
        else:
            parameter.copy_(weight)
    replace_parameters_(model, replacements)


def parameter_digests(model: PreTrainedModel) -> dict[str, str]:
    """SHA-256 of each parameter; a tied one is there once."""
    return {
        name: sha256(tensor_bytes(weight.detach().cpu())).hexdigest()
        for name, weight in model.named_parameters()
    }


def changed_weights(
    model: PreTrainedModel, plan_digests: Mapping[str, str], plan: Plan
) -> dict[str, Tensor]:
    """The parameters whose digest is not that of `plan_digests`.

    For a kind of plan without `temporarily_pruned` they are all parameters: the last bits of its
    weights may differ between machines, and the others would not fit to these.
    """
    if not KINDS[plan.kind].is_reversible:
        return dict(model.named_parameters())
    digests = parameter_digests(model)
    return {
        name: weight
        for name, weight in model.named_parameters()
        if digests[name] != plan_digests[name]
    }
