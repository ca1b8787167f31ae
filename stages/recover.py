"""recover <target>: weights of the pruned model after training, if the target wants it, at data/recovered/<target>."""

from __future__ import annotations

from pathlib import Path

from blockpruner.core.progress import observer
from blockpruner.core.settings import Run
from blockpruner.inputs.calibration import CalibrationSet, check_context
from blockpruner.inputs.texts import read_texts
from blockpruner.params import load_run
from blockpruner.store.files import read_json, replace_directory, write_json
from blockpruner.store.plans import load_plan
from stages import DATA, run


def draw(name: str, settings: Run) -> tuple[CalibrationSet, CalibrationSet | None]:
    """The rows of training and of validation; none holds a text that is evaluated."""
    from blockpruner.evaluation.perplexity import held_out
    from blockpruner.inputs.tokenizers import load_tokenizer
    from blockpruner.recovery.rows import training_rows

    assert settings.recover is not None  # load_params has checked it
    sources, tokenizer = (
        DATA / "sources" / name,
        load_tokenizer(DATA / "models" / name, settings.model.trust_remote_code),
    )
    evaluated = held_out(tokenizer, read_texts(sources / "perplexity.parquet"), settings.evaluate.perplexity)
    texts = read_texts(sources / "recover.parquet")
    rows, validation = training_rows(texts, tokenizer, settings.recover, evaluated.documents, observer().note)
    observer().note(f"{len(rows.rows)} rows, {rows.tokens} tokens, {settings.recover.epochs} epochs")
    return rows, validation


def main(name: str) -> None:
    plan, out = load_plan(DATA / "plans" / name / "plan.json"), DATA / "recovered" / name
    if not plan.recover:
        replace_directory(out, lambda directory: write_json(directory / "recover.json", {"enabled": False}))
        return
    from blockpruner.methods.healed import changed_weights, find_healed, load_healed_, parameter_digests, save_healed
    from blockpruner.model.models import depths_after
    from blockpruner.recovery.training import recover_
    from stages.materialize import pruning_of

    settings, pruning = load_run(plan.run), pruning_of(plan)
    wanted, of = settings.recover, pruning.identity
    assert wanted is not None
    check_context(wanted.seq_len, read_json(pruning.dense / "config.json"), "recover.seq_len")
    compensated = find_healed([DATA / "compensated" / name], of)
    rows, validation = draw(plan.run, settings)
    model = pruning.prune_(pruning.load())
    before = parameter_digests(model)
    if compensated is not None:
        load_healed_(model, compensated)
    teacher = pruning.load() if wanted.distill or wanted.hidden else None
    depths = depths_after(teacher, plan.mask) if teacher and wanted.hidden else ()
    recovered = recover_(
        model, rows, wanted, teacher=teacher, validation=validation, depths=depths, adapters=DATA / "adapters",
        identity=f"{of} {compensated.digest}" if compensated else of, observer=observer(),
    )  # fmt: skip

    def build(directory: Path) -> None:
        words = f"then trained ({wanted.title}) on {len(rows.rows):,} rows of `{wanted.data.title}`"
        weights = changed_weights(recovered.model, before, plan)
        save_healed(directory, weights, of, f"{words}, {rows.tokens:,} tokens", wanted.data, compensated)
        facts = {"enabled": True, **wanted.model_dump(), "rows": len(rows.rows), "tokens": rows.tokens}
        write_json(directory / "recover.json", facts | recovered.facts)

    replace_directory(out, build)


if __name__ == "__main__":
    run("recover", main)
