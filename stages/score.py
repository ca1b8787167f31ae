"""score <run>: search far enough for every target of the run; tables at data/scores/<run>/<method>/<search>.

What was computed, and how long it took, is at data/provenance/<run>-search.json, by method and search.
"""

from functools import partial

from blockpruner import pipeline
from blockpruner.core.progress import observer
from blockpruner.methods.recipes import compensation
from blockpruner.methods.score import headline, open_material
from blockpruner.params import load_params
from blockpruner.store.files import write_json
from blockpruner.store.trials import trials_root
from stages import DATA, run, sections


def main(name: str) -> None:
    runtime, settings, watch = load_params().runtime, sections(name), observer()
    checkpoint, model, found = DATA / "models" / name, settings.model, {}
    rows = pipeline.Rows.load(DATA / "calibration" / name, "search", "fit", "judge")
    with open_material(checkpoint, model, runtime, trials_root(), watch) as material:
        for method, asked in settings.score.items():
            healed, budget = compensation(None, method), asked.budgets[0] if asked.budgets else "0.1"
            pipeline.require_room(material.config, model.dtype, runtime, asked.score, healed, None, budget)
            place = DATA / "scores" / name / method
            latency = partial(pipeline.latency, material, place, checkpoint, model, asked.score, runtime)
            found[method] = pipeline.score(material, rows, asked.score, asked.budgets, place, latency)
            for search, counts in found[method].items():
                watch.note(f"{search}: {counts['trials_computed']} trials computed, {counts['trials_reused']} reused")
    write_json(DATA / "provenance" / f"{name}-search.json", found)
    figures = {method: {key: headline(counts) for key, counts in own.items()} for method, own in found.items()}
    write_json(DATA / "metrics" / name / "score.json", figures)


if __name__ == "__main__":
    run("score", main)
