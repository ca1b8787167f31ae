"""recover <target>: weights of the pruned model after training, if the target wants it, at data/recovered/<target>."""

from __future__ import annotations

from dataclasses import replace

from blockpruner.core.progress import observer
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.inputs.texts import read_texts
from blockpruner.settings import Sections
from blockpruner.store.files import replace_directory, write_json
from blockpruner.store.plans import load_plan
from stages import DATA, run, sections


def draw(name: str, settings: Sections) -> tuple[CalibrationSet, CalibrationSet | None]:
    """The rows of training and of validation; none holds a text that is evaluated."""
    from blockpruner.evaluation.perplexity import held_out
    from blockpruner.inputs.tokenizers import load_tokenizer
    from blockpruner.recovery.rows import training_rows

    assert settings.train is not None  # load_params has checked it
    sources, tokenizer = (
        DATA / "sources" / name,
        load_tokenizer(DATA / "models" / name, settings.model.trust_remote_code),
    )
    evaluated = held_out(tokenizer, read_texts(sources / "perplexity.parquet"), settings.heldout)
    texts = read_texts(sources / "recover.parquet")
    rows, validation = training_rows(texts, tokenizer, settings.train, evaluated.documents, observer().note)
    observer().note(f"{len(rows.rows)} rows, {rows.tokens} tokens, {settings.train.epochs} epochs")
    return rows, validation


def main(name: str) -> None:
    plan, out = load_plan(DATA / "plans" / name / "plan.json"), DATA / "recovered" / name
    if not plan.recover:
        replace_directory(out, lambda directory: write_json(directory / "recover.json", {"enabled": False}))
        return
    from blockpruner.methods.healed import find_healed
    from blockpruner.recovery.recover import write_recovered
    from stages.materialize import pruning_of

    settings, pruning = sections(plan.run), pruning_of(plan)
    assert settings.train is not None
    pruning = replace(pruning, healed=find_healed([DATA / "compensated" / name], pruning.identity))
    rows, validation = draw(plan.run, settings)
    write_recovered(out, pruning, settings.train, rows, validation, DATA / "adapters", observer())


if __name__ == "__main__":
    run("recover", main)
