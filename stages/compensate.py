"""compensate <target>: weights that make up for what is gone, without training, at data/compensated/<target>."""

from __future__ import annotations

from blockpruner.core.progress import observer
from blockpruner.core.settings import TaskAnswers
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.inputs.texts import read_texts
from blockpruner.settings import Sections
from blockpruner.store.files import read_json, replace_directory, write_json
from blockpruner.store.plans import load_plan
from stages import DATA, run, sections


def rows_of(name: str, settings: Sections, calibration: CalibrationSet) -> CalibrationSet:
    """Rows of texts of which none is evaluated. Of a run that is calibrated on answers, those, with every token
    scored."""
    from blockpruner.compensation.rows import compensation_rows
    from blockpruner.evaluation.perplexity import held_out
    from blockpruner.inputs.tokenizers import load_tokenizer

    wanted, sources = settings.compensate, DATA / "sources" / name
    if wanted.data is None and isinstance(settings.calibration.data, TaskAnswers):
        return CalibrationSet(tuple(tuple(max(t, ~t) for t in row) for row in calibration.rows[: wanted.num_rows]))
    tokenizer = load_tokenizer(DATA / "models" / name, settings.model.trust_remote_code)
    evaluated = held_out(tokenizer, read_texts(sources / "perplexity.parquet"), settings.heldout)
    texts = read_texts(sources / f"{'compensate' if wanted.data else 'calibration'}.parquet")
    context = read_json(DATA / "models" / name / "config.json").get("max_position_embeddings", wanted.seq_len)
    return compensation_rows(texts, tokenizer, wanted, evaluated.documents, context)


def main(name: str) -> None:
    plan, out = load_plan(DATA / "plans" / name / "plan.json"), DATA / "compensated" / name
    if plan.compensate == "none":
        replace_directory(out, lambda directory: write_json(directory / "compensate.json", {"enabled": False}))
        return
    from blockpruner.compensation.compensate import write_compensated
    from stages.materialize import pruning_of

    settings, pruning = sections(plan.run), pruning_of(plan)
    data = settings.compensate.data or settings.calibration.data
    rows = rows_of(plan.run, settings, pruning.rows)
    write_compensated(out, pruning, rows, settings.compensate, data, observer())


if __name__ == "__main__":
    run("compensate", main)
