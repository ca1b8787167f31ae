"""`blockpruner curve`: held-out perplexity of every step of a search, to choose a budget by.

Decides which masks are points, and how the points are shown. They are scored as a search scores masks, over the dense
model's weights, into the same trial stores: a killed run goes on, and a longer curve reuses a shorter one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table as RichTable

from blockpruner.cli.pruning import Place, read_plan, several
from blockpruner.cli.values import to_json
from blockpruner.core.blocks import DENSE, BlockKind, Mask, format_mask, parse_mask, sorted_blocks
from blockpruner.core.budgets import resources_of
from blockpruner.core.errors import InputError
from blockpruner.core.plan import Plan
from blockpruner.core.settings import Runtime, read_settings
from blockpruner.inputs.calibration import CalibrationSet, require_embedded
from blockpruner.inputs.texts import load_texts
from blockpruner.inputs.tokenizers import conversation, load_tokenizer
from blockpruner.methods.kind import open_stores
from blockpruner.methods.score import open_material
from blockpruner.reporting.formats import number, printable
from blockpruner.reporting.statistics import perplexity_ratio
from blockpruner.reporting.table import Field, Number, Table, percentage, table_of, to_csv
from blockpruner.scoring.metrics import NLL
from blockpruner.scoring.objectives import Counts, MaskScore, Objective, in_one_origin
from blockpruner.search.trace import read_trace, table_path
from blockpruner.settings import Run
from blockpruner.store.files import read_json, write_atomic, write_sealed_json
from blockpruner.store.provenance import fingerprint

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from blockpruner.reporting.plots import Plot

CAPTION = (
    "Held-out perplexity relative to the dense model against the share of parameters removed, with 95 % intervals over "
    "paired rows. Each dot is a step of the search as pruned: no weights are compensated or trained."
)


def measure(place: Place, run: Run, path: Path) -> dict[str, Any]:
    """Score the dense model and what a plan's search removed, step by step, on the run's held-out text.

    Args:
        path: a plan's file, or a checkpoint's folder that holds one.

    Raises:
        InputError: the plan removes no blocks or is of another model, or the text is too short.
    """
    from blockpruner.evaluation.perplexity import held_out

    file, plan = read_plan(path)
    if plan.kind != "mask":
        raise InputError(f"{file} is of method {plan.method}, which has no steps; give a plan that removes blocks")
    run, dense = place.fetch_base(run, file, plan)
    wanted = run.evaluate.perplexity
    tokenizer = load_tokenizer(dense, run.model.trust_remote_code)
    texts = load_texts(wanted.data, place.root / "cache", place.pins, partial(conversation, lambda: tokenizer))
    rows = CalibrationSet(several(held_out(tokenizer, texts, wanted).rows, wanted.seq_len))
    config = read_json(dense / "config.json")
    require_embedded(rows.rows, tokenizer, config)
    parameters = resources_of(config)["parameters"]
    masks = sorted(steps(place.root, plan), key=parameters.ratio)
    runtime = read_settings(Runtime, {"device": place.device})
    with (
        open_material(dense, run.model, runtime, place.root, place.observer) as given,
        open_stores([NLL.name], rows, given.identity, given.dtype, place.root, place.observer) as stores,
    ):

        def scored() -> tuple[list[MaskScore], Counts]:
            objective = Objective(rows, stores[NLL.name], given.scorer, place.observer)
            return objective([DENSE, *masks]), objective.counts

        place.observer.begin("curve")
        (base, *scores), counts = in_one_origin(scored, place.observer)
        work = f"{len(masks)} pruned models on {len(rows.rows)} rows of {wanted.seq_len} tokens"
        place.observer.end(work, cached=not counts.units_computed)
    found = []
    for before, mask, score in zip([DENSE, *masks], masks, scores, strict=False):
        effect = perplexity_ratio(base.row_loss, score.row_loss)
        found.append(
            {
                "ratio": parameters.ratio(mask),
                "added": format_mask(mask - before) if before < mask else None,
                "removed": [str(block) for block in sorted_blocks(mask)],
                "perplexity": score.perplexity,
                "relative": effect.value,
                "interval": [effect.interval.low, effect.interval.high],
            }
        )
    result = {
        "model": run.model.title, "text": wanted.data.title, "rows": len(rows.rows), "tokens": rows.tokens,
        "dense_perplexity": base.perplexity, "points": found,
    }  # fmt: skip
    write_sealed_json(kept(place.root, plan), result)
    return result | {"trials_computed": counts.trials_computed}


def kept(trials: Path, plan: Plan) -> Path:
    """Where the latest curve of a plan's search is kept."""
    return trials / "curves" / f"{fingerprint({'base': plan.base, 'search': plan.search})}.json"


def steps(trials: Path, plan: Plan) -> list[Mask]:
    """What a plan's search removed, step by step: every prefix of its sequence, also beyond the plan.

    A search that goes back on removals has no sequence. Then each point is the best that its steps chose with so many
    blocks removed. Where the trial folder does not hold the search, the plan alone tells.
    """
    best: dict[int, tuple[float, Mask]] = {}
    for first in sorted(trials.glob(f"searches/*/*/{plan.search}/**/{table_path(Path(), 0).name}")):
        for iteration in read_trace(first.parent, plan.search):
            choice = iteration.scores[iteration.chosen]
            if choice.mask and not choice.loss >= best.get(len(choice.mask), (math.inf, DENSE))[0]:
                best[len(choice.mask)] = (choice.loss, choice.mask)
    known, mask = {size: mask for size, (_, mask) in best.items()}, DENSE
    for unit in plan.order:
        mask |= parse_mask(unit)
        known[len(mask)] = mask
    return [known[size] for size in sorted(known)]


def _step(point: Mapping[str, Any]) -> str:
    """What a step removed, or where it took something back, how much is gone."""
    kinds = (f"{sum(name.startswith(kind) for name in point['removed'])} {kind.upper()}" for kind in BlockKind)
    return point["added"] or " + ".join(kinds)


FIELDS: tuple[Field[Mapping[str, Any]], ...] = (
    Field("ratio", "removed", lambda point: percentage(point["ratio"])),
    Field("step", "step", _step),
    Field("perplexity", "perplexity", lambda point: Number(point["perplexity"])),
    Field(
        "relative",
        "times dense [95 %]",
        lambda point: Number(point["relative"], 2, low=point["interval"][0], high=point["interval"][1]),
    ),
)
REMOVED: Field[Mapping[str, Any]] = Field("removed", "removed blocks", lambda point: " ".join(point["removed"]))


def table(found: Mapping[str, Any], plan: Plan | None = None, fields: Sequence[Field[Any]] = FIELDS) -> Table:
    """The points of a curve; that of a plan is stressed."""
    title = f"{found['model']}: perplexity of {found['text']}, dense {number(found['dense_perplexity'])}"
    chosen = list(plan.removed) if plan else []
    return table_of("curve", title, fields, found["points"], strong=lambda point: point["removed"] == chosen)


def words(found: Mapping[str, Any], plan: Plan) -> RichTable:
    """The curve for a terminal, a line for each point."""
    grid = table(found, plan)
    shown = RichTable(title=printable(grid.title), title_justify="left", box=None, pad_edge=False)
    for title, is_number in zip(grid.head, grid.numeric, strict=True):
        shown.add_column(title, justify="right" if is_number else "left", no_wrap=is_number)
    for index, texts in enumerate(grid.texts):
        shown.add_row(*texts, style="bold" if index in grid.strong else "")
    return shown


def plot(found: Mapping[str, Any]) -> Plot:
    """The curve as a figure."""
    from blockpruner.reporting import plots

    def draw(figure: Figure) -> None:
        axes, points = figure.subplots(), found["points"]
        y = [point["relative"] for point in points]
        sides = [[abs(point["interval"][i] - value) for point, value in zip(points, y, strict=True)] for i in (0, 1)]
        axes.errorbar([100 * point["ratio"] for point in points], y, sides, color=plots.BLUE, marker="o", markersize=4,
                      linewidth=1, capsize=2.5)  # fmt: skip
        plots.star_(axes, 0, 1)
        plots.label_(axes, plots.REMOVED, "perplexity, times that of the dense model")
        plots.scale_(axes, [1, *(end for point in points for end in point["interval"])])

    text = f"{CAPTION} {found['model']}, dense {number(found['dense_perplexity'])} on {found['text']}."
    return plots.render("curve", text, (4.3, 3.3), draw)


def require_known(file: Path) -> None:
    """Raise InputError if a file's name says no known kind."""
    if file.suffix not in FORMS:
        raise InputError(f"--out {str(file)!r} has no known ending; valid: {', '.join(FORMS)}")


def write(found: Mapping[str, Any], file: Path) -> None:
    """Write the curve: a picture or its numbers, as the file's ending says."""
    content = FORMS[file.suffix](found)
    write_atomic(file, lambda temporary: temporary.write_bytes(content))


FORMS: Mapping[str, Callable[[Mapping[str, Any]], bytes]] = {
    ".svg": lambda found: plot(found).svg.encode(),
    ".png": lambda found: plot(found).png,
    ".csv": lambda found: to_csv(table(found, fields=(*FIELDS, REMOVED))).encode(),
    ".json": lambda found: to_json(found, indent=2).encode(),
}
