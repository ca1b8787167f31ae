"""calibrate <run>: token rows of the calibration set, at data/calibration/<run>/rows.parquet."""

from __future__ import annotations

from blockpruner.core.progress import observer
from blockpruner.core.settings import TaskAnswers
from blockpruner.inputs.calibration import check_context, draw_in_turn, draw_rows, pack_answers
from blockpruner.inputs.texts import read_texts
from blockpruner.inputs.tokenizers import load_tokenizer
from blockpruner.store.files import read_json
from stages import DATA, run, sections


def main(name: str) -> None:
    settings = sections(name)
    wanted, checkpoint, sources = settings.calibration, DATA / "models" / name, DATA / "sources" / name
    check_context(wanted.seq_len, read_json(checkpoint / "config.json"), "calibration.seq_len")
    tokenizer = load_tokenizer(checkpoint, settings.model.trust_remote_code)
    if isinstance(wanted.data, TaskAnswers):
        from blockpruner.evaluation.zero_shot import gold_answers  # loads lm-eval

        tasks = {task: gold_answers(task, sources / "tasks", wanted.data.skip) for task in wanted.data.tasks}
        rows = pack_answers(draw_in_turn(tasks, wanted.samples, wanted.seed), tokenizer, wanted.seq_len)
    else:
        from blockpruner.evaluation.perplexity import held_out  # loads torch

        evaluated = held_out(tokenizer, read_texts(sources / "perplexity.parquet"), settings.heldout)
        texts = read_texts(sources / "calibration.parquet")
        rows = draw_rows(texts, tokenizer, wanted, evaluated.documents, observer().note)
    rows.save(DATA / "calibration" / name / "rows.parquet", wanted.data.source)
    counts = f"{len(rows.rows)} rows, {rows.tokens} tokens, of which {rows.scored} are scored"
    observer().note(f"{wanted.samples} samples{' at most' if rows.adaptive else ''} -> {counts} ({wanted.packing})")


if __name__ == "__main__":
    run("calibrate", main)
