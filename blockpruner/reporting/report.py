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
from blockpruner.reporting.pages import Block, Facts, Findings, Page, Section, made_line, write_page
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
    sections = [section for reported in runs for section in _sections(reported, draw)]
    made = made_line(
        made for reported in runs for option in reported.options for made in option.model.made
    )
    return Page(title, INTRO, tuple(sections), made)


def _sections(reported: ReportedRun, draw: bool) -> tuple[Section, Section]:
    """Give the verdict on a run, then its evidence."""
    dense, targets, labels = reported.dense, reported.targets, reported.labels
    shown = recommended(targets) or targets[0]
    signs = warnings(targets, reported.traces)
    blocks: tuple[Block, ...] = (
        Findings((stop(targets),)),
        f"Chosen on {labels.calibration}. Judged on {labels.heldout}.",
        compared(reported),
        _in_bits(dense.model, shown),
        *([Findings(tuple(signs))] if signs else []),
        *([removed_map(shown.name, shown.plan)] if draw and shown.plan.gone else []),
        *samples([dense, *targets]),
        *(
            _use(target, target is not shown)
            for target in sorted(targets, key=lambda target: target is not shown)
        ),
    )
    return Section(labels.name, blocks), _evidence(reported, shown, draw)


def _in_bits(dense: Model, shown: PrunedOption) -> str:
    """Name the competitor of every pruned model: the dense one in fewer bits, by arithmetic."""
    eight, four = (size(dense.parameters * bits / 8) for bits in BITS)
    return (
        f"In fewer bits: the dense model's weights take about {eight} in 8 bits (GGUF's Q8_0) and"
        f" {four} in 4 (Q4_K_M), those of {shown.name} {size(2 * shown.model.parameters)} in 16."
        " Where size alone counts, quantize first, and prune what has to be smaller or faster than"
        " that."
    )


def _use(target: PrunedOption, folded: bool) -> Facts:
    """List where a target's checkpoints are, and how to start engines on them."""
    lines, places = [], {place.name: place for place in target.checkpoints}
    for form in (form for form in EXPORTS if form in places):
        place = places[form]
        lines += [(EXPORTS[form].title, str(place)), *starts(form, target.plan, place)]
        if form == "hf":
            dense = place.parents[2] / "models" / target.plan.run
            lines.append(
                ("beside dense", f'blockpruner compare {dense} {place} --prompt "{PROMPTS[-1]}"')
            )
    return Facts(f"Use {target.name}", tuple(lines), is_code=True, folded=folded)


def starts(form: str, plan: Plan, place: Path) -> list[tuple[str, str]]:
    """List the engines of a checkpoint, and how to start each."""
    able = engines_of(form, place)
    # a model class of its own, which only transformers loads
    if KINDS[plan.kind].exports == frozenset({"hf"}):
        able = able[:1]
    engines = zip(EXPORTS[form].engines, EXPORTS[form].commands, strict=False)
    return [(name, text.format(path=quote(str(place)))) for name, text in engines if name in able]


def _evidence(reported: ReportedRun, shown: Option, draw: bool) -> Section:
    """Show all that was measured of a run. The blocks of the option `shown` are drawn already."""
    searches = [*reported.traces, *(target for target in reported.targets if not target.curve)]
    drawn = [target for target in searches if target is not shown and target.plan.gone]
    maps, facts = (
        (removed_map(one.name, one.plan) for one in drawn if draw),
        tuple(_facts(reported)),
    )
    return Section(
        f"Evidence: {reported.run}",
        (headline(reported), *maps, Facts("Model, data and work", facts)),
    )


def _facts(reported: ReportedRun) -> Iterator[tuple[str, str]]:
    """Write what a run computed, of what, and how."""
    targets, dense, labels = reported.targets, reported.dense, reported.labels
    calibration, text = targets[0].plan.calibration, dense.model.heldout
    yield "Model", labels.model
    yield (
        "Calibration",
        f"{labels.calibration}: {calibration['rows']:,} rows, {calibration['tokens']:,} tokens",
    )
    yield "Held-out text", f"{labels.heldout}: {text.rows:,} rows, {text.tokens:,} tokens"
    tasks = ", ".join(
        f"{task} ({score.items:,} items)" for task, score in dense.model.tasks.items()
    )
    yield "Tasks", f"{labels.tasks}: {tasks}"
    if mended := [_mended(target) for target in targets if target.compensation]:
        yield "Compensation", f"{labels.compensation}; {'; '.join(mended)}"
    if trained := [target.name for target in targets if target.plan.train]:
        yield "Training", f"{labels.training}: {listed(trained)}"
    yield "Speed", targets[0].race.pruned.setting if dense.timed else NOT_TIMED
    plans = [target.plan for target in targets if KINDS[target.plan.kind].removes_blocks]
    if metrics := dict.fromkeys(
        METRICS[plan.metric] for plan in plans if SEARCHES[plan.method].asks != "nothing"
    ):
        yield "Metric", "; ".join(f"{row.title}: {row.formula}" for row in metrics)
    steps = {
        target.name: KINDS[target.plan.kind].steps(target.plan)
        for target in targets
        if not target.plan.removed
    }
    methods = listed(list(dict.fromkeys(target.method for target in targets)))
    yield (
        "Method",
        "; ".join([methods, *(f"{name}: {text}" for name, text in steps.items() if text)]),
    )


def _mended(target: PrunedOption) -> str:
    """Write what compensation changed on the rows that it held out."""
    found = target.compensation["perplexity"]
    rows = f"{number(found['before'])} → {number(found['after'])} (dense {number(found['dense'])})"
    return (
        f"{target.name}: {target.plan.compensate}, {rows if target.helped else 'no help, left out'}"
    )
