"""The paper's figures as tables: which models are points of which line. They are drawn in
`page`."""

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from blockpruner.methods.recipes import BLOCKPRUNER
from study.paper.published import DENSE
from study.paper.tables import CURVES, plain_rows


def _calibrations(frame: pd.DataFrame) -> pd.DataFrame:
    """Choose the first run of each calibration set, at the budget that the largest number of runs
    has."""
    is_sampled = frame["samples"].notna() & (frame["recipe"] != DENSE)
    plain = frame[is_sampled & (frame["healing"] == "")]
    runs = plain.groupby(["model", "budget"], sort=False)["run"].nunique()
    # The first of equals comes last, and so is the one that the dictionary keeps.
    ranked = runs.sort_values(ascending=False, kind="stable").index.tolist()
    usual_budget = dict(reversed(ranked))
    rows = plain[plain["budget"] == plain["model"].map(usual_budget)]
    return rows.drop_duplicates(["model", "texts", "samples"])


def _trained(frame: pd.DataFrame) -> pd.DataFrame:
    """Choose models that are trained without compensation, and the same ones before."""
    keys = ["model", "run", "budget"]
    is_dense = frame["recipe"] == DENSE
    trained = frame[frame["healing"] == "training"][keys].drop_duplicates()
    candidates = frame[frame["healing"].isin(("", "training")) & ~is_dense]
    dense = frame[is_dense & frame["model"].isin(trained["model"])]
    return pd.concat([dense.drop_duplicates("model"), candidates.merge(trained, on=keys)])


@dataclass(frozen=True)
class Curve:
    """A figure of the paper."""

    name: str
    title: str
    methods: tuple[str, ...]
    y: tuple[str, ...] = ("avg_pct", "heldout_ppl")
    """The columns that are drawn, a panel for each."""
    x: str = "removed_pct"
    line: str = "method"
    """The column whose values are lines of their own."""
    rows: Callable[[pd.DataFrame], pd.DataFrame] = plain_rows
    note: str = ""

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(("model", "method", self.line, self.x, *self.y)))

    def points(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Choose its rows; none where there is nothing to compare."""
        rows = self.rows(frame[frame["recipe"].isin((DENSE, *self.methods))])
        # pandas refuses to filter an empty frame by a function
        if rows.empty:
            return rows
        return rows.groupby("model", sort=False).filter(self._is_comparison)

    def _is_comparison(self, model: pd.DataFrame) -> bool:
        methods = model[model["recipe"] != DENSE]["method"]
        return len(methods) > 1 and (len(self.methods) == 1 or methods.nunique() > 1)


BY = ("blockpruner-by-bi", "blockpruner-by-rm", "blockpruner-by-rm-frobenius")
FIGURES = (
    Curve("figure4", "Figure 4. Only MHA, only MLP, both", (BLOCKPRUNER, "mha-only", "mlp-only")),
    Curve(
        "figure5",
        "Figure 5. MHA among the removed blocks",
        (BLOCKPRUNER,),
        ("mha_share_pct",),
        line="model",
    ),
    Curve("figure6", "Figure 6. The metric of the search", (BLOCKPRUNER, *BY)),
    Curve(
        "figure7",
        "Figure 7. Texts and size of the calibration",
        (BLOCKPRUNER,),
        x="samples",
        line="texts",
        rows=_calibrations,
        note=(
            "WikiText-2 is its train split here; the paper's code draws from the test split, on"
            " which it evaluates. 16 samples are cut into rows of 512 tokens, more into rows of"
            " 2,048."
        ),
    ),
    Curve("figure8", "Figure 8. Before and after training", (BLOCKPRUNER,), rows=_trained),
    Curve("figure10", "Figure 10. Methods over ratios", CURVES),
)
