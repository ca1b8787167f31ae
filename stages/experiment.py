"""experiment <study>-<name>: what an experiment of a study measured, at
data/evidence/<study>-<name>/points.parquet."""

from pathlib import Path

from blockpruner.config.params import load_params
from blockpruner.config.sections import Run
from blockpruner.core.progress import observer
from blockpruner.evaluation.settings import Evaluate
from blockpruner.store.files import replace_directory, write_table
from stages import DATA, checked, run, runtime, sections, write_manifest
from stages.benchmark import dense_of
from study.experiments import measured
from study.points import FILE
from study.studies import load_study


def main(name: str) -> None:
    entry = load_params().experiments[name]
    experiment = checked(
        f"studies/{entry.study}.yaml", lambda: load_study(entry.study).experiments[entry.name]
    )
    values = sections(entry.run)
    evaluate = Evaluate(perplexity=values.heldout, zero_shot=values.zero_shot, speed=None)
    settings = Run(
        model=values.model,
        calibration=values.calibration,
        score=values.score.score,
        evaluate=evaluate,
    )
    settings = settings.model_copy(update={"compensate": values.compensate, "train": values.train})
    sources = DATA / "sources" / entry.run
    points, facts = measured(
        experiment, settings, dense_of(entry.run), sources, DATA, runtime(), observer()
    )

    def build(directory: Path) -> None:
        write_table(directory / FILE, points, facts)

    replace_directory(DATA / "evidence" / name, build)
    write_manifest(entry.study, name)


if __name__ == "__main__":
    run("experiment", main)
