"""The report of targets: its parts, their order, and its files.

For each run: the verdict and its numbers, what the search saw, how to use the result. Then its
evidence.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from shlex import quote

from blockpruner.checkpoints.registry import EXPORTS, engines_of
from blockpruner.core.plan import Plan
from blockpruner.evaluation.samples import PROMPTS
from blockpruner.methods.registry import KINDS
from blockpruner.reporting.findings import recommended, stop, warnings
from blockpruner.reporting.formats import listed, number, size
from blockpruner.reporting.inputs import PrunedOption, ReportedRun, read_runs
from blockpruner.reporting.pages import (
    Block,
    Facts,
    Findings,
    Page,
    Section,
    provenance_line,
    write_page,
)
from blockpruner.reporting.plots import removed_map
from blockpruner.reporting.results import Model, Option, RunLabels
from blockpruner.reporting.tables import (
    NOT_TIMED,
    compared,
    curve_csv,
    headline,
    iterations_csv,
    samples,
)
from blockpruner.scoring.metrics import METRICS
from blockpruner.search.registry import SEARCHES

INTRO = (
    "What is left of a language model when transformer blocks (attention: MHA, feed-forward: MLP)"
    " are taken out. Dense: the model with all its blocks."
)

BITS = 8.5, 4.85
"""What Q8_0 and Q4_K_M spend on a weight, with their scales."""


def write_report(
    out: Path,
    title: str,
    targets: Sequence[str],
    labels: Mapping[str, RunLabels],
    data: Path,
    plots: bool,
) -> None:
    """Write the report of `targets`, with `data` as for `read_runs`, in the place of the folder
    `out`: all of it, or nothing. The CSV files are written even where no plots are wanted."""
    runs = read_runs(targets, labels, data)
    files = {"curve.csv": curve_csv(runs), "iterations.csv": iterations_csv(runs)}
    write_page(out, build_page(title, runs, plots), files)


def build_page(title: str, runs: Sequence[ReportedRun], draw: bool) -> Page:
    sections: list[Section] = []
    models: list[Model] = []
    for reported in runs:
        sections += _sections(reported, draw)
        models += [option.model for option in reported.options]
    provenance = provenance_line(record for model in models for record in model.provenance)
    return Page(title, INTRO, tuple(sections), provenance)


def _sections(reported: ReportedRun, draw: bool) -> tuple[Section, Section]:
    """Give the verdict on a run, then its evidence."""
    dense, targets, labels = reported.dense, reported.targets, reported.labels
    # Without a recommended model the mildest one is shown.
    best = recommended(targets) or targets[0]
    blocks: list[Block] = [
        Findings((stop(targets),)),
        f"Chosen on {labels.calibration}. Judged on {labels.heldout}.",
        compared(reported),
        _quantized_sizes(dense.model, best),
    ]
    signs = warnings(targets, reported.traces)
    if signs:
        blocks.append(Findings(tuple(signs)))
    if draw and best.plan.gone:
        blocks.append(removed_map(best.name, best.plan))
    blocks += samples([dense, *targets])
    blocks.append(_use(best, folded=False))
    blocks += [_use(target, folded=True) for target in targets if target is not best]
    return Section(labels.name, tuple(blocks)), _evidence(reported, best, draw)


def _quantized_sizes(dense: Model, best: PrunedOption) -> str:
    """Name the competitor of every pruned model: the dense one in fewer bits, by arithmetic."""
    eight, four = (size(dense.parameters * bits / 8) for bits in BITS)
    return (
        f"In fewer bits: the dense model's weights take about {eight} in 8 bits (GGUF's Q8_0) and"
        f" {four} in 4 (Q4_K_M), those of {best.name} {size(2 * best.model.parameters)} in 16."
        " Where size alone counts, quantize first, and prune what has to be smaller or faster than"
        " that."
    )


def _use(target: PrunedOption, folded: bool) -> Facts:
    """List where a target's checkpoints are, and how to start engines on them."""
    lines: list[tuple[str, str]] = []
    paths = {path.name: path for path in target.checkpoints}
    for form in EXPORTS:
        if form not in paths:
            continue
        path = paths[form]
        lines.append((EXPORTS[form].title, str(path)))
        lines += starts(form, target.plan, path)
        if form == "hf":
            dense = path.parents[2] / "models" / target.plan.run
            command = f'blockpruner compare {dense} {path} --prompt "{PROMPTS[-1]}"'
            lines.append(("beside dense", command))
    return Facts(f"Use {target.name}", tuple(lines), is_code=True, folded=folded)


def starts(form: str, plan: Plan, checkpoint: Path) -> list[tuple[str, str]]:
    """List the engines of a checkpoint, and how to start each."""
    engines = engines_of(form, checkpoint)
    # a model class of its own, which only transformers loads
    if KINDS[plan.kind].exports == frozenset({"hf"}):
        engines = engines[:1]
    commands = zip(EXPORTS[form].engines, EXPORTS[form].commands, strict=False)
    path = quote(str(checkpoint))
    return [(name, command.format(path=path)) for name, command in commands if name in engines]


def _evidence(reported: ReportedRun, best: Option, draw: bool) -> Section:
    """Show all that was measured of a run. The blocks of the `best` option are drawn already."""
    blocks: list[Block] = [headline(reported)]
    without_curve = [target for target in reported.targets if not target.curve]
    for target in (*reported.traces, *without_curve):
        if draw and target is not best and target.plan.gone:
            blocks.append(removed_map(target.name, target.plan))
    blocks.append(Facts("Model, data and work", tuple(_facts(reported))))
    return Section(f"Evidence: {reported.run}", tuple(blocks))


def _facts(reported: ReportedRun) -> Iterator[tuple[str, str]]:
    """Write what a run computed, of what, and how."""
    targets, dense, labels = reported.targets, reported.dense, reported.labels
    calibration, text = targets[0].plan.calibration, dense.model.heldout
    yield "Model", labels.model
    size = f"{calibration['rows']:,} rows, {calibration['tokens']:,} tokens"
    yield "Calibration", f"{labels.calibration}: {size}"
    yield "Held-out text", f"{labels.heldout}: {text.rows:,} rows, {text.tokens:,} tokens"
    tasks = [f"{task} ({score.items:,} items)" for task, score in dense.model.tasks.items()]
    yield "Tasks", f"{labels.tasks}: {', '.join(tasks)}"
    compensations = [_compensation(target) for target in targets if target.compensation]
    if compensations:
        yield "Compensation", f"{labels.compensation}; {'; '.join(compensations)}"
    trained = [target.name for target in targets if target.plan.train]
    if trained:
        yield "Training", f"{labels.training}: {listed(trained)}"
    yield "Speed", targets[0].race.pruned.setting if dense.timed else NOT_TIMED
    metrics = _metrics([target.plan for target in targets])
    if metrics:
        yield "Metric", "; ".join(metrics)
    methods = dict.fromkeys(target.method for target in targets)
    yield "Method", "; ".join([listed(list(methods)), *_steps(targets)])


def _metrics(plans: Sequence[Plan]) -> list[str]:
    """The metrics by which searches have scored blocks."""
    names = []
    for plan in plans:
        if KINDS[plan.kind].removes_blocks and SEARCHES[plan.method].asks != "nothing":
            names.append(plan.metric)
    metrics = [METRICS[name] for name in dict.fromkeys(names)]
    return [f"{metric.title}: {metric.formula}" for metric in metrics]


def _steps(targets: Sequence[PrunedOption]) -> Iterator[str]:
    """What methods did that change weights and remove no blocks."""
    for target in targets:
        if not target.plan.removed:
            text = KINDS[target.plan.kind].step_words(target.plan)
            if text:
                yield f"{target.name}: {text}"


def _compensation(target: PrunedOption) -> str:
    """Write what compensation changed on the rows that it held out."""
    result = "no help, left out"
    if target.helped:
        perplexity = target.compensation["perplexity"]
        change = f"{number(perplexity['before'])} → {number(perplexity['after'])}"
        result = f"{change} (dense {number(perplexity['dense'])})"
    return f"{target.name}: {target.plan.compensate}, {result}"
