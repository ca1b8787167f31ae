"""fetch <run>: model, calibration and held-out texts and benchmark items, at data/models and
data/sources."""

from functools import cache, partial
from pathlib import Path

from blockpruner.core.progress import observer
from blockpruner.evaluation.tasks import check_tasks, fetch_tasks
from blockpruner.inputs.checkpoints import fetch_checkpoint
from blockpruner.inputs.texts import load_texts, write_texts
from blockpruner.inputs.tokenizers import conversation, load_tokenizer
from blockpruner.store.files import replace_directory
from stages import CACHE, DATA, PINS, run, sections


def main(name: str) -> None:
    sources = sections(name).sources
    note = observer().note
    out = DATA / "sources" / name
    model = DATA / "models" / name
    check_tasks(sources.zero_shot)
    fetch_checkpoint(sources.model, model, CACHE, PINS, note)
    tokenizer = cache(lambda: load_tokenizer(model, sources.model.trust_remote_code))
    template = partial(conversation, tokenizer)

    def build(directory: Path) -> None:
        for role, data in sources.texts.items():
            texts = load_texts(data, CACHE, PINS, template)
            write_texts(directory / f"{role}.parquet", texts)
            note(f"{role}: {len(texts)} texts")
        fetch_tasks(sources.zero_shot, directory / "tasks", out / "tasks", CACHE, PINS, note)

    replace_directory(out, build)


if __name__ == "__main__":
    run("fetch", main)
