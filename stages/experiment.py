"""experiment <study>-<name>: what an experiment of a study measured, at
data/evidence/<study>-<name>/points.parquet."""

from blockpruner.core.progress import observer
from blockpruner.evaluation.settings import Evaluate
from blockpruner.experiments import measured
from blockpruner.params import load_params
from blockpruner.reporting.points import FILE
from blockpruner.settings import Run
from blockpruner.store.files import replace_directory, write_table
from blockpruner.studies import load_study
from stages import DATA, given, run, runtime, sections, write_manifest
from stages.benchmark import dense_of


def main(name: str) -> None:
    params = load_params()
    asked = params.experiments[name]
    wanted = given(
        f"studies/{asked.study}.yaml", lambda: load_study(asked.study).experiments[asked.name]
    )
    own = sections(asked.run)
    evaluate = Evaluate(perplexity=own.heldout, zero_shot=own.zero_shot, speed=None)
    settings = Run(
        model=own.model, calibration=own.calibration, score=own.score.score, evaluate=evaluate
    )
    settings = settings.model_copy(update={"compensate": own.compensate, "train": own.train})
    dense, sources = dense_of(asked.run), DATA / "sources" / asked.run
    found = measured(wanted, settings, dense, sources, DATA, runtime(), observer())
    replace_directory(DATA / "evidence" / name, lambda folder: write_table(folder / FILE, *found))
    write_manifest(asked.study, name)


if __name__ == "__main__":
    run("experiment", main)
