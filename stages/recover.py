"""recover <target>: the pruned checkpoint trained with LoRA, if the target wants it, at data/recovered/<target>/hf."""

from __future__ import annotations

from pathlib import Path

from blockpruner.core.progress import observer
from blockpruner.inputs.texts import TEXTS
from blockpruner.params import load_params, load_run
from blockpruner.store.files import read_json, read_table, replace_directory, write_json
from blockpruner.store.plans import load_plan
from stages import DATA, run


def main(name: str) -> None:
    plan, out = load_plan(DATA / "plans" / name / "plan.json"), DATA / "recovered" / name
    if not plan.recover:
        replace_directory(out, lambda directory: write_json(directory / "recover.json", {"enabled": False}))
        return
    from blockpruner.checkpoints.hf import save_recovered
    from blockpruner.inputs.calibration import check_context
    from blockpruner.inputs.tokenizers import load_tokenizer
    from blockpruner.model.models import load_model, set_threads
    from blockpruner.recovery import Recipe, recover_, training_rows
    from blockpruner.store.provenance import model_identity

    runtime, settings, show = load_params().runtime, load_run(plan.run), observer()
    assert settings.recover is not None  # load_params has checked it
    wanted, checkpoint = settings.recover, DATA / "checkpoints" / name / "hf"
    check_context(wanted.seq_len, read_json(checkpoint / "config.json"), "recover.seq_len")
    set_threads(runtime.threads)
    texts = read_table(DATA / "sources" / plan.run / "recover.parquet", TEXTS)[0].column("text").to_pylist()
    tokenizer = load_tokenizer(checkpoint, trust_remote_code=True)
    rows = training_rows(texts, tokenizer, wanted.num_samples, wanted.seq_len, wanted.seed)
    show.note(f"{name}: {len(rows.rows)} samples, {rows.tokens} tokens, {wanted.epochs} epochs")
    recipe = Recipe(**wanted.model_dump(exclude={"data", "num_samples", "seq_len"}))
    model = load_model(checkpoint, settings.model.dtype, runtime.device, trust_remote_code=True)
    identity = model_identity(checkpoint)
    recovered = recover_(model, rows, recipe, adapters=DATA / "adapters", identity=identity, observer=show)

    def build(directory: Path) -> None:
        training = f"trained with LoRA (rank {recipe.rank}) on {len(rows.rows):,} samples, {rows.tokens:,} tokens"
        save_recovered(recovered.model, plan, DATA / "models" / plan.run, directory / "hf", training)
        facts = {"samples": len(rows.rows), "tokens": rows.tokens, "losses": recovered.losses}
        write_json(directory / "recover.json", {"enabled": True, **wanted.model_dump(), **facts})

    replace_directory(out, build)


if __name__ == "__main__":
    run("recover", main)
