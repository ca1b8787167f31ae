"""Our own texts as tests have them: two small kinds in files. The real ones are downloaded from a
package index."""

import json
from pathlib import Path
from random import Random

import yaml

from blockpruner.inputs import sources

REAL = sources.OURS
WORDS = (
    "the",
    "a",
    "cat",
    "dog",
    "runs",
    "sits",
    "on",
    "under",
    "red",
    "blue",
    "house",
    "tree",
    "was",
    "very",
    "small",
)


def texts_of(kind: str, count: int = 48) -> list[str]:
    chance = Random(kind)
    return [f"{kind} {number} " + " ".join(chance.choices(WORDS, k=40)) for number in range(count)]


def write_shipped(folder: Path) -> dict[str, object]:
    """The files of the texts in a folder, and the source `wide` over them."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for kind in ("tales", "code"):
        path = folder / f"{kind}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts_of(kind)))
        parts.append({"source": "path", "path": str(path), "kind": kind, "share": 0.5})
    return {"source": "mix", "of": parts}


def replace_shipped(folder: Path) -> None:
    """Let this process have these texts."""
    own = folder / sources.SOURCES
    values = yaml.safe_load(REAL.read_text(encoding="utf-8")) | {
        sources.SHIPPED: write_shipped(folder)
    }
    own.write_text(yaml.safe_dump(values))
    sources.OURS = own
