"""Narrower MLPs against the dense model with zeros in place of channels, and against least squares
in numpy."""

import copy
import json
import math
import shutil
from itertools import combinations, product

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from blockpruner.checkpoints.hf import export_hf
from blockpruner.checkpoints.nas import export_nas
from blockpruner.core.blocks import format_channels, parse_block, parse_channels, parse_mask
from blockpruner.core.budgets import parse_budget
from blockpruner.core.errors import InputError, UnreachableError
from blockpruner.core.families import FAMILIES, count_parameters
from blockpruner.core.progress import SilentObserver
from blockpruner.healing.compensate import compensate
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.methods.apply import pruned_copy
from blockpruner.methods.healed import set_weights_
from blockpruner.methods.narrow import levels as narrowing
from blockpruner.methods.narrow.kind import NarrowOptions, choose, require_widths, step_of
from blockpruner.methods.narrow.levels import Width, by_cost, levels, measure_levels
from blockpruner.model.models import decoder_layers, load_model, masked, model_family, shared_copy
from blockpruner.model.narrow import narrow_, narrowed
from blockpruner.scoring.engine import Engine
from tests.builders import scored
from tests.engines import with_mlx
from tests.plans import fetch_tiny, healed_of, narrow_plan, pruning, save_pruned
from tests.tiny import GRID, full_nll, tiny_model

GENERATOR = torch.Generator().manual_seed(5)


ALL_IDS = torch.randint(1, 257, (40, 24), generator=GENERATOR)


ROWS = CalibrationSet(tuple(map(tuple, ALL_IDS.tolist())))


FIT = CalibrationSet(ROWS.rows[:30])


HELDOUT = CalibrationSet(ROWS.rows[30:])


IDS = ALL_IDS[:3, :12]
KEPT = {"mlp.1": tuple(range(3, 20)), "mlp.3": (0, 5, 47)}
PLANS = {"narrow": KEPT, "none": {}}


NARROW = [case for case in GRID if FAMILIES[case.values[0].split()[0]].has_one_mlp]


def blocks(kept):
    return {parse_block(name): channels for name, channels in kept.items()}


def perplexity_of(model):
    """Of the rows that a refit holds out."""
    return math.exp(sum(full_nll(model, row) for row in HELDOUT.rows) / 10)


def output_projection(model, number):
    branch = model_family(model).mlp
    return decoder_layers(model)[number].get_submodule(f"{branch.module}.{branch.output}")


def with_zeros(model, kept):
    """A copy of a dense model in which the other channels are not written."""
    result = copy.deepcopy(model)
    for block, channels in blocks(kept).items():
        weight = output_projection(result, block.layer).weight
        removed = [channel for channel in range(weight.shape[1]) if channel not in channels]
        weight.data[:, removed] = 0
    return result


@pytest.mark.parametrize("variant", NARROW)
def test_a_narrow_model_is_the_dense_one_with_zeros(variant, tmp_path):
    """For a while, for good, and from a checkpoint; the dense model is as before, and shares the
    rest."""
    model = tiny_model(variant)
    config = model.config.to_dict()
    before = model(IDS).logits
    expected = with_zeros(model, KEPT)(IDS).logits
    with narrowed(model, blocks(KEPT)) as narrow:
        torch.testing.assert_close(narrow(IDS).logits, expected, rtol=0, atol=1e-9)
    assert torch.equal(model(IDS).logits, before)
    assert model.config.to_dict() == config

    pruned = narrow_(shared_copy(model), blocks(KEPT))
    torch.testing.assert_close(pruned(IDS).logits, expected, rtol=0, atol=1e-9)
    assert torch.equal(model(IDS).logits, before)
    shared = {weight.data_ptr() for weight in model.parameters()}
    for name, weight in pruned.named_parameters():
        assert weight.data_ptr() in shared or name.split(".")[2] in ("1", "3"), name
    save_pruned(pruned, tmp_path / "pruned")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "pruned", trust_remote_code=True, dtype=torch.float64
    )
    assert torch.equal(loaded(IDS).logits, pruned(IDS).logits)
    assert loaded.num_parameters() == narrow_plan(config, KEPT).parameters["pruned"]
    with pytest.raises(InputError, match="prune its dense model by more"):
        FAMILIES[loaded.config.model_type]
    # As transformers reads it.
    fields = json.loads((tmp_path / "pruned/config.json").read_text())
    per_layer = {"per_layer_config": fields["per_layer_config"]}
    base = CONFIG_MAPPING[config["model_type"]].from_dict(config | per_layer)
    assert [layer.intermediate_size for layer in base.per_layer_config] == [48, 17, 48, 3]


@pytest.mark.parametrize("variant", NARROW)
def test_an_mlp_without_any_channel_is_a_removed_block(variant):
    """To the bit: zeros in place of all channels, and of the bias of the output projection."""
    model = tiny_model(variant)
    emptied = with_zeros(model, {"mlp.2": ()})
    bias = output_projection(emptied, 2).bias
    if bias is not None:
        bias.data.zero_()
    with masked(model, parse_mask("mlp.2")) as pruned:
        assert torch.equal(pruned(IDS).logits, emptied(IDS).logits)
    assert not torch.equal(model(IDS).logits, emptied(IDS).logits)


@pytest.mark.parametrize(
    "kept", [{"mlp.4": (1,)}, {"mha.1": (1,)}, {"mlp.1": ()}, {"mlp.1": (1, 48)}]
)
def test_channels_that_a_model_does_not_have(kept):
    with pytest.raises(InputError, match=r"cannot keep .*: the model has 4 MLPs of 48 channels"):
        narrow_(tiny_model(), blocks(kept))


def test_channels_are_written_as_bits():
    assert format_channels((0, 3, 5), 10) == "029"
    assert parse_channels("029") == (0, 3, 5)
    for n in range(1, 49):
        assert parse_channels(format_channels(range(n), 48)) == tuple(range(n))


@pytest.mark.parametrize("at_once", [9, 4])
def test_levels_are_those_of_least_squares(at_once, monkeypatch):
    """Each channel that leaves is the one without which the best projection of all others errs
    least, solved anew; and so are projections and costs where two leave at once."""
    monkeypatch.setattr(narrowing, "REMOVED_AT_ONCE", at_once)
    generator = np.random.default_rng(3)
    x = generator.normal(size=(50, 9)) @ generator.normal(size=(9, 9))
    w = generator.normal(size=(9, 4))
    gain = np.array([1.0, 2.0, 0.5, 0.0])
    gram = x.T @ x / 50
    penalized = gram + narrowing.RIDGE_PENALTY * np.trace(gram) / 9 * np.eye(9)

    def change(channels):
        solved = np.zeros_like(w)
        block = penalized[np.ix_(channels, channels)]
        solved[channels] = np.linalg.solve(block, (penalized @ w)[channels])
        return w - solved

    def loss(channels, matrix):
        scaled = change(channels) * gain
        return np.trace(scaled.T @ matrix @ scaled)

    results = list(levels(torch.tensor(gram), torch.tensor(w), torch.tensor(gain), 2))
    assert [level.channels for level, _ in results] == [7, 5, 3, 1]
    channels_of = {}
    for level, level_change in results:
        channels = channels_of[level.channels] = list(parse_channels(level.kept))
        np.testing.assert_allclose(level_change, change(channels), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(level.cost, loss(channels, gram), rtol=1e-9)
    remaining = list(range(9))
    while at_once == 9 and len(remaining) > 1:
        candidates = combinations(remaining, len(remaining) - 1)
        remaining = min(map(list, candidates), key=lambda channels: loss(channels, penalized))
        assert channels_of.get(len(remaining), remaining) == remaining


def record_outputs(model, number, mlp_name, output_name):
    """What a layer computes in the next passes: x, the projection's input; y, the MLP's output; h,
    the stream behind the layer."""
    layer = decoder_layers(model)[number]
    mlp = layer.get_submodule(mlp_name)
    projection = mlp.get_submodule(output_name)
    tensors = {}
    projection.register_forward_pre_hook(lambda _, args: tensors.update(x=args[0]))
    mlp.register_forward_hook(lambda _, args, output: tensors.update(y=output))
    layer.register_forward_hook(lambda _, args, output: tensors.update(h=output))
    return tensors


@pytest.mark.parametrize("stride", [1, 4])
@pytest.mark.parametrize("variant", NARROW)
@torch.no_grad()
def test_a_level_costs_what_the_stream_loses_times_the_divergence_for_that(
    variant, stride, monkeypatch
):
    """Rows of two lengths (of one where not each token counts), of which every eighth measures
    divergences. The projection is put into a copy of the model."""
    monkeypatch.setattr(narrowing, "TOKEN_STRIDE", stride)
    model = tiny_model(variant)
    family = model_family(model).mlp
    rows = list(ROWS.rows[:16])
    rows += [row[: 24 if stride > 1 else 9] for row in ROWS.rows[16:32]]
    judging_rows = rows[7::8]
    fit_rows = [row for row in rows if row not in judging_rows]

    def log_probabilities(model):
        logits = [model(torch.tensor([row])).logits[0, :-1] for row in judging_rows]
        return torch.cat(logits)[::stride].log_softmax(-1)

    p = log_probabilities(model)
    costs = by_cost(list(measure_levels(model, rows, 12, (), SilentObserver())))
    for block, block_levels in costs.items():
        number = parse_block(block).layer
        tensors = record_outputs(
            watched := copy.deepcopy(model), number, family.module, family.output
        )
        features = []
        for row in fit_rows:
            watched(torch.tensor([row]))
            rms = tensors["y"].square().mean(-1, keepdim=True).sqrt() if family.post else 1
            size = tensors["h"].norm(dim=-1, keepdim=True)
            features.append((tensors["x"] / size / rms).flatten(0, -2))
        x = torch.cat(features)
        gain = torch.ones(32).double()
        if family.post:
            gain = decoder_layers(model)[number].get_submodule(family.post)(gain)
        weight = output_projection(model, number).weight
        expected = list(levels(x.T @ x / len(x), weight.T, gain, 12))
        assert [level.kept for level in block_levels] == [level.kept for level, _ in expected]
        least, change = expected[2]
        other = copy.deepcopy(model)
        output_projection(other, number).weight -= change.T
        rise = float((p.exp() * (p - log_probabilities(other))).sum(-1).mean())
        expected_costs = [level.cost / least.cost * rise for level, _ in expected]
        actual_costs = [level.cost for level in block_levels]
        assert actual_costs == pytest.approx(expected_costs, rel=1e-6, abs=1e-9)
    assert any(block_levels[0].cost > 0 for block_levels in costs.values())


class Killed(SilentObserver):
    def advance(self, done, total, unit):
        if done == 3:
            raise KeyboardInterrupt


def score_narrow(folder, model, budgets, **settings):
    config = model.config.to_dict()
    settings |= {"method": "narrow", "dense": lambda: model}
    return scored(folder, Engine(model), config, budgets, ROWS, **settings)


def test_levels_are_measured_once_and_survive_a_kill(tmp_path, monkeypatch):
    """Three MLPs are kept when a run ends behind them; other budgets, workspaces and clones measure
    none."""
    model = tiny_model(layers=12)
    measured = []
    measure = narrowing.levels
    monkeypatch.setattr(narrowing, "levels", lambda *args: measured.append(1) or measure(*args))

    def channels(name, *budgets, observer=None):
        """Of the last budget, and for how many MLPs levels were measured."""
        measured.clear()
        score_narrow(tmp_path / name, model, budgets, observer=observer)
        (details,) = (tmp_path / name / "scores").glob(f"*/{budgets[-1]}/details.json")
        return details.read_text(), len(measured)

    def forget_plan(name):
        for folder in (tmp_path / name / "scores").glob("*/0.2"):
            shutil.rmtree(folder)

    complete, count = channels("whole", "0.1")
    assert count == 12
    assert '"channels"' in complete
    with pytest.raises(KeyboardInterrupt):
        channels("mine", "0.1", observer=Killed())
    assert channels("mine", "0.1") == (complete, 9)
    other, count = channels("mine", "0.1", "0.2")
    assert count == 0
    assert other != complete
    shutil.copytree(tmp_path / "mine/trials", tmp_path / "second/trials")
    shutil.copytree(tmp_path / "mine/scores", tmp_path / "clone/scores")
    for name in ("second", "clone"):
        forget_plan(name)
        assert channels(name, "0.2") == (other, 0), name
    damaged = next((tmp_path / "clone/scores").glob("levels-*.json"))
    damaged.write_text(damaged.read_text().replace('"rise": ', '"rise": 1'))
    forget_plan("clone")
    assert channels("clone", "0.2") == (other, 12)


def test_another_step_has_costs_of_its_own(tmp_path):
    """In a folder that knows the costs of steps of 12 channels, steps of 16 are measured anew."""
    model = tiny_model(layers=2)
    for step in (12, 16, 12):
        score_narrow(tmp_path, model, ["0.1"], options={"step": step})
    removed = []
    for path in (tmp_path / "scores").glob("levels-*.json"):
        widths = json.loads(path.read_text())["levels"][0]["widths"]
        removed.append([48 - width["channels"] for width in widths])
    assert sorted(removed) == [[12, 24, 36], [16, 32]]


def levels_at(*costs):
    """Levels of an MLP of 48 channels that loses 12, 24 and 36 of them at these costs."""
    pairs = zip((36, 24, 12), costs, strict=True)
    return [Width(format_channels(range(width), 48), width, cost) for width, cost in pairs]


def widths_of(details):
    return {name: len(parse_channels(text)) for name, text in details["channels"].items()}


@pytest.mark.parametrize(
    ("removed", "widths"),
    [
        (12, {"mlp.1": 36}),
        (36, {"mlp.0": 36, "mlp.1": 24}),
        (72, {"mlp.0": 12, "mlp.1": 12}),
        (20, {"mlp.1": 24}),
    ],
)
def test_what_costs_least_leaves_first(removed, widths):
    """mlp.1 twice, mlp.0 once, then two steps of mlp.0 at once, which cost less than one of
    mlp.1."""
    costs = {"mlp.0": levels_at(3.0, 6.5, 7.0), "mlp.1": levels_at(1.0, 2.0, 9.0)}
    assert widths_of(choose(costs, tiny_model().config.to_dict(), removed)) == widths


@pytest.mark.parametrize("source", [*range(20), "llama", "gpt_neox", "gemma3_text"])
def test_no_other_widths_cost_less(source):
    """Against all combinations of three MLPs' widths, where each step costs more than the one
    before: of costs that are drawn, and of those of tiny models."""
    if isinstance(source, int):
        draws = np.random.default_rng(source).exponential(size=(3, 3))
        costs = {f"mlp.{n}": levels_at(*np.sort(draws[n]).cumsum()) for n in range(3)}
    else:
        rows = ROWS.rows[:10]
        measured = measure_levels(tiny_model(source, 3), rows, 12, (), SilentObserver())
        costs = by_cost(list(measured))
    by_steps = np.array([[0.0, *(width.cost for width in widths)] for widths in costs.values()])
    assert (np.diff(by_steps, 2) > 0).all()
    for steps in range(1, 10):
        details = choose(costs, tiny_model().config.to_dict(), 12 * steps)
        choices = [choice for choice in product(range(4), repeat=3) if sum(choice) == steps]
        least = min(by_steps[range(3), choice].sum() for choice in choices)
        assert details["cost"] == pytest.approx(least)
        assert sum(48 - width for width in widths_of(details).values()) == 12 * steps


@pytest.mark.parametrize(
    ("family", "budget", "error", "message"),
    [
        (
            "llama",
            "0.9",
            UnreachableError,
            r"narrow removes 1\.\d\d% to \d\d\.\d% of the parameters",
        ),
        ("llama", "0.001", UnreachableError, "out of reach"),
        ("llama", "0.5kv", InputError, "met by removing blocks"),
        ("llama", "3blocks", InputError, "met by removing blocks"),
        ("mixtral", "0.1", UnreachableError, "with one MLP in a layer"),
    ],
)
def test_budgets_that_no_widths_meet(family, budget, error, message):
    config = tiny_model(family).config.to_dict()
    with pytest.raises(error, match=message):
        require_widths(parse_budget(budget, count_parameters(config)), NarrowOptions(), config)


def test_steps_are_whole_tiles_where_an_mlp_has_them():
    assert [step_of(NarrowOptions(), width) for width in (48, 1536, 4864, 11008)] == [
        6,
        192,
        512,
        1280,
    ]
    assert step_of(NarrowOptions(step=7), 48) == 7


def test_a_refit_of_a_narrow_block_is_least_squares(monkeypatch):
    """What the kept channels of the last MLP write becomes what is nearest to the dense stream,
    relatively."""
    monkeypatch.setattr("blockpruner.healing.refit.RIDGE_PENALTIES", (1e-12,))
    model = tiny_model()
    name = "model.layers.3.mlp.down_proj.weight"
    channels = range(0, 48, 2)
    plan = narrow_plan(model.config.to_dict(), {"mlp.3": channels})
    weights, facts = compensate(model, {"": plan}, FIT, HELDOUT, SilentObserver())[""]
    assert facts["share"] == 1
    assert list(weights) == [name]
    tensors = record_outputs(model, 3, "mlp", "down_proj")
    model(ALL_IDS[:30])
    x, y, h = (tensors[key].flatten(0, 1).numpy() for key in "xyh")
    size = np.linalg.norm(h, axis=1, keepdims=True)
    best = np.linalg.lstsq((x / size)[:, channels], y / size, rcond=None)[0]
    np.testing.assert_allclose(weights[name].numpy(), best.T, atol=1e-6)


@pytest.mark.parametrize("variant", NARROW)
def test_a_refitted_narrow_model_has_the_perplexity_that_is_reported(variant):
    """Beside a plan that removes nothing, with which it shares a walk."""
    model = tiny_model(variant)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    plans = {name: narrow_plan(model.config.to_dict(), kept) for name, kept in PLANS.items()}
    results = compensate(model, plans, FIT, HELDOUT, SilentObserver())
    assert all(weight.equal(before[name]) for name, weight in model.named_parameters())
    assert not results["none"][0]
    weights, facts = results["narrow"]
    perplexity = facts["perplexity"]
    pruned = pruned_copy(model, plans["narrow"], ())
    assert perplexity_of(pruned) == pytest.approx(perplexity["before"], rel=1e-6)
    set_weights_(pruned, weights, shared=True)
    assert perplexity_of(pruned) == pytest.approx(perplexity["after"], rel=1e-6)
    # Of random weights, a fit need not mend the loss.
    if variant in ("llama", "gemma3_text", "gpt_neox"):
        assert perplexity["after"] < perplexity["before"]


@pytest.mark.parametrize("form", [export_hf, pytest.param(export_nas, marks=with_mlx)])
@pytest.mark.usefixtures("in_process")
def test_a_checkpoint_holds_a_narrow_model(form, tmp_path):
    """Verified by its engine, with refitted weights."""
    dense = fetch_tiny(tmp_path, "llama")
    plan = narrow_plan(dense, KEPT)
    name = "model.layers.1.mlp.down_proj.weight"
    weight = 2 * load_model(dense, "float32", "cpu").get_parameter(name)[:, list(KEPT["mlp.1"])]
    healed = healed_of(dense, plan, tmp_path, {name: weight})
    form(pruning(dense, plan, healed=healed), tmp_path / "out")
    report = json.loads((tmp_path / "out/verification.json").read_text())
    assert report["ok"]
    assert report["cache_layers"] == 4
    saved = load_file(tmp_path / "out/model.safetensors")[name]
    assert torch.equal(saved[:, :17], weight)
    assert not saved[:, 17:].any()
    assert "2 of its 4 MLPs narrowed" in (tmp_path / "out/README.md").read_text()
