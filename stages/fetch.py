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
    wanted, note, out = sections(name).sources, observer().note, DATA / "sources" / name
    check_tasks(wanted.zero_shot)
    model = DATA / "models" / name
    fetch_checkpoint(wanted.model, model, CACHE, PINS, note)
    template = partial(
        conversation, cache(lambda: load_tokenizer(model, wanted.model.trust_remote_code))
    )

    def build(directory: Path) -> None:
        for role, data in wanted.texts.items():
            found = load_texts(data, CACHE, PINS, template)
            write_texts(directory / f"{role}.parquet", found)
            note(f"{role}: {len(found)} texts")
        fetch_tasks(wanted.zero_shot, directory / "tasks", out / "tasks", CACHE, PINS, note)

    replace_directory(out, build)


if __name__ == "__main__":
    run("fetch", main)
