"""The pages of a study of experiments, made of points alone."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from blockpruner.reporting.answers.calibration import calibrations, published, variation
from blockpruner.reporting.answers.claims import claims
from blockpruner.reporting.answers.curves import (
    ALONE,
    blocks,
    compared,
    healing,
    quality,
    sizes,
    texts,
    trained,
)
from blockpruner.reporting.answers.masks import critical, healed_masks, masks
from blockpruner.reporting.answers.searches import searched
from blockpruner.reporting.answers.tasks import tasks
from blockpruner.reporting.pages import Page, Section, write_page
from blockpruner.reporting.plots import Plot
from blockpruner.reporting.points import Points
from blockpruner.reporting.table import Table, to_csv


def of_run(points: Points) -> Iterator[Table | Plot]:
    yield from sizes(points)
    for made in (
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
    ):
        if made is not None:
            yield made


def write_answers(
    out: Path, title: str, runs: Mapping[str, tuple[str, Sequence[str], Points]]
) -> None:
    """Write the tables and figures of a study in the place of `out`, as a whole or not at all.
    `runs` are by name: what a run's model is called, what its results hold for, and its points."""
    sections = list[Section]()
    files = {
        "rows.json": json.dumps(
            {run: points.digest for run, (_, _, points) in runs.items()}, indent=1
        )
    }
    for run, (model, conditions, points) in runs.items():
        made = [
            replace(each, name=f"{run.removesuffix('-seed')}-{each.name}")
            for each in of_run(points)
        ]
        sections.append(Section(model, (*conditions, *made)))
        files |= {
            f"tables/{each.name}.csv": to_csv(each.frame.map(_rounded))
            for each in made
            if isinstance(each, Table)
        }
    write_page(out, Page(title, "", tuple(sections)), files)


def _rounded(value: object) -> object:
    """Six digits of a number, and none behind the ninth place: those differ by processor."""
    return round(float(f"{value:.6g}"), 9) + 0.0 if isinstance(value, float) else value
