"""The tables that the paper does not have: seeds, calibration, MHA against MLP, speed with intervals, more tasks.

Decides which of a study's numbers each shows. All numbers in them are measured here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from blockpruner.core.blocks import BlockKind, parse_mask
from blockpruner.paper.contrasts import Pair, detectable, pairs_of
from blockpruner.paper.evidence import MAIN, Entry, Evidence
from blockpruner.paper.experiments import BLOCKPRUNER
from blockpruner.paper.tables import task_cell
from blockpruner.reporting import statistics
from blockpruner.reporting.findings import signs
from blockpruner.reporting.formats import number, percent
from blockpruner.reporting.grids import BLANK, Cell, Field, Grid, Number, factor, grid_of, p_value, points, score, share
from blockpruner.reporting.results import PARTS, TIMED, Option

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


def _known(value: float | None) -> Cell:
    return None if value is None else Number(value)


MODEL = Field[Option]("model", "model", lambda option: option.subject)
METHOD = Field[Option]("method", "method", lambda option: option.method)
RATIO = Field[Option]("ratio_pct", "removed, %", lambda option: share(option.ratio))
MHA = Field[Option]("mha", "MHA", lambda option: Number(option.blocks[BlockKind.MHA], 0))
MLP = Field[Option]("mlp", "MLP", lambda option: Number(option.blocks[BlockKind.MLP], 0))
HELDOUT = Field[Option]("heldout_ppl", "held-out PPL", lambda option: Number(option.model.perplexity))
AVERAGE = Field[Option]("avg", "average, %", lambda option: score(option.model.average))
PREFILL = Field[Option]("prefill_tokens_per_second", "prefill, tokens/s [95 %]", partial(_rate, "prefill"))
DECODE = Field[Option]("decode_tokens_per_second", "decode, tokens/s [95 %]", partial(_rate, "decode"))
CACHE = Field[Option]("kv_mib", "KV cache, MiB", lambda option: _mib(option.race.pruned.cache_bytes, 2))
MEMORY = Field[Option]("memory_mib", "memory, MiB", lambda option: _mib(option.race.pruned.memory_bytes))


def _settings(found: Found, *settings: str) -> list[str]:
    return [
        f"{evidence.dense.subject}: {evidence.dense.races[setting].dense.setting}."
        for setting in settings
        for evidence in found
        if setting in evidence.dense.races
    ]


def _dense(evidence: Evidence, setting: str = TIMED) -> list[Option]:
    return [evidence.dense] if setting in evidence.dense.races else []


def stopping(found: Found) -> Grid:
    """Every budget of every method that was timed at all budgets: what it costs, and what speaks against it."""
    best = [evidence.best for evidence in found]

    def remarks(option: Option) -> Cell:
        return ", ".join([*(signs(option) if option.plan else ()), *["stop here"] * (option in best)])

    fields = (
        MODEL, METHOD, RATIO, MHA, MLP, DECODE,
        Field[Option]("speedup", "generation, × [95 %]", partial(_gain, "generation", TIMED)), MEMORY,
        Field[Option]("calibration_ppl", "calibration PPL", lambda option: _known(option.calibration_perplexity)),
        HELDOUT, AVERAGE, Field[Option]("warnings", "warnings", remarks),
    )  # fmt: skip
    rows = [option for evidence in found for option in (*_dense(evidence), *evidence.timed(TIMED))]
    note = (
        "Stressed: the recommended stopping point of BlockPruner: the knee of held-out loss against speed-up among the "
        "budgets that are faster than dense and have no warning."
    )
    notes = (SPEEDUP_NOTE, *_settings(found, TIMED), note)
    title = "Quality against speed and memory, every budget"
    return grid_of("budgets", title, fields, rows, notes, lambda option: option in best)


@dataclass(frozen=True, eq=False)
class _Seeded:
    """A method with every calibration seed, and BlockPruner with the same seeds."""

    own: dict[str, Entry]
    base: dict[str, Entry]

    @property
    def method(self) -> Entry:
        return next(iter(self.own.values()))

    def average(self) -> statistics.Summary:
        return statistics.seed_summary([100 * entry.model.average.value for entry in self.own.values()])

    def perplexity(self) -> statistics.Summary:
        return statistics.seed_summary([entry.model.perplexity for entry in self.own.values()])

    def test(self) -> statistics.Comparison:
        base, own = ([side[seed].model.average.value for seed in self.base] for side in (self.base, self.own))
        return statistics.paired_t(base, own)


def _by_seed(evidence: Evidence, method: str) -> dict[str, Entry]:
    varied = {entry.variant.level: entry for entry in evidence.varied(method, "seed")}
    base = {str(entry.variant.calibration.seed): entry for entry in evidence.main(method)}
    return base | varied if varied else {}


def seeds(found: Found) -> Grid:
    """Calibration seeds as a factor; paired t tests of BlockPruner against the others over the same seeds."""
    groups = [
        _Seeded(own, base)
        for evidence in found
        if (base := _by_seed(evidence, BLOCKPRUNER))
        for method in evidence.methods
        if (own := _by_seed(evidence, method)).keys() == base.keys()
    ]
    tests = {group: group.test() for group in groups if group.own != group.base}
    corrected = dict(zip(tests, statistics.holm([test.p for test in tests.values()]), strict=True))
    fields: tuple[Field[_Seeded], ...] = (
        Field("model", "model", lambda group: group.method.subject),
        Field("method", "method", lambda group: group.method.method),
        Field("seeds", "seeds", lambda group: ", ".join(group.own)),
        Field("avg_mean", "average, %: mean", lambda group: Number(group.average().mean, 2)),
        Field("avg_sd", "sd", lambda group: Number(group.average().sd, 2)),
        Field("ppl_mean", "held-out PPL: mean", lambda group: Number(group.perplexity().mean)),
        Field("ppl_sd", "sd", lambda group: Number(group.perplexity().sd)),
        Field(
            "difference",
            "against BlockPruner, points [95 %]",
            lambda group: points(tests[group]) if group in tests else None,
        ),
        Field("p", "paired t, p", lambda group: p_value(tests[group].p) if group in tests else None),
        Field("p_holm", "p, Holm", lambda group: p_value(corrected[group]) if group in tests else None),
    )
    note = (
        "At the budget of Table 1, one search a calibration seed. Paired t test over seeds, method minus BlockPruner; "
        "Holm: over this table. Few seeds: a wide t interval. What varies is the calibration sample alone; items and "
        "held-out text are the same, so an sd of 0 means that every seed led to the same model."
    )
    return grid_of("seeds", "Calibration seeds", fields, groups, (note,))


@dataclass(frozen=True, eq=False)
class _Calibrated:
    """BlockPruner with another calibration, and its base at the same budget; they are one entry in the base's row."""

    evidence: Evidence
    base: Entry
    entry: Entry

    @property
    def name(self) -> str:
        variant = self.entry.variant
        if self.entry is self.base:
            return "base"
        return f"seed {variant.level}" if variant.factor == "seed" else variant.level

    @property
    def overlap(self) -> float:
        return statistics.rank_biased_overlap(self.base.order, self.entry.order, PERSISTENCE)

    def jaccard(self, budget: float) -> Cell:
        """Of the blocks removed at a share of the parameters, as far as both searches went."""
        prefixes = [self.evidence.prefix(entry.variant.name, budget) for entry in (self.base, self.entry)]
        a, b = ({str(block) for unit in prefix or () for block in parse_mask(unit)} for prefix in prefixes)
        return None if None in prefixes else Number(statistics.jaccard(a, b), 3)


def sensitivity(found: Found) -> Grid:
    """Every calibration set and seed of BlockPruner: how its sequence agrees with the base's, and its effect."""
    rows = []
    for evidence in found:
        varied = [*evidence.varied(BLOCKPRUNER, "calibration"), *evidence.varied(BLOCKPRUNER, "seed")]
        for budget in dict.fromkeys(entry.budget for entry in varied):
            base = evidence.at(BLOCKPRUNER, budget)
            if base is not None:
                own = [base, *(entry for entry in varied if entry.budget == budget)]
                rows += [_Calibrated(evidence, base, entry) for entry in own]
    tested = [row for row in rows if row.entry is not row.base]
    pairs = dict(zip(tested, pairs_of([(row.base, row.entry) for row in tested]), strict=True))

    def tested_(of: Callable[[Pair], Cell]) -> Callable[[_Calibrated], Cell]:
        return lambda row: of(pairs[row]) if row in pairs else None

    def jaccard(budget: float) -> Field[_Calibrated]:
        title = f"Jaccard at {100 * budget:g} %"
        return Field(f"jaccard_{budget:g}", title, lambda row: row.jaccard(budget))

    shares = sorted({entry.share for e in found for entry in e.of(BLOCKPRUNER) if entry.share > 0})
    fields: tuple[Field[_Calibrated], ...] = (
        Field("model", "model", lambda row: row.entry.subject),
        Field("calibration", "calibration", lambda row: row.name),
        Field("rows", "rows", lambda row: Number(row.entry.search.rows, 0)),
        Field("tokens", "tokens", lambda row: Number(row.entry.search.tokens, 0)),
        Field("rbo", "RBO", lambda row: Number(row.overlap, 3)),
        *map(jaccard, shares),
        Field("ratio_pct", "removed, %", lambda row: share(row.entry.ratio)),
        Field("heldout_ppl", "held-out PPL", lambda row: Number(row.entry.model.perplexity)),
        Field("ppl_ratio", "× base [95 %]", tested_(lambda pair: factor(pair.contrast.perplexity))),
        Field("avg", "average, %", lambda row: score(row.entry.model.average)),
        Field("difference", "against base, points [95 %]", tested_(lambda pair: points(pair.contrast.accuracy))),
        Field("p_holm", "p, Holm", tested_(lambda pair: p_value(pair.p_accuracy))),
    )
    note = (
        f"RBO: rank-biased overlap (p = {PERSISTENCE}) of the order of removal with the base’s; Jaccard: of the sets "
        "of blocks removed at a ratio, as far as both searches went. PPL, average and differences: at the ratio in the "
        "row, against the base at the same budget, on the same items and rows."
    )
    title = "Sensitivity to the calibration set"
    return grid_of("sensitivity", title, fields, rows, (note, *detectable(list(pairs.values()))))


BALANCE = {"MHA only": "MHA only", "MLP only": "MLP only", BLOCKPRUNER: "both (BlockPruner)"}
"""What may go, by method."""


def kinds(found: Found) -> Grid:
    """MHA only, MLP only and both, with measured speed."""
    fields = (
        MODEL, Field[Option]("method", "what may go", lambda option: BALANCE.get(option.method, "nothing (dense)")),
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


@dataclass(frozen=True, eq=False)
class _Balance:
    """What to take for a speed-up in one part of the work."""

    part: str
    wanted: float
    fast: list[Entry]
    """The models that reach it, the lowest held-out perplexity first."""

    @property
    def best(self) -> Entry:
        return self.fast[0]

    @property
    def runner_up(self) -> str:
        other = next((entry for entry in self.fast if entry.method != self.best.method), None)
        return f"{other.method}, {percent(other.ratio)}: PPL {number(other.model.perplexity)}" if other else BLANK


def balance(found: Found) -> Grid:
    """For each speed-up that is reached, the timed model of the lowest held-out perplexity, by part of the work."""

    def at_best(column: Field[Option], title: str | None = None) -> Field[_Balance]:
        return Field(column.key, title or column.title, lambda row: column.of(row.best))

    rows = []
    for evidence in found:
        timed = sorted(evidence.timed(TIMED), key=lambda entry: entry.model.perplexity)
        for part in reversed(PARTS):
            for wanted in THRESHOLDS:
                fast = [entry for entry in timed if entry.race.speedup(part) >= wanted]
                if fast:
                    rows.append(_Balance(part, wanted, fast))
    fields: tuple[Field[_Balance], ...] = (
        at_best(MODEL),
        Field("part", "faster in", lambda row: row.part),
        Field("at_least", "at least, ×", lambda row: Number(row.wanted, 2)),
        at_best(METHOD, "take"),
        *map(at_best, (RATIO, MHA, MLP)),
        Field("speedup", "× [95 %]", lambda row: factor(row.best.race.speedups[row.part])),
        *map(at_best, (HELDOUT, AVERAGE)),
        Field("runner_up", "next best, another method", lambda row: row.runner_up),
    )
    note = (
        "Computed: of all models timed in the setting of the curves whose measured speed-up reaches the threshold, the "
        "one of the lowest held-out perplexity. An interval that reaches below the threshold means that the speed-up "
        "itself may not."
    )
    return grid_of("balance", "The best balance at a given speed", fields, rows, (note,))


def speed(found: Found) -> Grid:
    """Every timed model in every setting, with intervals; the setting of 128 new tokens is Table 6's."""

    def cell(column: Field[Option]) -> Field[tuple[Option, str]]:
        return Field(column.key, column.title, lambda row: column.of(row[0]))

    def time(part: str) -> Field[tuple[Option, str]]:
        return Field(f"{part}_ms", f"{part}, ms [95 %]", lambda row: _time(part, row[1], row[0]))

    def gain(part: str) -> Field[tuple[Option, str]]:
        return Field(f"{part}_speedup", f"{part}, × [95 %]", lambda row: _gain(part, row[1], row[0]))

    def setting(row: tuple[Option, str]) -> Cell:
        pace = row[0].races[row[1]].dense
        return f"{pace.prompt_tokens} + {pace.new_tokens}"

    fields: tuple[Field[tuple[Option, str]], ...] = (
        cell(MODEL), Field("setting", "setting", setting), cell(METHOD), cell(RATIO), *map(time, PARTS),
        *map(gain, PARTS), Field("kv_mib", "KV, MiB", lambda row: _mib(row[0].races[row[1]].pruned.cache_bytes, 2)),
        Field("weights_mib", "weights, MiB", lambda row: _mib(row[0].model.weight_bytes)),
    )  # fmt: skip
    rows = [
        (option, name)
        for evidence in found
        for name in evidence.dense.races
        for option in (evidence.dense, *evidence.timed(name))
    ]
    return grid_of("speed", "Speed with intervals", fields, rows, (SPEEDUP_NOTE, *_settings(found, MAIN, TIMED)))


def blocks_removed(found: Found) -> Grid:
    """Figure 5 in numbers: how many of each kind BlockPruner removes."""

    def mha_share(option: Option) -> Cell:
        return Number(100 * option.blocks[BlockKind.MHA] / max(1, sum(option.blocks.values())), 1)

    fields = (MODEL, RATIO, MHA, MLP, Field[Option]("mha_share_pct", "MHA, % of the blocks", mha_share))
    rows = [entry for evidence in found for entry in evidence.of(BLOCKPRUNER)]
    notes = ("The paper at 30 %: Llama2-7B 14 MHA and 8 MLP, Llama2-13B 19 and 10.",)
    return grid_of("figure5-counts", "Kinds of block removed by BlockPruner", fields, rows, notes)


def more_tasks(found: Found) -> Grid:
    """What a study measured beside the tasks of the average: never part of it."""
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
