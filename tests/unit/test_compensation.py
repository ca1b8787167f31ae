"""Compensation against least squares in numpy, against the same change written into a forward pass,
and where it must recover the dense model exactly."""

import math
from dataclasses import replace

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
IDS = torch.randint(1, 257, (40, 24), generator=GENERATOR)
ROWS = CalibrationSet(tuple(map(tuple, IDS.tolist())))
FIT = CalibrationSet(ROWS.rows[:30])
HELDOUT = CalibrationSet(ROWS.rows[30:])
PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


def mask_plan(model, mask):
    return plan_of(model.config.to_dict(), mask.split(","))


def compensate(model, plan, fit=FIT, heldout=HELDOUT, observer=None):
    """The weights and the facts of one plan."""
    observer = observer or SilentObserver()
    return compensation.compensate(model, {"plan": plan}, fit, heldout, observer)["plan"]


@torch.no_grad()
def refit_(model, mask, streams=None):
    """Give a model its refitted weights; the stats of each fit point."""
    streams = streams or Streams(model, ROWS.rows, 30)
    results = list(methods.refit(streams, {"": Cut(parse_mask(mask))}))
    for weight, value in results[-1][0].weights.items():
        weight.copy_(value)
    return [stats for _, stats in results if stats]


def copy_of(state):
    return {name: weight.clone() for name, weight in state.items()}


def names(stats, key):
    return [block for point in stats for block in point[key]]


def heldout_perplexity(model):
    return np.exp(np.mean([full_nll(model, row) for row in HELDOUT.rows]))


def random_matrix():
    return torch.randn(32, 32, dtype=torch.float64, generator=GENERATOR) / 6


# Least squares


def lstsq(x, r, penalty):
    """numpy's least squares of tokens [N, p] and [N, q], with rows [k, p] that ask for zero."""
    zeros = np.zeros((len(penalty), r.shape[1]))
    return np.linalg.lstsq(np.vstack([x, penalty]), np.vstack([r, zeros]), rcond=None)[0]


def ridge(x, r, strength, gain=(1.0,)):
    """Least squares with a ridge penalty; column by column with gains."""
    scale = np.mean(np.diag(x.T @ x)) * np.mean(np.square(gain))
    penalty = np.sqrt(strength * scale) * np.eye(x.shape[1])
    if len(gain) == 1:
        return lstsq(x, r, penalty)
    return np.hstack([lstsq(x * g, r[:, [j]], penalty) for j, g in enumerate(gain)])


def relative_error(x, r, change):
    return ((x @ change - r) ** 2).sum() / (r**2).sum()


def moments_of(x, r, **options):
    moments = Moments.zero(x.shape[1], r.shape[1], torch.device("cpu"), x.dtype, **options)
    half = len(x) // 2
    for rows in (slice(half), slice(half, None)):
        moments.add(x[rows], r[rows])
    symmetric_(moments.gram)
    return moments


def test_sums_of_16_bit_features_lead_to_the_weights_of_exact_sums():
    """Products may round to 16 bits, penalties are compared in float32, and a matrix that is too
    near to singular for that is solved in float64."""
    rng = np.random.default_rng(5)
    x = rng.normal(size=(3000, 700)) @ np.diag(np.geomspace(1, 1e-3, 700)) + 1
    x = torch.tensor(x).bfloat16().double().numpy()
    r = x @ rng.normal(size=(700, 5)) + rng.normal(size=(3000, 5))
    features, residuals = torch.tensor(x).float(), torch.tensor(r).float()
    moments = moments_of(features[:2000], residuals[:2000], is_fast=True)
    np.testing.assert_allclose(moments.gram, x[:2000].T @ x[:2000], rtol=0.02, atol=0.02 * 2000)
    heldout = features[2000:], residuals[2000:]
    change, penalty, error = best_change(moments, heldout, PENALTIES, 0.3)
    assert change.dtype is torch.float64
    assert torch.get_float32_matmul_precision() == "highest"
    exact = ridge(x[:2000], r[:2000], penalty)
    atol = 0.02 * np.abs(r).max()
    np.testing.assert_allclose(x[2000:] @ change.numpy(), x[2000:] @ exact, atol=atol)
    assert error == pytest.approx(relative_error(x[2000:], r[2000:], exact), rel=0.01)
    singular = Moments(torch.ones(700, 700), torch.ones(700, 1))
    np.testing.assert_allclose(singular.solve(1e-9, torch.float32), singular.solve(1e-9), rtol=1e-6)


def test_ridge_is_numpys_least_squares():
    x = np.random.default_rng(0).normal(size=(50, 6))
    r = np.random.default_rng(1).normal(size=(50, 3))
    features, residuals = torch.tensor(x), torch.tensor(r)
    moments = moments_of(features, residuals)
    np.testing.assert_allclose(moments.gram, x.T @ x, atol=1e-12)
    change = moments.solve(0.3)
    np.testing.assert_allclose(change, ridge(x, r, 0.3), atol=1e-12)
    error = moments.error(features, residuals, change)
    assert error == pytest.approx(relative_error(x, r, change.numpy()), rel=1e-12)
    no_change = torch.zeros(6, 3)
    assert moments.error(features, residuals, no_change) == 1.0
    assert moments.error(features, torch.zeros(50, 3), no_change) == 1.0


def test_ridge_with_gains_is_numpys_least_squares_of_each_column():
    x = np.random.default_rng(0).normal(size=(50, 6))
    r = np.random.default_rng(1).normal(size=(50, 3))
    gain = np.array([0.05, 1.0, 5.0])
    heldout = torch.tensor(x), torch.tensor(r)
    moments = moments_of(*heldout)
    solve = moments.solver_with_gains(torch.tensor(gain))
    for penalty in (0.3, 2.0):
        np.testing.assert_allclose(solve(penalty), ridge(x, r, penalty, gain), atol=1e-12)
    change, penalty, error = best_change(moments, heldout, (0.1, 1.0), 1.0, torch.tensor(gain))
    assert penalty == 0.1
    assert error == pytest.approx(relative_error(x, r, change.numpy() * gain))


@pytest.mark.parametrize("start", [0.01, 0.3, 10.0])
@pytest.mark.parametrize("noise", [0.0, 2.0, 100.0])
def test_the_penalty_is_the_best_of_all_wherever_the_walk_begins(start, noise, monkeypatch):
    rng = np.random.default_rng(3)
    x = rng.normal(size=(60, 8))
    r = x @ rng.normal(size=(8, 3)) + noise * rng.normal(size=(60, 3))
    features, residuals = torch.tensor(x), torch.tensor(r)
    moments = moments_of(features[:30], residuals[:30])
    heldout = features[30:], residuals[30:]
    changes = {penalty: moments.solve(penalty) for penalty in PENALTIES}
    errors = {penalty: moments.error(*heldout, change) for penalty, change in changes.items()}
    tried = []

    def solve(self, penalty, dtype=None):
        if dtype:
            tried.append(penalty)
        return changes[penalty]

    monkeypatch.setattr(Moments, "solve", solve)
    change, penalty, error = best_change(moments, heldout, PENALTIES, start)
    assert penalty == min(errors, key=errors.get)
    assert error == errors[penalty]
    assert change is changes[penalty]
    # From the start to the best one, and a neighbour on either side.
    steps = abs(PENALTIES.index(start) - PENALTIES.index(penalty))
    assert len(tried) == len(set(tried)) <= steps + 3


# Fits against plain forward passes


def input_of(model, name):
    """What a module reads in a plain forward pass of the fit rows, [tokens, d]."""
    inputs = []
    module = model.get_submodule(f"model.{name}")
    hook = module.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    model(IDS[:30])
    hook.remove()
    return inputs[0].flatten(0, 1).numpy()


NEXT_NORM = {
    "layers.0.mlp.down_proj": "layers.1.post_attention_layernorm",  # before the removed mha.1
    "layers.1.mlp.down_proj": "layers.2.input_layernorm",
    "layers.2.self_attn.o_proj": "layers.3.input_layernorm",  # before the removed mlp.2
    "layers.3.self_attn.o_proj": "layers.3.post_attention_layernorm",
    "layers.3.mlp.down_proj": "norm",
}
"""Without mha.1 and mlp.2: each output projection from before the first removed span on, and the
norm that next reads the stream."""


def test_fits_are_least_squares_on_plain_forward_passes(monkeypatch):
    monkeypatch.setattr(methods, "RIDGE_PENALTIES", (0.3,))
    model, expected = tiny_model(), tiny_model()
    dense = {norm: input_of(model, norm) for norm in NEXT_NORM.values()}
    for name, norm in NEXT_NORM.items():
        with masked(expected, parse_mask("mha.1,mlp.2")):
            features, stream = input_of(expected, name), input_of(expected, norm)
        scale = 1 / np.linalg.norm(dense[norm], axis=1, keepdims=True)
        change = ridge(features * scale, (dense[norm] - stream) * scale, 0.3)
        expected.get_submodule(f"model.{name}").weight.add_(torch.tensor(change.T))
    stats = refit_(model, "mha.1,mlp.2")
    assert [(point["hole"], point["writers"]) for point in stats] == [
        (["mha.1"], ["mlp.0"]),
        ([], ["mlp.1"]),
        (["mlp.2"], ["mha.2"]),
        ([], ["mha.3"]),
        ([], ["mlp.3"]),
    ]
    assert all(point["error"] < 1 for point in stats)
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), atol=1e-9, rtol=0)


def spread_gains_(model):
    """Give the norms behind modules gains over two orders of magnitude. Gemma's weights are gains
    less 1."""
    family = FAMILIES[model.config.model_type]
    generator = torch.Generator().manual_seed(3)
    for layer in decoder_layers(model):
        for branch in (family.mha, family.mlp):
            if branch.post:
                weight = getattr(layer, branch.post).weight
                gains = 0.05 * 100 ** torch.rand(len(weight), generator=generator)
                weight.copy_(gains - int("gemma" in family.model_type))
    return model


NORMS = {
    "layers.2.self_attn.o_proj": (  # before the removed mlp.2
        "layers.2.post_attention_layernorm",
        "layers.3.input_layernorm",
    ),
    "layers.3.self_attn.o_proj": (
        "layers.3.post_attention_layernorm",
        "layers.3.pre_feedforward_layernorm",
    ),
    "layers.3.mlp.down_proj": ("layers.3.post_feedforward_layernorm", "norm"),
}
"""Each output projection, the norm behind it, and the norm that next reads the stream."""


def test_fits_before_norms_are_least_squares_by_gains_on_plain_forward_passes(monkeypatch):
    """With half of each projection's change, and then the gains that are best for it."""
    monkeypatch.setattr(methods, "RIDGE_PENALTIES", (0.3,))
    monkeypatch.setattr(methods, "STEP_SIZES", (0.5,))
    model = spread_gains_(tiny_model("gemma3_text"))
    expected = spread_gains_(tiny_model("gemma3_text"))
    dense = {reader: input_of(model, reader) for _, reader in NORMS.values()}
    for name, (norm_name, reader) in NORMS.items():
        projection = expected.get_submodule(f"model.{name}")
        norm = expected.get_submodule(f"model.{norm_name}")
        with masked(expected, parse_mask("mlp.2")):
            x, y = input_of(expected, name), input_of(expected, norm_name)
            residual = dense[reader] - input_of(expected, reader)
        scale = 1 / np.linalg.norm(dense[reader], axis=1, keepdims=True)
        size = np.sqrt(y.shape[1]) / np.linalg.norm(y, axis=1, keepdims=True)
        gain = 1 + norm.weight.numpy()
        change = 0.5 * ridge(x * size * scale, residual * scale, 0.3, gain)
        changed = y + x @ change
        unit = changed / np.sqrt((changed**2).mean(1, keepdims=True))
        remaining = (residual + gain * (y * size - unit)) * scale
        cross = (unit * scale * remaining).sum(0)
        squares = ((unit * scale) ** 2).sum(0)
        projection.weight.add_(torch.tensor(change.T))
        norm.weight.add_(torch.tensor(cross / (squares + 0.3 * squares.mean())))
    stats = refit_(model, "mlp.2")
    assert names(stats, "writers") == ["mha.2", "mha.3", "mlp.3"]
    assert all(point["error"] < 1 for point in stats)
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), atol=1e-5, rtol=1e-5)


class WatchedStreams(Streams):
    """Streams that compute the error on held-out rows at each fit point, before and after it."""

    def walk(self, cuts):
        self.errors = {}
        self.fit_points = []
        self.error_now = lambda: 0.0
        for branch in super().walk(cuts):
            blocks, states = branch.point.blocks, branch.states
            self.fit_points.append(branch.point)
            before = self.after_restore = self.heldout_error(blocks, states)
            self.error_now = lambda blocks=blocks, states=states: self.heldout_error(blocks, states)
            yield branch
            for block in blocks:
                self.errors[str(block)] = (before, self.after_restore)

    def restore_(self):
        self.after_restore = self.error_now()
        return super().restore_()

    def heldout_error(self, blocks, states):
        total = 0.0
        for n in self.heldout_batches:
            missing = self.dense[n] - self.after(blocks, states[n], n)
            relative = missing.norm(dim=-1) / self.dense[n].norm(dim=-1)
            total += float(relative[self.is_real[n]].square().sum())
        return total


@pytest.mark.parametrize("variant", GRID)
def test_every_block_behind_a_removed_span_is_fitted_and_no_heldout_error_rises(variant):
    model = spread_gains_(tiny_model(variant))
    mask = parse_mask("mlp.1,mha.2")
    dense = model(IDS[:30], output_hidden_states=True).hidden_states[-1]

    def distance():
        with masked(model, mask) as pruned:
            states = pruned(IDS[:30], output_hidden_states=True).hidden_states[-1]
        return float((states - dense).square().mean())

    distance_before = distance()
    streams = WatchedStreams(model, ROWS.rows, 30)
    stats = refit_(model, "mlp.1,mha.2", streams)
    for block, (before, after) in streams.errors.items():
        assert after <= before * (1 + 1e-6), block
    for point in stats:
        for block in point["writers"][:1]:
            before, after = streams.errors[block]
            assert after / before == pytest.approx(min(point["error"], 1), rel=1e-4)
    assert distance() < distance_before
    assert names(stats, "hole") == ["mlp.1", "mha.2"]
    fittable = []
    for point in streams.fit_points:
        # What is fitted begins at the block before the first removed span.
        if point.removed_span or fittable:
            able = [b for b in point.blocks if streams.output_projection(b) is not None]
            fittable += map(str, able)
    assert names(stats, "writers") == fittable
    assert len(fittable) >= 2


# Where the dense model can be recovered exactly


def feed_mlp_(model, layer, source, function):
    """Let the MLP of a layer give a function of what a module of that layer gave."""
    outputs = {}  # by the number of rows: batches of unlike size take turns
    block = decoder_layers(model)[layer]
    module = block.get_submodule(source)
    module.register_forward_hook(lambda _, args, output: outputs.update({len(output): output}))
    block.mlp.forward = lambda states: function(outputs[len(states)])


def test_a_removed_multiple_of_each_column_is_recovered_by_the_gains(monkeypatch):
    """The output projection cannot: a norm keeps the size of what it gives."""
    monkeypatch.setattr(methods, "RIDGE_PENALTIES", (1e-12,))
    monkeypatch.setattr(compensation, "SMALLER_STEPS", (1.0,))
    model = spread_gains_(tiny_model("gemma3_text"))
    factor = torch.rand(32, dtype=torch.float64, generator=GENERATOR) * 3
    layer = decoder_layers(model)[1]
    expected = (1 + layer.post_attention_layernorm.weight) * (1 + factor) - 1
    feed_mlp_(model, 1, "post_attention_layernorm", lambda states: states)
    layer.post_feedforward_layernorm.forward = lambda states: states * factor
    weights, facts = compensate(model, mask_plan(model, "mlp.1"))
    perplexity = facts["perplexity"]
    assert facts["stops"][0]["error"] < 1e-9
    assert perplexity["after"] == pytest.approx(perplexity["dense"], rel=1e-5)
    gains = weights["model.layers.1.post_attention_layernorm.weight"]
    torch.testing.assert_close(gains, expected, atol=1e-4, rtol=1e-4)
    pruned = prune_(model, parse_mask("mlp.1"))
    set_weights_(pruned, weights)
    assert heldout_perplexity(pruned) == pytest.approx(perplexity["after"], rel=1e-6)


def test_a_removed_linear_map_is_recovered_by_the_output_projection(monkeypatch):
    monkeypatch.setattr(methods, "RIDGE_PENALTIES", (1e-12,))
    model = tiny_model()
    matrix = random_matrix()
    feed_mlp_(model, 1, "self_attn.o_proj", lambda states: states @ matrix)
    logits = model(IDS).logits
    first, *others = refit_(model, "mlp.1")
    with masked(model, parse_mask("mlp.1")) as pruned:
        torch.testing.assert_close(pruned(IDS).logits, logits, atol=1e-5, rtol=0)
    assert first["error"] < 1e-9
    assert len(others) == 4


# Compensated plans


@pytest.mark.parametrize("variant", ["llama", "gpt_neox"])
def test_a_span_before_all_kept_blocks_and_progress_to_the_last_block(variant):
    """llama's blocks run one after the other, GPT-NeoX's both of a layer at once."""
    progress = []

    class Observer(SilentObserver):
        def advance(self, done, total, detail=""):
            progress.append((done, total))

    model = tiny_model(variant)
    _, facts = compensate(model, mask_plan(model, "mha.0,mlp.0"), observer=Observer())
    assert facts["stops"][0] == {"hole": ["mha.0", "mlp.0"], "writers": [], "error": 1.0}
    blocks = [f"{kind}.{layer}" for layer in (1, 2, 3) for kind in ("mha", "mlp")]
    assert names(facts["stops"], "writers") == blocks
    assert progress == sorted(progress)
    assert progress[-1] == (8, 8)


def test_weights_are_named_as_in_the_pruned_model_and_the_dense_one_is_not_changed():
    """Layers 1 and 2 join to one. The projection of layer 0 keeps its name, those of layer 3 become
    layer 2's."""
    model = tiny_model()
    matrix = random_matrix()
    feed_mlp_(model, 2, "self_attn.o_proj", lambda states: states @ matrix)
    before = copy_of(model.state_dict())
    mask = "mha.1,mlp.1,mlp.2"
    weights, facts = compensate(model, mask_plan(model, mask))
    assert all(weight.equal(before[name]) for name, weight in model.state_dict().items())
    assert facts["perplexity"]["after"] < facts["perplexity"]["before"]
    assert weights.keys() == {
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.1.self_attn.o_proj.weight",
        "model.layers.2.self_attn.o_proj.weight",
        "model.layers.2.mlp.down_proj.weight",
    }
    pruned = prune_(model, parse_mask(mask))
    pruned.load_state_dict({**pruned.state_dict(), **weights})
    assert heldout_perplexity(pruned) == pytest.approx(facts["perplexity"]["after"], rel=1e-9)


@pytest.mark.parametrize("variant", ["llama", "gpt_neox", "gemma3_text"])
def test_models_that_are_fitted_together_get_the_weights_they_get_alone(variant):
    """Masks with a common beginning, a common span, and none."""
    masks = ("mlp.1,mha.2", "mlp.1,mha.2,mlp.3", "mlp.1,mha.3", "mha.0,mlp.0", "mlp.3")
    model = tiny_model(variant)
    plans = {mask: mask_plan(model, mask) for mask in masks}
    together = compensation.compensate(model, plans, FIT, HELDOUT, SilentObserver())
    for mask, (weights, facts) in together.items():
        weights_alone, facts_alone = compensate(model, plans[mask])
        assert facts == facts_alone
        torch.testing.assert_close(weights, weights_alone, atol=0, rtol=0)


def test_blocks_of_a_common_beginning_are_run_once(monkeypatch):
    """The dense stream passes each block; behind the first span each branch passes its own."""
    runs = dict.fromkeys(map(str, Streams(tiny_model(), ROWS.rows, 30).blocks), 0)
    run_block = Engine.run_block

    def counted(self, block, *args):
        runs[str(block)] += 1
        return run_block(self, block, *args)

    monkeypatch.setattr(Engine, "run_block", counted)
    with torch.no_grad():
        streams = Streams(tiny_model(), ROWS.rows, 30)
        cuts = {mask: Cut(parse_mask(mask)) for mask in ("mlp.2,mha.3", "mlp.2", "mlp.3")}
        list(methods.refit(streams, cuts))
    batches = len(streams.dense)
    several = {"mha.2", "mha.3", "mlp.3"}
    assert runs == {block: batches * (3 if block in several else 1) for block in runs}


def harmful_change(moments):
    return -moments.solve(0.01)


@pytest.mark.parametrize(("variant", "error"), [("llama", 1.5), ("gemma3_text", 0.5)])
def test_a_change_of_one_fit_point_that_does_harm_there_is_undone(variant, error, monkeypatch):
    """The least squares of the first point go the wrong way. They report it (llama), or the norm
    behind the block does (Gemma)."""
    model = tiny_model(variant)
    calls = []

    def harmful_once(moments, heldout, *args):
        calls.append(moments)
        if len(calls) == 1:
            return harmful_change(moments), 0.01, error
        return best_change(moments, heldout, *args)

    monkeypatch.setattr(methods, "best_change", harmful_once)
    monkeypatch.setattr(methods, "STEP_SIZES", (1.0,))
    before = copy_of(model.state_dict())
    first, second, *_ = refit_(model, "mlp.1")
    assert first["error"] >= 1 > second["error"]
    assert first["writers"] == ["mha.1"] != second["writers"]
    changed = [
        name for name, weight in model.state_dict().items() if not weight.equal(before[name])
    ]
    assert changed
    assert not any("layers.1." in name for name in changed)


@pytest.mark.parametrize(
    ("losses", "step"),
    [
        ([1.8, 1.9], 1.0),
        ([1.8, 1.7, 1.9], 0.75),
        ([1.8, 1.7, 1.6], 0.5),
        ([2.1, 2.2], 0.0),
        ([math.nan, math.inf, math.nan], 0.0),
    ],
)
def test_the_step_of_the_least_heldout_loss_is_taken(losses, step, monkeypatch):
    """The losses are of the full step, then of smaller ones until one is worse than the full one."""
    model = tiny_model()
    all_losses = iter([1.0, 2.0, *losses])  # of the dense model, and of the pruned one
    monkeypatch.setattr(Streams, "losses", lambda self, states: [next(all_losses)])
    weights, facts = compensate(model, mask_plan(model, "mlp.1"))
    perplexity = facts["perplexity"]
    assert facts["share"] == step
    assert bool(weights) == bool(step)
    assert perplexity["before"] == math.exp(2)
    assert perplexity["after"] == pytest.approx(math.exp(min(2, *losses)) if step else math.exp(2))
    assert next(all_losses, None) is None


def test_a_dense_model_that_overflows_is_refused(monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(Streams, "losses", lambda self, states: [math.nan])
    with pytest.raises(NonFiniteLossError, match="dense model is not finite"):
        compensate(model, mask_plan(model, "mlp.1"))


@pytest.mark.parametrize(
    ("changes", "fit", "heldout", "message"),
    [
        ({}, ROWS, CalibrationSet(()), "hold out: 40 and 0; raise compensate.num_rows"),
        ({}, CalibrationSet(()), ROWS, "hold out: 0 and 40"),
        ({"kind": "laco"}, FIT, HELDOUT, "not for laco; set none"),
    ],
)
def test_bad_requests_name_the_fix(changes, fit, heldout, message):
    model = tiny_model()
    plan = replace(mask_plan(model, "mlp.1"), **changes)
    with pytest.raises(InputError, match=message):
        compensate(model, plan, fit, heldout)
