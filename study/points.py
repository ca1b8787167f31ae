"""Points of experiments, and how methods are compared at one size over draws and documents.

Decides what is kept of a point, and how it is moved to a size: the NLL of each held-out row is
interpolated over the share removed, through the dense model and all sizes measured of one draw
(monotone cubic). So a method is compared with itself at other sizes as level.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd
import pyarrow as pa
from scipy.interpolate import PchipInterpolator

from blockpruner.core.errors import InputError
from blockpruner.reporting.statistics import Effect, Floats, Interval, exponential, t_effect
from blockpruner.store.files import read_table

FILE = "points.parquet"
DENSE = "dense"

TEXT, INTEGER, FLOAT = pa.string(), pa.int32(), pa.float64()


def _required(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


POINTS = pa.schema(
    [
        # The rows of the search, by the name that the experiment gives them.
        _required("calibration", TEXT),
        _required("method", TEXT),
        _required("budget", TEXT),
        _required("heal", TEXT),
        # What is removed, for instance "mha.3 mlp.7"; else a digest.
        _required("plan", TEXT),
        _required("seed", INTEGER),
        # The share of all parameters removed.
        _required("ratio", FLOAT),
        # Blocks removed.
        _required("mha", INTEGER),
        _required("mlp", INTEGER),
        # Masks whose loss the search asked for, and the time that took; null where losses were
        # known already.
        ("trials_asked", FLOAT),
        ("seconds", FLOAT),
        # Perplexity on the rows of the search.
        ("search_ppl", FLOAT),
        # Of compensation and training.
        ("heal_seconds", FLOAT),
        # Mean NLL of each held-out row, nats per token.
        _required("nll", pa.list_(pa.float32())),
        # As JSON, by task: the "score" of each item in the main metric, and "p_gold", the p of its
        # right answer.
        _required("items", TEXT),
    ]
)
"""One row a point; the dense model has the method "dense"."""

EXTRAPOLATION = 0.01
"""A curve goes on so far beyond its last size."""


@dataclass(frozen=True, eq=False)
class Points:
    """What one experiment, or several of one model, measured."""

    frame: pd.DataFrame
    """The pruned models, in the columns POINTS; `nll` is an array each."""
    dense: pd.Series
    kinds: Floats
    """The kind of text of each held-out row."""
    digest: str
    """Of these rows."""
    compared: tuple[str, ...] = ()
    """The methods that the study compares, in order; empty: all that were measured."""

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Raises InputError if there are none, or the file is damaged."""
        table, facts = read_table(folder / FILE, POINTS)
        frame = table.to_pandas()
        is_dense = frame["method"] == DENSE
        kinds = np.array(json.loads(facts["kinds"]))
        dense = frame[is_dense].iloc[0]
        return cls(frame[~is_dense], dense, kinds, facts["digest"])

    @classmethod
    def joined(cls, experiments: Sequence[Self]) -> Self:
        """The points of some experiments of one model; raises InputError if they were measured on
        other rows."""
        digests = {points.digest for points in experiments}
        if len(digests) > 1:
            message = "experiments were measured on different held-out rows; run them again"
            raise InputError(message, rule="other-rows")
        # Only some experiments measure tasks, which the longest items show.
        models = [points.dense for points in experiments]
        dense = max(models, key=lambda model: len(model["items"]))
        frame = pd.concat([points.frame for points in experiments], ignore_index=True)
        return replace(experiments[0], dense=dense, frame=frame)

    @cached_property
    def texts(self) -> list[str]:
        """The kinds of text, in order."""
        return list(dict.fromkeys(self.kinds))

    def curve(self, size: float, **columns: object) -> Floats:
        """Rises of the NLL over the dense model at a share removed [draws, rows]; NaN for a draw
        without a model as large and one as small. `columns` are values that rows must have."""
        frame = self.frame
        for column, value in columns.items():
            frame = frame[frame[column] == value]
        draws = frame.groupby("seed")
        return np.array([self._at(size, draw) for _, draw in draws])

    def _at(self, size: float, draw: pd.DataFrame) -> Floats:
        models = draw.drop_duplicates("ratio").sort_values("ratio")
        sizes = models["ratio"].to_numpy()
        rises = np.stack(models["nll"]) - self.dense["nll"]
        if not sizes[0] - EXTRAPOLATION <= size <= sizes[-1] + EXTRAPOLATION:
            return np.full(len(self.kinds), math.nan)
        # The dense model is the point at 0.
        sizes = np.r_[0.0, sizes]
        rises = np.vstack([np.zeros_like(rises[0]), rises])
        return np.asarray(PchipInterpolator(sizes, rises)(size))

    def over(self, rises: Floats) -> float:
        """The perplexity over that of the dense model for the rises of each row, every kind of text
        alike."""
        means = [rises[self.kinds == kind].mean() for kind in self.texts]
        return math.exp(np.mean(means))

    def ratios(self, models: pd.DataFrame) -> list[float]:
        """As `over`, of each of some rows of `frame`."""
        dense = self.dense["nll"]
        return [self.over(nll - dense) for nll in models["nll"]]

    def of(self, cell: pd.Series) -> Effect:
        """The perplexity of one model, a row of `frame`, over that of the dense model."""
        return self.against((cell["nll"] - self.dense["nll"])[None])

    def against(self, a: Floats, b: Floats | None = None, kind: str | None = None) -> Effect:
        """The perplexity of `b` over that of `a` (rises of the same draws, as from `curve`), or of
        `a` over the dense model, on the rows of a kind or on all kinds alike.

        The interval is a t interval over draws and documents together. y[i, r] are the rises of the
        NLL (nats per token) in n draws i on the rows r of K kinds, m_i is the mean over kinds of a
        draw's mean rise, and z_r the mean rise of a row over draws. The variance of the mean rise
        is var(m) / n, with n - 1 degrees of freedom, plus var(z) / (R K^2) for each kind, over its
        R rows with R - 1; a single draw has the latter only. `t_effect` adds them. With 3 draws
        that make 90 % of the variance, its interval would hold the truth in 92 of 100 studies: a
        draws' variance that is small by chance also raises the degrees of freedom. So it is never
        narrower, nor p smaller, than those of the draws alone, which makes it 94 to 95.
        """
        rises = a if b is None else b - a
        is_complete = ~np.isnan(rises).any(axis=1)
        kinds = self.texts if kind is None else [kind]
        # A draw that lacks a model of the size does not count.
        rises = rises[is_complete]
        by_kind = [rises[:, self.kinds == name] for name in kinds]
        kind_means = [rows.mean(axis=1) for rows in by_kind]
        draw_means = np.mean(kind_means, axis=0)  # m
        row_means = [rows.mean(axis=0) / len(kinds) for rows in by_kind]  # z / K
        value = float(draw_means.mean())
        if len(draw_means) == 1:
            return exponential(t_effect(value, row_means))
        # The wider of two intervals: see the docstring.
        both = t_effect(value, [*row_means, draw_means])
        draws = t_effect(value, [draw_means])
        low = min(both.interval.low, draws.interval.low)
        high = max(both.interval.high, draws.interval.high)
        p = max(both.p, draws.p)
        return exponential(Effect(value, Interval(low, high), p))
