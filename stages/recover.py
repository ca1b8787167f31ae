"""recover <target>: the pruned checkpoint trained, if the target wants it, at data/recovered/<target>/hf."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from blockpruner.core.progress import observer
from blockpruner.core.settings import HubTexts, Recover, Run
from blockpruner.inputs.calibration import CalibrationSet, check_context
from blockpruner.inputs.texts import read_texts
from blockpruner.params import load_params, load_run
from blockpruner.store.files import read_json, replace_directory, write_json
from blockpruner.store.plans import load_plan
from stages import DATA, run


def draw(settings: Run, tokenizer: Any, sources: Path) -> tuple[CalibrationSet, CalibrationSet | None]:
    """The rows of training and of validation; none holds a text that is evaluated."""
    from blockpruner.evaluation.perplexity import held_out
    from blockpruner.recovery.rows import training_rows

    assert settings.recover is not None
    evaluated = held_out(tokenizer, read_texts(sources / "perplexity.parquet"), settings.evaluate.perplexity)
    texts = read_texts(sources / "recover.parquet")
    rows, validation = training_rows(texts, tokenizer, settings.recover, evaluated.documents, observer().note)
    observer().note(f"{len(rows.rows)} rows, {rows.tokens} tokens, {settings.recover.epochs} epochs")
    return rows, validation


def described(wanted: Recover, rows: CalibrationSet) -> str:
    """How the model was trained, for its card."""
    data = wanted.data.model_dump()
    origin = data.get("repo") or data.get("package") or Path(data["path"]).name
    return f"trained ({wanted.title}) on {len(rows.rows):,} rows of `{origin}`, {rows.tokens:,} tokens"


def main(name: str) -> None:
    plan, out = load_plan(DATA / "plans" / name / "plan.json"), DATA / "recovered" / name
    if not plan.recover:
        replace_directory(out, lambda directory: write_json(directory / "recover.json", {"enabled": False}))
        return
    from blockpruner.checkpoints.hf import save_recovered
    from blockpruner.inputs.tokenizers import load_export_tokenizer
    from blockpruner.model.classes import has_our_code
    from blockpruner.model.models import depths_after, load_model, set_threads
    from blockpruner.recovery.training import recover_
    from blockpruner.store.manifest import model_identity, require_verified

    runtime, settings, show = load_params().runtime, load_run(plan.run), observer()
    wanted, checkpoint, dense = settings.recover, DATA / "checkpoints" / name / "hf", DATA / "models" / plan.run
    assert wanted is not None  # load_params has checked it
    dtype, device, trusted = settings.model.dtype, runtime.device, settings.model.trust_remote_code
    identity = model_identity(require_verified(checkpoint))
    check_context(wanted.seq_len, read_json(checkpoint / "config.json"), "recover.seq_len")
    set_threads(runtime.threads)
    tokenizer = load_export_tokenizer(checkpoint, dense, trusted)
    rows, validation = draw(settings, tokenizer, DATA / "sources" / plan.run)
    model = load_model(checkpoint, dtype, device, has_our_code(checkpoint))
    teacher = load_model(dense, dtype, device, trusted) if wanted.distill or wanted.hidden else None
    depths = depths_after(teacher, plan.mask) if teacher and wanted.hidden else ()
    recovered = recover_(
        model, rows, wanted, teacher=teacher, validation=validation, depths=depths,
        adapters=DATA / "adapters", identity=identity, observer=show,
    )  # fmt: skip

    def build(directory: Path) -> None:
        repos = [wanted.data.repo] if isinstance(wanted.data, HubTexts) else []
        save_recovered(recovered.model, plan, dense, directory / "hf", described(wanted, rows), repos)
        facts = {"enabled": True, **wanted.model_dump(), "rows": len(rows.rows), "tokens": rows.tokens}
        write_json(directory / "recover.json", facts | recovered.facts)

    replace_directory(out, build)


if __name__ == "__main__":
    run("recover", main)
