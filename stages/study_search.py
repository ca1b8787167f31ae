"""study_search <run>: every search of a study; traces at data/studies/<run>/scores, what they lead to at plans."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from blockpruner.core.progress import observer
from blockpruner.core.settings import Texts
from blockpruner.inputs.texts import read_texts
from blockpruner.methods.score import open_material
from blockpruner.paper.experiments import study_of, variants
from blockpruner.paper.studies import Setting, StudyTexts, search_all
from blockpruner.params import load_params, load_run
from blockpruner.settings import Run
from blockpruner.store.provenance import fingerprint
from blockpruner.store.trials import trials_root
from stages import STUDIES, run


def texts_of(name: str, settings: Run) -> StudyTexts:
    """What was fetched for a run's study."""
    folder = STUDIES / name

    @cache
    def tokenizer() -> Any:
        from blockpruner.inputs.tokenizers import load_tokenizer  # loads transformers

        return load_tokenizer(folder / "model", settings.model.trust_remote_code)

    def samples(data: Texts) -> list[str]:
        return read_texts(folder / "sources" / f"calibration-{fingerprint(data.model_dump())}.parquet")

    def evaluated() -> Sequence[str]:
        from blockpruner.evaluation.perplexity import held_out  # loads torch

        texts = read_texts(folder / "sources" / "perplexity.parquet")
        found = list(held_out(tokenizer(), texts, settings.evaluate.perplexity).documents)
        wikitext, path = study_of(settings).wikitext, folder / "sources" / "wikitext.parquet"
        if wikitext is not None and path.exists():
            found += held_out(tokenizer(), read_texts(path), wikitext).documents
        return found

    return StudyTexts(tokenizer, samples, evaluated)


def main(name: str) -> None:
    settings, runtime, folder = load_run(name), load_params().runtime, STUDIES / name
    with open_material(folder / "model", settings.model, runtime, trials_root(), observer()) as material:
        setting = Setting(name, material, texts_of(name, settings))
        search_all(variants(settings), folder / "scores", folder / "plans", setting)


if __name__ == "__main__":
    run("study_search", main)
