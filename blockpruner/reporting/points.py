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

POINTS = pa.schema(
    [
        *(
            pa.field(name, pa.string(), nullable=False)
            for name in ("calibration", "method", "budget", "heal", "plan")
        ),
        pa.field("seed", pa.int32(), nullable=False),
        pa.field("ratio", pa.float64(), nullable=False),
        *(pa.field(name, pa.int32(), nullable=False) for name in ("mha", "mlp")),
        *(
            pa.field(name, pa.float64())
            for name in ("trials_asked", "seconds", "search_ppl", "heal_seconds")
        ),
        pa.field("nll", pa.list_(pa.float32()), nullable=False),
        pa.field("items", pa.string(), nullable=False),
    ]
)
"""One row a point; the dense model has the method "dense".

    calibration     name of the rows of the search among those that the experiment compares plan
    what is removed, for instance "mha.3 mlp.7"; else a digest ratio           share of all
    parameters removed mha, mlp        blocks removed trials_asked    masks whose loss the search
    asked for; seconds: what that took, null where losses were known before search_ppl
    perplexity on the rows of the search heal_seconds    of compensation and training nll
    mean NLL of each held-out row, nats per token items           of tasks, as JSON: by task the
    "score" of each item in the main metric, and "p_gold", the p of its
                    right answer
"""


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
        table, about = read_table(folder / FILE, POINTS)
        frame = table.to_pandas()
        dense = frame["method"] == DENSE
        return cls(
            frame[~dense],
            frame[dense].iloc[0],
            np.array(json.loads(about["kinds"])),
            about["digest"],
        )

    @classmethod
    def joined(cls, several: Sequence[Self]) -> Self:
        """The points of some experiments of one model; raises InputError if they were measured on
        other rows."""
        if len({each.digest for each in several}) > 1:
            raise InputError(
                "experiments were measured on different held-out rows; run them again",
                rule="other-rows",
            )
        # tasks, where measured
        dense = max((each.dense for each in several), key=lambda dense: len(dense["items"]))
        return replace(
            several[0],
            dense=dense,
            frame=pd.concat([each.frame for each in several], ignore_index=True),
        )

    @cached_property
    def texts(self) -> list[str]:
        """The kinds of text, in order."""
        return list(dict.fromkeys(self.kinds))

    def curve(self, size: float, **where: object) -> Floats:
        """Rises of the NLL over the dense model at a share removed [draws, rows]; NaN for a draw
        without a model as large and one as small. `where` chooses by columns."""
        own = self.frame[
            np.logical_and.reduce([self.frame[key] == value for key, value in where.items()])
        ]
        return np.array([self._at(size, draw) for _, draw in own.groupby("seed")])

    def _at(self, size: float, draw: pd.DataFrame) -> Floats:
        draw = draw.drop_duplicates("ratio").sort_values("ratio")
        sizes, rises = draw["ratio"].to_numpy(), np.stack(draw["nll"]) - self.dense["nll"]
        if not sizes[0] - NEAR <= size <= sizes[-1] + NEAR:
            return np.full(len(self.kinds), math.nan)
        sizes, rises = np.r_[0.0, sizes], np.vstack([0 * rises[0], rises])
        return np.asarray(PchipInterpolator(sizes, rises)(size))

    def over(self, rises: Floats) -> float:
        """The perplexity over that of the dense model for the rises of each row, every kind of text
        alike."""
        return math.exp(np.mean([rises[self.kinds == kind].mean() for kind in self.texts]))

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
        rises = rises[~np.isnan(rises).any(axis=1)]
        by_kind = [
            rises[:, self.kinds == name] for name in (self.texts if kind is None else [kind])
        ]
        means = np.mean([rows.mean(axis=1) for rows in by_kind], axis=0)
        samples = [rows.mean(axis=0) / len(by_kind) for rows in by_kind]
        value = float(means.mean())
        if len(means) == 1:
            return exponential(t_effect(value, samples))
        together, draws = t_effect(value, [*samples, means]), t_effect(value, [means])
        low = min(together.interval.low, draws.interval.low)
        high = max(together.interval.high, draws.interval.high)
        return exponential(Effect(value, Interval(low, high), max(together.p, draws.p)))


NEAR = 0.01
"""A curve goes on so far beyond its last size."""
