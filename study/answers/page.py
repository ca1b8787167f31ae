"""The pages of a study of experiments, made of points alone."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from blockpruner.reporting.pages import Block, Page, Section, write_page
from blockpruner.reporting.plots import Plot
from blockpruner.reporting.table import Table, to_csv
from study.answers.calibration import calibrations, published, variation
from study.answers.claims import claims
from study.answers.curves import (
    ALONE,
    blocks,
    compared,
    healing,
    quality,
    sizes,
    texts,
    trained,
)
from study.answers.masks import critical, healed_masks, masks
from study.answers.searches import searched
from study.answers.tasks import tasks
from study.points import Points


def tables_and_plots(points: Points) -> Iterator[Table | Plot]:
    """Make everything of which something was measured."""
    yield from sizes(points)
    optional: tuple[Table | Plot | None, ...] = (
        healing(points),
        trained(points),
        claims(points),
        texts(points, 0.1),
        texts(points, 0.2),
        calibrations(points),
        variation(points),
        published(points),
        searched(points),
        masks(points),
        critical(points),
        tasks(points),
        quality(points, "quality", compared(points)),
        quality(points, "kinds", ALONE),
        blocks(points),
        healed_masks(points),
    )
    yield from filter(None, optional)


def write_answers(
    out: Path, title: str, runs: Mapping[str, tuple[str, Sequence[str], Points]]
) -> None:
    """Write the tables and figures of a study in the place of `out`, as a whole or not at all.
    `runs` are by name: what a run's model is called, what its results hold for, and its points."""
    sections: list[Section] = []
    digests = {run: points.digest for run, (_, _, points) in runs.items()}
    files = {"rows.json": json.dumps(digests, indent=1)}
    # Names carry the run: all studies publish into one folder.
    for run, (model, conditions, points) in runs.items():
        parts: list[Block] = [*conditions]
        for block in tables_and_plots(points):
            block = replace(block, name=f"{run.removesuffix('-seed')}-{block.name}")
            parts.append(block)
            if isinstance(block, Table):
                files[f"tables/{block.name}.csv"] = to_csv(block.frame.map(_rounded))
        sections.append(Section(model, tuple(parts)))
    write_page(out, Page(title, "", tuple(sections)), files)


def _rounded(value: object) -> object:
    """Six digits of a number, and none behind the ninth place: those differ by processor."""
    if not isinstance(value, float):
        return value
    # + 0.0 makes -0.0 to 0.0
    return round(float(f"{value:.6g}"), 9) + 0.0
