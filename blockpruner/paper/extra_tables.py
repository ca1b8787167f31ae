"""The tables that the paper does not have: seeds, calibration, MHA against MLP, speed with intervals, more tasks.

Decides which of a study's numbers each shows. All numbers in them are measured here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product

import numpy as np

from blockpruner.core.blocks import BlockKind, parse_mask
from blockpruner.paper.contrasts import detectable, effect_cell, pairs_of
from blockpruner.paper.evidence import MAIN, Entry, Evidence
from blockpruner.paper.experiments import BLOCKPRUNER
from blockpruner.paper.tables import MODEL, RATIO, task_cell
from blockpruner.reporting import statistics
from blockpruner.reporting.findings import signs
from blockpruner.reporting.formats import number, percent
from blockpruner.reporting.grids import (
    BLANK,
    Cell,
    Field,
    Grid,
    Number,
    columns_of,
    factor,
    grid_of,
    p_value,
    points,
    score,
    share,
)
from blockpruner.reporting.results import PARTS, TIMED, Option
from blockpruner.reporting.tables import AVERAGE, CALIBRATION, HELDOUT, METHOD, P_GOLD

THRESHOLDS = (1.02, 1.05, 1.1, 1.15, 1.2, 1.25, 1.3, 1.4, 1.5, 1.75, 2.0)
"""Speed-ups for which the best balance of MHA and MLP is named."""

PERSISTENCE = 0.9
"""p of rank-biased overlap: the first ten removals have 86 % of the weight."""

SPEEDUP_NOTE = (
    "Tokens/s: from the median of the repeats, its 95 % interval from order statistics (none with fewer than six "
    "repeats). Speed-ups: quotient of the medians of dense and pruned timed in turns, 95 % interval of a paired "
    "bootstrap over repeats. Memory: of weights and KV cache on a CPU, the allocated peak on a GPU."
)

Found = Sequence[Evidence]
"""Of the runs of a set that are computed."""


def _rate(part: str, option: Option) -> Cell:
    pace = option.races[TIMED].pruned
    found = pace.rate_interval(part)
    return Number(pace.rate(part), low=found.low, high=found.high)


def _time(part: str, setting: str, option: Option) -> Cell:
    pace = option.races[setting].pruned
    found = statistics.median_interval(pace.seconds[part])
    return Number(1000 * pace.median(part), 1, low=1000 * found.low, high=1000 * found.high)


def _gain(part: str, setting: str, option: Option) -> Cell:
    return factor(option.races[setting].speedups[part]) if option.plan else Number(1.0, 3)


def _mib(count: int, digits: int = 1) -> Number:
    return Number(count / 2**20, digits)


MHA = Field[Option]("mha", "MHA", lambda option: Number(option.blocks[BlockKind.MHA], 0))
MLP = Field[Option]("mlp", "MLP", lambda option: Number(option.blocks[BlockKind.MLP], 0))
PREFILL = Field[Option]("prefill_tokens_per_second", "prefill, tokens/s [95 %]", partial(_rate, "prefill"))
DECODE = Field[Option]("decode_tokens_per_second", "decode, tokens/s [95 %]", partial(_rate, "decode"))
CACHE = Field[Option]("kv_mib", "KV cache, MiB", lambda option: _mib(option.race.pruned.cache_bytes, 2))
MEMORY = Field[Option]("memory_mib", "memory, MiB", lambda option: _mib(option.race.pruned.memory_bytes))


def _settings(found: Found, *settings: str) -> list[str]:
    texts = [
        f"{evidence.dense.subject}: {evidence.dense.races[setting].dense.setting}."
        for setting in settings
        for evidence in found
        if setting in evidence.dense.races
    ]
    return texts or ["Not timed."]


def _dense(evidence: Evidence) -> list[Option]:
    return [evidence.dense] if TIMED in evidence.dense.races else []


def stopping(found: Found) -> Grid:
    """Show every budget of every method timed at all budgets: what it costs, and what speaks against it."""
    best = [evidence.best for evidence in found]

    def remarks(option: Option) -> Cell:
        return ", ".join([*(signs(option) if option.plan else ()), *["stop here"] * (option in best)])

    fields = (
        MODEL, METHOD, RATIO, MHA, MLP, DECODE,
        Field[Option]("speedup", "generation, × [95 %]", partial(_gain, "generation", TIMED)), MEMORY,
        CALIBRATION, HELDOUT, AVERAGE, P_GOLD, Field[Option]("warnings", "warnings", remarks),
    )  # fmt: skip
    rows = [option for evidence in found for option in (*_dense(evidence), *evidence.candidates)]
    note = (
        "Stressed: the recommended stopping point, the fastest of the models that are faster than dense beyond noise "
        "and not broken; none: keep the dense model. A healed model has the plain one's shape, so its times are those."
    )
    notes = (SPEEDUP_NOTE, *_settings(found, TIMED), note)
    title = "Quality against speed and memory, every budget"
    return grid_of("budgets", title, fields, rows, notes, lambda option: option in best)


def _by_seed(entries: Sequence[Entry], method: str) -> dict[str, Entry]:
    own = [entry for entry in entries if entry.variant.method == method]
    varied = {entry.variant.level: entry for entry in own if entry.variant.factor == "seed"}
    base = {str(e.variant.calibration.seed): e for e in own if not e.variant.factor and e.budget == e.variant.main}
    return base | varied if varied else {}


def _healed_alike(evidence: Evidence) -> list[list[Entry]]:
    groups = dict[tuple[str, ...], list[Entry]]()
    for entry in (*evidence.entries, *evidence.healed):
        groups.setdefault(entry.healing, []).append(entry)
    return list(groups.values())


def seeds(found: Found) -> Grid:
    """Show calibration seeds as a factor, with paired t tests against BlockPruner, healed alike, over all seeds."""
    groups = [
        (method, base, own)
        for evidence in found
        for entries in _healed_alike(evidence)
        if (base := _by_seed(entries, BLOCKPRUNER))
        for method in evidence.methods
        if (own := _by_seed(entries, method)).keys() == base.keys()
    ]

    def averages(entries: dict[str, Entry]) -> list[float]:
        return [entry.model.average.value for entry in entries.values()]

    def losses(entries: dict[str, Entry]) -> list[float]:
        return [math.log(entry.model.perplexity) for entry in entries.values()]

    others = [i for i, (method, _, _) in enumerate(groups) if method != BLOCKPRUNER]
    by_accuracy = [statistics.paired_t(averages(groups[i][1]), averages(groups[i][2])) for i in others]
    by_loss = [statistics.perplexity_ratio(losses(groups[i][1]), losses(groups[i][2])) for i in others]
    tested: dict[int, tuple[Cell, ...]] = {}
    corrected = (statistics.holm([test.p for test in tests]) for tests in (by_accuracy, by_loss))
    for i, gain, ratio, p_gain, p_ratio in zip(others, by_accuracy, by_loss, *corrected, strict=True):
        tested[i] = (points(gain), p_value(p_gain), factor(ratio), p_value(p_ratio))
    rows: list[tuple[Cell, ...]] = []
    for i, (_, _, own) in enumerate(groups):
        first = next(iter(own.values()))
        measures = [(100 * entry.model.average.value, entry.model.perplexity) for entry in own.values()]
        (average, perplexity), (spread, sd) = np.mean(measures, 0).tolist(), np.std(measures, 0, ddof=1).tolist()
        rows.append(
            (
                first.subject, first.recipe, ", ".join(own), Number(average, 2), Number(spread, 2),
                Number(perplexity), Number(sd), *tested.get(i, (None,) * 4),
            )
        )  # fmt: skip
    columns = columns_of(
        model="model", method="method", seeds="seeds", avg_mean="average, %: mean", avg_sd="sd",
        ppl_mean="held-out PPL: mean", ppl_sd="sd", difference="average, points [95 %]", p_holm="p, Holm",
        ppl_ratio="held-out PPL, × [95 %]", ppl_p_holm="p, Holm",
    )  # fmt: skip
    note = (
        "At the budget of Table 1, one search a calibration seed. Paired t tests over seeds, method minus BlockPruner "
        "healed alike, or their quotient; Holm: over this table. Few seeds: a wide t interval. What varies is the "
        "calibration sample alone; items and held-out text are the same, so an sd of 0 means that every seed led to "
        "the same model."
    )
    return Grid("seeds", "Calibration seeds", columns, tuple(rows), (note,))


def sensitivity(found: Found) -> Grid:
    """Show every calibration set and seed of BlockPruner: how its sequence agrees with the base's, and its effect."""
    shares = sorted({entry.share for evidence in found for entry in evidence.of(BLOCKPRUNER) if entry.share > 0})
    lines: list[tuple[Evidence, Entry, Entry]] = []
    for evidence in found:
        varied = [*evidence.varied(BLOCKPRUNER, "calibration"), *evidence.varied(BLOCKPRUNER, "seed")]
        for budget in dict.fromkeys(entry.budget for entry in varied):
            base = evidence.at(BLOCKPRUNER, budget)
            if base is not None:
                lines += [(evidence, base, e) for e in (base, *(entry for entry in varied if entry.budget == budget))]
    pairs = pairs_of([(base, entry) for _, base, entry in lines if entry is not base])
    tested = {pair.method: pair for pair in pairs}
    rows: list[tuple[Cell, ...]] = []
    for evidence, base, entry in lines:
        name = f"seed {entry.variant.level}" if entry.variant.factor == "seed" else entry.variant.level or "base"
        overlap = statistics.rank_biased_overlap(base.order, entry.order, PERSISTENCE)
        pair = None if entry is base else tested[entry]
        rows.append(
            (
                entry.subject, name, Number(entry.search.rows, 0), Number(entry.search.tokens, 0), Number(overlap, 3),
                *(_jaccard(evidence, base, entry, budget) for budget in shares), share(entry.ratio),
                Number(entry.model.perplexity), effect_cell(pair, "perplexity") if pair else None,
                score(entry.model.average), effect_cell(pair, "accuracy") if pair else None,
                p_value(pair.holm["accuracy"]) if pair else None,
                P_GOLD.of(entry), effect_cell(pair, "p_gold") if pair else None,
            )
        )  # fmt: skip
    columns = columns_of(
        model="model", calibration="calibration", rows="rows", tokens="tokens", rbo="RBO",
        **{f"jaccard_{budget:g}": f"Jaccard at {100 * budget:g} %" for budget in shares}, ratio_pct="removed, %",
        heldout_ppl="held-out PPL", ppl_ratio="× base [95 %, Holm]", avg="average, %",
        difference="against base, points [95 %, Holm]", p_holm="p, Holm", p_gold=P_GOLD.title,
        p_gold_difference="against base, points [95 %, Holm]",
    )  # fmt: skip
    note = (
        f"RBO: rank-biased overlap (p = {PERSISTENCE}) of the order of removal with the base’s; Jaccard: of the sets "
        "of blocks removed at a ratio, as far as both searches went. PPL, average and differences: at the ratio in the "
        "row, against the base at the same budget, on the same items and rows."
    )
    title = "Sensitivity to the calibration set"
    return Grid("sensitivity", title, columns, tuple(rows), (note, *detectable(pairs)))


def _jaccard(evidence: Evidence, base: Entry, entry: Entry, budget: float) -> Cell:
    prefixes = [evidence.prefix(one.variant.slug, budget) for one in (base, entry)]
    a, b = ({block for unit in prefix or () for block in parse_mask(unit)} for prefix in prefixes)
    return None if None in prefixes else Number(statistics.jaccard(a, b), 3)


BALANCE = {"mha-only": "MHA only", "mlp-only": "MLP only", BLOCKPRUNER: "both (BlockPruner)"}
"""What may go, by method."""


def kinds(found: Found) -> Grid:
    """Compare MHA only, MLP only and both, with measured speed."""

    def may_go(option: Option) -> Cell:
        return BALANCE[option.variant.method] if isinstance(option, Entry) else "nothing (dense)"

    fields = (
        MODEL, Field[Option]("method", "what may go", may_go),
        RATIO, MHA, MLP, PREFILL, Field[Option]("prefill_speedup", "× [95 %]", partial(_gain, "prefill", TIMED)),
        DECODE, Field[Option]("decode_speedup", "× [95 %]", partial(_gain, "decode", TIMED)), CACHE, MEMORY, HELDOUT,
        AVERAGE,
    )  # fmt: skip
    rows = [
        option
        for evidence in found
        for option in (*_dense(evidence), *(e for m in BALANCE for e in evidence.of(m) if TIMED in e.races))
    ]
    title = "MHA against MLP: quality, speed and memory"
    return grid_of("mha-mlp", title, fields, rows, (SPEEDUP_NOTE, *_settings(found, TIMED)))


def balance(found: Found) -> Grid:
    """Find for each speed-up that is reached the timed model of the lowest held-out perplexity, by part of the work."""
    rows: list[tuple[Cell, ...]] = []
    for evidence in found:
        timed = sorted(evidence.candidates, key=lambda entry: entry.model.perplexity)
        for part, wanted in product(reversed(PARTS), THRESHOLDS):
            fast = [e for e in timed if e.race.speedup(part) >= wanted and e.race.speedups[part].interval.low > 1]
            for best in fast[:1]:
                other = next((entry for entry in fast if entry.method != best.method), None)
                words = f"{other.recipe}, {percent(other.ratio)}: PPL {number(other.model.perplexity)}" if other else ""
                sizes, gain = (field.of(best) for field in (RATIO, MHA, MLP)), factor(best.race.speedups[part])
                quality = HELDOUT.of(best), AVERAGE.of(best), words or BLANK
                rows.append((best.subject, part, Number(wanted, 2), best.recipe, *sizes, gain, *quality))
    columns = columns_of(
        model="model", part="faster in", at_least="at least, ×", method="take", ratio_pct="removed, %", mha="MHA",
        mlp="MLP", speedup="× [95 %]", heldout_ppl="held-out PPL", avg="average, %",
        runner_up="next best, another method",
    )  # fmt: skip
    note = (
        "Computed: of all models timed in the setting of the curves whose measured speed-up reaches the threshold, and "
        "differs from 1 beyond noise, the one of the lowest held-out perplexity. An interval that reaches below the "
        "threshold means that the speed-up itself may not."
    )
    return Grid("balance", "The best balance at a given speed", columns, tuple(rows), (note,))


def speed(found: Found) -> Grid:
    """Show every timed model in every setting, with intervals; the setting of 128 new tokens is Table 6's."""
    rows: list[tuple[Cell, ...]] = []
    for evidence in found:
        for setting, dense in evidence.dense.races.items():
            title = f"{dense.dense.prompt_tokens} + {dense.dense.new_tokens}"
            for option in (evidence.dense, *evidence.timed(setting)):
                times = (_time(part, setting, option) for part in PARTS)
                gains = (_gain(part, setting, option) for part in PARTS)
                sizes = _mib(option.races[setting].pruned.cache_bytes, 2), _mib(option.model.weight_bytes)
                rows.append((option.subject, title, option.method, share(option.ratio), *times, *gains, *sizes))
    columns = columns_of(
        model="model", setting="setting", method="method", ratio_pct="removed, %",
        **{f"{part}_ms": f"{part}, ms [95 %]" for part in PARTS},
        **{f"{part}_speedup": f"{part}, × [95 %]" for part in PARTS}, kv_mib="KV, MiB", weights_mib="weights, MiB",
    )  # fmt: skip
    notes = (SPEEDUP_NOTE, *_settings(found, MAIN, TIMED))
    return Grid("speed", "Speed with intervals", columns, tuple(rows), notes)


def blocks_removed(found: Found) -> Grid:
    """Give Figure 5 in numbers: how many of each kind BlockPruner removes."""

    def mha_share(option: Option) -> Cell:
        return Number(100 * option.blocks[BlockKind.MHA] / max(1, sum(option.blocks.values())), 1)

    fields = (MODEL, RATIO, MHA, MLP, Field[Option]("mha_share_pct", "MHA, % of the blocks", mha_share))
    rows = [entry for evidence in found for entry in evidence.of(BLOCKPRUNER)]
    notes = ("The paper at 30 %: Llama2-7B 14 MHA and 8 MLP, Llama2-13B 19 and 10.",)
    return grid_of("figure5-counts", "Kinds of block removed by BlockPruner", fields, rows, notes)


def more_tasks(found: Found) -> Grid:
    """Show what a study measured beside the tasks of the average, which is never part of it."""
    models = [(e.tasks, option.model) for e in found for option in (e.dense, *e.entries)]
    names = list(dict.fromkeys(task for tasks, model in models for task in model.tasks if task not in tasks))
    average = Field[Option]("avg", "average of the main tasks, %", AVERAGE.of)
    tasks = (Field[Option](task, task, partial(task_cell, task=task, digits=2)) for task in names)
    rows = [
        option
        for evidence in found
        for option in (evidence.dense, *evidence.main(*evidence.methods))
        if not option.model.tasks.keys().isdisjoint(names)
    ]
    missing = () if rows else ("Empty: study.tasks of these runs names no task beside those of the average.",)
    note = (
        "Multiple choice hides damage; these are generation and knowledge, and other tasks that a run asks for: "
        "accuracy in %, or the perplexity that a task is scored by. None of them is part of an average elsewhere in "
        "this report."
    )
    fields = (MODEL, METHOD, RATIO, average, *tasks)
    return grid_of("more-tasks", "Beside multiple choice", fields, rows, (note, *missing))


GRIDS: tuple[Callable[[Found], Grid], ...] = (
    more_tasks, seeds, sensitivity, kinds, balance, blocks_removed, speed,
)  # fmt: skip
"""All but `stopping`, which opens the page."""
