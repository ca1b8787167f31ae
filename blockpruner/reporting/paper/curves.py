"""The paper's figures as tables: which models are points of which line. They are drawn in
`page`."""

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from blockpruner.methods.recipes import BLOCKPRUNER
from blockpruner.reporting.paper.published import DENSE
from blockpruner.reporting.paper.tables import CURVES, plain_rows


def _calibrations(frame: pd.DataFrame) -> pd.DataFrame:
    """Choose the first run of each calibration set, at the budget that most runs have."""
    own = frame[(frame["healing"] == "") & (frame["recipe"] != DENSE) & frame["samples"].notna()]
    runs = (
        own.groupby(["model", "budget"], sort=False)["run"]
        .nunique()
        .sort_values(ascending=False, kind="stable")
    )
    most = dict(reversed(runs.index.tolist()))
    return own[own["budget"] == own["model"].map(most)].drop_duplicates(
        ["model", "texts", "samples"]
    )


def _trained(frame: pd.DataFrame) -> pd.DataFrame:
    """Choose models that are trained without compensation, and the same ones before."""
    keys = ["model", "run", "budget"]
    trained = frame[frame["healing"] == "training"][keys].drop_duplicates()
    before = frame[frame["healing"].isin(("", "training")) & (frame["recipe"] != DENSE)].merge(
        trained, on=keys
    )
    dense = frame[(frame["recipe"] == DENSE) & frame["model"].isin(trained["model"])]
    return pd.concat([dense.drop_duplicates("model"), before])


@dataclass(frozen=True)
class Curve:
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
        found = self.rows(frame[frame["recipe"].isin((DENSE, *self.methods))])
        return (
            found.groupby("model", sort=False).filter(self._is_comparison) if len(found) else found
        )

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
