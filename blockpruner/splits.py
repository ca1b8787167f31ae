"""The token rows of a run, by their use.

Texts on which models are evaluated or judged are seen by no search, no fit and no training.

Decides which texts are set aside. How rows are drawn from texts is decided in `inputs.calibration`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from blockpruner.core.errors import InputError
from blockpruner.core.families import Config
from blockpruner.core.settings import Texts
from blockpruner.evaluation.settings import Perplexity
from blockpruner.healing.settings import Compensate, Train
from blockpruner.inputs.calibration import (
    CalibrationSet,
    draw,
    draw_rows,
    require_embedded,
    sharing,
)
from blockpruner.inputs.settings import Calibration
from blockpruner.inputs.sources import shipped_texts
from blockpruner.inputs.texts import TextKind, by_kind, judging_texts

Note = Callable[[str], object]
"""Receives a line for the user."""

NONE = CalibrationSet(())

JUDGING_SHARE = 8
"""One text in 8 of each kind is set aside to judge."""

JUDGING_ROWS, JUDGING_TOKENS = 12, 128
"""The most rows of each kind of text that judge, and their tokens."""


@dataclass(frozen=True)
class Pool:
    """The texts that a run draws from, by their use."""

    search: Sequence[str]
    """Calibration texts."""
    fit: Sequence[str] | None = None
    """Texts of the compensation; None: those of the search."""
    train: Sequence[str] | None = None
    judge: Sequence[str] = ()
    """Texts of further kinds that judge. A kind that the fit has, too, is judged by texts of the
    fit."""
    evaluated: Sequence[str] = ()
    """Texts on which models are evaluated."""


@dataclass(frozen=True)
class Rows:
    """Every token row that decides something about a pruned model."""

    search: CalibrationSet
    """The rows on which masks are scored."""
    fit: CalibrationSet = NONE
    """The rows to which weights are fitted."""
    tuning: CalibrationSet = NONE
    """The rows on which the strength of a fit is chosen."""
    judge: CalibrationSet = NONE
    """The rows that choose between proposals and accept a fit, kind after kind. Neither search nor
    fit nor training has seen their texts."""
    train: CalibrationSet = NONE
    validation: CalibrationSet = NONE
    """The rows that choose the best state of training."""

    def save(self, folder: Path, source: str) -> None:
        for split in fields(self):
            getattr(self, split.name).save(folder / f"{split.name}.parquet", source)

    @classmethod
    def load(cls, folder: Path, *names: str) -> Rows:
        """Read the splits of these names, or all."""
        names = names or tuple(split.name for split in fields(cls))
        return cls(**{name: CalibrationSet.load(folder / f"{name}.parquet") for name in names})


def our_judging_texts(load: Callable[[Texts], Sequence[str]], note: Note) -> Sequence[str]:
    """Our own texts, which judge what kinds of text lose that the user's texts do not have.

    Without a network they may be out of reach. Nothing but the judging asks for them here, so the
    run goes on without them, and `note` receives a warning.
    """
    try:
        texts = load(shipped_texts())
    except InputError as error:
        note(f"warning: what other kinds of text lose is not judged: {error}")
        texts = ()
    return judging_texts(texts)


def calibrate(
    calibration: Calibration,
    compensate: Compensate,
    train: Train | None,
    pool: Pool,
    tokenizer: Any,
    config: Config,
    note: Note,
    *,
    judged: bool,
    at_most: bool = False,
) -> Rows:
    """Draw every row of a run; `note` receives what was left out.

    Args:
        judged: whether rows are set aside that judge.
        at_most: whether fewer rows than are asked for will do.

    Raises:
        InputError: the texts are too few; it names how many there are.
    """
    from blockpruner.healing.rows import compensation_rows, training_rows

    context = config.get("max_position_embeddings") or compensate.seq_len
    fit_texts = pool.search if pool.fit is None else pool.fit
    judge, reserved = NONE, set[str]()
    if judged:
        # First of all: no other draw may see these texts, or texts that share a paragraph with
        # them.
        judge, judging = _set_aside(compensate, fit_texts, pool, tokenizer, context, note)
        every_text = {*fit_texts, *pool.search, *(pool.train or ())}
        reserved = judging | sharing(every_text, judging)
    search = draw_rows(
        pool.search,
        tokenizer,
        calibration,
        pool.evaluated,
        note,
        at_most=at_most,
        reserved=reserved,
    )
    try:
        fit, tuning = compensation_rows(
            fit_texts, tokenizer, compensate, pool.evaluated, context, reserved, note
        )
    except InputError:
        # No row comes out. `require_fit` refuses that, where something is compensated at all.
        fit = tuning = NONE
    rows = Rows(search, fit, tuning, judge)
    if train is not None and pool.train is not None:
        trained, validation = training_rows(
            pool.train, tokenizer, train, pool.evaluated, note, at_most=at_most, reserved=reserved
        )
        rows = replace(rows, train=trained, validation=validation or NONE)
    for split in vars(rows).values():
        require_embedded(split.rows, tokenizer, config)
    return rows


def _set_aside(
    compensate: Compensate,
    fit_texts: Sequence[str],
    pool: Pool,
    tokenizer: Any,
    context: int,
    note: Note,
) -> tuple[CalibrationSet, set[str]]:
    """The rows that judge, the same number of each kind, and the texts in them."""
    from blockpruner.evaluation.perplexity import held_out

    evaluated = sharing({*fit_texts, *pool.judge}, pool.evaluated)
    fitted_kinds = _last_of_each_kind(fit_texts, evaluated, compensate.seed)
    texts_by_kind = dict(fitted_kinds)
    for kind, texts in by_kind(pool.judge).items():
        if _title(kind) not in fitted_kinds:
            texts_by_kind[_title(kind)] = texts
    settings = Perplexity(
        seq_len=min(JUDGING_TOKENS, compensate.seq_len, context),
        max_rows=JUDGING_ROWS,
        packing="documents",
    )
    rows, documents, kinds = list[tuple[int, ...]](), set[str](), list[str]()
    for title, texts in texts_by_kind.items():
        unseen = [str(text) for text in texts if text not in evaluated]
        try:
            judging = held_out(tokenizer, unseen, settings)
        except InputError:  # the texts of this kind do not fill one row
            continue
        rows += judging.rows
        documents.update(judging.documents)
        kinds += [title] * len(judging.rows)
    missing = [title for title in fitted_kinds if title not in kinds]
    if not rows:
        note(
            f"warning: {len(fit_texts)} texts are too few to set some aside that judge between"
            " searches: only the first search of the recipe is made"
        )
    elif missing:
        note(
            f"warning: too few texts of {', '.join(missing)} to set some aside: what they lose is"
            " not judged; give more"
        )
    return CalibrationSet(tuple(rows), kinds=tuple(kinds)), documents


def _last_of_each_kind(
    texts: Sequence[str], evaluated: set[str], seed: int
) -> dict[str, list[str]]:
    """The last texts of each kind, by its title, in the order in which texts are drawn. The draws
    of search and fit begin at the other end, so judging leaves their first texts as they are."""
    order = [text for text in draw(texts, None, "all", seed) if text not in evaluated]
    texts_by_kind: dict[str, list[str]] = {}
    for kind, of_kind in by_kind(order).items():
        start = len(of_kind) - len(of_kind) // JUDGING_SHARE
        texts_by_kind.setdefault(_title(kind), []).extend(of_kind[start:])
    return texts_by_kind


def _title(kind: TextKind | None) -> str:
    return kind.name if kind else "texts"
