"""score <run>-<method>: search far enough for every target of a method; tables at
data/scores/<run>/<method>/<search>.

What was computed, and how long it took, is at data/provenance/<run>-<method>-search.json, by
search.
"""

from functools import partial

from blockpruner import pipeline
from blockpruner.core.progress import observer
from blockpruner.dag import read_dag, require_current
from blockpruner.methods.recipes import compensation
from blockpruner.methods.score import headline, open_material
from blockpruner.params import load_params
from blockpruner.store.files import write_json
from blockpruner.store.trials import trials_root
from stages import DATA, run, searched, sections


def main(name: str) -> None:
    entry, runtime, watch = read_dag()["searches"][name], load_params().runtime, observer()
    require_current(machine="machine" in entry)  # in 16 bits the search is of one machine
    run_name, method = entry["run"], entry["method"]
    asked, model, checkpoint = (
        searched(run_name, method),
        sections(run_name).model,
        DATA / "models" / run_name,
    )
    rows = pipeline.Rows.load(DATA / "calibration" / run_name, "search", "fit", "judge")
    with open_material(checkpoint, model, runtime, trials_root(), watch) as material:
        healed, budget = compensation(None, method), asked.budgets[0] if asked.budgets else "0.1"
        pipeline.require_room(
            material.config, model.dtype, runtime, asked.score, healed, None, budget
        )
        place = DATA / "scores" / run_name / method
        latency = partial(
            pipeline.latency, material, place, checkpoint, model, asked.score, runtime
        )
        found = pipeline.score(material, rows, asked.score, asked.budgets, place, latency)
    for search, counts in found.items():
        watch.note(
            f"{search}: {counts['trials_computed']} trials computed, {counts['trials_reused']}"
            " reused"
        )
    write_json(DATA / "provenance" / f"{name}-search.json", found)
    figures = {search: headline(counts) for search, counts in found.items()}
    write_json(DATA / "metrics" / run_name / f"{method}.json", figures)


if __name__ == "__main__":
    run("score", main)
