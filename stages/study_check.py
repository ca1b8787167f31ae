"""study_check <run>: the paper's published answers for a run held against this machine; not part of the DAG.

`python -m flows.paper --check <run>` fetches what it needs and starts it. It writes data/studies/<run>/check, and fails
where an answer differs.
"""

from __future__ import annotations

from blockpruner.core.errors import InputError
from blockpruner.core.progress import observer
from blockpruner.methods.score import open_material
from blockpruner.paper.check import check_of, hold_against
from blockpruner.paper.studies import Setting
from blockpruner.params import load_params, load_run
from blockpruner.settings import resolve
from blockpruner.store.files import write_text
from blockpruner.store.trials import trials_root
from stages import DATA, STUDIES, run
from stages.report import labels
from stages.study_evaluate import dense
from stages.study_search import texts_of


def main(name: str) -> None:
    check, settings, folder = check_of(name), load_run(name), STUDIES / name
    with open_material(folder / "model", settings.model, load_params().runtime, trials_root(), observer()) as material:
        lines = hold_against(
            check,
            settings,
            load_run(check.given),
            dense(name, settings),
            Setting(name, material, texts_of(name, settings)),
            folder / "sources",
            folder / "check",
            DATA / "evaluations",
            DATA / "paper",
            observer(),
        )
    texts = [*map(str, lines), labels(resolve(settings, [])).conditions]
    write_text(folder / "check" / "check.md", "".join(f"- {text}\n" for text in texts))
    for text in texts:
        observer().note(text)
    if not all(line.agrees for line in lines):
        raise InputError(f"published answers are not reproduced: {'; '.join(str(x) for x in lines if not x.agrees)}")


if __name__ == "__main__":
    run("study_check", main)
