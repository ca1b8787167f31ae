"""The model card of a checkpoint: README.md, from its plan.

Decides what a finder of the directory reads: the base model, its licence, what was done to it, with which data, scores,
how to load it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from blockpruner.core.families import FAMILIES
from blockpruner.core.markdown import code, plain
from blockpruner.core.plan import Plan
from blockpruner.inputs.checkpoints import licence_of
from blockpruner.methods.healed import Healed
from blockpruner.methods.registry import KINDS
from blockpruner.store.files import read_json
from blockpruner.store.manifest import SOURCE_FILE


def model_card(
    plan: Plan,
    dense: Path,
    module: str | None = None,
    healed: Healed | None = None,
    note: str = "",
    library: str = "transformers",
    loading: str | None = None,
) -> str:
    """README.md of the checkpoint.

    Args:
        dense: the base model's directory.
        module: the modelling file in the checkpoint, None where there is none.
        healed: what was done after pruning.
        note: a remark about the format.
        library: what loads the checkpoint.
        loading: how to load it; None: with transformers, and vLLM if it has models of the family.
    """
    source: dict[str, Any] = read_json(dense / SOURCE_FILE)["source"]
    base = source.get("repo") or source.get("package") or Path(source.get("path", "")).name
    front = {"library_name": library, "pipeline_tag": "text-generation", "tags": ["blockpruner", "pruned"]}
    front |= licence_of(dense) | ({"base_model": base} if "repo" in source else {})
    front |= {"datasets": list(healed.datasets)} if healed and healed.datasets else {}
    since = healed.words if healed else "not retrained"
    return f"""---
{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---

# {plain(plan.target)}

{code(base)} {KINDS[plan.kind].card(plan)}: {plan.parameters["pruned"]:,} of {plan.parameters["dense"]:,} parameters
({plan.ratio:.2%} removed), made by [BlockPruner](https://arxiv.org/abs/2406.10594)'s workflow and {since}.

{_perplexity(plan)}{note}
{_loading(module) + _serving(dense, module) if loading is None else loading}{_steps(plan)}"""


def _perplexity(plan: Plan) -> str:
    calibration = plan.calibration
    if calibration["perplexity"] is None:
        return ""
    return f"""Perplexity on the calibration set ({calibration["rows"]} rows, {calibration["tokens"]:,} tokens):
{calibration["dense_perplexity"]:.3f} before, {calibration["perplexity"]:.3f} after pruning.
"""


def _loading(module: str | None) -> str:
    option, no = (", trust_remote_code=True", ", trust_remote_code=False") if module else ("", "")
    text = f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("<this directory>"{option})
tokenizer = AutoTokenizer.from_pretrained("<this directory>"{no})
```
"""
    if module:
        text += f"""
`trust_remote_code` runs the file `{module}` beside this card and no other; it needs transformers 5.15 or newer and
nothing else. The tokenizer needs no code: `False` keeps transformers from asking.
"""
    return text


def _serving(dense: Path, module: str | None) -> str:
    if module == "modeling_slicegpt.py" or not FAMILIES[read_json(dense / "config.json")["model_type"]].in_vllm:
        return ""
    plugin = " with the plugin in `blockpruner`, and runs no code of this directory" if module else ""
    install = "pip install --no-deps blockpruner   # beside vLLM; or the path of a clone\n" if module else ""
    return f"""
vLLM serves it{plugin}:

```console
{install}vllm serve <this directory>
```
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
