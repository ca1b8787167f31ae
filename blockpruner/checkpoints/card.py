"""The model card of a checkpoint: README.md, from its plan.

Decides what a finder of the directory reads: the base model, its licence, what was done to it, with
which data, scores, how to load and serve it, its limits.
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
"""What stands in a card for the checkpoint's place."""

HEALED = ("dense", "before", "after")
"""The columns of the table of a healing, keys of `Healed.perplexity`."""

LIBRARIES = {"hf": "transformers", "nas": "mlx", "mlx": "mlx", "gguf": "gguf"}
"""The hub's name of what loads a format."""

LIMITS = """
## Limits

What was removed held knowledge and skills of the base model. Other languages, long contexts, safety
and bias were not measured. Compare it with its base on texts of your own.
"""


def base_of(dense: Path) -> tuple[str, bool]:
    """The name of a fetched model, and whether it is a repository of the hub."""
    source: dict[str, Any] = read_json(dense / SOURCE_FILE)["source"]
    return (
        source.get("repo") or source.get("package") or Path(source.get("path", "")).name,
        "repo" in source,
    )


def model_card(
    plan: Plan,
    dense: Path,
    form: str,
    module: str | None = None,
    healed: Healed | None = None,
    note: str = "",
    loading: str | None = None,
) -> str:
    """README.md of a checkpoint. `dense` is the base model's directory, `module` the modelling file
    in the checkpoint, `note` a remark about the format, and `loading` tells how to load it; None:
    with transformers."""
    base, is_hub = base_of(dense)
    front: dict[str, Any] = {"library_name": LIBRARIES[form], "pipeline_tag": "text-generation"}
    front |= {"tags": ["blockpruner", "pruned"]} | licence_of(dense)
    front |= {"base_model": base, "base_model_relation": "finetune"} if is_hub else {}
    front |= {"datasets": list(healed.datasets)} if healed and healed.datasets else {}
    told = healed.perplexity if healed else {}
    front |= {"model-index": [{"name": plan.target, "results": _results(told)}]} if told else {}
    since = healed.words if healed else "not retrained"
    sizes = f"{plan.parameters['pruned']:,} of {plan.parameters['dense']:,} parameters"
    loading = _loading(module) if loading is None else loading
    told_parts = f"{_perplexity(plan)}{_healing(told)}{_kinds(plan)}{note}"
    return f"""---
{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---

# {plain(plan.target)}

{code(base)} {KINDS[plan.kind].card(plan)}: {sizes}
({plan.ratio:.2%} removed), made by
[BlockPruner](https://arxiv.org/abs/2406.10594)'s workflow and {since}.

{told_parts}
{loading}{_serving(form, dense, module)}{LIMITS}{_steps(plan)}"""


def _results(told: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    """The perplexity after the last healing, as the hub reads it from a card."""
    name, found = list(told.items())[-1]
    dataset = {"type": "custom", "name": f"rows held out from {name}"}
    metrics = [{"type": "perplexity", "value": found["after"]}]
    return [{"task": {"type": "text-generation"}, "dataset": dataset, "metrics": metrics}]


def _healing(told: Mapping[str, Mapping[str, float]]) -> str:
    if not told:
        return ""
    rows = [
        (name, *(f"{found[key]:.3f}" if key in found else "–" for key in HEALED))
        for name, found in told.items()
    ]
    lines = "\n".join(f"| rows held out from {' | '.join(row)} |" for row in rows)
    return f"\n| perplexity | {' | '.join(HEALED)} |\n|---|---:|---:|---:|\n{lines}\n"


def _kinds(plan: Plan) -> str:
    pairs, warning = in_words(plan.kinds or {})
    if not pairs:
        return ""
    lines = "\n".join(f"- {plain(kind)}: {lost}" for kind, lost in pairs)
    more = f"\n{plain(warning)}\n" if warning else ""
    return f"\nPerplexity by kind of text, of rows that were set aside:\n\n{lines}\n{more}"


def _perplexity(plan: Plan) -> str:
    calibration = plan.calibration
    if calibration["perplexity"] is None:
        return ""
    size = f"{calibration['rows']} rows, {calibration['tokens']:,} tokens"
    return f"""Perplexity on the calibration set ({size}):
{calibration["dense_perplexity"]:.3f} before, {calibration["perplexity"]:.3f} after pruning.
"""


def _loading(module: str | None) -> str:
    option, no = (", trust_remote_code=True", ", trust_remote_code=False") if module else ("", "")
    text = f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{HERE}"{option})
tokenizer = AutoTokenizer.from_pretrained("{HERE}"{no})
```
"""
    if module:
        text += f"""
`trust_remote_code` runs the file `{module}` beside this card and no other; it needs transformers
5.15 or newer and nothing else. The tokenizer needs no code: `False` keeps transformers from asking.
"""
    return text


def _serving(form: str, dense: Path, module: str | None) -> str:
    if form == "hf" and (module == "modeling_slicegpt.py" or "vLLM" not in engines_of(form, dense)):
        return ""
    engine, command = EXPORTS[form].engines[-1], EXPORTS[form].commands[-1].format(path=HERE)
    plugin = " with a plugin, and runs no code of this directory" if module else ""
    return f"""
{engine} serves it{plugin}:

```console
{command}
```
{_plugin() if module else ""}"""


def _plugin() -> str:
    about = metadata("blockpruner")
    urls = dict(url.split(", ", 1) for url in about.get_all("Project-URL", ()))
    address = (
        f"from {urls['Source']}"
        if "Source" in urls
        else "which has no public address yet: ask its author for it"
    )
    return f"""
The plugin is in the Python package `blockpruner` {about["Version"]}, {address}.
In its folder, `pip install --no-deps .` installs it beside vLLM.
"""


def _steps(plan: Plan) -> str:
    if not KINDS[plan.kind].removes_blocks:
        return ""
    if not plan.nested:
        return f"\nRemoved: {', '.join(plan.removed)}.\n"
    steps = "\n".join(
        f"| {k} | {unit} | {ratio:.2%} |"
        for k, (unit, ratio) in enumerate(zip(plan.order, plan.ratios, strict=True), 1)
    )
    return f"""
| step | removed | share of parameters removed so far |
|---:|---|---:|
{steps}
"""
