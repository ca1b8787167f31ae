"""experiment <study>-<name>: what an experiment of a study measured, at data/evidence/<study>-<name>/points.parquet."""

from blockpruner.core.progress import observer
from blockpruner.experiments import measured
from blockpruner.model.models import set_threads
from blockpruner.params import load_params, load_run
from blockpruner.reporting.points import FILE
from blockpruner.store.files import replace_directory, write_table
from blockpruner.studies import load_study
from stages import DATA, given, run
from stages.benchmark import dense_of


def main(name: str) -> None:
    params = load_params()
    asked = params.experiments[name]
    wanted = given(f"studies/{asked.study}.yaml", lambda: load_study(asked.study).experiments[asked.name])
    settings = given(f"runs/{asked.run}.yaml", lambda: load_run(asked.run))
    dense, sources = dense_of(asked.run), DATA / "sources" / asked.run
    set_threads(params.runtime.threads)
    found = measured(wanted, settings, dense, sources, DATA, params.runtime, observer())
    replace_directory(DATA / "evidence" / name, lambda folder: write_table(folder / FILE, *found))


if __name__ == "__main__":
    run("experiment", main)
