"""The model card of a checkpoint: README.md, from its plan.

Decides what a finder of the directory reads: the base model, what was done to it, scores, how to load it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from blockpruner.core.plan import Plan
from blockpruner.methods.registry import KINDS


def model_card(
    plan: Plan,
    dense: Path,
    code: str | None = None,
    since: str = "not retrained",
    note: str = "",
    library: str = "transformers",
    loading: str | None = None,
) -> str:
    """README.md of the checkpoint.

    Args:
        dense: the base model's directory.
        code: the modelling file in the checkpoint, None where there is none.
        since: what was done after pruning.
        note: a remark about the format.
        library: what loads the checkpoint.
        loading: how to load it; None: with transformers.
    """
    source: dict[str, Any] = json.loads((dense / "blockpruner_source.json").read_text())["source"]
    base = source.get("repo") or source.get("package") or Path(source.get("path", "")).name
    front = ["---", f"library_name: {library}", "pipeline_tag: text-generation", "tags: [blockpruner, pruned]"]
    if "repo" in source:
        front.append(f"base_model: {base}")
    return (
        "\n".join(front)
        + f"""
---

# {plan.target}

`{base}` {KINDS[plan.kind].card(plan)}: {plan.parameters["pruned"]:,} of {plan.parameters["dense"]:,} parameters
({plan.ratio:.2%} removed), made by [BlockPruner](https://arxiv.org/abs/2406.10594)'s workflow and {since}.

{_perplexity(plan)}{note}
{_loading(code) if loading is None else loading}{_steps(plan)}"""
    )


def _perplexity(plan: Plan) -> str:
    calibration = plan.calibration
    if calibration["perplexity"] is None:
        return ""
    return f"""Perplexity on the calibration set ({calibration["rows"]} rows, {calibration["tokens"]:,} tokens):
{calibration["dense_perplexity"]:.3f} before, {calibration["perplexity"]:.3f} after pruning.
"""


def _loading(code: str | None) -> str:
    option = ", trust_remote_code=True" if code else ""
    text = f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("<this directory>"{option})
tokenizer = AutoTokenizer.from_pretrained("<this directory>"{option})
```
"""
    if code:
        text += f"""
`trust_remote_code` runs the file `{code}` beside this card; it needs transformers 5.24 or newer and nothing else.
"""
    return text


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
