"""The rows that a compensation is fitted to and judged by, and those of training and of its
validation.

Decides which texts are drawn and which are held out. How texts are packed is decided in
`inputs.calibration`.
"""

from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from blockpruner.core.errors import InputError
from blockpruner.healing.settings import Compensate, Train
from blockpruner.inputs.calibration import (
    CalibrationSet,
    draw,
    fill_rows,
    pack_rows,
    without_evaluated,
)
from blockpruner.inputs.settings import Calibration


def training_rows(
    texts: Sequence[str],
    tokenizer: Any,
    recipe: Train,
    evaluated: Iterable[str] = (),
    note: Callable[[str], object] = lambda message: None,
    at_most: bool = False,
    reserved: AbstractSet[str] = frozenset(),
) -> tuple[CalibrationSet, CalibrationSet | None]:
    """Draw the rows of training and, from what is left, `recipe.validation` rows that are not
    trained on.

    Samples are drawn without replacement, none that shares a paragraph with an evaluated text. Each
    is a row, ended by the end-of-text token and cut off at `seq_len`. With `num_rows` texts are
    joined with blank lines and cut into full rows, as they are for calibration; with `at_most`,
    fewer will do. Raises InputError where there are fewer texts, or rows, than are asked for, or
    none to train on. The rest is as in `draw`.
    """
    pool = without_evaluated(texts, evaluated, "training", note)
    heldout = recipe.validation
    # Joined texts in full rows: every token of a row is trained on.
    if recipe.num_rows is not None:
        joined = Calibration(seq_len=recipe.seq_len, split="all", score="all", seed=recipe.seed)
        rows = fill_rows(
            pool,
            tokenizer,
            joined,
            recipe.num_rows + heldout,
            "train.num_rows + validation",
            at_most,
            reserved,
            note,
        ).rows
        # With `at_most` there may be fewer rows than asked for, but one has to be trained on.
        if len(rows) <= heldout:
            raise InputError(
                f"the training's texts fill {len(rows)} rows of {recipe.seq_len} tokens, of which"
                f" {heldout} are held out; give more texts"
            )
        trained = len(rows) - heldout
        splits = [CalibrationSet(rows[:trained]), CalibrationSet(rows[trained:])]
    else:
        key = "train.num_samples + validation"
        chosen_texts = draw(
            pool,
            recipe.num_samples + heldout,
            "all",
            recipe.seed,
            key=key,
            reserved=reserved,
            note=note,
        )
        # The end-of-text token teaches the model where an answer ends.
        samples = [text + (tokenizer.eos_token or "") for text in chosen_texts]
        groups = [samples[: recipe.num_samples]]
        if heldout:
            groups.append(samples[recipe.num_samples :])
        splits = [pack_rows(group, tokenizer, recipe.seq_len, "per_sample") for group in groups]
    return splits[0], splits[1] if heldout else None


def compensation_rows(
    texts: Sequence[str],
    tokenizer: Any,
    recipe: Compensate,
    evaluated: Iterable[str],
    context: int,
    reserved: AbstractSet[str] = frozenset(),
    note: Callable[[str], object] = lambda message: None,
) -> tuple[CalibrationSet, CalibrationSet]:
    """Draw at most `recipe.num_rows` full rows, every token of which counts: those that weights are
    fitted to, and those that choose the fit's strength. No row is longer than the model's
    `context`; the rest is as in `training_rows`."""
    # Least squares need no response alone: each token is an equation.
    joined = Calibration(
        seq_len=min(recipe.seq_len, context), split="all", score="all", seed=recipe.seed
    )
    pool = without_evaluated(texts, evaluated, "fit", lambda message: None)
    rows = fill_rows(
        pool, tokenizer, joined, recipe.num_rows, "compensate.num_rows", True, reserved, note
    ).rows
    fitted = len(rows) - recipe.held_out(len(rows))
    return CalibrationSet(rows[:fitted]), CalibrationSet(rows[fitted:])
