"""What a run is called for people: its model, texts and search in words."""

import re
from pathlib import Path
from typing import Any

from blockpruner.evaluation.settings import Perplexity
from blockpruner.methods.recipes import searches
from blockpruner.reporting.results import RunLabels
from blockpruner.settings import Sections

EXACT = {"none": "exact", "lazy+race": "lazy + race"}
PINNED = {"data": {"revision"}}
"""What a run file may add to the paper's held-out text, which is the default."""


def origin(source: Any) -> str:
    """One line on where a source's bytes are from."""
    if source.source == "pypi":
        return " of ".join(part for part in (getattr(source, "file", ""), source.package) if part)
    if source.source == "pypi-parts":
        return f"{source.parts[0].file} ({len(source.parts)} parts) of {source.title}"
    if source.source == "path":
        return str(source.path)
    if source.source == "mix":
        places = dict.fromkeys(one.title if one.kind else origin(one) for one in source.of)
        return (
            f"{source.title} ({', '.join(places)})"
            if all(one.kind for one in source.of)
            else " + ".join(places)
        )
    return str(getattr(source, "repo", "the tasks' own hub data sets"))


def name_of(source: Any) -> str:
    """What people call a model, from its repository, folder or file."""
    place = str(
        getattr(source, "repo", None)
        or getattr(source, "path", None)
        or origin(source).partition(" ")[0]
    )
    return re.sub(
        r"([.-](gguf|part\d+|q\d\w*(-k)?(-[sml])?))+$", "", Path(place).name, flags=re.IGNORECASE
    )


def labels(settings: Sections) -> RunLabels:
    calibration, heldout, tasks, train = (
        settings.calibration,
        settings.heldout,
        settings.zero_shot,
        settings.train,
    )
    compensate, ways = settings.compensate, dict[str, str]()
    for method, own in settings.searches.items():
        kinds = dict.fromkeys(one.acceleration or "none" for one in searches(own.score).values())
        ways[method] = ", ".join(EXACT.get(kind, kind) for kind in kinds)
    return RunLabels(
        name=name_of(settings.model),
        model=f"{origin(settings.model)}, {settings.model.dtype}",
        calibration=f"{origin(calibration.data)}; "
        + (
            f"{calibration.num_rows} rows"
            if calibration.num_rows
            else f"{calibration.num_samples} samples"
        )
        + f", {calibration.packing}, rows of up to {calibration.seq_len} tokens, scored:"
        f" {calibration.score}, seed {calibration.seed}",
        heldout=f"{origin(heldout.data)}, rows of {heldout.seq_len} tokens"
        + (" of documents from their beginning" if heldout.packing == "documents" else ""),
        tasks=(
            f"{origin(tasks.data)}; zero-shot, first {tasks.limit or 'to last'} items, "
            f"{'with the BOS that the tokenizer adds' if tasks.bos else 'without BOS'}"
        ),
        wikitext2=heldout.model_dump(exclude=PINNED) == Perplexity().model_dump(exclude=PINNED),
        compensation=(
            f"{origin(compensate.data or calibration.data)}; up to {compensate.num_rows} rows of "
            f"{compensate.seq_len} tokens, perplexity on the {compensate.validation:.0%} held out"
        ),
        training=(
            f"{train.title}; "
            + (f"{train.num_rows:,} rows" if train.num_rows else f"{train.num_samples:,} samples")
            + f" of {origin(train.data)}, learning rate {train.learning_rate:g}, epochs"
            f" {train.epochs}"
            if train
            else ""
        ),
        search="; ".join(f"{method}: {how}" for method, how in ways.items()),
    )
