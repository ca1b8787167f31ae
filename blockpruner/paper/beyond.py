"""What search and healing add to the paper: every method at the same budgets, plain, compensated and trained.

Decides which models are held against each other: those of one budget that were healed alike.
"""

from __future__ import annotations

from collections.abc import Sequence

from blockpruner.paper.contrasts import contrast_grid
from blockpruner.paper.evidence import Entry, Evidence, Pairs
from blockpruner.paper.experiments import FLOATING
from blockpruner.paper.extra_tables import MHA, MLP
from blockpruner.paper.tables import HELDOUT, MODEL, RATIO, WIKITEXT
from blockpruner.reporting import statistics
from blockpruner.reporting.grids import Cell, Field, Grid, factor, grid_of, points
from blockpruner.reporting.results import Option
from blockpruner.reporting.tables import AVERAGE, METHOD, P_GOLD

TITLE = "Search and healing"
NOTE = (
    "× dense: quotient of the perplexities, and p − dense: difference of p of the right answer, each on the same rows "
    "or items, with the interval of this one comparison. refit: the writers from the first hole on are fitted anew, "
    "without training. Stressed: the lowest held-out perplexity at its budget among models that were healed alike."
)


def _against_dense(text: str) -> Field[Option]:
    def cell(option: Option) -> Cell:
        own, dense = option.model.texts.get(text), option.dense.texts.get(text)
        if option.plan is None or own is None or dense is None:
            return None
        return factor(statistics.perplexity_ratio(dense.row_nll, own.row_nll))

    return Field(f"{text}_ratio", "× dense [95 %]", cell)


def _confidence(option: Option) -> Cell:
    if option.plan is None or not (option.dense.p_gold and option.model.p_gold):
        return None
    return points(statistics.stratified_t(option.dense.p_gold, option.model.p_gold))


FIELDS: tuple[Field[Option], ...] = (
    MODEL, METHOD, RATIO, MHA, MLP, HELDOUT, _against_dense("heldout"), WIKITEXT, _against_dense("wikitext2"), AVERAGE,
    P_GOLD, Field("p_gold_difference", "p − dense, points [95 %]", _confidence),
)  # fmt: skip


def compared(evidence: Evidence) -> list[list[Entry]]:
    """All models at the budgets at which some are healed, by budget and healing, the best first."""
    shares = sorted({entry.share for entry in evidence.healed})
    plain = [entry for entry in evidence.entries if not entry.variant.factor]
    groups = dict[tuple[float, tuple[str, ...]], list[Entry]]()
    for share in shares:
        for entry in sorted((*plain, *evidence.healed), key=lambda entry: (len(entry.healing), entry.model.perplexity)):
            if entry.share == share:
                groups.setdefault((share, entry.healing), []).append(entry)
    return list(groups.values())


def _pairs(evidence: Evidence) -> Pairs:
    """Pair every other method with floating search, where both were healed alike."""
    pairs: list[tuple[Entry, Entry]] = []
    for group in compared(evidence):
        ours = [entry for entry in group if entry.variant.method == FLOATING]
        pairs += [(other, own) for own in ours for other in group if other is not own]
    return pairs


def healing_grids(found: Sequence[Evidence]) -> list[Grid]:
    """The table of all models at the budgets at which some are healed, and the tests of floating search."""
    own = [evidence for evidence in found if evidence.healed]
    if not own:
        return []
    groups = [group for evidence in own for group in compared(evidence)]
    best = {id(group[0]) for group in groups}
    rows: list[Option] = [
        option for evidence in own for option in (evidence.dense, *(e for group in compared(evidence) for e in group))
    ]
    grids = [grid_of("healing", TITLE, FIELDS, rows, (NOTE,), lambda option: id(option) in best)]
    if pairs := [pair for evidence in own for pair in _pairs(evidence)]:
        title = f"{TITLE}: floating search against the others, healed alike"
        grids.append(contrast_grid("healing-tests", title, pairs))
    return grids
