"""Compensation against plain least squares in numpy, against the same change written into a forward
pass, and where it must recover the dense model exactly."""

import math
from dataclasses import replace
from itertools import dropwhile

import numpy as np
import pytest
import torch

from blockpruner.core.blocks import Cut, parse_mask
from blockpruner.core.errors import InputError, NonFiniteLossError
from blockpruner.core.families import FAMILIES
from blockpruner.core.progress import SilentObserver
from blockpruner.fitting.gram import symmetric_
from blockpruner.fitting.streams import Streams
from blockpruner.healing import compensate as compensation
from blockpruner.healing import refit as methods
from blockpruner.healing.ridge import Moments, best_change
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.methods.healed import set_weights_
from blockpruner.model.models import decoder_layers, masked, prune_
from blockpruner.scoring.engine import Engine
from tests.plans import plan_of
from tests.tiny import GRID, full_nll, tiny_model

GENERATOR = torch.Generator().manual_seed(5)
ROWS = CalibrationSet(
    tuple(tuple(torch.randint(1, 257, (24,), generator=GENERATOR).tolist()) for _ in range(40))
)
FIT, TUNING = CalibrationSet(ROWS.rows[:30]), CalibrationSet(ROWS.rows[30:])


def mask_plan(model, mask):
    return plan_of(model.config.to_dict(), mask.split(","))


def compensate(model, plan, *given):
    """Compensate one plan."""
    return compensation.compensate(model, {"plan": plan}, *given)["plan"]


def fit_with(monkeypatch, strength):
    monkeypatch.setattr(methods, "RIDGE_PENALTIES", (strength,))


def fitted_(streams, mask):
    """What was done stop by stop; the streams' model is given its new weights."""
    with torch.no_grad():
        done = list(methods.refit(streams, {"": Cut(parse_mask(mask))}))
        for weight, value in done[-1][0].weights.items():
            weight.copy_(value)
    return [mended for _, mended in done if mended]


def changed(model, mask):
    return fitted_(Streams(model, ROWS.rows, 30), mask)


def stops_of(model, mask):
    """The stops of a mask, with streams that nothing moves on."""
    with torch.no_grad():
        return [
            branch.point
            for branch in Streams(model, ROWS.rows, 30).walk({"": Cut(parse_mask(mask))})
        ]


def ids():
    return torch.tensor(ROWS.rows)


def test_sums_of_16_bit_features_lead_to_the_weights_of_exact_sums():
    """Products may round to 16 bits, strengths are compared in float32, and a matrix that is too
    near to singular for that is solved in float64."""
    rng = np.random.default_rng(5)
    x = rng.normal(size=(3000, 700)) @ np.diag(np.geomspace(1, 1e-3, 700)) + 1
    x = torch.tensor(x).bfloat16().double().numpy()
    r = x @ rng.normal(size=(700, 5)) + rng.normal(size=(3000, 5))
    parts = [
        tuple(torch.tensor(part[rows]).float() for part in (x, r))
        for rows in (slice(2000), slice(2000, 3000))
    ]
    fitted = Moments.zero(700, 5, torch.device("cpu"), torch.float32, is_fast=True)
    fitted.add(*parts[0])
    symmetric_(fitted.gram)
    np.testing.assert_allclose(fitted.gram, x[:2000].T @ x[:2000], rtol=0.02, atol=0.02 * 2000)
    change, strength, least = best_change(fitted, parts[1], STRENGTHS, 0.3)
    wanted = ridge(x[:2000], r[:2000], strength)
    assert change.dtype is torch.float64 and torch.get_float32_matmul_precision() == "highest"
    np.testing.assert_allclose(
        x[2000:] @ change.numpy(), x[2000:] @ wanted, atol=0.02 * np.abs(r).max()
    )
    assert least == pytest.approx(
        ((x[2000:] @ wanted - r[2000:]) ** 2).sum() / (r[2000:] ** 2).sum(), rel=0.01
    )
    near = Moments(torch.ones(700, 700), torch.ones(700, 1))  # of rank 1
    np.testing.assert_allclose(near.solve(1e-9, torch.float32), near.solve(1e-9), rtol=1e-6)


def test_ridge_is_numpys_least_squares():
    x, r = (
        np.random.default_rng(0).normal(size=(50, 6)),
        np.random.default_rng(1).normal(size=(50, 3)),
    )
    moments = Moments.zero(6, 3, torch.device("cpu"))
    for part in (slice(0, 20), slice(20, 50)):
        moments.add(torch.tensor(x[part]), torch.tensor(r[part]))
    wanted = ridge(x, r, 0.3)
    symmetric_(moments.gram)
    np.testing.assert_allclose(moments.gram, x.T @ x, atol=1e-12)
    change = moments.solve(0.3)
    np.testing.assert_allclose(change, wanted, atol=1e-12)
    x_t, r_t, error = torch.tensor(x), torch.tensor(r), moments.error
    assert error(x_t, r_t, change) == pytest.approx(
        ((x @ wanted - r) ** 2).sum() / (r**2).sum(), rel=1e-12
    )
    assert (
        error(x_t, r_t, torch.zeros(6, 3))
        == 1.0
        == error(x_t, torch.zeros(50, 3), torch.zeros(6, 3))
    )
    gain = np.array([0.05, 1.0, 5.0])
    solve = moments.solver_with_gains(torch.tensor(gain))
    for s in (0.3, 2.0):
        np.testing.assert_allclose(solve(s), ridge(x, r, s, gain), atol=1e-12)
    best, strength, least = best_change(moments, (x_t, r_t), (0.1, 1.0), 1.0, torch.tensor(gain))
    assert strength == 0.1 and least == pytest.approx(
        ((x @ best.numpy() * gain - r) ** 2).sum() / (r**2).sum()
    )


STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


@pytest.mark.parametrize("near", [0.01, 0.3, 10.0])
@pytest.mark.parametrize("noise", [0.0, 2.0, 100.0])
def test_the_strength_is_the_best_of_all_wherever_the_walk_begins(near, noise, monkeypatch):
    rng = np.random.default_rng(3)
    x, way = rng.normal(size=(60, 8)), rng.normal(size=(8, 3))
    r, asked, solve = x @ way + noise * rng.normal(size=(60, 3)), [], Moments.solve
    fitted = Moments.zero(8, 3, torch.device("cpu"))
    fitted.add(torch.tensor(x[:30]), torch.tensor(r[:30]))
    symmetric_(fitted.gram)
    held_out = torch.tensor(x[30:]), torch.tensor(r[30:])
    errors = {strength: fitted.error(*held_out, solve(fitted, strength)) for strength in STRENGTHS}
    monkeypatch.setattr(
        Moments,
        "solve",
        lambda self, strength, dtype=None: (
            (dtype and asked.append(strength)) or solve(self, strength)
        ),
    )
    change, strength, least = best_change(fitted, held_out, STRENGTHS, near)
    assert strength == min(errors, key=errors.__getitem__) and least == errors[strength]
    torch.testing.assert_close(change, solve(fitted, strength), rtol=0, atol=0)
    ways = sorted(map(STRENGTHS.index, (near, strength)))
    # from there to here, and one on either side
    assert len(asked) == len(set(asked)) <= ways[1] - ways[0] + 3


def test_stops_hold_every_block_once_and_holes_follow_kept_blocks():
    def words(variant):
        stops = stops_of(tiny_model(variant), "mha.0,mlp.1,mha.2,mlp.2,mlp.3")
        return [("+".join(map(str, stop.blocks)), "+".join(stop.removed_names)) for stop in stops]

    assert words("llama") == [
        ("", "mha.0"),
        ("mlp.0", ""),
        ("mha.1", "mlp.1+mha.2+mlp.2"),
        ("mha.3", "mlp.3"),
    ]
    assert words("gpt_neox") == [
        ("", ""),
        ("mlp.0", "mha.0"),
        ("mha.1", "mlp.1+mha.2+mlp.2"),
        ("mha.3", "mlp.3"),
    ]


def ridge(x, r, strength, gain=(1.0,)):
    """numpy's least squares of tokens [N, p] and [N, q], with a pull to zero; column by column with
    gains."""
    pull = np.sqrt(strength * np.mean(np.diag(x.T @ x)) * np.mean(np.square(gain))) * np.eye(
        x.shape[1]
    )
    if len(gain) > 1:
        return np.hstack([one(x * g, r[:, [j]], pull) for j, g in enumerate(gain)])
    return one(x, r, pull)


def one(x, r, pull):
    return np.linalg.lstsq(
        np.vstack([x, pull]), np.vstack([r, np.zeros((len(pull), r.shape[1]))]), rcond=None
    )[0]


def seen_by(model, name, tokens):
    """What a part of the model reads in a plain forward pass."""
    taken = []
    hook = model.get_submodule(name).register_forward_pre_hook(
        lambda _, given: taken.append(given[0])
    )
    model(tokens)
    hook.remove()
    return taken[0]


# before the hole mha.1
FITS = {
    "model.layers.0.mlp.down_proj": ("model.layers.1.post_attention_layernorm"),
    "model.layers.1.mlp.down_proj": "model.layers.2.input_layernorm",
    "model.layers.2.self_attn.o_proj": "model.layers.3.input_layernorm",  # before the hole mlp.2
    "model.layers.3.self_attn.o_proj": "model.layers.3.post_attention_layernorm",
    "model.layers.3.mlp.down_proj": "model.norm",
}
"""Without mha.1 and mlp.2: each writer from before the first hole on, and the norm that next reads
the stream."""


def test_fits_are_least_squares_of_writers_on_plain_forward_passes(monkeypatch):
    fit_with(monkeypatch, 0.3)
    model, tokens = tiny_model("llama").requires_grad_(False), ids()[:30]
    dense = {place: seen_by(model, place, tokens) for place in FITS.values()}
    wanted = tiny_model("llama").requires_grad_(False)
    for name, place in FITS.items():
        writer, target = wanted.get_submodule(name), dense[place]
        with masked(wanted, parse_mask("mha.1,mlp.2")):
            reads, stream = seen_by(wanted, name, tokens), seen_by(wanted, place, tokens)
        weight = 1 / target.norm(dim=-1, keepdim=True)
        change = ridge(
            *((part * weight).flatten(0, 1).numpy() for part in (reads, target - stream)), 0.3
        )
        writer.weight.add_(torch.tensor(change.T))
    stops = changed(model, "mha.1,mlp.2")
    done = [("mha.1", "mlp.0"), ("", "mlp.1"), ("mlp.2", "mha.2"), ("", "mha.3"), ("", "mlp.3")]
    assert [("+".join(stop["hole"]), "+".join(stop["writers"])) for stop in stops] == done
    assert all(stop["error"] < 1 for stop in stops)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, wanted.state_dict()[name], atol=1e-9, rtol=0)


def spread_gains_(model):
    """Give the norms behind writers gains over two orders of magnitude. Gemma keeps them less 1."""
    family, generator = FAMILIES[model.config.model_type], torch.Generator().manual_seed(3)
    for layer in decoder_layers(model):
        for branch in (family.mha, family.mlp):
            if branch.post:
                weight = getattr(layer, branch.post).weight
                gains = 0.05 * 100 ** torch.rand(len(weight), generator=generator)
                weight.copy_(gains - int("gemma" in family.model_type))
    return model


# before the hole mlp.2
NORMED = {
    "2.self_attn.o_proj": (
        "2.post_attention_layernorm",
        "layers.3.input_layernorm",
    ),
    "3.self_attn.o_proj": ("3.post_attention_layernorm", "layers.3.pre_feedforward_layernorm"),
    "3.mlp.down_proj": ("3.post_feedforward_layernorm", "norm"),
}
"""Each writer, the norm behind it, and the norm that next reads the stream."""


def test_fits_before_norms_are_least_squares_by_gains_on_plain_forward_passes(monkeypatch):
    """With half of each writer's change, and then the gains that are best for it."""
    fit_with(monkeypatch, 0.3)
    monkeypatch.setattr(methods, "STEP_SIZES", (0.5,))
    model, wanted = (spread_gains_(tiny_model("gemma3_text")) for _ in range(2))
    wanted.load_state_dict(model.state_dict())
    dense = {place: seen_by(model, f"model.{place}", ids()[:30]) for _, place in NORMED.values()}
    for name, (behind, place) in NORMED.items():
        writer, norm = (wanted.get_submodule(f"model.layers.{part}") for part in (name, behind))
        with masked(wanted, parse_mask("mlp.2")):
            parts = [f"model.layers.{name}", f"model.layers.{behind}", f"model.{place}"]
            x, y, stream = (
                seen_by(wanted, part, ids()[:30]).flatten(0, 1).numpy() for part in parts
            )
        target, gain = dense[place].flatten(0, 1).numpy(), 1 + norm.weight.numpy()
        weight, size = (1 / np.linalg.norm(part, axis=1, keepdims=True) for part in (target, y))
        size *= np.sqrt(y.shape[1])
        step = 0.5 * ridge(x * size * weight, (target - stream) * weight, 0.3, gain)
        moved = y + x @ step
        unit = moved / np.sqrt((moved**2).mean(1, keepdims=True))
        missing = (target - stream + gain * (y * size - unit)) * weight
        cross, squares = ((unit * weight * part).sum(0) for part in (missing, unit * weight))
        writer.weight.add_(torch.tensor(step.T))
        norm.weight.add_(torch.tensor(cross / (squares + 0.3 * squares.mean())))
    stops = changed(model, "mlp.2")
    assert [stop["writers"] for stop in stops] == [["mha.2"], ["mha.3"], ["mlp.3"]]
    assert all(stop["error"] < 1 for stop in stops)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, wanted.state_dict()[name], atol=1e-5, rtol=1e-5)


class Watched(Streams):
    """Streams that compare the real held-out errors at each stop, without its changes and with
    them."""

    def walk(self, cuts):
        self.errors, self.error_after, self.now = {}, 0.0, lambda: 0.0
        for branch in super().walk(cuts):
            kept, start = branch.point.blocks, branch.states
            before = self.error_after = self.error(kept, start)
            self.now = lambda kept=kept, start=start: self.error(kept, start)
            yield branch
            self.errors |= {str(block): (before, self.error_after) for block in kept}

    def restore_(self):
        self.error_after = self.now()
        return super().restore_()

    def error(self, kept, states):
        total = 0.0
        for n in self.heldout_batches:
            missing = self.dense[n] - self.after(kept, states[n], n)
            total += float(
                (missing.norm(dim=-1) / self.dense[n].norm(dim=-1))[self.is_real[n]].square().sum()
            )
        return total


@pytest.mark.parametrize("variant", GRID)
def test_the_real_held_out_error_rises_at_no_stop_in_any_family(variant):
    model = spread_gains_(tiny_model(variant))
    streams = Watched(model, ROWS.rows, 30)
    stops = fitted_(streams, "mlp.1,mha.2")
    assert [
        block for block, (before, after) in streams.errors.items() if after > before * (1 + 1e-6)
    ] == []
    for stop in stops:
        for block in stop["writers"][:1]:
            before, after = streams.errors[block]
            assert after / before == pytest.approx(min(stop["error"], 1), rel=1e-4)


def test_a_removed_multiple_of_each_column_is_recovered_by_the_gains(monkeypatch):
    """The writer cannot: a norm keeps the size of what it gives. The pruned model has the gains by
    their name."""
    fit_with(monkeypatch, 1e-12)
    monkeypatch.setattr("blockpruner.healing.compensate.SMALLER_STEPS", (1.0,))
    model, given = spread_gains_(tiny_model("gemma3_text")), {}
    layer, factor = (
        decoder_layers(model)[1],
        torch.rand(32, dtype=torch.float64, generator=GENERATOR) * 3,
    )
    wanted = (1 + layer.post_attention_layernorm.weight) * (1 + factor)
    layer.post_attention_layernorm.register_forward_hook(lambda _, x, y: given.update({len(y): y}))
    layer.mlp.forward = lambda states: given[len(states)]
    layer.post_feedforward_layernorm.forward = lambda states: states * factor
    weights, facts = compensate(model, mask_plan(model, "mlp.1"), FIT, TUNING, SilentObserver())
    assert facts["stops"][0]["error"] < 1e-9
    assert facts["perplexity"]["after"] == pytest.approx(facts["perplexity"]["dense"], rel=1e-5)
    torch.testing.assert_close(
        weights["model.layers.1.post_attention_layernorm.weight"], wanted - 1, atol=1e-4, rtol=1e-4
    )
    pruned = prune_(model, parse_mask("mlp.1"))
    set_weights_(pruned, weights)
    nll = np.mean([full_nll(pruned, row) for row in ROWS.rows[30:]])
    assert np.exp(nll) == pytest.approx(facts["perplexity"]["after"], rel=1e-6)


def rewire(model, layer, give):
    """Make the MLP of a layer give what `give` makes of what the attention before it gave."""
    given = {}  # by the number of rows: batches of unlike size take turns
    block = decoder_layers(model)[layer]
    block.self_attn.o_proj.register_forward_hook(lambda _, x, y: given.update({len(y): y}))
    block.mlp.forward = lambda states: give(given[len(states)])


def test_a_removed_linear_map_of_the_writer_before_is_recovered(monkeypatch):
    fit_with(monkeypatch, 1e-12)
    model = tiny_model("llama").requires_grad_(False)
    matrix = torch.randn(32, 32, dtype=torch.float64, generator=GENERATOR) / 6
    rewire(model, 1, lambda given: given @ matrix)
    before = model(ids()).logits
    hole, *behind = changed(model, "mlp.1")
    with masked(model, parse_mask("mlp.1")) as pruned:
        torch.testing.assert_close(pruned(ids()).logits, before, atol=1e-5, rtol=0)
    assert hole["error"] < 1e-9 and len(behind) == 4


@pytest.mark.parametrize("variant", GRID)
def test_refit_comes_nearer_to_the_dense_states_in_every_family(variant):
    model = tiny_model(variant).requires_grad_(False)
    dense = model(ids()[:30], output_hidden_states=True).hidden_states[-1]
    mask = parse_mask("mlp.1,mha.2")

    def distance():
        with masked(model, mask) as pruned:
            states = pruned(ids()[:30], output_hidden_states=True).hidden_states[-1]
        return float((states - dense).square().mean())

    before, streams = distance(), Streams(model, ROWS.rows, 30)
    behind = dropwhile(lambda stop: not stop.removed_span, stops_of(model, "mlp.1,mha.2"))
    able = [
        str(block)
        for stop in behind
        for block in stop.blocks
        if streams.output_projection(block) is not None
    ]
    stops = changed(model, "mlp.1,mha.2")
    assert [block for stop in stops for block in stop["writers"]] == able and len(able) >= 2
    assert [block for stop in stops for block in stop["hole"]] == ["mlp.1", "mha.2"]
    assert distance() < before


@pytest.mark.parametrize(
    "variant", ["llama", "gpt_neox"]
)  # one block after the other; both of a layer at once
def test_a_hole_before_all_kept_blocks_and_progress_to_the_last_block(variant):
    model, seen = tiny_model(variant).requires_grad_(False), []

    class Observer(SilentObserver):
        def advance(self, done, total, detail=""):
            seen.append((done, total, detail))

    gone = "mha.0,mlp.0"
    _, facts = compensate(model, mask_plan(model, gone), FIT, TUNING, Observer())
    assert facts["stops"][0] == {"hole": ["mha.0", "mlp.0"], "writers": [], "error": 1.0}
    blocks = [block for stop in facts["stops"] for block in stop["writers"]]
    assert blocks == [f"{kind}.{layer}" for layer in (1, 2, 3) for kind in ("mha", "mlp")]
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert seen[0][2] == "writers" and seen[-1][:2] == (8, 8)


def test_weights_are_named_as_in_the_pruned_model_and_the_dense_one_is_left_alone(monkeypatch):
    """Layers 1 and 2 join to one; the refitted writer of layer 0 keeps its name, those of layer 3
    become layer 2's."""
    model = tiny_model("llama").requires_grad_(False)
    matrix = torch.randn(32, 32, dtype=torch.float64, generator=GENERATOR) / 6
    rewire(model, 2, lambda given: given @ matrix)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    mask = "mha.1,mlp.1,mlp.2"
    weights, facts = compensate(model, mask_plan(model, mask), FIT, TUNING, SilentObserver())
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert facts["perplexity"]["after"] < facts["perplexity"]["before"]
    pruned = prune_(model, parse_mask(mask))
    parts = (
        "layers.0.mlp.down_proj",
        "layers.1.self_attn.o_proj",
        "layers.2.self_attn.o_proj",
        "layers.2.mlp.down_proj",
    )
    assert weights.keys() == {f"model.{part}.weight" for part in parts}
    assert weights.keys() <= pruned.state_dict().keys()
    pruned.load_state_dict({**pruned.state_dict(), **weights})
    nll = np.mean([full_nll(pruned, row) for row in ROWS.rows[30:]])
    assert np.exp(nll) == pytest.approx(facts["perplexity"]["after"], rel=1e-9)


def test_models_that_are_fitted_together_get_the_weights_they_get_alone():
    """Masks with a common beginning, a common hole, and none."""
    masks = ("mlp.1,mha.2", "mlp.1,mha.2,mlp.3", "mlp.1,mha.3", "mha.0,mlp.0", "mlp.3")
    for variant in ("llama", "gpt_neox", "gemma3_text"):
        model = tiny_model(variant).requires_grad_(False)
        plans = {mask: mask_plan(model, mask) for mask in masks}
        together = compensation.compensate(model, plans, FIT, TUNING, SilentObserver())
        for mask in masks:
            weights, facts = compensate(model, plans[mask], FIT, TUNING, SilentObserver())
            assert facts == together[mask][1] and weights.keys() == together[mask][0].keys()
            assert all(
                torch.equal(weight, together[mask][0][name]) for name, weight in weights.items()
            )


@pytest.fixture
def ran(monkeypatch):
    """The blocks that are run, by name, once for each batch."""
    found, block = [], Engine.run_block

    def counted(self, which, *given):
        found.append(str(which))
        return block(self, which, *given)

    monkeypatch.setattr(Engine, "run_block", counted)
    return found


def test_blocks_of_a_common_beginning_are_run_once(ran):
    """The dense stream passes each block; behind the first hole each branch passes its own."""
    model = tiny_model("llama").requires_grad_(False)
    with torch.no_grad():
        streams = Streams(model, ROWS.rows, 30)
        cuts = {mask: Cut(parse_mask(mask)) for mask in ("mlp.2,mha.3", "mlp.2", "mlp.3")}
        list(methods.refit(streams, cuts))
    runs = {name: ran.count(name) // len(streams.dense) for name in dict.fromkeys(ran)}
    assert runs == dict.fromkeys(runs, 1) | {"mha.2": 3, "mha.3": 3, "mlp.3": 3}


def test_what_does_not_help_is_left(monkeypatch):
    model = tiny_model("llama").requires_grad_(False)
    monkeypatch.setattr(
        methods, "best_change", lambda fitted, held_out, *given: (-fitted.solve(0.01), 0.01, 0.5)
    )
    weights, facts = compensate(model, mask_plan(model, "mlp.1"), FIT, TUNING, SilentObserver())
    perplexity = facts["perplexity"]
    assert not weights and facts["share"] == 0 and perplexity["after"] == perplexity["before"]


@pytest.mark.parametrize(("variant", "error"), [("llama", 1.5), ("gemma3_text", 0.5)])
def test_a_change_of_one_stop_that_does_harm_there_is_left(variant, error, monkeypatch):
    """The least squares of the first stop go the wrong way. They know it (llama), or the norm
    behind does (Gemma)."""
    model, fits = tiny_model(variant).requires_grad_(False), iter([best_change])

    def harmful(fitted, held_out, *given):
        if next(fits, None) is None:
            return best_change(fitted, held_out, *given)
        return -fitted.solve(0.01), 0.01, error

    monkeypatch.setattr(methods, "best_change", harmful)
    monkeypatch.setattr(methods, "STEP_SIZES", (1.0,))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    first, second, *_ = changed(model, "mlp.1")
    assert (
        first["error"] >= 1 > second["error"] and first["writers"] == ["mha.1"] != second["writers"]
    )
    moved = {
        name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])
    }
    assert moved and not any(name.startswith("model.layers.1.") for name in moved)


def test_a_change_that_overflows_is_left_and_a_dense_model_that_does_is_named(monkeypatch):
    model = tiny_model("llama").requires_grad_(False)
    # dense, before, shares of the change
    losses = iter([[1.0], [2.0], [math.nan], [math.inf], [math.nan]])
    monkeypatch.setattr(Streams, "losses", lambda self, states: next(losses))
    weights, facts = compensate(model, mask_plan(model, "mlp.1"), FIT, TUNING, SilentObserver())
    assert not weights and facts["perplexity"]["after"] == facts["perplexity"][
        "before"
    ] == math.exp(2)
    losses = iter([[math.nan]])
    with pytest.raises(
        NonFiniteLossError, match=r"dense model is not finite; try model.dtype: float32"
    ):
        compensate(model, mask_plan(model, "mlp.1"), FIT, TUNING, SilentObserver())


def test_bad_requests_name_the_fix():
    model = tiny_model("llama")
    plan = mask_plan(model, "mlp.1")
    for changes, fit, tuning, words in (
        ({}, ROWS, CalibrationSet(()), "hold out: 40 and 0; raise compensate.num_rows"),
        ({}, CalibrationSet(()), ROWS, "hold out: 0 and 40"),
        ({"kind": "laco"}, FIT, TUNING, "not for laco; set none"),
    ):
        with pytest.raises(InputError, match=words):
            compensate(model, replace(plan, **changes), fit, tuning, SilentObserver())
