"""`blockpruner report`: one self-contained page on a checkpoint, of the parts that reports are made
of."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from shlex import quote
from typing import Any

from blockpruner.checkpoints.card import HEALED
from blockpruner.checkpoints.registry import EXPORTS
from blockpruner.cli.pruning import read_plan
from blockpruner.core.errors import InputError
from blockpruner.core.plan import Plan
from blockpruner.evaluation.kinds import in_words
from blockpruner.inputs.checkpoints import read_fields
from blockpruner.methods.healed import kept_facts
from blockpruner.methods.registry import KINDS
from blockpruner.reporting.findings import UNLIKE, Finding, Level
from blockpruner.reporting.formats import number, parameters, percent, size, times
from blockpruner.reporting.pages import Facts, Findings, Page, Section, to_html
from blockpruner.reporting.plots import removed_map
from blockpruner.reporting.report import INTRO, starts
from blockpruner.reporting.table import Column, Number, Table
from blockpruner.store.files import read_json, write_text
from blockpruner.store.manifest import REPORT_FILE, require_verified


def write_page_of(checkpoint: Path, out: Path) -> None:
    """Write the page; raises InputError if there is no checkpoint with a plan, or it is not what
    was verified."""
    _, plan = read_plan(checkpoint)
    if not (checkpoint / REPORT_FILE).is_file():
        raise InputError(
            f"{checkpoint} has no {REPORT_FILE}; give a folder that prune or apply has written"
        )
    files = require_verified(checkpoint)
    weights = sum(
        (checkpoint / name).stat().st_size
        for name in files
        if name.endswith((".safetensors", ".gguf"))
    )
    healed, verified = kept_facts(checkpoint), read_json(checkpoint / REPORT_FILE)
    perplexity = healed.perplexity if healed else {}
    findings = Findings(tuple(_findings(plan, verified, checkpoint, bool(perplexity))))
    pairs, _ = in_words(plan.kinds or {})
    tables = [_healing(perplexity)] if perplexity else []
    lost = [Facts("Perplexity by kind of text, of texts set aside", pairs)] if pairs else []
    steps = KINDS[plan.kind].step_words(plan) or "No block is removed as a whole."
    removed = removed_map(plan.target, plan) if plan.gone else steps
    facts = {
        "Folder": str(checkpoint),
        "Weights": size(weights),
        "Method": f"{plan.method}, by {plan.metric}, budget {plan.budget}",
        "Calibration": "not done here: the plan was applied",
    }
    if healed:
        facts["After pruning"] = healed.words.replace("`", "")  # Markdown, for the card
    if plan.calibration["rows"] is not None:
        facts["Calibration"] = (
            f"{plan.calibration['rows']:,} rows, {plan.calibration['tokens']:,} tokens"
        )
    form = {"mlx_lm": "mlx", "xllamacpp": "gguf"}.get(verified["engine"], "hf")
    if form == "mlx" and read_fields(checkpoint)["model_type"] == "nemotron-nas":
        form = "nas"
    folder_by_format = {form: checkpoint}
    if form == "hf":
        for other in EXPORTS:
            folder = checkpoint.with_name(f"{checkpoint.name}-{other}")
            if other != "hf" and (folder / REPORT_FILE).is_file():
                folder_by_format[other] = folder
    commands: list[Any] = []
    for name, folder in folder_by_format.items():
        commands += starts(name, plan, folder)
    use = Facts("Use it", tuple(commands), is_code=True)
    sections = (
        Section("Verdict", (findings, *tables, *lost)),
        Section("What is gone", (removed,)),
        Section("Model", (Facts("Model and data", tuple(facts.items())), use)),
    )
    write_text(out, to_html(Page(plan.target, INTRO, sections)))


def _healing(perplexities: Mapping[str, Mapping[str, float]]) -> Table:
    """The perplexities of rows held out from each part of healing."""
    columns = (Column("rows", "perplexity"), *(Column(key, key) for key in HEALED))
    cells = []
    for name, heldout in perplexities.items():
        numbers = [Number(heldout[key]) if key in heldout else None for key in HEALED]
        cells.append((f"rows held out from {name}", *numbers))
    return Table("healing", "Before and after healing", columns, tuple(cells))


def _findings(
    plan: Plan, verified: dict[str, Any], folder: Path, is_healed: bool
) -> Iterator[Finding]:
    dense_perplexity = plan.calibration["dense_perplexity"]
    perplexity = plan.calibration["perplexity"]
    dense, pruned = (parameters(plan.parameters[name]) for name in ("dense", "pruned"))
    if perplexity:
        quality = (
            f"Perplexity of the calibration texts {number(dense_perplexity)} →"
            f" {number(perplexity)}, {times(perplexity / dense_perplexity)} the dense model's,"
            " before any healing. The blocks were chosen on these texts; others tell more."
        )
    elif is_healed:
        quality = "Perplexities are in the table below."
    else:
        quality = "The perplexity of the pruned model was not measured."
    yield Finding(
        Level.RESULT,
        "outcome",
        f"{percent(plan.ratio)} of the parameters removed ({KINDS[plan.kind].removed_words(plan)}):"
        f" {dense} → {pruned}",
        quality,
    )
    _, warning = in_words(plan.kinds or {})
    if warning:
        yield Finding(Level.WARNING, "uneven", UNLIKE, warning)
    path = quote(str(folder))
    text = (
        f"blockpruner compare MODEL {path} --texts FILE does that, and blockpruner eval {path} asks"
        " benchmarks."
    )
    yield Finding(Level.ADVICE, "measure", "Measure it on texts that the search has not seen", text)
    yield Finding(
        Level.RESULT if verified["ok"] else Level.WARNING,
        "verified",
        f"{'Verified' if verified['ok'] else 'Not verified'} by {verified['engine']}",
        verified.get("unchecked", "A fresh process computes what the masked dense model computes."),
    )
