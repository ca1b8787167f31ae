"""recover <target>: the pruned checkpoint trained with LoRA, if the target wants it, at data/recovered/<target>/hf."""

from __future__ import annotations

from pathlib import Path

from blockpruner.core.progress import observer
from blockpruner.inputs.calibration import check_context
from blockpruner.inputs.texts import read_texts
from blockpruner.params import load_params, load_run
from blockpruner.store.files import read_json, replace_directory, write_json
from blockpruner.store.plans import load_plan
from stages import DATA, run


def main(name: str) -> None:
    plan, out = load_plan(DATA / "plans" / name / "plan.json"), DATA / "recovered" / name
    if not plan.recover:
        replace_directory(out, lambda directory: write_json(directory / "recover.json", {"enabled": False}))
        return
    from blockpruner.checkpoints.hf import save_recovered
    from blockpruner.inputs.tokenizers import load_export_tokenizer
    from blockpruner.model.classes import has_our_code
    from blockpruner.model.models import load_model, set_threads
    from blockpruner.recovery import recover_, training_rows
    from blockpruner.store.manifest import model_identity, require_verified

    runtime, settings, show = load_params().runtime, load_run(plan.run), observer()
    assert settings.recover is not None  # load_params has checked it
    wanted, checkpoint, dense = settings.recover, DATA / "checkpoints" / name / "hf", DATA / "models" / plan.run
    identity = model_identity(require_verified(checkpoint))
    check_context(wanted.seq_len, read_json(checkpoint / "config.json"), "recover.seq_len")
    set_threads(runtime.threads)
    texts = read_texts(DATA / "sources" / plan.run / "recover.parquet")
    tokenizer = load_export_tokenizer(checkpoint, dense, settings.model.trust_remote_code)
    rows = training_rows(texts, tokenizer, wanted)
    show.note(f"{name}: {len(rows.rows)} samples, {rows.tokens} tokens, {wanted.epochs} epochs")
    model = load_model(checkpoint, settings.model.dtype, runtime.device, has_our_code(checkpoint))
    recovered = recover_(model, rows, wanted, adapters=DATA / "adapters", identity=identity, observer=show)

    def build(directory: Path) -> None:
        data = wanted.data.model_dump()
        repo = data.get("repo")
        origin = repo or data.get("package") or Path(data["path"]).name
        training = f"trained with LoRA (rank {wanted.rank}) on {len(rows.rows):,} samples of `{origin}`"
        training += f", {rows.tokens:,} tokens"
        save_recovered(recovered.model, plan, dense, directory / "hf", training, [repo] if repo else [])
        facts = {"samples": len(rows.rows), "tokens": rows.tokens, "losses": recovered.losses}
        write_json(directory / "recover.json", {"enabled": True, **wanted.model_dump(), **facts})

    replace_directory(out, build)


if __name__ == "__main__":
    run("recover", main)
