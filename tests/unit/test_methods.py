"""Greedy, one-shot, given and random removal against brute force over whole forward passes; what
switching between methods and metrics computes, to the trial; every error of a `score` section; and
what a kind brings."""

import random
import re
import shutil
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from blockpruner.config.params import load_run
from blockpruner.core.blocks import DENSE, BlockKind, format_mask, parse_mask, removable_units
from blockpruner.core.budgets import choose_prefix, parse_budget, resources_of
from blockpruner.core.errors import InputError
from blockpruner.core.families import count_parameters
from blockpruner.core.settings import read_settings
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.methods.registry import KINDS, check_score
from blockpruner.model.models import decoder_layers, masked
from blockpruner.scoring.metrics import METRICS
from blockpruner.scoring.settings import Score
from blockpruner.search.iteration import removals
from blockpruner.search.registry import SEARCHES, request
from blockpruner.search.trace import read_trace, trace_directory
from tests.builders import FakeScorer, removed_in, scored, searched, short_rows, small_config
from tests.oracles import divergence, influence, model_of, recorded, row
from tests.shapes import SHAPES
from tests.tiny import full_nll, tiny_model
from tests.unit.test_blocks_budgets import OFFICIAL_ORDER

LAYERS = 3
ROWS = CalibrationSet((row(12, 1), row(7, 2), row(10, 3)))
ROOT = Path(__file__).parents[2]
INFLUENCES = [name for name, metric in METRICS.items() if metric.influence]
MODELS = pytest.mark.parametrize(
    "variant", ["llama", pytest.param("gpt_neox", marks=pytest.mark.slow)]
)


class Searched:
    """A nested search of a tiny model: its order to the end, and the losses of the first step."""

    def __init__(self, model=None, budget=None, rows=ROWS, **score):
        units = units_of(score.get("unit", "block"), score.get("candidates", "all"))
        budget = budget or f"{len(DENSE.union(*units))}blocks"
        self.trace = searched(model or model_of("llama", LAYERS), rows, [budget], **score).of(
            budget
        )
        self.order, self.perplexities = removed_in(self.trace), removals(self.trace, nested=True)[1]
        first = zip(self.trace[0].added, self.trace[0].scores, strict=True)
        self.losses = {
            format_mask(unit): score.loss for unit, score in first if unit and score.row_loss
        }


@cache
def lopsided(variant):
    """A model whose first layer adds little, so that its removal comes early and changes what the
    others do."""
    model = tiny_model(variant, LAYERS)
    for parameter in decoder_layers(model)[0].parameters():
        if parameter.dim() == 2:
            parameter.mul_(0.4)
    return model


@cache
def nll(model, mask, rows=ROWS.rows):
    with masked(model, mask):
        return np.mean([full_nll(model, tokens) for tokens in rows])


def perplexities_of(model, masks):
    return pytest.approx([np.exp(nll(model, mask)) for mask in masks], rel=1e-9)


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


# --- one-shot


@pytest.mark.parametrize("unit", ["layer", "block"])
@pytest.mark.parametrize("metric", ["perplexity", *INFLUENCES])
@MODELS
def test_one_shot_is_the_ranking_of_the_formula(variant, metric, unit):
    """Over layers by block influence: ShortGPT; by relative magnitude: the paper's RM; by
    perplexity: Shortened-LLM. Over blocks: LLM-Drop, and the ablation of table 2. Every step
    reports its perplexity."""
    model = lopsided(variant)
    result = Searched(model, method="one_shot", unit=unit, metric=metric)
    brute = (
        {u: nll(model, u) for u in units_of(unit)}
        if metric == "perplexity"
        else brute_influences(model, metric)
    )
    expected = {format_mask(u): brute[u] for u in units_of(unit)}
    assert result.losses == pytest.approx(
        expected, **{"abs" if metric == "perplexity" else "rel": 1e-10}
    )
    assert result.order == sorted(expected, key=expected.__getitem__)
    prefixes = [
        DENSE.union(*map(parse_mask, result.order[:k])) for k in range(len(result.order) + 1)
    ]
    assert result.perplexities == perplexities_of(model, prefixes)


# --- greedy


@pytest.mark.parametrize(
    ("unit", "candidates"), [("layer", "all"), ("block", "all"), ("block", "mha"), ("block", "mlp")]
)
def test_greedy_by_perplexity(unit, candidates):
    """Over layers: greedy layers. Over blocks BlockPruner, and of one kind only, as in figure 4."""
    model = lopsided("llama")
    result = Searched(model, unit=unit, candidates=candidates)
    assert result.order == brute_greedy(
        units_of(unit, candidates), lambda removed, u: nll(model, removed | u)
    )


@pytest.mark.parametrize("metric", ["kl", "js"])
def test_greedy_by_divergence(metric):
    def loss(removed, unit):
        return np.mean(
            [divergence(metric, "llama", removed | unit, tokens) for tokens in ROWS.rows]
        )

    result = Searched(metric=metric)
    assert result.order == brute_greedy(units_of(), loss)
    expected = {format_mask(u): loss(DENSE, u) for u in units_of()}
    assert result.losses == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("unit", ["block", "layer"])
@pytest.mark.parametrize("metric", INFLUENCES)
@MODELS
def test_greedy_by_influence_measures_what_is_left_anew(variant, metric, unit):
    """Figure 6, and LLM-Drop's iterative script: after each removal from the states of the model
    without it, and with each step's perplexity."""
    model = lopsided(variant)
    result = Searched(model, metric=metric, unit=unit)
    bases, moved = [DENSE, *(step.removed for step in result.trace)], set()
    assert result.order == brute_greedy(
        units_of(unit), lambda removed, u: brute_influences(model, metric, removed)[u]
    )
    for base, step in zip(bases[:-1], result.trace, strict=True):
        brute = brute_influences(model, metric, base)
        for added, score in zip(step.added, step.scores, strict=True):
            if added is not None:
                assert score.mask == base | added
                assert score.loss == pytest.approx(brute[added], rel=1e-9)
        dense = brute_influences(model, metric)
        moved |= {unit for unit in brute if abs(brute[unit] - dense[unit]) > 1e-3}
    assert len(moved) > 1  # scores of the dense model would not have passed
    assert result.perplexities == perplexities_of(model, bases)


def test_perplexity_is_over_the_scored_tokens():
    rows = CalibrationSet((row(9, 1, given=5), row(12, 2, given=10), row(6, 3, given=2)))

    def loss(mask):
        result = []
        for tokens in rows.rows:
            ids = torch.tensor([[t if t >= 0 else ~t for t in tokens]])
            with masked(model_of("llama", LAYERS), mask) as model, torch.no_grad():
                lp = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
            result.append(
                -np.mean(
                    [lp[t - 1, tokens[t]].item() for t in range(1, len(tokens)) if tokens[t] >= 0]
                )
            )
        return np.mean(result)

    result = Searched(rows=rows)
    assert result.losses == pytest.approx({format_mask(u): loss(u) for u in units_of()}, abs=1e-10)
    assert result.order == brute_greedy(units_of(), lambda removed, u: loss(removed | u))


# --- no score at all


@pytest.mark.parametrize(
    ("unit", "candidates"), [("block", "all"), ("layer", "all"), ("block", "mlp")]
)
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
    result = Searched(method="given", options={"order": order}, budget="4blocks")
    assert result.order == list(order)
    prefixes = [parse_mask(",".join(order[:k])) for k in range(4)]
    assert result.perplexities == perplexities_of(model_of("llama", LAYERS), prefixes)
    assert Searched(method="given", options={"order": order}, budget="1blocks").order == ["mlp.2"]


@pytest.mark.parametrize(
    ("order", "changes", "named"),
    [
        (("mha.0", "mlp.3"), {}, "mlp.3"),
        (("mha.0", "mha.0"), {}, "mha.0"),
        (("mha.0,mlp.1", "mlp.1,mlp.2"), {}, "mlp.1"),
        (("mlp.0",), {"candidates": "mha"}, "mlp.0"),
        (("attn.3",), {}, "attn.3"),
        (("mha.0", "mlp.0"), {}, "3blocks"),
        ((), {}, "score.options.order"),
    ],
)
def test_given_refuses(order, changes, named):
    with pytest.raises(InputError, match=re.escape(named)):
        Searched(method="given", options={"order": order}, budget="3blocks", **changes)


def test_given_that_ends_nearest_to_a_ratio_meets_it():
    """Where one block more would be farther off than the end of the order."""
    order = ("mha.0", "mlp.0")
    ratio = count_parameters(model_of("llama", LAYERS).config.to_dict()).ratio(
        parse_mask(",".join(order))
    )
    ended = Searched(method="given", options={"order": order}, budget=f"{ratio + 1e-4:.6f}")
    assert ended.order == list(order)


def test_the_official_sequence_is_shipped_and_its_first_17_removals_are_the_papers_ratio():
    """Of the public code of arXiv 2406.10594 on Llama-2-7B with 64 samples; ratios from the config
    alone."""
    run, resources = (
        load_run("llama2-7b-official", ROOT / "runs"),
        resources_of(SHAPES["meta-llama/Llama-2-7b-hf"]),
    )
    counts = resources["parameters"]
    trace = searched(
        FakeScorer(), short_rows(1), ["20blocks"], resources, **run.score.model_dump()
    ).of("20blocks")
    assert removed_in(trace) == [f"{text[:3]}.{text[3:]}" for text in OFFICIAL_ORDER.split()]
    prefixes = [step.removed for step in trace]
    assert f"{counts.ratio(prefixes[16]):.2%}" == "21.99%"
    assert {kind: sum(b.kind is kind for b in prefixes[16]) for kind in BlockKind} == {
        "mha": 12,
        "mlp": 5,
    }
    for budget in ("0.22", "17blocks"):
        assert choose_prefix(parse_budget(budget, counts), prefixes, counts) == 17
    assert run.calibration.num_samples == 64
    dense = load_run("llama2-7b", ROOT / "runs")
    assert run.model == dense.model
    assert run.train == dense.train
    assert run.evaluate.perplexity == dense.evaluate.perplexity
    assert not run.evaluate.zero_shot.bos


# --- switching method and metric, and back

COSTS = {
    "perplexity": "mha.0 mha.1 mha.2 mlp.0 mlp.1 mlp.2",
    "kl": "mlp.0 mha.2 mlp.1 mha.0 mha.1 mlp.2",
    "js": "mlp.1 mlp.0 mha.0 mha.1 mha.2 mlp.2",
    "block_influence": "mlp.2 mlp.1 mha.2 mha.1 mlp.0 mha.0",
}
"""The blocks in the order of their costs by loss; the loss of a mask is the sum of its blocks'
costs."""


def cost_of(loss, base, mask, row):
    costs = COSTS.get(loss, COSTS["block_influence"]).split()
    return 1.0 + sum(costs.index(str(block)) for block in mask - base)


def run(folder, budget="2blocks", **score):
    """What a run of the search computed, in trials by loss, and its removed mask."""
    scorer, rows = FakeScorer(cost_of, one_row=True), CalibrationSet(((1, 2, 3), (4, 5, 6)))
    result = scored(folder, scorer, small_config(LAYERS), [budget], rows, **score)
    assert (
        result.trials_computed * 2
        == result.units_computed
        == len(scorer.asked)
        == len(set(scorer.asked))
    )
    current = result.current
    trace = read_trace(trace_directory(folder / "scores", current, budget), current.search)
    # longer ones may be left of before
    steps = int(budget.removesuffix("blocks")) if current.nested else len(trace)
    computed = Counter(loss for loss, *_ in scorer.asked)
    return {loss: n // 2 for loss, n in computed.items()}, format_mask(trace[steps - 1].removed)


def test_switching_method_or_metric_and_back_computes_no_trial_again(tmp_path):
    """Six blocks, two removed. A greedy search asks for the dense model, 6 single blocks and 5
    pairs with the first."""
    influence, beam = (
        {"method": "one_shot", "metric": "block_influence"},
        {"method": "beam", "options": {"per": "none"}},
    )
    assert run(tmp_path) == ({"perplexity": 12}, "mha.0,mha.1")
    # one pass for 6 units; of the dense model and of mlp.2 alone the perplexity is known, of both
    # removed it is not
    assert run(tmp_path, **influence) == ({"block_influence": 6, "perplexity": 1}, "mlp.1,mlp.2")
    assert run(tmp_path, metric="kl") == ({"kl": 12, "perplexity": 1}, "mha.2,mlp.0")
    # all pairs but that of the two worst; the five with mha.0 are known, and one of those found
    # above
    assert run(tmp_path, **beam) == ({"perplexity": 8}, "mha.0,mha.1")
    assert run(tmp_path) == ({}, "mha.0,mha.1")
    # and further on: the third step's candidates
    assert run(tmp_path, budget="3blocks") == ({"perplexity": 4}, "mha.0,mha.1,mha.2")
    # one-shot asks for the scores of single blocks, which greedy knows; its masks are greedy's
    assert run(tmp_path, method="one_shot") == ({}, "mha.0,mha.1")
    # Jensen-Shannon is of its own (the beam knows the perplexity), and so is an influence within
    # what is left
    assert run(tmp_path, metric="js") == ({"js": 12}, "mlp.0,mlp.1")
    assert run(tmp_path, metric="block_influence") == ({"block_influence": 5}, "mlp.1,mlp.2")
    for again in (
        influence,
        {"metric": "kl"},
        beam,
        {"metric": "js"},
        {"metric": "block_influence"},
        {},
    ):
        assert run(tmp_path, **again)[0] == {}


@pytest.mark.parametrize(
    "score",
    [
        *({"metric": metric} for metric in ("perplexity", "kl", "block_influence")),
        *({"method": method} for method in ("one_shot", "random", "floating")),
    ],
    ids=lambda score: " ".join(map(str, score.values())),
)
def test_tables_alone_seed_every_store(tmp_path, score):
    first, removed = run(tmp_path, **score)
    assert first
    shutil.rmtree(tmp_path / "trials")
    assert run(tmp_path, **score) == ({}, removed)


# --- settings


@pytest.mark.parametrize(
    ("score", "named"),
    [
        ({"method": "gredy"}, "gredy"),
        ({"method": "mask"}, "mask"),
        ({"metric": "ppl"}, "ppl"),
        ({"method": "random", "metric": "kl"}, "score.metric kl"),
        ({"method": "floating", "metric": "block_influence"}, "score.metric block_influence"),
        ({"metric": "block_influence", "acceleration": "race"}, "score.acceleration race"),
        ({"metric": "block_influence", "options": {"per": "kv"}}, "score.options.per kv"),
        ({"method": "laco", "unit": "layer"}, "score.unit: layer"),
        ({"method": "slicegpt", "acceleration": "race"}, "score.acceleration: race"),
        *(
            ({"method": "floating", "options": {"tries": tries}}, "score.options.tries")
            for tries in (0, "3", True, 3.0)
        ),
        ({"method": "laco", "options": {"variant": "mine"}}, "score.options.variant"),
        ({"method": "slicegpt", "options": {"width": 8}}, "score.options.width"),
        ({"method": "given"}, "score.options.order"),
        ({"acceleration": "fast"}, "acceleration"),
    ],
)
def test_settings_that_make_no_sense(score, named):
    with pytest.raises(InputError, match=re.escape(named)):
        check_score(read_settings(Score, {"method": "greedy", **score}))


def test_every_score_section_in_the_documentation_is_valid():
    """Those of docs/methods.md, as a run file would have them."""
    texts = re.findall(
        r"`(\{method: .*?\})`", (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    )
    sections = [Score(**yaml.safe_load(text)) for text in texts]
    assert {section.method for section in sections} == {*SEARCHES, *KINDS} - {"mask"}
    for section in sections:
        if check_score(section).removes_blocks:
            assert section.options.items() <= request(section).fields["options"].items()
