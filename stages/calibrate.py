"""calibrate <run>: every token row of a run, at data/calibration/<run>: search, fit, tuning, judge,
train, validation."""

from blockpruner import pipeline
from blockpruner.core.progress import observer
from blockpruner.inputs.calibration import check_context
from blockpruner.inputs.texts import judging_texts, read_texts
from blockpruner.inputs.tokenizers import load_tokenizer
from blockpruner.store.files import read_json
from stages import DATA, run, sections


def main(name: str) -> None:
    from blockpruner.evaluation.perplexity import held_out  # loads torch

    settings, checkpoint, sources = sections(name), DATA / "models" / name, DATA / "sources" / name
    wanted, config, note = (
        settings.calibration,
        read_json(checkpoint / "config.json"),
        observer().note,
    )
    check_context(wanted.seq_len, config, "calibration.seq_len")
    tokenizer = load_tokenizer(checkpoint, settings.model.trust_remote_code)
    texts = {path.stem: read_texts(path) for path in sources.glob("*.parquet")}
    evaluated = held_out(tokenizer, texts["perplexity"], settings.heldout).documents
    judge = judging_texts(texts["judge"]) if settings.judged else ()
    pool = pipeline.Pool(
        texts["calibration"], texts.get("compensate"), texts.get("train"), judge, evaluated
    )
    sections_ = (wanted, settings.compensate, settings.train)
    rows = pipeline.calibrate(*sections_, pool, tokenizer, config, note, judged=settings.judged)
    rows.save(DATA / "calibration" / name, wanted.data.source)
    found = rows.search
    note(
        f"{len(found.rows)} rows, {found.tokens} tokens, of which {found.scored} are scored"
        f" ({wanted.packing})"
    )


if __name__ == "__main__":
    run("calibrate", main)
