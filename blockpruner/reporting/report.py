"""The report of all targets: report.md, index.html, plots/ and the CSV files for `dvc plots show`, written at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from blockpruner.reporting.comparison import comparisons
from blockpruner.reporting.html import render_html
from blockpruner.reporting.inputs import RunLabels, read_studies
from blockpruner.reporting.markdown import render_markdown
from blockpruner.reporting.page import build_page
from blockpruner.reporting.tables import curve_csv, iterations_csv, pareto_csv
from blockpruner.store.files import replace_directory


def write_report(
    out: Path, title: str, targets: Sequence[str], labels: Mapping[str, RunLabels], data: Path, plots: bool
) -> None:
    """Write the report of `targets` in the place of `out`.

    Args:
        out: folder of the report; replaced as a whole, or left as it is on failure.
        targets: names, of folders in data/plans and data/results.
        labels: by run, what its model and data are.
        data: folder of plans/, results/ and metrics/.
        plots: whether to draw; the CSV files are written in any case.
    """
    studies = read_studies(targets, labels, data)
    page = build_page(title, studies, plots)

    def build(directory: Path) -> None:
        files = {
            "report.md": render_markdown(page),
            "index.html": render_html(page),
            "curve.csv": curve_csv(studies),
            "iterations.csv": iterations_csv(studies),
            "pareto.csv": pareto_csv(comparisons(studies)),
        }
        for name, text in files.items():
            (directory / name).write_text(text, encoding="utf-8")
        for plot in page.plots:
            (directory / "plots").mkdir(exist_ok=True)
            (directory / "plots" / f"{plot.name}.svg").write_text(plot.svg, encoding="utf-8")
            (directory / "plots" / f"{plot.name}.png").write_bytes(plot.png)

    replace_directory(out, build)
