"""calibrate <run>: every token row of a run, at data/calibration/<run>: search, fit, tuning, judge,
train, validation."""

from blockpruner import splits
from blockpruner.core.progress import observer
from blockpruner.inputs.calibration import check_context
from blockpruner.inputs.texts import judging_texts, read_texts
from blockpruner.inputs.tokenizers import load_tokenizer
from blockpruner.splits import Pool
from blockpruner.store.files import read_json
from stages import DATA, run, sections


def main(name: str) -> None:
    from blockpruner.evaluation.perplexity import held_out  # loads torch

    settings = sections(name)
    checkpoint = DATA / "models" / name
    config = read_json(checkpoint / "config.json")
    note = observer().note
    check_context(settings.calibration.seq_len, config, "calibration.seq_len")
    tokenizer = load_tokenizer(checkpoint, settings.model.trust_remote_code)
    files = (DATA / "sources" / name).glob("*.parquet")
    texts = {path.stem: read_texts(path) for path in files}
    evaluated = held_out(tokenizer, texts["perplexity"], settings.heldout).documents
    judge = judging_texts(texts["judge"]) if settings.judged else ()
    pool = Pool(texts["calibration"], texts.get("compensate"), texts.get("train"), judge, evaluated)
    rows = splits.calibrate(
        settings.calibration,
        settings.compensate,
        settings.train,
        pool,
        tokenizer,
        config,
        note,
        judged=settings.judged,
    )
    rows.save(DATA / "calibration" / name, settings.calibration.data.source)
    search = rows.search
    note(
        f"{len(search.rows)} rows, {search.tokens} tokens, of which {search.scored} are scored"
        f" ({settings.calibration.packing})"
    )


if __name__ == "__main__":
    run("calibrate", main)
