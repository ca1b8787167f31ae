"""Narrower MLPs against the dense model with zeros in place of channels, and against least squares
in numpy."""

import copy
import json
import math
import shutil
from itertools import product

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
ROWS = CalibrationSet(
    tuple(tuple(torch.randint(1, 257, (24,), generator=GENERATOR).tolist()) for _ in range(40))
)
FIT, TUNING = CalibrationSet(ROWS.rows[:30]), CalibrationSet(ROWS.rows[30:])
IDS = torch.tensor([row[:12] for row in ROWS.rows[:3]])
KEPT = {"mlp.1": tuple(range(3, 20)), "mlp.3": (0, 5, 47)}
NARROW = [each for each in GRID if FAMILIES[each.values[0].split()[0]].has_one_mlp]


def blocks(kept):
    return {parse_block(name): channels for name, channels in kept.items()}


def perplexity_of(model):
    """Of the rows that a refit holds out."""
    return math.exp(sum(full_nll(model, row) for row in ROWS.rows[30:]) / 10)


def with_zeros(model, kept):
    """A copy of a dense model in which the other channels are not written."""
    result = copy.deepcopy(model)
    for block, channels in blocks(kept).items():
        branch = model_family(model).mlp
        writer = getattr(getattr(decoder_layers(result)[block.layer], branch.module), branch.output)
        writer.weight.data[:, [j for j in range(writer.in_features) if j not in channels]] = 0
    return result


@pytest.mark.parametrize("variant", NARROW)
def test_a_narrow_model_is_the_dense_one_with_zeros(variant, tmp_path):
    """For a while, for good, and from a checkpoint; the dense model is as before, and shares the
    rest."""
    model = tiny_model(variant)
    before, want = model(IDS).logits, with_zeros(model, KEPT)(IDS).logits
    config = model.config.to_dict()
    with narrowed(model, blocks(KEPT)) as lent:
        torch.testing.assert_close(lent(IDS).logits, want, rtol=0, atol=1e-9)
    assert torch.equal(model(IDS).logits, before) and model.config.to_dict() == config

    pruned = narrow_(shared_copy(model), blocks(KEPT))
    torch.testing.assert_close(pruned(IDS).logits, want, rtol=0, atol=1e-9)
    assert torch.equal(model(IDS).logits, before)
    shared = {weight.data_ptr() for weight in model.parameters()}
    assert {
        name.split(".")[2] for name, w in pruned.named_parameters() if w.data_ptr() not in shared
    } == {"1", "3"}
    save_pruned(pruned, tmp_path / "pruned")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "pruned", trust_remote_code=True, dtype=torch.float64
    )
    assert torch.equal(loaded(IDS).logits, pruned(IDS).logits)
    assert loaded.config.mlp_widths == [48, 17, 48, 3]
    fields = json.loads((tmp_path / "pruned/config.json").read_text())
    own = fields["per_layer_config"]
    assert (
        own == {"1": {"intermediate_size": 17}, "3": {"intermediate_size": 3}}
        and "mlp_widths" not in fields
    )
    base = CONFIG_MAPPING[config["model_type"]].from_dict({**config, "per_layer_config": own})
    assert [layer.intermediate_size for layer in base.per_layer_config] == [
        48,
        17,
        48,
        3,
    ], "as transformers reads it"
    with pytest.raises(InputError, match="prune its dense model by more"):
        FAMILIES[loaded.config.model_type]
    assert (
        loaded.num_parameters()
        == pruned.num_parameters()
        == narrow_plan(config, KEPT).parameters["pruned"]
    )


@pytest.mark.parametrize("variant", NARROW)
def test_an_mlp_without_any_channel_is_a_removed_block(variant):
    """To the bit: zeros in place of all channels, and of the bias of the writer."""
    model = tiny_model(variant)
    emptied = with_zeros(model, {"mlp.2": ()})
    for name, weight in decoder_layers(emptied)[2].named_parameters():
        if name.endswith(f"{model_family(model).mlp.output}.bias"):
            weight.data.zero_()
    with masked(model, parse_mask("mlp.2")) as lent:
        assert torch.equal(lent(IDS).logits, emptied(IDS).logits)
    assert not torch.equal(model(IDS).logits, emptied(IDS).logits)


@pytest.mark.parametrize(
    "kept", [{"mlp.4": (1,)}, {"mha.1": (1,)}, {"mlp.1": ()}, {"mlp.1": (1, 48)}]
)
def test_channels_that_a_model_does_not_have(kept):
    with pytest.raises(InputError, match=r"cannot keep .*: the model has 4 MLPs of 48 channels"):
        narrow_(tiny_model(), blocks(kept))


def test_channels_are_written_as_bits():
    assert format_channels((0, 3, 5), 10) == "029" and parse_channels("029") == (0, 3, 5)
    assert all(
        parse_channels(format_channels(range(n), 48)) == tuple(range(n)) for n in range(1, 49)
    )


@pytest.mark.parametrize("part", [9, 4])
def test_levels_are_those_of_least_squares(part, monkeypatch):
    """Each channel that leaves is the one without which the best writer of all others errs least,
    solved anew; and so are writers and costs where two leave at once."""
    monkeypatch.setattr(narrowing, "REMOVED_AT_ONCE", part)
    generator = np.random.default_rng(3)
    x, w = (
        generator.normal(size=(50, 9)) @ generator.normal(size=(9, 9)),
        generator.normal(size=(9, 4)),
    )
    gram, gain = x.T @ x / 50, np.array([1.0, 2.0, 0.5, 0.0])
    shifted = gram + narrowing.RIDGE_PENALTY * np.trace(gram) / 9 * np.eye(9)

    def best(kept):
        solved = np.zeros_like(w)
        solved[kept] = np.linalg.solve(shifted[np.ix_(kept, kept)], (shifted @ w)[kept])
        return w - solved

    def loss(kept, matrix):
        return np.trace((best(kept) * gain).T @ matrix @ (best(kept) * gain))

    kept, found = list(range(9)), list(levels(*map(torch.tensor, (gram, w, gain)), 2))
    assert [level.channels for level, _ in found] == [7, 5, 3, 1]
    for level, change in found:
        left = list(parse_channels(level.kept))
        np.testing.assert_allclose(change, best(left), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(level.cost, loss(left, gram), rtol=1e-9)
    while part == 9 and len(kept) > 1:
        kept = min(
            ([k for k in kept if k != j] for j in kept), key=lambda rest: loss(rest, shifted)
        )
        for level, _ in found:
            if level.channels == len(kept):
                assert parse_channels(level.kept) == tuple(kept)


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("variant", NARROW)
@torch.no_grad()
def test_a_level_costs_what_the_stream_loses_times_the_divergence_for_that(
    variant, every, monkeypatch
):
    """Rows of two lengths (of one where not each token counts), of which every eighth measures
    divergences. The writer is put into a copy of the model."""
    monkeypatch.setattr(narrowing, "TOKEN_STRIDE", every)
    model = tiny_model(variant)
    rows = tuple(row[: 24 if n < 16 or every > 1 else 9] for n, row in enumerate(ROWS.rows[:32]))
    summed, judging, family = (
        [row for n, row in enumerate(rows) if n % 8 != 7],
        rows[7::8],
        model_family(model).mlp,
    )
    costs, got = by_cost(list(measure_levels(model, rows, 12, (), SilentObserver()))), {}
    for block, found in costs.items():
        number = parse_block(block).layer
        layer, other = decoder_layers(model)[number], copy.deepcopy(model)
        mlp, norm, x = getattr(layer, family.module), getattr(layer, family.post or "", None), []
        hooks = [
            getattr(mlp, family.output).register_forward_pre_hook(
                lambda _, given: got.update(x=given[0][0])
            ),
            mlp.register_forward_hook(lambda _, given, out: got.update(y=out[0])),
            layer.register_forward_hook(lambda _, given, out: got.update(h=out[0])),
        ]
        for row in summed:
            model(torch.tensor([row]))
            rms = 1 if norm is None else got["y"].square().mean(-1, keepdim=True).sqrt()
            x.append(got["x"] / got["h"].norm(dim=-1, keepdim=True) / rms)
        [hook.remove() for hook in hooks]
        x, ones = torch.cat(x), torch.ones(32).double()
        gain, weight = ones if norm is None else norm(ones), getattr(mlp, family.output).weight
        expected = list(levels(x.T @ x / len(x), weight.T, gain, 12))
        assert [level.kept for level in found] == [level.kept for level, _ in expected]

        getattr(
            getattr(decoder_layers(other)[number], family.module), family.output
        ).weight -= expected[2][1].T
        p, q = (
            torch.cat([m(torch.tensor([row])).logits[0, :-1] for row in judging])
            for m in (model, other)
        )
        p, q = (logits[::every].log_softmax(-1) for logits in (p, q))
        rise = float((p.exp() * (p - q)).sum(-1).mean())
        for mine, (theirs, _) in zip(found, expected, strict=True):
            assert mine.cost == pytest.approx(
                theirs.cost / expected[2][0].cost * rise, rel=1e-6, abs=1e-9
            )
    assert any(levels[0].cost > 0 for levels in costs.values())


class KilledError(Exception):
    pass


class Killed(SilentObserver):
    def advance(self, done, total, unit):
        if done == 3:
            raise KilledError


def test_levels_are_measured_once_and_survive_a_kill(tmp_path, monkeypatch):
    """Three MLPs are kept when a run ends behind them; other budgets, workspaces and clones measure
    none."""
    model, measured, one = tiny_model(layers=12).requires_grad_(False), [], narrowing.levels
    monkeypatch.setattr(narrowing, "levels", lambda *given: (measured.append(1), one(*given))[1])

    def channels(folder, *budgets, observer=None):
        """Of the last budget, and for how many MLPs levels were measured."""
        measured.clear()
        found = scored(
            folder,
            Engine(model),
            model.config.to_dict(),
            budgets,
            ROWS,
            method="narrow",
            dense=lambda: model,
            observer=observer,
        )
        details = next((folder / "scores").glob(f"*/{budgets[-1]}/details.json"))
        assert found.current.kind == "narrow"
        return details.read_text(), len(measured)

    whole, count = channels(tmp_path / "whole", "0.1")
    assert count == 12 and '"channels"' in whole
    with pytest.raises(KilledError):
        channels(tmp_path / "mine", "0.1", observer=Killed())
    assert channels(tmp_path / "mine", "0.1") == (whole, 9)
    more, count = channels(tmp_path / "mine", "0.1", "0.2")
    assert count == 0 and more != whole
    shutil.copytree(tmp_path / "mine/trials", tmp_path / "beside/trials")
    shutil.copytree(tmp_path / "mine/scores", tmp_path / "clone/scores")
    for place in ("beside", "clone"):
        for folder in (tmp_path / place / "scores").glob("*/0.2"):
            shutil.rmtree(folder)
        assert channels(tmp_path / place, "0.2") == (more, 0), place
    changed = next((tmp_path / "clone/scores").glob("levels-*.json"))
    changed.write_text(changed.read_text().replace('"rise": ', '"rise": 1'))
    shutil.rmtree(next((tmp_path / "clone/scores").glob("*/0.2")))
    assert channels(tmp_path / "clone", "0.2") == (more, 12), "a damaged table is not used"


def test_another_step_has_costs_of_its_own(tmp_path):
    """In a folder that knows the costs of steps of 12 channels, steps of 16 are measured anew."""
    model = tiny_model(layers=2).requires_grad_(False)
    for step in (12, 16, 12):
        scored(
            tmp_path,
            Engine(model),
            model.config.to_dict(),
            ["0.1"],
            ROWS,
            method="narrow",
            options={"step": step},
            dense=lambda: model,
        )
    tables = {
        path: json.loads(path.read_text())["levels"]
        for path in (tmp_path / "scores").glob("levels-*.json")
    }
    gone = [[48 - width["channels"] for width in levels[0]["widths"]] for levels in tables.values()]
    assert sorted(gone) == [[12, 24, 36], [16, 32]]


def narrowest(*losts):
    """Levels of an MLP of 48 channels that loses 12, 24 and 36 of them at these costs."""
    widths = [48 - 12 * n for n in range(1, 4)]
    return [
        Width(format_channels(range(n), 48), n, lost) for n, lost in zip(widths, losts, strict=True)
    ]


@pytest.mark.parametrize(
    ("wanted", "widths"),
    [
        (12, {"mlp.1": 36}),
        (36, {"mlp.0": 36, "mlp.1": 24}),
        (72, {"mlp.0": 12, "mlp.1": 12}),
        (20, {"mlp.1": 24}),
    ],
)
def test_what_costs_least_leaves_first(wanted, widths):
    """mlp.1 twice, mlp.0 once, then two steps of mlp.0 at once, which cost less than one of
    mlp.1."""
    known = {"mlp.0": narrowest(3.0, 6.5, 7.0), "mlp.1": narrowest(1.0, 2.0, 9.0)}
    found = choose(known, tiny_model().config.to_dict(), wanted)
    assert {name: len(parse_channels(text)) for name, text in found["channels"].items()} == widths


@pytest.mark.parametrize("costs", [*range(20), "llama", "gpt_neox", "gemma3_text"])
def test_no_other_widths_cost_less(costs):
    """Against all combinations of three MLPs' widths, where each step costs more than the one
    before: of costs that are drawn, and of those of tiny models."""
    if isinstance(costs, int):
        draw = np.random.default_rng(costs)
        known = {
            f"mlp.{n}": narrowest(*np.sort(draw.exponential(size=3)).cumsum()) for n in range(3)
        }
    else:
        known = by_cost(
            list(measure_levels(tiny_model(costs, 3), ROWS.rows[:10], 12, (), SilentObserver()))
        )
    losts = [[0.0, *(width.cost for width in widths)] for widths in known.values()]
    assert all((np.diff(lost, 2) > 0).all() for lost in losts)
    for steps in range(1, 10):
        found = choose(known, tiny_model().config.to_dict(), 12 * steps)
        enumerated = (
            sum(lost[n] for lost, n in zip(losts, each, strict=True))
            for each in product(range(4), repeat=3)
            if sum(each) == steps
        )
        assert found["cost"] == pytest.approx(min(enumerated))
        assert (
            sum(48 - len(parse_channels(text)) for text in found["channels"].values()) == 12 * steps
        )


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
    model, kept = tiny_model().requires_grad_(False), tuple(range(0, 48, 2))
    plan = narrow_plan(model.config.to_dict(), {"mlp.3": kept})
    weights, facts = compensate(model, {"": plan}, FIT, TUNING, SilentObserver())[""]
    assert facts["share"] == 1 and list(weights) == ["model.layers.3.mlp.down_proj.weight"]
    layer, got = decoder_layers(model)[3], {}
    layer.mlp.down_proj.register_forward_pre_hook(lambda _, given: got.update(x=given[0]))
    layer.mlp.register_forward_hook(lambda _, given, out: got.update(y=out))
    layer.register_forward_hook(lambda _, given, out: got.update(h=out))
    with torch.no_grad():
        model(torch.tensor(ROWS.rows[:30]))
    x, y, h = (got[name].flatten(0, 1).numpy() for name in "xyh")
    size = np.linalg.norm(h, axis=1, keepdims=True)
    best = np.linalg.lstsq((x / size)[:, kept], y / size, rcond=None)[0]
    np.testing.assert_allclose(
        weights["model.layers.3.mlp.down_proj.weight"].numpy(), best.T, atol=1e-6
    )


@pytest.mark.parametrize("variant", NARROW)
def test_a_refitted_narrow_model_has_the_perplexity_that_is_reported(variant):
    """Beside a plan that removes blocks, with which it shares a walk."""
    model = tiny_model(variant).requires_grad_(False)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    plans = {
        "narrow": narrow_plan(model.config.to_dict(), KEPT),
        "none": narrow_plan(model.config.to_dict(), {}),
    }
    found = compensate(model, plans, FIT, TUNING, SilentObserver())
    assert all(torch.equal(before[name], weight) for name, weight in model.named_parameters())
    weights, facts = found["narrow"]
    pruned = pruned_copy(model, plans["narrow"], ())
    assert perplexity_of(pruned) == pytest.approx(facts["perplexity"]["before"], rel=1e-6)
    set_weights_(pruned, weights, shared=True)
    assert perplexity_of(pruned) == pytest.approx(facts["perplexity"]["after"], rel=1e-6)
    assert not found["none"][0]
    # of random weights, a fit need not mend the loss
    if variant in (
        "llama",
        "gemma3_text",
        "gpt_neox",
    ):
        assert facts["perplexity"]["after"] < facts["perplexity"]["before"]


@pytest.mark.parametrize("form", [export_hf, pytest.param(export_nas, marks=with_mlx)])
@pytest.mark.usefixtures("in_process")
def test_a_checkpoint_holds_a_narrow_model(form, tmp_path):
    """Verified by its engine, with refitted weights."""
    dense, writer = fetch_tiny(tmp_path, "llama"), "model.layers.1.mlp.down_proj.weight"
    plan = narrow_plan(dense, KEPT)
    weight = load_model(dense, "float32", "cpu").get_parameter(writer)[:, list(KEPT["mlp.1"])]
    form(
        pruning(dense, plan, healed=healed_of(dense, plan, tmp_path, {writer: 2 * weight})),
        tmp_path / "out",
    )
    report = json.loads((tmp_path / "out/verification.json").read_text())
    assert report["ok"] and report["cache_layers"] == 4
    saved = load_file(tmp_path / "out/model.safetensors")[writer]
    assert torch.equal(saved[:, :17], 2 * weight) and not saved[:, 17:].any()
    assert "2 of its 4 MLPs narrowed" in (tmp_path / "out/README.md").read_text()
