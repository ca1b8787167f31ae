"""The tables that the paper does not have: seeds, calibration, MHA against MLP, speed with intervals, more tasks.

Decides which of a study's numbers each shows. A table is one row of GRIDS; all rows of all of them are measured here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from blockpruner.core.blocks import parse_mask
from blockpruner.paper import statistics
from blockpruner.paper.advice import advice, warnings_of
from blockpruner.paper.contrasts import detectable, factor, p_value, points, share
from blockpruner.paper.evidence import Entry, Evidence, Model, Pace, Subject, compare
from blockpruner.paper.experiments import BLOCKPRUNER
from blockpruner.reporting.formats import number
from blockpruner.reporting.grids import Cell, Column, Grid, Number
from blockpruner.reporting.tables import BLANK

Found = Sequence[tuple[str, Evidence]]
"""(model's name, its study), of the runs that are computed."""

PARTS = ("prefill", "decode", "generation")
THRESHOLDS = (1.02, 1.05, 1.1, 1.15, 1.2, 1.25, 1.3, 1.4, 1.5, 1.75, 2.0)
"""Speed-ups for which the best balance of MHA and MLP is named."""

PERSISTENCE = 0.9
"""p of rank-biased overlap: the first ten removals have 86 % of the weight."""

MODEL = Column("model", "model")
SPEEDUP_NOTE = (
    "Tokens/s: from the median of the repeats, its 95 % interval from order statistics (none with fewer than six "
    "repeats). Speed-ups: quotient of the medians of dense and pruned timed in turns, 95 % interval of a paired "
    "bootstrap over repeats. Memory: of weights and KV cache on a CPU, the allocated peak on a GPU."
)


def _average(model: Model) -> Number:
    return Number(100 * model.average, 1, 100 * model.stderr)


def _rate(pace: Pace, part: str) -> Number:
    found = pace.rate_interval(part)
    return Number(pace.rate(part), None, low=found.low, high=found.high)


def _counts(entry: Entry) -> tuple[Number, Number]:
    return Number(entry.plan.blocks["mha"], 0), Number(entry.plan.blocks["mlp"], 0)


def stopping(found: Found) -> Grid:
    """Every budget of every method that was timed at all budgets: what it costs, and what speaks against it."""
    columns = (
        MODEL, Column("method", "method"), Column("ratio_pct", "removed, %"),
        Column("mha", "MHA"), Column("mlp", "MLP"),
        Column("decode_tokens_per_second", "decode, tokens/s [95 %]"), Column("speedup", "generation, × [95 %]"),
        Column("memory_mib", "memory, MiB"), Column("calibration_ppl", "calibration PPL"),
        Column("heldout_ppl", "held-out PPL"), Column("avg", "average, %"), Column("warnings", "warnings"),
    )  # fmt: skip
    rows: list[tuple[Cell, ...]] = []
    strong = set()
    for model, evidence in found:
        best = advice(evidence).best
        pace = evidence.speeds.get("timed")
        if pace is not None:
            rows.append(
                (model, "dense", share(0), Number(0, 0), Number(0, 0), _rate(pace, "decode"), Number(1.0, 3),
                 _mib(pace.memory_bytes), None, Number(evidence.dense.perplexity), _average(evidence.dense), "")
            )  # fmt: skip
        for entry in evidence.timed("timed"):
            race = entry.model.races["timed"]
            if entry is best:
                strong.add(len(rows))
            calibration = entry.plan.calibration["perplexity"]
            rows.append(
                (
                    model, entry.method, share(entry.ratio), *_counts(entry), _rate(race.pruned, "decode"),
                    factor(race.speedups["generation"]), _mib(race.pruned.memory_bytes),
                    None if calibration is None else Number(calibration), Number(entry.model.perplexity),
                    _average(entry.model), ", ".join([*warnings_of(evidence, entry), *["stop here"] * (entry is best)]),
                )
            )  # fmt: skip
    return Grid("budgets", "Quality against speed and memory, every budget", columns, tuple(rows),
                (SPEEDUP_NOTE, *_settings(found, "timed"),
                 "Stressed: the recommended stopping point of BlockPruner: the knee of held-out loss against speed-up "
                 "among the budgets that are faster than dense and have no warning."), frozenset(strong))  # fmt: skip


def _mib(count: int) -> Number:
    return Number(count / 2**20, 1)


def _settings(found: Found, setting: str) -> tuple[str, ...]:
    return tuple(
        f"{model}: {evidence.speeds[setting].setting}." for model, evidence in found if setting in evidence.speeds
    )


def seeds(found: Found) -> Grid:
    """Calibration seeds as a factor; paired t tests of BlockPruner against the others over the same seeds."""
    columns = (
        MODEL, Column("method", "method"), Column("seeds", "seeds"), Column("avg_mean", "average, %: mean"),
        Column("avg_sd", "sd"), Column("ppl_mean", "held-out PPL: mean"), Column("ppl_sd", "sd"),
        Column("difference", "against BlockPruner, points [95 %]"), Column("p", "paired t, p"),
        Column("p_holm", "p, Holm"),
    )  # fmt: skip
    groups: list[tuple[str, str, tuple[str, ...], list[Entry], list[Entry]]] = []
    for model, evidence in found:
        by_method = {
            method: _by_seed(evidence, method) for method in evidence.methods if evidence.varied(method, "seed")
        }
        base = by_method.get(BLOCKPRUNER)
        for method, seeded in by_method.items():
            if base is not None and seeded.keys() == base.keys():
                groups.append((model, method, tuple(seeded), list(base.values()), list(seeded.values())))
    tests = {
        i: statistics.paired_t([e.model.average for e in base], [e.model.average for e in own])
        for i, (_, method, _, base, own) in enumerate(groups)
        if method != BLOCKPRUNER
    }
    corrected = dict(zip(tests, statistics.holm([t.p for t in tests.values()]), strict=True)) if tests else {}
    rows: list[tuple[Cell, ...]] = []
    for i, (model, method, names, _, own) in enumerate(groups):
        average = statistics.seed_summary([100 * e.model.average for e in own])
        perplexity = statistics.seed_summary([e.model.perplexity for e in own])
        tested: tuple[Cell, ...] = (None, None, None)
        if i in tests:
            tested = (points(tests[i]), p_value(tests[i].p), p_value(corrected[i]))
        rows.append(
            (model, method, ", ".join(names), Number(average.mean, 2), Number(average.sd, 2), Number(perplexity.mean),
             Number(perplexity.sd), *tested)
        )  # fmt: skip
    notes = (
        "At the budget of Table 1, one search a calibration seed. Paired t test over seeds, method minus BlockPruner; "
        "Holm: over this table. Few seeds: a wide t interval. What varies is the calibration sample alone; items and "
        "held-out text are the same, so that an sd of 0 says that every seed led to the same model.",
    )
    return Grid("seeds", "Calibration seeds", columns, tuple(rows), notes)


def _by_seed(evidence: Evidence, method: str) -> dict[str, Entry]:
    base = evidence.main(method)
    own = {} if base is None else {str(base.variant.calibration.seed): base}
    return own | {entry.variant.level: entry for entry in evidence.varied(method, "seed")}


def sensitivity(found: Found) -> Grid:
    """Every calibration set and seed of BlockPruner: how its sequence agrees with the base's, and its effect."""
    shares = sorted({budget for _, e in found for entry in e.of(BLOCKPRUNER) if (budget := entry.share) > 0})
    columns = (
        MODEL, Column("calibration", "calibration"), Column("rows", "rows"), Column("tokens", "tokens"),
        Column("rbo", "RBO"), *(Column(f"jaccard_{b:g}", f"Jaccard at {100 * b:g} %") for b in shares),
        Column("ratio_pct", "removed, %"), Column("heldout_ppl", "held-out PPL"), Column("ppl_ratio", "× base [95 %]"),
        Column("avg", "average, %"), Column("difference", "against base, points [95 %]"), Column("p_holm", "p, Holm"),
    )  # fmt: skip
    lines: list[tuple[str, Evidence, Entry, Entry, str]] = []
    for model, evidence in found:
        varied = [*evidence.varied(BLOCKPRUNER, "calibration"), *evidence.varied(BLOCKPRUNER, "seed")]
        for asked in dict.fromkeys(entry.budget for entry in varied):
            base = evidence.at(BLOCKPRUNER, asked)
            if base is not None:
                lines.append((model, evidence, base, base, "base"))
                for e in varied:
                    if e.budget == asked:
                        name = f"seed {e.variant.level}" if e.variant.factor == "seed" else e.variant.level
                        lines.append((model, evidence, base, e, name))
    tested = [i for i, (_, _, base, entry, _) in enumerate(lines) if entry is not base]
    contrasts = {i: compare(lines[i][2].model, lines[i][3].model) for i in tested}
    corrected = (
        dict(zip(tested, statistics.holm([c.accuracy.p for c in contrasts.values()]), strict=True)) if tested else {}
    )
    rows: list[tuple[Cell, ...]] = []
    for i, (model, evidence, base, entry, name) in enumerate(lines):
        search = evidence.searches[entry.variant.name]
        order = evidence.searches[base.variant.name].order
        agreement: list[Cell] = [Number(statistics.rank_biased_overlap(order, search.order, PERSISTENCE), 3)]
        for budget in shares:
            pair = [evidence.prefix(name, budget) for name in (base.variant.name, entry.variant.name)]
            agreement.append(None if None in pair else Number(statistics.jaccard(*map(_blocks, pair)), 3))
        effect: tuple[Cell, ...] = (None, _average(entry.model), None, None)
        if i in contrasts:
            c = contrasts[i]
            effect = (factor(c.perplexity), _average(entry.model), points(c.accuracy), p_value(corrected[i]))
        rows.append(
            (model, name, Number(search.rows, 0), Number(search.tokens, 0), *agreement, share(entry.ratio),
             Number(entry.model.perplexity), *effect)
        )  # fmt: skip
    notes = (
        f"RBO: rank-biased overlap (p = {PERSISTENCE}) of the order of removal with the base’s; Jaccard: of the sets "
        "of blocks removed at a ratio, as far as both searches went. PPL, average and differences: at the ratio in the "
        "row, against the base at the same budget, on the same items and rows.",
        *detectable(list(contrasts.values())),
    )
    return Grid("sensitivity", "Sensitivity to the calibration set", columns, tuple(rows), notes)


def _blocks(units: tuple[str, ...] | None) -> frozenset[str]:
    return frozenset(str(block) for unit in units or () for block in parse_mask(unit))


BALANCE = ("MHA only", "MLP only", BLOCKPRUNER)


def kinds(found: Found) -> Grid:
    """MHA only, MLP only and both, with measured speed."""
    columns = (
        MODEL, Column("method", "what may go"), Column("ratio_pct", "removed, %"), Column("mha", "MHA"),
        Column("mlp", "MLP"), Column("prefill_tokens_per_second", "prefill, tokens/s [95 %]"),
        Column("prefill_speedup", "× [95 %]"), Column("decode_tokens_per_second", "decode, tokens/s [95 %]"),
        Column("decode_speedup", "× [95 %]"), Column("kv_mib", "KV cache, MiB"), Column("memory_mib", "memory, MiB"),
        Column("heldout_ppl", "held-out PPL"), Column("avg", "average, %"),
    )  # fmt: skip
    rows: list[tuple[Cell, ...]] = []
    for model, evidence in found:
        pace = evidence.speeds.get("timed")
        if pace is not None:
            one = Number(1.0, 3)
            rows.append(
                (model, "nothing (dense)", share(0), Number(0, 0), Number(0, 0), _rate(pace, "prefill"), one,
                 _rate(pace, "decode"), one, Number(pace.cache_bytes / 2**20, 2), _mib(pace.memory_bytes),
                 Number(evidence.dense.perplexity), _average(evidence.dense))
            )  # fmt: skip
        for entry in (e for method in BALANCE for e in evidence.of(method) if "timed" in e.model.races):
            race = entry.model.races["timed"]
            title = "both (BlockPruner)" if entry.method == BLOCKPRUNER else entry.method
            rows.append(
                (model, title, share(entry.ratio), *_counts(entry), _rate(race.pruned, "prefill"),
                 factor(race.speedups["prefill"]), _rate(race.pruned, "decode"), factor(race.speedups["decode"]),
                 Number(race.pruned.cache_bytes / 2**20, 2), _mib(race.pruned.memory_bytes),
                 Number(entry.model.perplexity), _average(entry.model))
            )  # fmt: skip
    return Grid("mha-mlp", "MHA against MLP: quality, speed and memory", columns, tuple(rows),
                (SPEEDUP_NOTE, *_settings(found, "timed")))  # fmt: skip


def balance(found: Found) -> Grid:
    """For each speed-up that is reached, the timed model of the lowest held-out perplexity, by part of the work."""
    columns = (
        MODEL, Column("part", "faster in"), Column("at_least", "at least, ×"), Column("method", "take"),
        Column("ratio_pct", "removed, %"), Column("mha", "MHA"), Column("mlp", "MLP"), Column("speedup", "× [95 %]"),
        Column("heldout_ppl", "held-out PPL"), Column("avg", "average, %"),
        Column("runner_up", "next best, another method"),
    )  # fmt: skip
    rows: list[tuple[Cell, ...]] = []
    for model, evidence in found:
        timed = evidence.timed("timed")
        for part in ("generation", "decode", "prefill"):
            for wanted in THRESHOLDS:
                fast = sorted(
                    (e for e in timed if e.model.races["timed"].speedups[part].value >= wanted),
                    key=lambda e: e.model.perplexity,
                )
                if not fast:
                    break
                best = fast[0]
                other = next((e for e in fast if e.method != best.method), None)
                runner_up = (
                    f"{other.method}, {100 * other.ratio:.1f} %: PPL {number(other.model.perplexity)}"
                    if other
                    else BLANK
                )
                rows.append(
                    (model, part, Number(wanted, 2), best.method, share(best.ratio), *_counts(best),
                     factor(best.model.races["timed"].speedups[part]), Number(best.model.perplexity),
                     _average(best.model), runner_up)
                )  # fmt: skip
    notes = (
        "Computed: of all models timed in the setting of the curves whose measured speed-up reaches the threshold, the "
        "one of the lowest held-out perplexity. An interval that reaches below the threshold says that the speed-up "
        "itself may not.",
    )
    return Grid("balance", "The best balance at a given speed", columns, tuple(rows), notes)


def speed(found: Found) -> Grid:
    """Every timed model in every setting, with intervals; the setting of 128 new tokens is Table 6's."""
    columns = (
        MODEL, Column("setting", "setting"), Column("method", "method"), Column("ratio_pct", "removed, %"),
        *(Column(f"{part}_ms", f"{part}, ms [95 %]") for part in PARTS),
        *(Column(f"{part}_speedup", f"{part}, × [95 %]") for part in PARTS),
        Column("kv_mib", "KV, MiB"), Column("weights_mib", "weights, MiB"),
    )  # fmt: skip
    rows: list[tuple[Cell, ...]] = []
    for model, evidence in found:
        for setting, pace in evidence.speeds.items():
            title = f"{pace.fields['prompt_tokens']} + {pace.fields['new_tokens']}"
            rows.append(
                (model, title, "dense", share(0), *_times(pace), *[Number(1.0, 3)] * 3, *_sizes(pace, evidence.dense))
            )
            for entry in evidence.timed(setting):
                race = entry.model.races[setting]
                gains = (factor(race.speedups[part]) for part in PARTS)
                rows.append(
                    (model, title, entry.method, share(entry.ratio), *_times(race.pruned), *gains,
                     *_sizes(race.pruned, entry.model))
                )  # fmt: skip
    notes = (SPEEDUP_NOTE, *_settings(found, "main"), *_settings(found, "timed"))
    return Grid("speed", "Speed with intervals", columns, tuple(rows), notes)


def _times(pace: Pace) -> tuple[Number, ...]:
    found = [(pace.median(part), statistics.median_interval(pace.seconds(part))) for part in PARTS]
    return tuple(Number(1000 * m, 1, low=1000 * i.low, high=1000 * i.high) for m, i in found)


def _sizes(pace: Pace, model: Model) -> tuple[Number, Number]:
    return Number(pace.cache_bytes / 2**20, 2), _mib(model.weight_bytes)


def blocks_removed(found: Found) -> Grid:
    """Figure 5 in numbers: how many of each kind BlockPruner removes."""
    columns = (
        MODEL, Column("ratio_pct", "removed, %"), Column("mha", "MHA"), Column("mlp", "MLP"),
        Column("mha_share_pct", "MHA, % of the blocks"),
    )  # fmt: skip
    rows = [
        (
            model,
            share(e.ratio),
            *_counts(e),
            Number(100 * e.plan.blocks["mha"] / max(1, sum(e.plan.blocks.values())), 1),
        )
        for model, evidence in found
        for e in evidence.of(BLOCKPRUNER)
    ]
    notes = ("The paper at 30 %: Llama2-7B 14 MHA and 8 MLP, Llama2-13B 19 and 10.",)
    return Grid("figure5-counts", "Kinds of block removed by BlockPruner", columns, tuple(rows), notes)


def more_tasks(found: Found) -> Grid:
    """What a study measured beside the tasks of the average: never part of it."""
    names = list(dict.fromkeys(t for _, e in found for model in _all(e) for t in model.tasks if t not in e.tasks))
    columns = (
        MODEL,
        Column("method", "method"),
        Column("ratio_pct", "removed, %"),
        Column("avg", "average of the main tasks, %"),
        *(Column(task, task) for task in names),
    )
    rows: list[tuple[Cell, ...]] = []
    for model, evidence in found:
        entries: list[tuple[str, float, Model]] = [("dense", 0.0, evidence.dense)]
        entries += [(e.method, e.ratio, e.model) for e in _mains(evidence)]
        for method, ratio, own in entries:
            if names and any(task in own.tasks for task in names):
                rows.append((model, method, share(ratio), _average(own), *(_score(own, task) for task in names)))
    missing = () if rows else ("Empty: study.tasks of these runs names no task beside those of the average.",)
    notes = (
        "Multiple choice hides damage; these are generation and knowledge, and other tasks that a run asks for: "
        "accuracy in %, or the perplexity that a task is scored by. None of them is part of an average elsewhere in "
        "this report.",
        *missing,
    )
    return Grid("more-tasks", "Beside multiple choice", columns, tuple(rows), notes)


def _all(evidence: Evidence) -> list[Model]:
    return [evidence.dense, *(entry.model for entry in evidence.entries)]


def _mains(evidence: Evidence) -> list[Entry]:
    return [entry for method in evidence.methods if (entry := evidence.main(method)) is not None]


def _score(model: Model, task: str) -> Cell:
    score = model.tasks.get(task)
    if score is None:
        return None
    scale = 100 if score.is_accuracy else 1
    return Number(scale * score.value, 2, None if score.stderr is None else scale * score.stderr)


GRIDS: tuple[Callable[[Found], Grid], ...] = (
    more_tasks, seeds, sensitivity, kinds, balance, blocks_removed, speed,
)  # fmt: skip


def beyond(subjects: Sequence[Subject]) -> list[Grid]:
    """All tables that have rows, and those that say why they have none."""
    found = [(s.model, s.evidence) for s in subjects if s.evidence is not None]
    return [make(found) for make in GRIDS] if found else []
