"""The model card of a checkpoint: README.md, from its plan.

Decides what a reader learns: the base model, its licence, what was done to it, with which data,
scores, how to load and serve it, its limits.
"""

from collections.abc import Mapping
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import yaml

from blockpruner.checkpoints.registry import EXPORTS, engines_of
from blockpruner.core.markdown import code, plain
from blockpruner.core.plan import Plan
from blockpruner.evaluation.kinds import in_words
from blockpruner.inputs.checkpoints import licence_of
from blockpruner.methods.healed import Healed
from blockpruner.methods.registry import KINDS
from blockpruner.store.files import read_json
from blockpruner.store.manifest import SOURCE_FILE

HERE = "<this directory>"
"""The placeholder of a card for the checkpoint's folder or repository."""

HEALED = ("dense", "before", "after")
"""The columns of the table of a healing, keys of `Healed.perplexity`."""

LIBRARIES = {"hf": "transformers", "nas": "mlx", "mlx": "mlx", "gguf": "gguf"}
"""The hub's name of the library that loads a format."""

LIMITS = """
## Limits

What was removed held knowledge and skills of the base model. Other languages, long contexts, safety
and bias were not measured. Compare it with its base on texts of your own.
"""


def base_of(dense: Path) -> tuple[str, bool]:
    """The name of a fetched model, and whether it is a repository of the hub."""
    source: dict[str, Any] = read_json(dense / SOURCE_FILE)["source"]
    name = source.get("repo") or source.get("package") or Path(source.get("path", "")).name
    return name, "repo" in source


def model_card(
    plan: Plan,
    dense: Path,
    form: str,
    module: str | None = None,
    healed: Healed | None = None,
    note: str = "",
    loading: str | None = None,
) -> str:
    """README.md of a checkpoint.

    Args:
        dense: The folder of the base model.
        form: The name of the format, as in `EXPORTS`.
        module: The modelling file in the checkpoint.
        note: A remark about the format.
        loading: How to load the checkpoint; None for transformers.
    """
    base, _ = base_of(dense)
    perplexity_by_step = healed.perplexity if healed else {}
    healing = healed.words if healed else "not retrained"
    front = yaml.safe_dump(
        _front_matter(plan, dense, form, healed), sort_keys=False, allow_unicode=True
    )
    sizes = f"{plan.parameters['pruned']:,} of {plan.parameters['dense']:,} parameters"
    if loading is None:
        loading = _loading(module)
    scores = f"{_perplexity(plan)}{_healing(perplexity_by_step)}{_kinds(plan)}"
    return f"""---
{front}---

# {plain(plan.target)}

{code(base)} {KINDS[plan.kind].card_words(plan)}: {sizes}
({plan.ratio:.2%} removed), made by
[BlockPruner](https://arxiv.org/abs/2406.10594)'s workflow and {healing}.

{scores}{note}
{loading}{_serving(form, dense, module)}{LIMITS}{_steps(plan)}"""


def _front_matter(plan: Plan, dense: Path, form: str, healed: Healed | None) -> dict[str, Any]:
    """What the hub reads from a card."""
    base, is_hub = base_of(dense)
    front: dict[str, Any] = {
        "library_name": LIBRARIES[form],
        "pipeline_tag": "text-generation",
        "tags": ["blockpruner", "pruned"],
        **licence_of(dense),
    }
    if is_hub:
        front["base_model"] = base
        front["base_model_relation"] = "finetune"
    if healed and healed.datasets:
        front["datasets"] = list(healed.datasets)
    if healed and healed.perplexity:
        results = _results(healed.perplexity)
        front["model-index"] = [{"name": plan.target, "results": results}]
    return front


def _results(perplexity_by_step: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    """The perplexity after the last healing, as the hub reads it from a card."""
    step, perplexity = list(perplexity_by_step.items())[-1]
    return [
        {
            "task": {"type": "text-generation"},
            "dataset": {"type": "custom", "name": f"rows held out from {step}"},
            "metrics": [{"type": "perplexity", "value": perplexity["after"]}],
        }
    ]


def _healing(perplexity_by_step: Mapping[str, Mapping[str, float]]) -> str:
    if not perplexity_by_step:
        return ""
    lines = [f"| perplexity | {' | '.join(HEALED)} |", "|---|---:|---:|---:|"]
    for step, perplexity in perplexity_by_step.items():
        cells = [f"{perplexity[key]:.3f}" if key in perplexity else "–" for key in HEALED]
        lines.append(f"| rows held out from {step} | {' | '.join(cells)} |")
    return "\n" + "\n".join(lines) + "\n"


def _kinds(plan: Plan) -> str:
    losses, warning = in_words(plan.kinds or {})
    if not losses:
        return ""
    lines = "\n".join(f"- {plain(kind)}: {loss}" for kind, loss in losses)
    note = f"\n{plain(warning)}\n" if warning else ""
    return f"\nPerplexity by kind of text, of rows that were set aside:\n\n{lines}\n{note}"


def _perplexity(plan: Plan) -> str:
    calibration = plan.calibration
    if calibration["perplexity"] is None:
        return ""
    size = f"{calibration['rows']} rows, {calibration['tokens']:,} tokens"
    return f"""Perplexity on the calibration set ({size}):
{calibration["dense_perplexity"]:.3f} before, {calibration["perplexity"]:.3f} after pruning.
"""


def _loading(module: str | None) -> str:
    model_option = ", trust_remote_code=True" if module else ""
    # Without the option, transformers asks whether it may run the code for the tokenizer, too.
    tokenizer_option = ", trust_remote_code=False" if module else ""
    text = f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{HERE}"{model_option})
tokenizer = AutoTokenizer.from_pretrained("{HERE}"{tokenizer_option})
```
"""
    if module:
        text += f"""
`trust_remote_code` runs the file `{module}` beside this card and no other; it needs transformers
5.15 or newer and nothing else. The tokenizer needs no code: `False` keeps transformers from asking.
"""
    return text


def _serving(form: str, dense: Path, module: str | None) -> str:
    if form == "hf":
        # vLLM lacks SliceGPT's models, and some families.
        is_sliced = module == "modeling_slicegpt.py"
        if is_sliced or "vLLM" not in engines_of(form, dense):
            return ""
    engine = EXPORTS[form].engines[-1]
    command = EXPORTS[form].commands[-1].format(path=HERE)
    plugin = " with a plugin, and runs no code of this directory" if module else ""
    return f"""
{engine} serves it{plugin}:

```console
{command}
```
{_plugin() if module else ""}"""


def _plugin() -> str:
    package = metadata("blockpruner")
    address = "which has no public address yet: ask its author for it"
    for entry in package.get_all("Project-URL", ()):
        name, url = entry.split(", ", 1)
        if name == "Source":
            address = f"from {url}"
    return f"""
The plugin is in the Python package `blockpruner` {package["Version"]}, {address}.
In its folder, `pip install --no-deps .` installs it beside vLLM.
"""


def _steps(plan: Plan) -> str:
    if not KINDS[plan.kind].removes_blocks:
        return ""
    # The order of the steps means something only if each budget continues the smaller one.
    if not plan.nested:
        return f"\nRemoved: {', '.join(plan.removed)}.\n"
    rows = []
    for step, (unit, ratio) in enumerate(zip(plan.order, plan.ratios, strict=True), 1):
        rows.append(f"| {step} | {unit} | {ratio:.2%} |")
    steps = "\n".join(rows)
    return f"""
| step | removed | share of parameters removed so far |
|---:|---|---:|
{steps}
"""
