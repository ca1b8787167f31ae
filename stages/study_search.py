"""study_search <run>: every search of a study; traces at data/studies/<run>/scores, what they lead to at plans."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from blockpruner.core.progress import observer
from blockpruner.inputs.checkpoints import checkpoint_identity
from blockpruner.inputs.texts import TEXTS
from blockpruner.methods.planning import Bench
from blockpruner.paper.experiments import variants
from blockpruner.paper.studies import Setting, search_all
from blockpruner.params import load_params, load_run
from blockpruner.scoring.scorers import LazyScorer, make_scorer
from blockpruner.scoring.work import Rows, Scorer
from blockpruner.store.files import read_json, read_table
from blockpruner.store.provenance import fingerprint
from blockpruner.store.trials import trials_root
from stages import STUDIES, run


def main(name: str) -> None:
    settings, runtime, watch = load_run(name), load_params().runtime, observer()
    folder, dtype, remote = STUDIES / name, settings.model.dtype, getattr(settings.model, "trust_remote_code", False)
    checkpoint = folder / "model"

    def scorer() -> Scorer:
        return make_scorer(checkpoint, dtype, runtime, trust_remote_code=remote, note=watch.note, advance=watch.advance)

    @cache
    def dense() -> Any:
        from blockpruner.model.models import load_model, set_threads

        set_threads(runtime.threads)
        return load_model(checkpoint, dtype, runtime.device, remote, runtime.attention)

    def bench(rows: Rows) -> Bench:
        from blockpruner.methods.laco.merging import ModelBench

        return ModelBench(dense(), rows, watch.advance)

    @cache
    def tokenizer() -> Any:
        from blockpruner.inputs.tokenizers import load_tokenizer

        return load_tokenizer(checkpoint, remote)

    def texts(data: Any) -> Sequence[str]:
        table, _ = read_table(folder / "sources" / f"calibration-{fingerprint(data.model_dump())}.parquet", TEXTS)
        return [str(text) for text in table.column("text").to_pylist()]

    identity, config = checkpoint_identity(checkpoint), read_json(checkpoint / "config.json")
    with LazyScorer(scorer) as lazy:
        setting = Setting(name, identity, dtype, config, tokenizer, texts, trials_root(), lazy, bench)
        search_all(variants(settings), folder / "scores", folder / "plans", setting, watch)


if __name__ == "__main__":
    run("study_search", main)
