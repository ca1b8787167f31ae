"""calibrate <run>: token rows of the calibration set, at data/calibration/<run>/rows.parquet."""

from __future__ import annotations

from blockpruner.core.progress import observer
from blockpruner.inputs.calibration import check_context, draw, draw_in_turn, pack, pack_answers
from blockpruner.inputs.texts import TEXTS
from blockpruner.inputs.tokenizers import load_tokenizer
from blockpruner.params import load_run
from blockpruner.store.files import read_json, read_table
from stages import DATA, run


def main(name: str) -> None:
    settings = load_run(name)
    wanted, checkpoint, sources = settings.calibration, DATA / "models" / name, DATA / "sources" / name
    check_context(wanted.seq_len, read_json(checkpoint / "config.json"), "calibration.seq_len")

    tokenizer = load_tokenizer(checkpoint, getattr(settings.model, "trust_remote_code", False))
    if wanted.data.source == "tasks":
        from blockpruner.evaluation.zero_shot import gold_answers  # loads lm-eval

        tasks = {task: gold_answers(task, sources / "tasks", wanted.data.skip) for task in wanted.data.tasks}
        rows = pack_answers(draw_in_turn(tasks, wanted.num_samples, wanted.seed), tokenizer, wanted.seq_len)
    else:
        texts, _ = read_table(sources / "calibration.parquet", TEXTS)
        samples = draw(texts.column("text").to_pylist(), wanted.num_samples, wanted.split, wanted.seed)
        rows = pack(samples, tokenizer, wanted.seq_len, wanted.packing)
    rows.save(DATA / "calibration" / name / "rows.parquet", wanted.data.source)
    observer().note(f"{wanted.num_samples} samples -> {len(rows.rows)} rows, {rows.tokens} tokens ({wanted.packing})")


if __name__ == "__main__":
    run("calibrate", main)
