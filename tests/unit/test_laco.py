"""LaCo against models built by hand from its formulas, a walk written as its notebook, and scans of
all thresholds."""

import copy
import json
import math
import random
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from blockpruner.core.budgets import parse_budget, resources_of
from blockpruner.core.errors import InputError, UnreachableError
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.methods.laco.kind import LACO, LacoOptions, plan_merges
from blockpruner.methods.laco.merging import VARIANTS, Similarity, merge_, merged
from blockpruner.methods.laco.walk import (
    Merge,
    Walk,
    dropped,
    layers_after,
    search_threshold,
)
from blockpruner.model.classes import read_config
from blockpruner.model.models import decoder_layers, load_model, model_family
from tests import tiny
from tests.builders import material_of
from tests.tiny import tiny_model, tolerance

MODELS = [
    each
    for each in tiny.GRID
    if not each.values[0].startswith(("qwen3_moe", "qwen3_next", "qwen3_5"))
]
"""Those whose layers are of one kind."""
OF_ALL = pytest.mark.parametrize("family", MODELS)
OF_BOTH = pytest.mark.parametrize("variant", VARIANTS)
# the third merges a merged layer and one merged before
MERGES = (
    Merge(3, 2),
    Merge(1, 1),
    Merge(1, 2),
)
SETTINGS = {"count": 3, "lowest": 0, "highest": None, "interval": 1}
ROWS = [[5, 17, 200, 3, 99, 41, 8], [250, 1, 0], [60, 61, 62, 63]]
IDS = torch.tensor([[5, 17, 200, 3, 99, 41, 8, 250, 77]])


def by_hand(dense, merges, variant):
    """A model of fewer layers, made from its config, with weights put together by name from the
    dense state dict."""
    prefix, depth = model_family(dense).layers + ".", dense.config.num_hidden_layers
    state = {name: value.clone() for name, value in dense.state_dict().items()}
    layers = []
    for i in range(depth):
        own = [name for name in state if name.startswith(f"{prefix}{i}.")]
        layers.append({name.removeprefix(f"{prefix}{i}."): state.pop(name) for name in own})
    lists = ("layer_types", "no_rope_layers")
    kinds = {
        name: list(values)
        for name in lists
        if (values := getattr(dense.config, name, None)) is not None
    }
    for merge in merges:
        first, last = merge.layer, merge.layer + merge.count
        new = dict(layers[first])
        for name, theta in layers[first].items():
            if variant == "paper":
                new[name] = theta + sum(
                    layers[first + k][name] - theta for k in range(1, merge.count + 1)
                )
            elif "norm" not in name:
                # the notebook's loop: the base is the one already updated
                for k in range(1, merge.count + 1):
                    new[name] = new[name] + (layers[first + k][name] - new[name])
        layers[first : last + 1] = [new]
        for values in kinds.values():
            values[first : last + 1] = [values[first]]
    config = copy.deepcopy(dense.config)
    config.num_hidden_layers = len(layers)
    for name, values in kinds.items():
        setattr(config, name, values)
    model = type(dense)._from_config(config, dtype=dense.dtype)
    state |= {
        f"{prefix}{i}.{name}": value
        for i, layer in enumerate(layers)
        for name, value in layer.items()
    }
    model.load_state_dict(state)
    return model.eval()


def logits_of(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


# Merges


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_moe step"])
def test_layers_of_two_kinds_are_not_merged(family):
    model = tiny_model(family)
    logits = logits_of(model, torch.tensor([ROWS[0]]))
    with pytest.raises(
        InputError, match=r"merges 1\+1 are of layers of different kinds.*another method"
    ):
        merge_(model, [Merge(1, 1)], "repo")
    assert torch.equal(logits_of(model, torch.tensor([ROWS[0]])), logits)


@OF_BOTH
@OF_ALL
def test_a_merged_model_is_the_one_built_by_hand(family, variant):
    dense = tiny_model(family, layers=8)
    kind, expected = type(dense), logits_of(by_hand(dense, MERGES, variant), IDS)
    scale = expected.abs().max()
    with merged(dense, MERGES, variant) as model:
        assert (logits_of(model, IDS) - expected).abs().max() <= 1e-11 * scale
    model = merge_(dense, MERGES, variant)
    assert model is dense
    assert type(model) is kind
    assert len(decoder_layers(model)) == model.config.num_hidden_layers == 3
    assert len(getattr(model.config, "layer_types", None) or range(3)) == 3
    assert (logits_of(model, IDS) - expected).abs().max() <= 1e-11 * scale
    with torch.no_grad():
        cached, past = [], None
        for token in IDS[0]:
            step = model(token[None, None], past_key_values=past, use_cache=True)
            past = step.past_key_values
            cached.append(step.logits[0, -1])
    assert len(past) == 3
    assert (torch.stack(cached) - expected[0]).abs().max() <= tolerance(family) / 10 * scale


def test_paper_is_computed_in_float32_and_rounded_once():
    model = tiny_model(layers=5, dtype=torch.bfloat16)
    name = "self_attn.o_proj.weight"
    theta = [layer.get_parameter(name).float().numpy().copy() for layer in decoder_layers(model)]
    merge_(model, [Merge(1, 3)], "paper")
    result = decoder_layers(model)[1].get_parameter(name)
    expected = theta[1] + (theta[2] - theta[1]) + (theta[3] - theta[1]) + (theta[4] - theta[1])
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, torch.from_numpy(expected).bfloat16())


@OF_BOTH
@OF_ALL
def test_saved_it_is_a_plain_checkpoint(tmp_path, family, variant):
    tiny_model(family, layers=6).save_pretrained(tmp_path / "dense")
    model = merge_(
        load_model(tmp_path / "dense", "float64", "cpu"), [Merge(2, 2), Merge(0, 1)], variant
    )
    model.save_pretrained(tmp_path / "merged")
    assert sorted(path.suffix for path in (tmp_path / "merged").iterdir())[-1] == ".safetensors"
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["model_type"] == family.split()[0]
    assert config["num_hidden_layers"] == 3
    assert "auto_map" not in config
    options = {"config": read_config(tmp_path / "merged"), "experts_implementation": "eager"}
    loaded, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", output_loading_info=True, **options
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    assert type(loaded) is type(model)
    assert len(decoder_layers(loaded)) == 3
    weights = loaded.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert torch.allclose(logits_of(loaded, IDS), logits_of(model, IDS), rtol=0, atol=1e-12)


def snapshot(model):
    """All that a merge changes for a while, to the bit."""
    return {
        "weights": {name: value.numpy().tobytes() for name, value in model.named_parameters()},
        "numbers": [
            getattr(layer, model_family(model).mha.module).layer_idx
            for layer in decoder_layers(model)
        ],
        "layers": list(decoder_layers(model)),
        "config": copy.deepcopy(model.config.to_dict()),
    }


@OF_BOTH
@OF_ALL
def test_a_similarity_leaves_the_dense_model_to_the_bit(monkeypatch, family, variant):
    model = tiny_model(family, layers=8)
    before, parameters = snapshot(model), list(model.parameters())
    similarity = Similarity(model, ROWS, variant)
    similarity(MERGES)
    assert snapshot(model) == before
    with pytest.raises(InputError, match=r"merge 2 \(5\+1"):
        similarity((Merge(3, 2), Merge(5, 1)))
    assert snapshot(model) == before

    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(similarity, "_advance", fail)
    with pytest.raises(KeyboardInterrupt):
        similarity(MERGES[:1])
    assert snapshot(model) == before
    assert all(now is then for now, then in zip(model.parameters(), parameters, strict=True))


@given(st.integers(1, 12), st.lists(st.tuples(st.integers(-1, 12), st.integers(-1, 6)), max_size=5))
def test_source_layers(depth, pairs):
    """Against a list of sets; a merge that runs out of the model is refused, whichever it is."""
    merges, layers, possible = (
        [Merge(*pair) for pair in pairs],
        [{layer} for layer in range(depth)],
        True,
    )
    for merge in merges:
        possible &= merge.layer >= 0 and merge.count > 0 and merge.layer + merge.count < len(layers)
        if possible:
            for _ in range(merge.count):
                layers[merge.layer] = layers[merge.layer] | layers.pop(merge.layer + 1)
    if not possible:
        with pytest.raises(InputError, match="is not possible among"):
            layers_after(merges, depth)
        return
    assert [set(sources) for sources in layers_after(merges, depth)] == layers
    assert all(list(sources) == sorted(sources) for sources in layers_after(merges, depth))
    assert dropped(merges, depth) == depth - len(layers)


# Similarity


@pytest.mark.parametrize("batch_tokens", [1, 12])
@OF_BOTH
@pytest.mark.parametrize("family", ["qwen2", "gpt_neox"])
def test_similarity_is_the_mean_cosine_after_the_final_norm(family, variant, batch_tokens):
    dense = tiny_model(family, layers=8)
    other = by_hand(dense, MERGES, variant)
    expected = []
    for row in ROWS:
        with torch.no_grad():
            a, b = (
                model(torch.tensor([row]), output_hidden_states=True)
                .hidden_states[-1]
                .numpy()
                .ravel()
                for model in (dense, other)
            )
        expected.append(a @ b / np.sqrt((a @ a) * (b @ b)))
    result = Similarity(dense, ROWS, variant, batch_tokens=batch_tokens)(MERGES)
    assert result == pytest.approx(np.mean(expected), abs=1e-12)
    assert abs(result) < 0.999


def test_states_that_are_not_finite_name_row_and_merges():
    model, rows = tiny_model(), [[1, 2, 3], [4, 200, 5]]
    model.model.embed_tokens.weight[200] = math.inf
    with pytest.raises(InputError, match=r"row 1 are not finite.*merges 1\+1; try a wider dtype"):
        Similarity(model, rows, "repo")((Merge(1, 1),))


# The walk


def collapse(similarity, depth, *, threshold, **walk):
    """The merges that a walk accepts at one threshold."""
    steps = Walk(depth, **walk).steps(similarity, threshold)
    return next((step.merges for step in reversed(list(steps)) if step.accepted), ())


def notebook_walk(similarity, depth, count, lowest, highest, interval, threshold):
    """The public notebook's loop over a list of layers that really shrinks; the candidates asked,
    and the merges."""
    model, merges, asked = list(range(depth)), (), []
    lay = highest - count
    while lay >= lowest:
        candidate, number = list(model), 0
        for _ in range(count - 1):
            if lay + 1 < len(candidate):
                del candidate[lay + 1]
                number += 1
        asked.append((*merges, Merge(lay, number)))
        if similarity(asked[-1]) > threshold:
            model, merges = candidate, asked[-1]
            lay -= interval
            if lay >= len(model):
                raise AssertionError("the notebook's rule l = depth - 1 - C is never needed")
        else:
            lay -= 1
    return asked, merges


@st.composite
def walks(draw, deepest=12):
    depth = draw(st.integers(3, deepest))
    highest = draw(st.integers(2, depth - 1))
    lowest = draw(st.integers(0, highest - 2))
    count, interval = draw(st.integers(2, highest - lowest)), draw(st.integers(1, 4))
    return {
        "depth": depth,
        "count": count,
        "lowest": lowest,
        "highest": highest,
        "interval": interval,
    }


@st.composite
def similarities(draw):
    """Any function of the merges: unrelated values, values of few kinds (ties), or falling with
    what is merged."""
    seed, kind = draw(st.integers(0, 10**6)), draw(st.sampled_from(["any", "ties", "falling"]))

    @cache
    def similarity(merges):
        value = random.Random(f"{seed} {merges}").uniform(-1, 1)
        if kind == "falling":
            return 1 - sum(
                m.count * random.Random(f"{seed} {m.layer}").uniform(0.01, 0.1) for m in merges
            )
        return round(value, 1) if kind == "ties" else value

    return similarity


@given(walks(20), similarities(), st.sampled_from([-2.0, -0.3, 0.0, 0.2, 0.6, 0.9, 2.0]))
def test_the_walk_is_the_notebooks(walk, similarity, threshold):
    expected, merges = notebook_walk(similarity, threshold=threshold, **walk)
    asked = []
    result = collapse(lambda m: asked.append(m) or similarity(m), threshold=threshold, **walk)
    assert asked == expected
    assert result == merges


# The threshold


def all_results(similarity, walk):
    """Merges by threshold, at every distinct similarity of any candidate that any sequence of
    decisions leads to."""
    candidates = set()

    def visit(layer, depth, merges):
        if layer < walk["lowest"]:
            return
        number = min(walk["count"] - 1, depth - 1 - layer)
        candidates.add((*merges, Merge(layer, number)))
        visit(layer - 1, depth, merges)
        visit(layer - walk["interval"], depth - number, (*merges, Merge(layer, number)))

    visit(walk["highest"] - walk["count"], walk["depth"], ())
    thresholds = sorted({similarity(m) for m in candidates} | {-2.0}, reverse=True)
    return {t: notebook_walk(similarity, threshold=t, **walk)[1] for t in thresholds}


@given(walks(9), similarities())
def test_results_are_all_that_a_threshold_can_give(walk, similarity):
    expected = [merges for merges in all_results(similarity, walk).values() if merges]
    expected = [merges for i, merges in enumerate(expected) if i == 0 or merges != expected[i - 1]]
    result = list(Walk(**walk).results(similarity))
    assert [merges for _, merges in result] == expected
    assert [t for t, _ in result] == sorted({t for t, _ in result}, reverse=True)
    for threshold, merges in result:
        assert collapse(similarity, threshold=threshold, **walk) == merges


@given(walks(9), similarities())
def test_the_threshold_is_the_largest_that_meets_the_budget(walk, similarity):
    depth = walk["depth"]
    scan = all_results(similarity, walk)
    removed = {t: sum(m.count for m in merges) for t, merges in scan.items()}
    asked = []

    def measure(merges):
        asked.append(merges)
        return similarity(merges)

    for wanted in range(1, depth):
        meeting = [t for t in removed if removed[t] == wanted]
        asked.clear()
        if meeting:
            threshold, merges = search_threshold(measure, Walk(**walk), wanted)
            assert merges == scan[max(meeting)]
            assert dropped(merges, depth) == wanted
            assert notebook_walk(similarity, threshold=threshold, **walk)[1] == merges
        else:
            with pytest.raises(
                InputError, match=rf"removes {wanted} of {depth} layers at no threshold"
            ):
                search_threshold(measure, Walk(**walk), wanted)
        assert len(asked) == len(set(asked)), "a candidate was measured twice"


def never_asked(merges):
    pytest.fail("measured")


@pytest.mark.parametrize(("wanted", "near"), [(7, "5"), (3, "2 and 4"), (0, "2"), (-3, "2")])
def test_a_budget_that_no_walk_meets_is_refused_before_anything_is_measured(wanted, near):
    walk = {"count": 3, "lowest": 2, "highest": 7, "interval": 1}
    message = rf"{wanted} of 8 layers at no threshold; the nearest that it removes: {near}\."
    with pytest.raises(InputError, match=message):
        search_threshold(never_asked, Walk(8, **walk), wanted)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"highest": 8}, "highest layer H = 8 is not in a model of 8 layers; valid: 0 to 7"),
        ({"lowest": 8}, "lowest layer L = 8 is not valid; choose 0 to H = 7"),
        ({"count": 1}, "count C = 1 is not valid; choose 2 to H - L = 5"),
        ({"count": 6}, "count C = 6 is not valid"),
        ({"interval": 0}, "interval I = 0 is not valid"),
    ],
)
def test_a_walk_that_would_visit_no_layer_is_refused(wrong, message):
    with pytest.raises(InputError, match=message):
        Walk(8, **{"count": 3, "lowest": 2, "highest": None, "interval": 1} | wrong)


def test_a_budget_out_of_reach_of_these_settings_is_refused_before_a_search():
    config = tiny_model("llama", 8).config.to_dict()
    counts, options = (
        resources_of(config)["parameters"],
        LacoOptions(count=3, lowest=2, highest=7, interval=1),
    )
    for text in ("2layers", "1.3x"):  # a speed-up is measured first
        LACO.require(parse_budget(text, counts), options, config)
    with pytest.raises(
        UnreachableError, match=r"budget '1layers': .*1 of 8 layers at no threshold"
    ):
        LACO.require(parse_budget("1layers", counts), options, config)


# What is known


def test_a_killed_search_goes_on_where_it_was(tmp_path, monkeypatch):
    model, rows, asked, own = (
        tiny_model(layers=8),
        CalibrationSet(tuple(map(tuple, ROWS))),
        [],
        Similarity.__call__,
    )
    costs = resources_of(model.config.to_dict())["parameters"]

    def search(kill_after=math.inf):
        """The details that are found, without what is measured of the merged model."""

        def measure(similarity, merges):
            if len(asked) >= kill_after:
                raise KeyboardInterrupt
            asked.append(merges)
            return own(similarity, merges)

        monkeypatch.setattr(Similarity, "__call__", measure)
        material = material_of(
            tmp_path, None, model.config.to_dict(), dtype="float64", dense=lambda: model
        )
        job = SimpleNamespace(material=material, calibration=rows, resources={"parameters": costs})
        return plan_merges(LacoOptions(**SETTINGS), job, parse_budget("4layers", costs))

    with pytest.raises(KeyboardInterrupt):
        search(kill_after=4)
    (path,) = (tmp_path / "trials").glob("laco-*.jsonl")
    with open(path, "ab") as file:  # a line that the kill interrupted
        file.write(b'0badc0de {"merges":[[3,2]],"sim')
    result = search()
    assert len(asked) == len(set(asked)) > 4, "what was known is not measured again"
    measured = len(asked)
    assert search() == result
    assert len(asked) == measured
    path.unlink()
    assert search() == result and len(asked) == 2 * measured, "an undisturbed search gives the same"
