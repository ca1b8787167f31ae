"""score <run>-<method>: search far enough for every target of a method; tables at
data/scores/<run>/<method>/<search>.

What was computed, and how long it took, is at data/provenance/<run>-<method>-search.json, by
search.
"""

from functools import partial

from blockpruner import pipeline
from blockpruner.config.dag import read_dag, require_current
from blockpruner.config.params import load_params, load_run
from blockpruner.core.progress import observer
from blockpruner.methods.score import headline, open_material
from blockpruner.splits import Rows
from blockpruner.store.files import write_json
from blockpruner.store.trials import trials_root
from stages import DATA, run, searched, sections


def main(name: str) -> None:
    entry = read_dag()["searches"][name]
    runtime = load_params().runtime
    progress = observer()
    require_current(machine="machine" in entry)  # in 16 bits the search is of one machine
    run_name, method = entry["run"], entry["method"]
    search = searched(run_name, method)
    model = sections(run_name).model
    checkpoint = DATA / "models" / run_name
    folder = DATA / "scores" / run_name / method
    rows = Rows.load(DATA / "calibration" / run_name, "search", "fit", "judge")
    with open_material(checkpoint, model, runtime, trials_root(), progress) as material:
        # These settings only refuse: the stage does not depend on them.
        targets = load_params().targets_of(run_name)
        settings = load_run(run_name)
        pipeline.check_targets(rows, material.config, runtime, settings, targets, method)
        latency = partial(
            pipeline.latency, material, folder, checkpoint, model, search.score, runtime
        )
        counts = pipeline.score(material, rows, search.score, search.budgets, folder, latency)
    # How much was computed and how long it took is of this machine, and not an output of DVC.
    for search_name, count in counts.items():
        progress.note(
            f"{search_name}: {count['trials_computed']} trials computed, {count['trials_reused']}"
            " reused"
        )
    write_json(DATA / "provenance" / f"{name}-search.json", counts)
    figures = {search_name: headline(count) for search_name, count in counts.items()}
    write_json(DATA / "metrics" / run_name / f"{method}.json", figures)


if __name__ == "__main__":
    run("score", main)
