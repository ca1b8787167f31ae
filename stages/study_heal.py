"""study_heal <run>: weights of the models of a study that are compensated or trained, at data/studies/<run>/healed."""

from __future__ import annotations

from blockpruner.core.progress import observer
from blockpruner.model.models import set_threads
from blockpruner.paper.healing import Healer
from blockpruner.params import load_params, load_run
from stages import DATA, STUDIES, run
from stages.study_search import texts_of


def main(name: str) -> None:
    settings, runtime = load_run(name), load_params().runtime
    set_threads(runtime.threads)
    healer = Healer(settings, texts_of(name, settings), STUDIES / name, DATA / "adapters", runtime.device, observer())
    healer.heal_all()


if __name__ == "__main__":
    run("study_heal", main)
