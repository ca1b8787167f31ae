"""Training against LoRA, AdamW and the loss written out here in plain torch, and against itself after a kill."""

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save
from torch import nn
from torch.func import functional_call

from blockpruner.core.blocks import parse_mask
from blockpruner.core.errors import InputError, NonFiniteLossError
from blockpruner.core.progress import SilentObserver
from blockpruner.healing import loss, training
from blockpruner.healing.rows import training_rows
from blockpruner.healing.settings import Train
from blockpruner.healing.training import train_
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.model.models import prune_
from blockpruner.store.files import DIGEST
from blockpruner.store.tensors import read_facts, read_tensors, write_tensors
from tests.tiny import VARIANTS, full_nll, tiny_model, tiny_tokenizer, tolerance

MASK = parse_mask("mha.0,mlp.1,mha.2,mlp.2")  # an MLP-only layer, an attention-only layer, a layer that is gone
ROWS = CalibrationSet(tuple(tuple((7 * r + 3 * k + r * k) % 250 + 1 for k in range(9 + 4 * r)) for r in range(4)))
DATA = {"source": "path", "path": "texts.parquet"}
SMALL = Train(data=DATA, rank=3, learning_rate=2e-3, epochs=3)


def changed(**changes):
    return SMALL.model_copy(update=changes)


def pruned(family="llama", dtype=torch.float64, **config):
    return prune_(tiny_model(family, dtype=dtype, **config), MASK)


def train(model, adapters, recipe=SMALL, rows=ROWS, **options):
    given = {"teacher": None, "validation": None, "identity": "m", "observer": SilentObserver()} | options
    return train_(model, rows, recipe, adapters=adapters, **given)


def weights_of(model):
    return {name: weight.detach().clone() for name, weight in model.state_dict(keep_vars=True).items()}


def adapters_of(folder):
    """A and B of every linear layer, from the state file: {layer: (A, B)}."""
    (path,) = folder.glob("*.safetensors")
    tensors = {name.removeprefix("base_model.model."): tensor for name, tensor in load_file(path).items()}
    layers = {name.split(".lora_")[0] for name in tensors}
    return {k: (tensors[f"{k}.lora_A.default.weight"], tensors[f"{k}.lora_B.default.weight"]) for k in layers}


def head_of(model):
    return next(name for name, module in model.named_modules() if module is model.get_output_embeddings())


class Watch(SilentObserver):
    """Counts steps, keeps notes, and kills the run after `last` of them."""

    def __init__(self, last=math.inf):
        self.last, self.steps, self.notes, self.cached, self.summary = last, 0, [], None, ""

    def note(self, message):
        self.notes.append(message)

    def advance(self, done, total, detail):
        self.steps += 1
        if self.steps == self.last:
            raise KeyboardInterrupt

    def end(self, summary, table=(), cached=False):
        self.cached, self.summary = cached, summary


# --- the training itself --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_three_steps_of_lora_and_adamw_by_hand(tmp_path, family):
    """W + alpha/r B A, mean over rows of the row's mean NLL, clipping to norm 1, AdamW without decay, lr (1 - k/K).

    Every step takes all rows, so that no order is assumed. The start of A is that of a run of one step, whose
    gradient for A is zero since B starts at zero.
    """
    recipe = changed(batch=3, accumulation=2)  # a short last batch; rows of four lengths
    assert len(ROWS.rows) <= recipe.batch * recipe.accumulation
    train(pruned(family), tmp_path / "one", recipe.model_copy(update={"epochs": 1}))
    start = {name: a for name, (a, _) in adapters_of(tmp_path / "one").items()}
    model = pruned(family)
    base = weights_of(model)
    A = {name: a.clone().requires_grad_() for name, a in start.items()}
    B = {name: torch.zeros(base[f"{name}.weight"].shape[0], 3, dtype=torch.float64).requires_grad_() for name in A}
    parameters = [*A.values(), *B.values()]
    m, v = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    losses, clipped = [], 0
    for k in range(3):
        merged = base | {f"{name}.weight": base[f"{name}.weight"] + 10 / 3 * B[name] @ A[name] for name in A}
        loss = 0.0
        for row in ROWS.rows:
            logits = functional_call(model, merged, (torch.tensor([row]),), {"use_cache": False}).logits[0, :-1]
            picked = logits.log_softmax(-1).gather(1, torch.tensor(row[1:])[:, None])
            loss = loss - picked.mean() / len(ROWS.rows)
        gradients = torch.autograd.grad(loss, parameters)
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients))
        clipped += norm > 1
        lr = 2e-3 * (1 - k / 3)
        with torch.no_grad():
            for i, (p, g) in enumerate(zip(parameters, gradients, strict=True)):
                g = g * min(1.0, 1.0 / (norm + 1e-6))
                m[i] = 0.9 * m[i] + 0.1 * g
                v[i] = 0.999 * v[i] + 0.001 * g**2
                p -= lr * (m[i] / (1 - 0.9 ** (k + 1))) / ((v[i] / (1 - 0.999 ** (k + 1))).sqrt() + 1e-8)
        losses.append(loss.item())
    assert clipped
    found = train(model, tmp_path / "all", recipe)
    assert found.losses == pytest.approx(losses, abs=1e-10)
    assert found.model is model
    for name, weight in model.state_dict().items():
        layer = name.removesuffix(".weight")
        expected = base[name] + (10 / 3 * B[layer] @ A[layer]).detach() if layer in A else base[name]
        assert (weight - expected).abs().max() < 1e-8, name


def test_rows_are_seen_once_an_epoch_in_a_seeded_order(tmp_path):
    """With a learning rate of next to nothing, the losses tell which rows each step took."""
    rows = CalibrationSet(ROWS.rows + ROWS.rows[::-1][:3])
    nll = [full_nll(pruned(), row) for row in rows.rows]
    recipe = changed(learning_rate=1e-30, batch=1, accumulation=1, epochs=2)
    orders = []
    for seed in (1, 2):
        losses = train(pruned(), tmp_path / str(seed), recipe.model_copy(update={"seed": seed}), rows).losses
        for epoch in (losses[:7], losses[7:]):
            assert sorted(epoch) == pytest.approx(sorted(nll))
        orders += [losses[:7], losses[7:]]
    assert len(set(orders)) == 4
    by_two = train(pruned(), tmp_path / "two", recipe.model_copy(update={"seed": 1, "accumulation": 2}), rows).losses
    expected = [*zip(orders[0][::2], [*orders[0][1::2], None], strict=True)]
    assert by_two[:4] == pytest.approx([a if b is None else (a + b) / 2 for a, b in expected])


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_linear_layer_learns_and_nothing_else(tmp_path, variant):
    model = pruned(variant, torch.float32)
    kind, config = type(model), model.config.to_dict()
    modules = [name for name, module in model.named_modules()]
    before = weights_of(model)
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    wanted = linear - {f"{head_of(model)}.weight"}
    nll = [full_nll(model, row) for row in ROWS.rows]
    train(model, tmp_path, changed(epochs=12))
    after = weights_of(model)
    assert {name for name in before if not torch.equal(before[name], after[name])} == wanted
    assert (type(model), model.config.to_dict()) == (kind, config)
    assert [name for name, module in model.named_modules()] == modules
    assert not model.training
    assert sum(full_nll(model, row) for row in ROWS.rows) < sum(nll)


def test_tied_embeddings_stay_tied_and_unchanged(tmp_path):
    model = pruned(dtype=torch.float32, tie_word_embeddings=True)
    before = model.get_input_embeddings().weight.clone()
    train(model, tmp_path)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight, before)


def test_merged_model_equals_the_model_with_its_adapters(tmp_path):
    merged, model = pruned(), pruned()
    train(merged, tmp_path, changed(learning_rate=0.05))
    for name, (a, b) in adapters_of(tmp_path).items():
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, a=a, b=b: output + 10 / 3 * inputs[0] @ a.T @ b.T
        )
    ids = torch.arange(1, 20)[None]
    plain, expected, found = pruned()(ids).logits, model(ids).logits, merged(ids).logits
    assert (found - expected).abs().max() < 1e-10
    assert (found - plain).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models_train_in_float32(tmp_path, dtype):
    model = pruned(dtype=dtype)
    before, linear = weights_of(model), {n for n, module in model.named_modules() if isinstance(module, nn.Linear)}
    tables = {name: buffer.clone() for name, buffer in model.named_buffers()}
    nll = sum(full_nll(model, row) for row in ROWS.rows)
    train(model, tmp_path, changed(learning_rate=0.01, epochs=10))
    assert {weight.dtype for weight in model.parameters()} == {dtype}
    assert {a.dtype for pair in adapters_of(tmp_path).values() for a in pair} == {torch.float32}
    assert sum(full_nll(model, row) for row in ROWS.rows) < nll
    for name, weight in weights_of(model).items():
        if name.removesuffix(".weight") not in linear - {head_of(model)}:
            assert torch.equal(weight, before[name]), name
    assert all(torch.equal(buffer, tables[name]) for name, buffer in model.named_buffers())


def test_divergence_says_what_to_lower(tmp_path):
    with pytest.raises(NonFiniteLossError, match=r"loss of step \d is (nan|inf); lower train.learning_rate"):
        train(pruned(dtype=torch.float32), tmp_path, changed(learning_rate=1e30))


# --- the loss -------------------------------------------------------------------------------------------------

DEPTHS = [0, 1, 3]  # of the layers that MASK leaves


def plain_loss(model, teacher, row, wanted):
    """The formula for one row, from whole logits of both models, sums over the vocabulary written out."""
    found = []
    for each in (model, teacher):
        ends = []
        hook = each.get_decoder().norm.register_forward_pre_hook(lambda module, given, ends=ends: ends.append(given[0]))
        output = each(torch.tensor([row]), use_cache=False, output_hidden_states=True)
        hook.remove()
        found.append((output.logits[0, :-1], [state[0, :-1] for state in (*output.hidden_states[1:-1], ends[0])]))
    (z, states), (dense, dense_states) = found
    T, loss = wanted.temperature, 0.0
    for t, target in enumerate(row[1:]):
        q, p = (torch.exp(x / T) / torch.exp(x / T).sum() for x in (z[t], dense[t]))
        if wanted.top_k:
            order = sorted(range(len(p)), key=lambda v: -p[v])
            split = [order[: wanted.top_k], order[wanted.top_k :]]
            p, q = (torch.stack([*x[split[0]], x[split[1]].sum()]) for x in (p, q))
        kl = (p * torch.log(p / q)).sum()
        nll = torch.log(torch.exp(z[t]).sum()) - z[t, target]
        apart = [
            ((s[t] - dense_states[d][t]) ** 2).sum() / (dense_states[d][t] ** 2).sum()
            for s, d in zip(states, DEPTHS, strict=True)
        ]
        loss = loss + (1 - wanted.distill) * nll + wanted.distill * T**2 * kl + wanted.hidden * sum(apart) / 3
    return loss / (len(row) - 1)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize(
    "recipe",
    [
        {"distill": 0.7, "temperature": 2.0},
        {"distill": 1.0, "temperature": 1.5, "top_k": 5},
        {"distill": 0.4, "top_k": 259, "hidden": 0.3},
        {"hidden": 2.0},
    ],
)
def test_gradient_is_that_of_the_plain_formula(monkeypatch, family, recipe):
    """In chunks of 7 tokens and batches of rows of unlike lengths; Gemma 2 caps its logits."""
    monkeypatch.setattr(loss, "LOGITS_BYTES", 7 * 4 * 260)
    wanted, teacher = changed(**recipe), tiny_model(family)
    models = [pruned(family).requires_grad_(), pruned(family).requires_grad_()]
    for weight in (model.get_input_embeddings().weight for model in models):
        weight.requires_grad_(False)
    objective = loss.TrainingLoss(models[0], teacher, wanted, DEPTHS if wanted.hidden else ())
    value = objective.accumulate_(ROWS.rows, 1 / 4)
    expected = sum(plain_loss(models[1], teacher, row, wanted) for row in ROWS.rows) / 4
    expected.backward()
    close = tolerance(family)
    assert value == pytest.approx(expected.item(), rel=close)
    assert objective.measure(ROWS.rows) == pytest.approx(
        (value, sum(full_nll(models[1], row) for row in ROWS.rows) / 4), rel=close
    )
    head = head_of(models[0])
    for (name, found), (_, plain) in zip(*(model.named_parameters() for model in models), strict=True):
        if plain.grad is not None and not name.startswith(head):
            assert (found.grad - plain.grad).norm() <= 10 * close * plain.grad.norm(), name


def test_what_is_distilled_comes_closer_to_the_dense_model(tmp_path):
    teacher, model = tiny_model(), pruned()
    recipe = changed(weights="all", distill=1.0, hidden=0.1, epochs=15, learning_rate=0.01)
    found = train(model, tmp_path, recipe, teacher=teacher, validation=ROWS, depths=DEPTHS)
    kl = [validation.loss for validation in found.validations]
    assert kl[-1] < 0.5 * kl[0]
    ids = torch.tensor([ROWS.rows[3]])
    before, after, goal = (each(ids).logits.log_softmax(-1) for each in (pruned(), model, teacher))
    assert (goal.exp() * (goal - after)).sum() < 0.5 * (goal.exp() * (goal - before)).sum()


def test_more_top_k_than_tokens_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"train.top_k 260 is not less than the vocabulary of 260; lower it"):
        train(pruned(), tmp_path, changed(distill=1.0, top_k=260), teacher=tiny_model())


# --- all weights ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_weights_learn_but_embeddings_and_head(tmp_path, variant):
    model = pruned(variant, torch.float32)
    before, ends = weights_of(model), {f"{head_of(model)}.weight"}
    ends |= {name for name, weight in model.named_parameters() if weight is model.get_input_embeddings().weight}
    train(model, tmp_path, changed(weights="all", epochs=2))
    after = weights_of(model)
    names = {name for name, _ in model.named_parameters()}
    assert {name for name in names if not torch.equal(before[name], after[name])} == names - ends
    assert not any(weight.requires_grad for weight in model.parameters())


def test_steps_smaller_than_the_last_bit_are_not_lost(tmp_path):
    """bfloat16 weights of 0.5 and more lie 2^-8 apart or more; a step of 2e-4 alone changes none of them."""
    recipe = changed(weights="all", learning_rate=2e-4, epochs=20)
    model, exact = pruned(dtype=torch.bfloat16), pruned(dtype=torch.bfloat16).float()
    before = weights_of(model)
    train(model, tmp_path, recipe)
    train(exact, tmp_path, recipe)
    moved, goal = (
        torch.cat([(w.float() - before[name].float())[before[name].abs() > 0.5] for name, w in each.named_parameters()])
        for each in (model, exact)
    )
    assert (moved != 0).float().mean() > 0.1
    assert torch.corrcoef(torch.stack([moved, goal]))[0, 1] > 0.5


def test_checkpointing_changes_no_bit(tmp_path):
    models = [pruned(dtype=torch.float32) for _ in range(2)]
    for model, kept in zip(models, (False, True), strict=True):
        train(model, tmp_path / str(kept), changed(checkpointing=kept, weights="all"))
        assert all("forward" not in vars(layer) for layer in model.model.layers)
    assert all(map(torch.equal, *(model.parameters() for model in models)))


def test_learning_rate_rises_and_falls():
    linear, cosine = (changed(warmup=0.2, schedule=name) for name in ("linear", "cosine"))
    assert [training._rate(step, 10, linear) for step in (0, 1, 2, 6, 9)] == [0.5, 1, 1, 0.5, 0.125]
    assert [training._rate(step, 10, cosine) for step in (0, 1, 2, 6)] == pytest.approx([0.5, 1, 1, 0.5])
    assert training._rate(9, 10, cosine) == pytest.approx((1 + math.cos(math.pi * 7 / 8)) / 2)


# --- validation -----------------------------------------------------------------------------------------------

LOSSES = [5.0, 4.0, 4.5, 3.0, 3.5, 3.0, 3.25, 1.0]


@pytest.mark.parametrize("weights", ["lora", "all"])
def test_training_stops_early_and_keeps_the_best(tmp_path, monkeypatch, weights):
    """A validation in two steps; after 3.0 come three that are no better."""
    losses = iter(LOSSES)
    monkeypatch.setattr(loss.TrainingLoss, "measure", lambda objective, rows: (next(losses), 7.0))
    recipe = changed(weights=weights, epochs=30, validate_every=2, patience=3)
    model = pruned()
    found = train(model, tmp_path, recipe, validation=ROWS)
    assert [(v.step, v.loss, v.nll) for v in found.validations] == [(2 * n, x, 7.0) for n, x in enumerate(LOSSES[:7])]
    assert (found.step, len(found.losses)) == (6, 12)
    monkeypatch.undo()
    again = train(pruned(), tmp_path, recipe, validation=ROWS)
    assert (again.validations, again.step) == (found.validations, 6)
    same = pruned()
    monkeypatch.setattr(loss.TrainingLoss, "measure", lambda *_: (0.0, 0.0))
    with pytest.raises(KeyboardInterrupt):  # the state after six steps is saved alone
        train(same, tmp_path / "six", recipe, validation=ROWS, observer=Watch(last=6), save_every=6)
    (path,) = (tmp_path / "six").iterdir()
    kept, at_six = (load_file(each) for each in (next(tmp_path.glob("*.safetensors")), path))
    assert all(torch.equal(kept[name], at_six[name]) for name in kept)


@pytest.mark.parametrize("weights", ["lora", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_does_not_get_better_is_left_as_it_was(tmp_path, monkeypatch, weights, dtype):
    losses = iter([2.0, 2.5, 2.0])
    monkeypatch.setattr(loss.TrainingLoss, "measure", lambda objective, rows: (next(losses), 1.0))
    model, watch = pruned(dtype=dtype), Watch()
    recipe = changed(weights=weights, patience=2, validate_every=1)
    found = train(model, tmp_path, recipe, validation=ROWS, observer=watch)
    assert found.step == 0 and len(found.validations) == 3
    assert "never fell: the weights are left as they were" in watch.summary
    before = weights_of(pruned(dtype=dtype))
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(model).items())


# --- what survives a kill -------------------------------------------------------------------------------------


KINDS = [
    (torch.float32, {}, None),
    (torch.float32, {}, ROWS),
    (
        torch.bfloat16,
        {"weights": "all", "distill": 0.5, "schedule": "cosine", "warmup": 0.4, "validate_every": 3},
        ROWS,
    ),
]


@pytest.mark.parametrize(("dtype", "changes", "validation"), KINDS)
@pytest.mark.parametrize("kill", [2, 5])
def test_a_killed_run_ends_in_the_same_weights(tmp_path, kill, dtype, changes, validation):
    recipe = changed(epochs=6, accumulation=4, **changes)
    undisturbed, model = pruned(dtype=dtype), pruned(dtype=dtype)
    given = {"teacher": tiny_model(dtype=dtype), "validation": validation}
    expected = train(undisturbed, tmp_path / "undisturbed", recipe, **given)
    with pytest.raises(KeyboardInterrupt):
        train(pruned(dtype=dtype), tmp_path / "killed", recipe, observer=Watch(last=kill), save_every=2, **given)
    watch = Watch()
    torch.rand(5)  # the order of the rows is not the process's
    found = train(model, tmp_path / "killed", recipe, observer=watch, **given)
    assert replace(found, model=None) == replace(expected, model=None)
    assert watch.steps == 6 - kill // 2 * 2
    assert watch.cached is False
    for name, weight in weights_of(model).items():
        assert torch.equal(weight, weights_of(undisturbed)[name]), name


def test_a_finished_run_is_not_trained_again(tmp_path):
    first, second, watch = pruned(), pruned(), Watch()
    losses = train(first, tmp_path).losses
    assert train(second, tmp_path, observer=watch).losses == losses
    assert (watch.steps, watch.cached) == (0, True)
    assert all(torch.equal(weight, weights_of(first)[name]) for name, weight in weights_of(second).items())


def test_what_changes_the_result_has_a_state_of_its_own(tmp_path):
    rows = CalibrationSet(ROWS.rows[:3])
    others = [{"recipe": changed(alpha=11)}, {"rows": rows}, {"identity": "n"}, {"validation": rows}, {}]
    for other in others:
        train(pruned(dtype=torch.float32), tmp_path, **other)
    train(pruned(), tmp_path)  # float64
    assert len(list(tmp_path.iterdir())) == len(others) + 1


def test_the_same_content_has_the_same_bytes(tmp_path):
    tensors, facts = {"a": torch.arange(3.0)}, {name: name for name in "pqrstu"}
    for number in range(5):
        write_tensors(tmp_path / str(number), tensors, facts)
    assert len({(tmp_path / str(number)).read_bytes() for number in range(5)}) == 1
    found, said = read_tensors(tmp_path / "0")
    assert said == facts and torch.equal(found["a"], tensors["a"])


FAULTS = ["truncated", "a bit flipped", "not safetensors", "another loss", "no losses", "no metadata", "other names"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_state_is_named_and_set_aside(tmp_path, fault):
    train(pruned(), tmp_path / "good")
    with pytest.raises(KeyboardInterrupt):
        train(pruned(), tmp_path / "bad", observer=Watch(last=2), save_every=1)
    (path,) = (tmp_path / "bad").iterdir()
    content = bytearray(path.read_bytes())
    content[-9] ^= 1

    def sealed(tensors, facts):
        write_tensors(tmp_path / "other", tensors, facts)
        return (tmp_path / "other").read_bytes()

    tensors, facts = read_tensors(path)
    others = {name.replace("lora_A", "lora_a"): tensor for name, tensor in tensors.items()}
    changes = {
        "truncated": content[:-40],
        "a bit flipped": content,
        "not safetensors": b"{}",
        "another loss": save(tensors, {"progress": '{"losses": [1.5], "curve": []}', DIGEST: read_facts(path)[DIGEST]}),
        "no losses": sealed(tensors, {}),
        "no metadata": save(tensors),
        "other names": sealed(others, facts),
    }
    path.write_bytes(changes[fault])
    watch = Watch()
    train(pruned(), tmp_path / "bad", observer=watch)
    assert watch.steps == 3
    assert watch.notes[0].startswith(f"{path} ")
    assert f"set aside as {path.name}.bad" in watch.notes[0]
    assert path.with_name(f"{path.name}.bad").read_bytes() == changes[fault]
    good, again = load_file(tmp_path / "good" / path.name), load_file(path)
    assert good.keys() == again.keys() and all(torch.equal(good[name], again[name]) for name in good)


# --- data and stage -------------------------------------------------------------------------------------------


def test_samples_end_where_the_text_ends_or_at_seq_len():
    texts = ["ab", "abc", "abcdefgh"]

    def rows_of(texts, samples, seed):
        wanted = changed(num_samples=samples, seq_len=4, seed=seed, validation=0)
        return training_rows(texts, tiny_tokenizer(), wanted)[0].rows

    rows = rows_of(texts, 3, 0)
    ids = {letter: tiny_tokenizer()(letter)["input_ids"][0] for letter in "abcd"}
    a, b, c, d = ids.values()
    assert sorted(rows) == sorted([(a, b, 258), (a, b, c, 258), (a, b, c, d)])
    assert sorted(rows_of(texts * 9, 27, 1)) == sorted(rows * 9)
    with pytest.raises(InputError, match=r"train.num_samples \+ validation 4 is more than the 3 texts.*at most 3"):
        rows_of(texts, 4, 0)


def test_joined_rows_are_full_and_validation_rows_are_others():
    texts = [
        f"{number} " + "abcd " * 7 + "\n" + f"the paragraph of {number} has well more than fifty characters"
        for number in range(30)
    ]
    notes, wanted = [], changed(num_rows=5, seq_len=32, validation=3)
    rows, held = training_rows(texts, tiny_tokenizer(), wanted, texts[:4], notes.append)
    assert [len(row) for row in rows.rows + held.rows] == [32] * 8
    assert notes == ["4 of 30 training texts are evaluated too: they are not drawn"]
    text = tiny_tokenizer().decode([token for row in rows.rows + held.rows for token in row])
    assert not any(f"\n\n{number} " in text for number in range(4))
    samples, others = training_rows(texts, tiny_tokenizer(), changed(num_samples=20, validation=10, seq_len=99))
    assert (len(samples.rows), len(others.rows)) == (20, 10) and not set(samples.rows) & set(others.rows)
    with pytest.raises(InputError, match=r"train.num_rows \+ validation 903 is more than the \d+ rows of 32 tokens"):
        training_rows(texts, tiny_tokenizer(), wanted.model_copy(update={"num_rows": 900}))
    few, last = training_rows(texts, tiny_tokenizer(), wanted.model_copy(update={"num_rows": 900}), at_most=True)
    assert len(few.rows) > 5 and len(last.rows) == 3 and not set(few.rows) & set(last.rows)
    held_out = wanted.model_copy(update={"validation": len(few.rows) + 3})
    with pytest.raises(InputError, match=r"fill (\d+) rows of 32 tokens, of which \1 are held out; give more texts"):
        training_rows(texts, tiny_tokenizer(), held_out, at_most=True)
