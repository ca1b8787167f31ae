"""Greedy, one-shot, given and random removal against brute force over whole forward passes; what switching between
methods and metrics computes, to the trial; and every error of a `score` section."""

import json
import random
import re
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from blockpruner.core.blocks import DENSE, BlockKind, format_mask, parse_mask, removable_units
from blockpruner.core.budgets import choose_prefix, parse_budget
from blockpruner.core.errors import InputError
from blockpruner.core.families import count_parameters
from blockpruner.core.progress import SilentObserver
from blockpruner.core.settings import Score
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.methods.score import score_run
from blockpruner.methods.transforms import TRANSFORMS
from blockpruner.model.models import decoder_layers, masked
from blockpruner.params import load_run
from blockpruner.scoring.engine import Engine
from blockpruner.scoring.metrics import METRICS, metric_of
from blockpruner.scoring.objectives import Objective
from blockpruner.scoring.work import ScoredRows
from blockpruner.search import SEARCHES, search_settings
from blockpruner.search.iteration import removals
from blockpruner.search.problem import Problem
from blockpruner.search.run import SearchRun
from blockpruner.search.trace import read_current, read_trace, trace_directory
from blockpruner.store.trials import TrialStore
from tests.tiny import full_nll, tiny_model
from tests.unit.test_metrics import divergence, influence, model_of, recorded, row

LAYERS = 3
ROWS = CalibrationSet((row(12, 1), row(7, 2), row(10, 3)))
SCORE = {"method": "greedy", "unit": "block", "candidates": "all", "metric": "perplexity", "acceleration": "none"}
ROOT = Path(__file__).parents[2]


class Searched:
    """A nested search with an engine over a tiny model; its order to the end, and the losses of the first step."""

    def __init__(self, model=None, budget=None, rows=ROWS, **score):
        model = model or model_of("llama", LAYERS)
        score = search_settings(SCORE | score)
        metric = metric_of(score["metric"])
        units = removable_units(LAYERS, score["unit"], score["candidates"])
        engine = Engine(model, 24)

        def objective(of):
            return Objective(rows, TrialStore({}, len(rows.rows)), engine, metric=of)

        asked = objective(metric)
        nll = asked if metric.is_nll else objective(METRICS["perplexity"])
        counts = count_parameters(model.config.to_dict())
        run = SearchRun(asked, nll, score, units, {"parameters": counts}, SilentObserver())
        (self.trace,) = run.traces([budget or f"{len(DENSE.union(*units))}blocks"]).values()
        order, self.perplexities = removals(self.trace, nested=True)
        self.order = [format_mask(unit) for unit in order]
        first = self.trace[0]
        self.losses = {
            format_mask(unit): score.loss
            for unit, score in zip(first.added, first.scores, strict=True)
            if unit is not None and score.row_loss
        }


@cache
def lopsided(variant):
    """A model whose first layer adds little, so that its removal comes early and changes what the others do."""
    model = tiny_model(variant, LAYERS)
    for parameter in decoder_layers(model)[0].parameters():
        if parameter.dim() == 2:
            parameter.mul_(0.4)
    return model


@cache
def nll(model, mask, rows=ROWS.rows):
    with masked(model, mask):
        return np.mean([full_nll(model, tokens) for tokens in rows])


@cache
def brute_influences(model, name, base=DENSE):
    """Of every unit that the base leaves: mean over rows, from the states that hooks saw."""
    seen = [recorded(model, base, tokens) for tokens in ROWS.rows]
    return {unit: np.mean([influence(name, *states[unit]) for states in seen]) for unit in seen[0]}


def brute_greedy(units, loss):
    """By its definition: of what remains remove that which leaves the lowest loss, and again."""
    removed, order = DENSE, []
    while len(order) < len(units):
        unit = min((u for u in units if not u <= removed), key=lambda u: loss(removed, u))
        removed, order = removed | unit, [*order, format_mask(unit)]
    return order


def units_of(unit="block", candidates="all"):
    return removable_units(LAYERS, unit, candidates)


# --- one-shot --------------------------------------------------------------------------------------------------------

INFLUENCES = [name for name, metric in METRICS.items() if metric.influence]


@pytest.mark.parametrize("unit", ["layer", "block"])
@pytest.mark.parametrize("metric", INFLUENCES)
@pytest.mark.parametrize("variant", ["llama", "gpt_neox"])
def test_one_shot_by_influence_is_the_ranking_of_the_formula(variant, metric, unit):
    """Over layers by block influence: ShortGPT. Over blocks: LLM-Drop. By relative magnitude: the paper's RM."""
    model = lopsided(variant)
    found, brute = Searched(model, method="one_shot", unit=unit, metric=metric), brute_influences(model, metric)
    wanted = {format_mask(u): brute[u] for u in units_of(unit)}
    assert found.losses == pytest.approx(wanted, rel=1e-10)
    assert found.order == sorted(wanted, key=wanted.__getitem__)


@pytest.mark.parametrize("candidates", ["mha", "mlp"])
def test_llm_drop_of_one_kind(candidates):
    found = Searched(method="one_shot", candidates=candidates, metric="block_influence")
    brute = brute_influences(model_of("llama", LAYERS), "block_influence")
    assert found.order == [format_mask(u) for u in sorted(units_of("block", candidates), key=brute.__getitem__)]


@pytest.mark.parametrize("unit", ["layer", "block"])
@pytest.mark.parametrize("variant", ["llama", "gpt_neox"])
def test_one_shot_by_perplexity(variant, unit):
    """Over layers: Shortened-LLM. Over blocks: the ablation of table 2. Then, too, every step says its perplexity."""
    model = lopsided(variant)
    found = Searched(model, method="one_shot", unit=unit)
    wanted = {format_mask(u): nll(model, u) for u in units_of(unit)}
    assert found.losses == pytest.approx(wanted, abs=1e-10)
    assert found.order == sorted(wanted, key=wanted.__getitem__)
    prefixes = [DENSE.union(*map(parse_mask, found.order[:k])) for k in range(len(found.order) + 1)]
    assert found.perplexities == pytest.approx([np.exp(nll(model, mask)) for mask in prefixes], rel=1e-9)


# --- greedy ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("unit", "candidates"), [("layer", "all"), ("block", "all"), ("block", "mha"), ("block", "mlp")]
)
def test_greedy_by_perplexity(unit, candidates):
    """Over layers: SLEB. Over blocks BlockPruner, and of one kind only, as in figure 4."""
    model = lopsided("llama")
    found = Searched(model, unit=unit, candidates=candidates)
    assert found.order == brute_greedy(units_of(unit, candidates), lambda removed, u: nll(model, removed | u))


@pytest.mark.parametrize("metric", ["kl", "js"])
def test_greedy_by_divergence(metric):
    def loss(removed, unit):
        return np.mean([divergence(metric, "llama", removed | unit, tokens) for tokens in ROWS.rows])

    found = Searched(metric=metric)
    assert found.order == brute_greedy(units_of(), loss)
    wanted = {format_mask(u): loss(DENSE, u) for u in units_of()}
    assert found.losses == pytest.approx(wanted, rel=1e-10)


@pytest.mark.parametrize("unit", ["block", "layer"])
@pytest.mark.parametrize("metric", INFLUENCES)
@pytest.mark.parametrize("variant", ["llama", "gpt_neox"])
def test_greedy_by_influence_measures_what_is_left_anew(variant, metric, unit):
    """Figure 6: after each removal from the states of the model without it, and with each step's perplexity."""
    model = lopsided(variant)
    found = Searched(model, metric=metric, unit=unit)
    bases, moved = [DENSE, *(step.removed for step in found.trace)], set()
    assert found.order == brute_greedy(units_of(unit), lambda removed, u: brute_influences(model, metric, removed)[u])
    for base, step in zip(bases[:-1], found.trace, strict=True):
        brute = brute_influences(model, metric, base)
        for added, score in zip(step.added, step.scores, strict=True):
            if added is not None:
                assert score.mask == base | added and score.loss == pytest.approx(brute[added], rel=1e-9)
        dense = brute_influences(model, metric)
        moved |= {unit for unit in brute if abs(brute[unit] - dense[unit]) > 1e-3}
    assert len(moved) > 1  # scores of the dense model would not have passed
    assert found.perplexities == pytest.approx([np.exp(nll(model, base)) for base in bases], rel=1e-9)


def test_answer_likelihood_is_perplexity_over_the_scored_tokens():
    rows = CalibrationSet((row(9, 1, given=5), row(12, 2, given=10), row(6, 3, given=2)))

    def loss(mask):
        found = []
        for tokens in rows.rows:
            ids = torch.tensor([[t if t >= 0 else ~t for t in tokens]])
            with masked(model_of("llama", LAYERS), mask) as model, torch.no_grad():
                lp = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
            found.append(-np.mean([lp[t - 1, tokens[t]].item() for t in range(1, len(tokens)) if tokens[t] >= 0]))
        return np.mean(found)

    found = Searched(rows=rows, metric="answer_likelihood")
    assert found.losses == pytest.approx({format_mask(u): loss(u) for u in units_of()}, abs=1e-10)
    assert found.order == brute_greedy(units_of(), lambda removed, u: loss(removed | u))


# --- no score at all -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("unit", "candidates"), [("block", "all"), ("layer", "all"), ("block", "mlp")])
def test_random_is_a_permutation_by_its_seed(unit, candidates):
    score = {"method": "random", "unit": unit, "candidates": candidates}
    drawn = [Searched(**score, options={"seed": seed}).order for seed in (0, 0, 1, 42)]
    units = [format_mask(u) for u in units_of(unit, candidates)]
    assert all(sorted(order) == sorted(units) for order in drawn)
    assert drawn[0] == drawn[1] == random.Random(0).sample(units, len(units))
    assert Searched(**score).order == drawn[3]
    assert len(set(map(tuple, drawn))) > 1


def test_given_keeps_the_order_and_says_each_steps_perplexity():
    order = ("mlp.2", "mha.0,mlp.0", "mha.1")
    found = Searched(method="given", options={"order": order}, budget="4blocks")
    assert found.order == list(order)
    prefixes = [parse_mask(",".join(order[:k])) for k in range(4)]
    assert found.perplexities == pytest.approx(
        [np.exp(nll(model_of("llama", LAYERS), mask)) for mask in prefixes], rel=1e-9
    )
    assert Searched(method="given", options={"order": order}, budget="1blocks").order == ["mlp.2"]


@pytest.mark.parametrize(
    ("order", "changes", "message"),
    [
        (
            ("mha.0", "mlp.3"),
            {},
            r"score\.options\.order removes mlp\.3, which is not among the candidates; the candidates are",
        ),
        (("mha.0", "mha.0"), {}, r"removes mha\.0, which was removed before"),
        (("mha.0,mlp.1", "mlp.1,mlp.2"), {}, r"removes mlp\.1, which was removed before"),
        (("mlp.0",), {"candidates": "mha"}, r"is not among the candidates; the candidates are mha\.0,mha\.1,mha\.2$"),
        (("attn.3",), {}, r"block 'attn\.3' is not of the form mha\.<layer>"),
        ((25,), {}, r"block '25' is not of the form mha\.<layer>"),
        (("mha.0", "mlp.0"), {}, r"budget '3blocks' is not reached: the removals end at 2blocks, ratio 0\.\d{4}"),
        ((), {}, r"score\.options\.order is empty; name what to remove"),
    ],
)
def test_given_refuses(order, changes, message):
    with pytest.raises(InputError, match=message):
        Searched(method="given", options={"order": order}, budget="3blocks", **changes)


def test_given_that_ends_nearest_to_a_ratio_meets_it():
    """Where one block more would be farther off than the end of the order."""
    full = Searched(method="given", options={"order": ("mha.0", "mlp.0", "mha.1")}, budget="0.3")
    counts = count_parameters(model_of("llama", LAYERS).config.to_dict())
    ratio = counts.ratio(parse_mask("mha.0,mlp.0"))
    ended = Searched(method="given", options={"order": ("mha.0", "mlp.0")}, budget=f"{ratio + 1e-4:.6f}")
    assert ended.order == full.order[:2]


LLAMA2_7B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000, "tie_word_embeddings": False,
}  # fmt: skip
OFFICIAL = """mha25 mha27 mha24 mha23 mha28 mha29 mha8 mlp7 mha19 mha30 mlp22 mha21 mlp27 mha18 mlp21 mlp11 mha12
    mha14 mlp14 mlp24"""


def test_the_official_sequence_is_shipped_and_its_first_17_removals_are_the_papers_ratio():
    """Of the public code of arXiv 2406.10594 on Llama-2-7B with 64 samples; ratios from the config alone."""
    run = load_run("llama2-7b-official", ROOT / "runs")
    settings = search_settings(run.score.model_dump(exclude_none=True))
    counts = count_parameters(LLAMA2_7B)
    units = removable_units(32, settings["unit"], settings["candidates"])
    problem = Problem(units, ask=None, select=None, rows=1)
    trace = list(SEARCHES[settings["method"]].search(problem, **settings["options"]))
    assert [format_mask(step.added[-1]) for step in trace] == [
        f"{text[:3]}.{text[3:]}" for text in OFFICIAL.split()
    ]  # fmt: skip
    prefixes = [step.removed for step in trace]
    assert f"{counts.ratio(prefixes[16]):.2%}" == "21.99%"
    assert {kind: sum(b.kind is kind for b in prefixes[16]) for kind in BlockKind} == {"mha": 12, "mlp": 5}
    for budget in ("0.22", "17blocks"):
        assert choose_prefix(parse_budget(budget, counts), prefixes, counts) == 17
    assert run.calibration.num_samples == 64
    dense = load_run("llama2-7b", ROOT / "runs")
    assert run.model == dense.model and run.evaluate == dense.evaluate and run.recover == dense.recover


# --- switching method and metric, and back ---------------------------------------------------------------------------

CONFIG = {
    "model_type": "llama", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 3,
    "num_attention_heads": 2, "vocab_size": 16,
}  # fmt: skip
COSTS = {
    "perplexity": "mha.0 mha.1 mha.2 mlp.0 mlp.1 mlp.2",
    "kl": "mlp.0 mha.2 mlp.1 mha.0 mha.1 mlp.2",
    "js": "mlp.1 mlp.0 mha.0 mha.1 mha.2 mlp.2",
    "block_influence": "mlp.2 mlp.1 mha.2 mha.1 mlp.0 mha.0",
}
"""The blocks in the order of their costs by loss; the loss of a mask is the sum of its blocks' costs."""


class CountingEngine:
    def __init__(self):
        self.asked = []

    def row_batches(self, rows, span):
        return [range(i, i + 1) for i in span]

    def run(self, tasks, rows):
        for task in tasks:
            costs = COSTS.get(task.metric.key, COSTS["block_influence"]).split()
            for mask in task.masks:
                self.asked.append((task.metric.key, task.base, mask, task.span.start))
                value = 1.0 + sum(costs.index(str(block)) for block in mask - task.base)
                yield ScoredRows(mask, task.span.start, tuple(value for _ in task.span))

    def close(self):
        pass


def scored(folder, budget="2blocks", rows=((1, 2, 3), (4, 5, 6)), **score):
    """What a run of the search computed, in trials, and its removed mask by budget."""
    engine = CountingEngine()
    score_run(
        folder / "scores", folder / "trials", calibration=CalibrationSet(rows), model_identity="m", dtype="float32",
        config=CONFIG, score=SCORE | score, budgets=[budget], scorer=engine, make_bench=None,
        observer=SilentObserver(), metrics=folder / "score.json",
    )  # fmt: skip
    assert len(engine.asked) == len(set(engine.asked))
    by_loss = {loss: sum(asked[0] == loss for asked in engine.asked) for loss in {asked[0] for asked in engine.asked}}
    facts = json.loads((folder / "score.json").read_text())
    assert facts["trials_computed"] * len(rows) == facts["units_computed"] == sum(by_loss.values())
    current = read_current(folder / "scores")
    trace = read_trace(trace_directory(folder / "scores", current, budget), current["search"])
    steps = int(budget.removesuffix("blocks")) if current["nested"] else len(trace)  # longer ones may be left of before
    return {loss: n // len(rows) for loss, n in by_loss.items()}, format_mask(trace[steps - 1].removed)


def test_switching_method_or_metric_and_back_computes_no_trial_again(tmp_path):
    """Six blocks, two removed. A greedy search asks for the dense model, 6 single blocks and 5 pairs with the first."""
    influence, swap = {"method": "one_shot", "metric": "block_influence"}, {"method": "swap"}
    assert scored(tmp_path) == ({"perplexity": 12}, "mha.0,mha.1")
    # one pass for 6 units; of the dense model and of mlp.2 alone the perplexity is known, of both removed it is not
    assert scored(tmp_path, **influence) == ({"block_influence": 6, "perplexity": 1}, "mlp.1,mlp.2")
    assert scored(tmp_path, metric="kl") == ({"kl": 12, "perplexity": 1}, "mha.2,mlp.0")
    # from greedy's mask: 4 probes of three blocks, and of 8 swaps the 4 that keep mha.1 (those that keep mha.0 are
    # known); the pairs found above are not among them
    assert scored(tmp_path, **swap) == ({"perplexity": 8}, "mha.0,mha.1")
    assert scored(tmp_path) == ({}, "mha.0,mha.1")
    # and further on: the third step's candidates are the probes of the swap search
    assert scored(tmp_path, budget="3blocks") == ({}, "mha.0,mha.1,mha.2")
    # one-shot asks for the scores of single blocks, which greedy knows; its masks are greedy's
    assert scored(tmp_path, method="one_shot") == ({}, "mha.0,mha.1")
    assert scored(tmp_path, metric="answer_likelihood") == ({}, "mha.0,mha.1")
    # Jensen-Shannon is of its own, and so is an influence within what a first removal leaves
    assert scored(tmp_path, metric="js") == ({"js": 12, "perplexity": 1}, "mlp.0,mlp.1")
    assert scored(tmp_path, metric="block_influence") == ({"block_influence": 5}, "mlp.1,mlp.2")
    for again in (influence, {"metric": "kl"}, swap, {"metric": "js"}, {"metric": "block_influence"}, {}):
        assert scored(tmp_path, **again)[0] == {}


@pytest.mark.parametrize("method", ["greedy", "one_shot"])
@pytest.mark.parametrize("metric", sorted(METRICS))
def test_tables_alone_seed_every_store(tmp_path, method, metric):
    first, removed = scored(tmp_path, method=method, metric=metric)
    assert first
    shutil.rmtree(tmp_path / "trials")
    assert scored(tmp_path, method=method, metric=metric) == ({}, removed)


@pytest.mark.parametrize(
    ("method", "options"), [("random", {}), ("given", {"order": ("mha.2", "mlp.0")}), ("beam", {}), ("swap", {})]
)
def test_tables_alone_seed_the_perplexities(tmp_path, method, options):
    first, removed = scored(tmp_path, method=method, options=options)
    assert first
    shutil.rmtree(tmp_path / "trials")
    assert scored(tmp_path, method=method, options=options) == ({}, removed)


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("score", "message"),
    [
        ({"method": "gredy"}, r"score\.method 'gredy' is unknown; valid: beam, .*greedy"),
        ({"metric": "ppl"}, r"score\.metric 'ppl' is unknown; valid: perplexity, .*relative_magnitude_frobenius"),
        (
            {"method": "random", "metric": "kl"},
            r"score\.metric kl does nothing with method: random, which asks for no score; remove it",
        ),
        ({"method": "given", "metric": "js", "options": {"order": ("mha.0",)}}, r"does nothing with method: given"),
        *(
            (
                {"method": method, "metric": metric},
                rf"score\.metric {metric} is of single units, and method: {method} compares whole masks; choose a "
                r"metric of masks \(perplexity, answer_likelihood, kl, js\), or one of the methods greedy, one_shot",
            )
            for method in ("beam", "evolution", "swap")
            for metric in INFLUENCES
        ),
        *(
            (
                {"method": method, "metric": metric, "acceleration": acceleration},
                rf"score\.acceleration {acceleration.replace('+', '.')} does not fit method: {method} with metric: "
                rf"{metric}: there is nothing to leave out; set acceleration: none",
            )
            for method, metric, acceleration in (
                ("greedy", "block_influence", "race"),
                ("greedy", "relative_magnitude", "lazy"),
                ("one_shot", "perplexity", "lazy+race"),
                ("beam", "perplexity", "race"),
                ("random", "perplexity", "lazy"),
                ("evolution", "perplexity", "race"),  # its start is random
            )
        ),
        ({"acceleration": "fast"}, r"score\.acceleration 'fast' is unknown; valid: none, lazy, race, lazy\+race"),
        ({"options": {"width": 3}}, r"score\.options\.width is unknown to method: greedy; valid: per"),
        (
            {"method": "swap", "options": {"try": 3}},
            r"score\.options\.try is unknown to method: swap; valid: start, tries, seed",
        ),
        ({"method": "beam", "options": {"width": "3"}}, r"score\.options\.width: '3' is not of type int"),
        ({"method": "beam", "options": {"width": True}}, r"score\.options\.width: True is not of type int"),
        ({"method": "beam", "options": {"width": 3.0}}, r"score\.options\.width: 3\.0 is not of type int"),
        ({"method": "swap", "options": {"start": 1}}, r"score\.options\.start: 1 is not of type str"),
        ({"method": "evolution", "options": {"survivors": 8}}, r"score\.options\.survivors: 8 is not of type tuple"),
        *(
            (
                {"method": method, **change},
                rf"score\.\w+: \w+ does nothing with method: {method}, which removes no block",
            )
            for method in ("laco", "slicegpt")
            for change in ({"unit": "layer"}, {"candidates": "mha"}, {"metric": "kl"}, {"acceleration": "race"})
        ),
        (
            {"method": "slicegpt", "options": {"width": 8}},
            r"options\.width is unknown to method: slicegpt; valid: none",
        ),
        ({"method": "given"}, r"method: given needs score\.options\.order, of type tuple"),
        ({"method": "given", "options": {"order": "mha.0"}}, r"score\.options\.order: 'mha\.0' is not of type tuple"),
    ],
)
def test_settings_that_make_no_sense(score, message):
    with pytest.raises(InputError, match=message):
        search_settings(SCORE | score)


@pytest.mark.parametrize("method", sorted(SEARCHES))
def test_defaults_are_filled_in_and_are_part_of_the_settings(method):
    options = {"order": ("mha.0",)} if method == "given" else {}
    filled = search_settings(SCORE | {"method": method, "options": options})
    assert set(filled["options"]) == set(SEARCHES[method].options)
    assert search_settings(filled) == filled
    assert filled | {"options": options} == SCORE | {"method": method, "options": options}


def test_every_score_section_in_the_documentation_is_valid():
    """Those of docs/methods.md, as a run file would have them."""
    texts = re.findall(r"`(\{method: .*?\})`", (ROOT / "docs" / "methods.md").read_text(encoding="utf-8"))
    sections = [yaml.safe_load(text) for text in texts]
    assert {section["method"] for section in sections} == {*SEARCHES, *TRANSFORMS}
    for section in sections:
        score = Score(**section).model_dump(exclude_none=True)
        settings = search_settings(score)
        assert score["options"].items() <= settings["options"].items()
        assert {key: settings[key] for key in section if key != "options"}.items() <= section.items()
