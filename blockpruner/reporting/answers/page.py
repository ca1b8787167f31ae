"""The page of a study of experiments, made of points alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from blockpruner.reporting.answers.calibration import calibrations, variation
from blockpruner.reporting.answers.claims import claims
from blockpruner.reporting.answers.curves import (
    blocks,
    quality,
    sizes,
    texts,
)
from blockpruner.reporting.answers.masks import healed_masks, masks
from blockpruner.reporting.answers.searches import searched, starts
from blockpruner.reporting.answers.tasks import tasks
from blockpruner.reporting.pages import Page, Section, write_page
from blockpruner.reporting.plots import Plot
from blockpruner.reporting.points import Points
from blockpruner.reporting.table import Table, to_csv, to_markdown

if TYPE_CHECKING:
    pass


def of_run(points: Points) -> Iterator[Table | Plot]:
    yield claims(points)
    yield sizes(points)
    yield texts(points)
    for made in (
        calibrations(points), variation(points), searched(points), starts(points), masks(points), tasks(points),
        quality(points), blocks(points), healed_masks(points),
    ):  # fmt: skip
        if made is not None:
            yield made


def write_answers(out: Path, title: str, runs: Mapping[str, tuple[str, Sequence[str], Points]]) -> None:
    """Write the tables and figures of a study in the place of `out`, as a whole or not at all.

    Args:
        runs: by name: what its model is called, what its results hold for, and its points.
    """
    sections, files, lines = [], dict[str, str](), [f"# {title}"]
    for run, (model, conditions, points) in runs.items():
        lines += [f"## {model}", "\n".join(f"- {line}" for line in conditions)]
        made = [replace(each, name=f"{run}-{each.name}") for each in of_run(points)]
        sections.append(Section(model, (*conditions, *made)))
        for each in made:
            if isinstance(each, Table):
                files[f"tables/{each.name}.csv"] = to_csv(each)
                lines += [f"### {each.title}", to_markdown(replace(each, title="", notes=())), "\n".join(each.notes)]
            else:
                lines += [f"![{each.caption}](results/{each.name}.png)"]
    files["results.md"] = "\n\n".join(line for line in lines if line) + "\n"
    write_page(out, Page(title, "", tuple(sections)), files)
