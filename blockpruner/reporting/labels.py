"""What a run is called for people: its model, texts and search in words."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blockpruner.config.sections import Sections
from blockpruner.evaluation.settings import Perplexity, ZeroShot
from blockpruner.healing.settings import Compensate, Train
from blockpruner.inputs.settings import Calibration
from blockpruner.methods.recipes import searches
from blockpruner.reporting.results import RunLabels

EXACT = {"none": "exact", "lazy+race": "lazy + race"}
PINNED = {"data": {"revision"}}
"""What a run file may add to the paper's held-out text, which is the default."""

FORMAT_SUFFIXES = re.compile(r"([.-](gguf|part\d+|q\d\w*(-k)?(-[sml])?))+$", re.IGNORECASE)


def origin(source: Any) -> str:
    """One line on where a source's bytes are from."""
    match source.source:
        case "pypi":
            file = getattr(source, "file", "")
            return f"{file} of {source.package}" if file else str(source.package)
        case "pypi-parts":
            return f"{source.parts[0].file} ({len(source.parts)} parts) of {source.title}"
        case "path":
            return str(source.path)
        case "mix":
            titles = [text.title if text.kind else origin(text) for text in source.of]
            titles = list(dict.fromkeys(titles))
            # Sources that name their kinds of text are listed behind the mix's own title.
            if all(text.kind for text in source.of):
                return f"{source.title} ({', '.join(titles)})"
            return " + ".join(titles)
    return str(getattr(source, "repo", "the tasks' own hub data sets"))


def name_of(source: Any) -> str:
    """What people call a model, from its repository, folder or file."""
    address = getattr(source, "repo", None) or getattr(source, "path", None)
    # A package's file has neither: its name is the first word of its origin.
    if not address:
        address = origin(source).partition(" ")[0]
    return FORMAT_SUFFIXES.sub("", Path(address).name)


def labels(settings: Sections) -> RunLabels:
    calibration, heldout = settings.calibration, settings.heldout
    heldout_text = f"{origin(heldout.data)}, rows of {heldout.seq_len} tokens"
    if heldout.packing == "documents":
        heldout_text += " of documents from their beginning"
    is_wikitext2 = heldout.model_dump(exclude=PINNED) == Perplexity().model_dump(exclude=PINNED)
    return RunLabels(
        name=name_of(settings.model),
        model=f"{origin(settings.model)}, {settings.model.dtype}",
        calibration=_calibration(calibration),
        heldout=heldout_text,
        tasks=_tasks(settings.zero_shot),
        wikitext2=is_wikitext2,
        compensation=_compensation(settings.compensate, calibration),
        training=_training(settings.train) if settings.train else "",
        search="; ".join(_searches(settings)),
    )


def _calibration(settings: Calibration) -> str:
    count = f"{settings.num_samples} samples"
    if settings.num_rows:
        count = f"{settings.num_rows} rows"
    return (
        f"{origin(settings.data)}; {count}, {settings.packing}, rows of up to {settings.seq_len}"
        f" tokens, scored: {settings.score}, seed {settings.seed}"
    )


def _tasks(settings: ZeroShot) -> str:
    bos = "with the BOS that the tokenizer adds" if settings.bos else "without BOS"
    limit = settings.limit or "to last"
    return f"{origin(settings.data)}; zero-shot, first {limit} items, {bos}"


def _compensation(settings: Compensate, calibration: Calibration) -> str:
    return (
        f"{origin(settings.data or calibration.data)}; up to {settings.num_rows} rows of"
        f" {settings.seq_len} tokens, perplexity on the {settings.validation:.0%} held out"
    )


def _training(settings: Train) -> str:
    count = f"{settings.num_samples:,} samples"
    if settings.num_rows:
        count = f"{settings.num_rows:,} rows"
    return (
        f"{settings.title}; {count} of {origin(settings.data)}, learning rate"
        f" {settings.learning_rate:g}, epochs {settings.epochs}"
    )


def _searches(settings: Sections) -> Iterator[str]:
    """Which candidates each method leaves out."""
    for method, section in settings.searches.items():
        accelerations = [
            search.acceleration or "none" for search in searches(section.score).values()
        ]
        names = [EXACT.get(name, name) for name in dict.fromkeys(accelerations)]
        yield f"{method}: {', '.join(names)}"
