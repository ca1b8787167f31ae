"""calibrate <run>: token rows of the calibration set, at data/calibration/<run>/rows.parquet."""

from __future__ import annotations

from blockpruner.calibration import check_context, draw, pack
from blockpruner.params import load_run
from blockpruner.progress import observer
from blockpruner.tables import TEXTS, read_json, read_table
from stages import DATA, run


def main(name: str) -> None:
    settings = load_run(name)
    wanted, checkpoint = settings.calibration, DATA / "models" / name
    check_context(wanted.seq_len, read_json(checkpoint / "config.json"), "calibration.seq_len")
    texts, _ = read_table(DATA / "sources" / name / "calibration.parquet", TEXTS)
    samples = draw(texts.column("text").to_pylist(), wanted.num_samples, wanted.split, wanted.seed)

    from transformers import AutoTokenizer

    remote = getattr(settings.model, "trust_remote_code", False)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=remote)
    rows = pack(samples, tokenizer, wanted.seq_len, wanted.packing)
    rows.save(DATA / "calibration" / name / "rows.parquet", wanted.data.source)
    observer().note(f"{len(samples)} samples -> {len(rows.rows)} rows, {rows.tokens} tokens ({wanted.packing})")


if __name__ == "__main__":
    run("calibrate", main)
