"""Training against LoRA, AdamW and the loss written out here in plain torch, and against itself
after a kill."""

import math
import resource
import shutil
from contextlib import contextmanager
from itertools import count

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.func import functional_call

from blockpruner.core.blocks import parse_block, parse_mask
from blockpruner.core.errors import DeviceMemoryError, InputError, NonFiniteLossError, StorageError
from blockpruner.core.progress import SilentObserver
from blockpruner.healing import loss, trainer
from blockpruner.healing.loss import TrainingLoss
from blockpruner.healing.rows import training_rows
from blockpruner.healing.settings import Train
from blockpruner.healing.states import BEST, drop_old_states, last_state, seal_state
from blockpruner.healing.trainer import train_
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.model.models import decoder_layers, prune_
from blockpruner.model.narrow import narrow_
from blockpruner.scoring import losses
from blockpruner.store.files import write_atomic
from tests.power import forked
from tests.tiny import GRID, full_nll, tiny_model, tiny_tokenizer, tolerance

# an MLP-only layer, an attention-only layer, a layer that is gone
MASK = parse_mask("mha.0,mlp.1,mha.2,mlp.2")
ROWS = CalibrationSet(
    tuple(tuple((7 * r + 3 * k + r * k) % 250 + 1 for k in range(9 + 4 * r)) for r in range(4))
)
FLAT = torch.ones(1)
DATA = {"source": "path", "path": "texts.parquet"}
SMALL = Train(data=DATA, rank=3, learning_rate=2e-3, epochs=3)


def changed(**changes):
    return SMALL.model_copy(update=changes)


def pruned(family="llama", dtype=torch.float64, **config):
    return prune_(tiny_model(family, dtype=dtype, **config), MASK)


def train(model, states, recipe=SMALL, rows=ROWS, **options):
    given = {"teacher": None, "validation": None, "observer": SilentObserver()} | options
    return train_(model, rows, recipe, states=states, **given)


def weights_of(model):
    return {
        name: weight.detach().clone() for name, weight in model.state_dict(keep_vars=True).items()
    }


def adapters_of(folder, model):
    """A and B of every linear layer, from the last checkpoint: {layer: (A, B)}."""
    path = max(folder.glob("checkpoint-*/model.safetensors"), key=lambda path: path.stat().st_mtime)
    tensors = load_file(path)
    tensors = [tensors[f"masters.{number}"] for number in range(len(tensors))]
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != head_of(model)
    ]
    return dict(zip(names, zip(tensors[::2], tensors[1::2], strict=True), strict=True))


def head_of(model):
    return next(
        name for name, module in model.named_modules() if module is model.get_output_embeddings()
    )


class Watch(SilentObserver):
    """Counts steps, keeps notes, and kills the run after `last` of them."""

    def __init__(self, last=math.inf):
        self.last, self.steps, self.notes, self.summary = last, 0, [], ""

    def note(self, message):
        self.notes.append(message)

    def advance(self, done, total, detail):
        self.steps += 1
        if self.steps == self.last:
            raise KeyboardInterrupt

    def end(self, summary, table=(), cached=False):
        self.summary = summary


# --- the training itself


def steps_by_hand(parameters, loss_of):
    """Three steps of AdamW without decay, gradients clipped to norm 1, lr (1 - k/3); changes the
    parameters in place.

    Returns:
        The losses, and how often the gradient was clipped.
    """
    m, v = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    losses, clipped = [], 0
    for k in range(3):
        loss = loss_of()
        gradients = torch.autograd.grad(loss, parameters)
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients))
        clipped += norm > 1
        with torch.no_grad():
            for i, (p, g) in enumerate(zip(parameters, gradients, strict=True)):
                g = g * min(1.0, 1.0 / (norm + 1e-6))
                m[i] = 0.9 * m[i] + 0.1 * g
                v[i] = 0.999 * v[i] + 0.001 * g**2
                up, down = (
                    m[i] / (1 - 0.9 ** (k + 1)),
                    (v[i] / (1 - 0.999 ** (k + 1))).sqrt() + 1e-8,
                )
                p -= 2e-3 * (1 - k / 3) * up / down
        losses.append(loss.item())
    return losses, clipped


# a step takes all rows, so that no order is assumed; a short last batch
ALL_AT_ONCE = {
    "batch": 3,
    "accumulation": 2,
}


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_three_steps_of_lora_and_adamw_by_hand(tmp_path, family):
    """W + alpha/r B A, mean over rows of the row's mean NLL.

    The start of A is that of a run of one step, whose gradient for A is zero since B starts at
    zero.
    """
    recipe = changed(**ALL_AT_ONCE)
    train(pruned(family), tmp_path / "one", recipe.model_copy(update={"epochs": 1}))
    start = {name: a for name, (a, _) in adapters_of(tmp_path / "one", pruned(family)).items()}
    model = pruned(family)
    base = weights_of(model)
    A = {name: a.clone().requires_grad_() for name, a in start.items()}
    B = {
        name: torch.zeros(base[f"{name}.weight"].shape[0], 3, dtype=torch.float64).requires_grad_()
        for name in A
    }

    def loss():
        merged = base | {
            f"{name}.weight": base[f"{name}.weight"] + 10 / 3 * B[name] @ A[name] for name in A
        }
        result = 0.0
        for row in ROWS.rows:
            logits = functional_call(
                model, merged, (torch.tensor([row]),), {"use_cache": False}
            ).logits[0, :-1]
            result = result - logits.log_softmax(-1).gather(
                1, torch.tensor(row[1:])[:, None]
            ).mean() / len(ROWS.rows)
        return result

    losses, clipped = steps_by_hand([*A.values(), *B.values()], loss)
    assert clipped
    result = train(model, tmp_path / "all", recipe)
    assert result["losses"] == pytest.approx(losses, abs=1e-6)  # the Trainer adds them as float32
    for name, weight in model.state_dict().items():
        layer = name.removesuffix(".weight")
        expected = (
            base[name] + (10 / 3 * B[layer] @ A[layer]).detach() if layer in A else base[name]
        )
        assert (weight - expected).abs().max() < 1e-8, name


def test_three_steps_of_all_weights_by_hand(tmp_path):
    """All but embeddings and head, half of the loss the distance to the dense model."""
    recipe, teacher, plain = (
        changed(weights="all", distill=0.5, **ALL_AT_ONCE),
        tiny_model(),
        pruned(),
    )
    ends = {id(plain.get_input_embeddings().weight), id(plain.get_output_embeddings().weight)}
    own = [weight.requires_grad_() for weight in plain.parameters() if id(weight) not in ends]
    losses, _ = steps_by_hand(
        own, lambda: sum(plain_loss(plain, teacher, row, recipe) for row in ROWS.rows) / 4
    )
    model = pruned()
    result = train(model, tmp_path, recipe, teacher=teacher)
    assert result["losses"] == pytest.approx(losses, abs=1e-6)
    for (name, weight), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (weight - expected).abs().max() < 1e-8, name


def test_rows_are_seen_once_an_epoch_in_a_seeded_order(tmp_path):
    """With a learning rate of next to nothing, the losses tell which rows each step took."""
    rows = CalibrationSet(ROWS.rows + ROWS.rows[::-1][:3])
    nll = [full_nll(pruned(), row) for row in rows.rows]
    recipe = changed(learning_rate=1e-30, batch=1, accumulation=1, epochs=2)
    orders = []
    for seed in (1, 9):  # the generator's seed is the sum of seed and epoch
        losses = train(
            pruned(), tmp_path / str(seed), recipe.model_copy(update={"seed": seed}), rows
        )["losses"]
        for epoch in (losses[:7], losses[7:]):
            assert sorted(epoch) == pytest.approx(sorted(nll))
        orders += [losses[:7], losses[7:]]
    assert len(set(map(tuple, orders))) == 4
    by_two = train(
        pruned(), tmp_path / "two", recipe.model_copy(update={"seed": 1, "accumulation": 2}), rows
    )["losses"]
    expected = [*zip(orders[0][::2], [*orders[0][1::2], None], strict=True)]
    assert by_two[:4] == pytest.approx([a if b is None else (a + b) / 2 for a, b in expected])


@pytest.mark.parametrize("weights", ["lora", "all"])
@pytest.mark.parametrize("variant", [*GRID, "narrow"])
def test_what_is_trained_learns_and_nothing_else(tmp_path, variant, weights):
    """Every linear layer but the head; or all weights but embeddings and head."""
    narrow = {parse_block("mlp.1"): range(5, 20)}
    model = (
        narrow_(tiny_model(dtype=torch.float32), narrow)
        if variant == "narrow"
        else pruned(variant, torch.float32)
    )
    kind, config, names = (
        type(model),
        model.config.to_dict(),
        [name for name, _ in model.named_modules()],
    )
    before, ends = (
        weights_of(model),
        (model.get_input_embeddings().weight, model.get_output_embeddings().weight),
    )
    if weights == "lora":
        expected = {
            f"{name}.weight"
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
        }
        expected -= {f"{head_of(model)}.weight"}
    else:
        expected = {
            name
            for name, weight in model.named_parameters()
            if all(weight is not end for end in ends)
        }
    nll = sum(full_nll(model, row) for row in ROWS.rows)
    train(model, tmp_path, changed(weights=weights, epochs=12))
    after = weights_of(model)
    assert {name for name in before if not torch.equal(before[name], after[name])} == expected
    assert (type(model), model.config.to_dict(), [name for name, _ in model.named_modules()]) == (
        kind,
        config,
        names,
    )
    assert not model.training
    assert not any(weight.requires_grad for weight in model.parameters())
    assert sum(full_nll(model, row) for row in ROWS.rows) < nll


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models_train_in_float32(tmp_path, dtype):
    model = pruned(dtype=dtype)
    before, linear = (
        weights_of(model),
        {n for n, module in model.named_modules() if isinstance(module, nn.Linear)},
    )
    tables = {name: buffer.clone() for name, buffer in model.named_buffers()}
    nll = sum(full_nll(model, row) for row in ROWS.rows)
    train(model, tmp_path, changed(learning_rate=0.01, epochs=10))
    assert {weight.dtype for weight in model.parameters()} == {dtype}
    assert {a.dtype for pair in adapters_of(tmp_path, pruned()).values() for a in pair} == {
        torch.float32
    }
    assert sum(full_nll(model, row) for row in ROWS.rows) < nll
    for name, weight in weights_of(model).items():
        if name.removesuffix(".weight") not in linear - {head_of(model)}:
            assert torch.equal(weight, before[name]), name
    assert all(torch.equal(buffer, tables[name]) for name, buffer in model.named_buffers())


def test_divergence_says_what_to_lower(tmp_path):
    with pytest.raises(
        NonFiniteLossError, match=r"loss of step \d is (nan|inf); lower train.learning_rate"
    ):
        train(pruned(dtype=torch.float32), tmp_path, changed(learning_rate=1e30))


# --- the loss


def plain_loss(model, teacher, row, wanted):
    """The formula for one row, from whole logits of both models, sums over the vocabulary written
    out."""
    z, dense = (
        item(torch.tensor([row]), use_cache=False).logits[0, :-1] for item in (model, teacher)
    )
    loss = 0.0
    for t, target in enumerate(row[1:]):
        q, p = (torch.exp(x) / torch.exp(x).sum() for x in (z[t], dense[t]))
        kl = (p * torch.log(p / q)).sum()
        nll = torch.log(torch.exp(z[t]).sum()) - z[t, target]
        loss = loss + (1 - wanted.distill) * nll + wanted.distill * kl
    return loss / (len(row) - 1)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("share", [0.7, 1.0])
def test_gradient_is_that_of_the_plain_formula(monkeypatch, family, share):
    """In chunks of 7 tokens, pieces of 4 and batches of rows of unlike lengths; Gemma 2 caps its
    logits."""
    monkeypatch.setattr(loss, "LOGITS_BYTES", 7 * 4 * 260)
    monkeypatch.setattr(losses, "PIECE_BYTES", 1)
    wanted, teacher = changed(distill=share), tiny_model(family)
    models = [pruned(family).requires_grad_(), pruned(family).requires_grad_()]
    for weight in (model.get_input_embeddings().weight for model in models):
        weight.requires_grad_(False)
    batch = trainer._batch(ROWS.rows)
    value, nll = loss.TrainingLoss(models[0], teacher, wanted)(batch["ids"], batch["lengths"], 4)
    value.backward()
    expected = sum(plain_loss(models[1], teacher, row, wanted) for row in ROWS.rows) / 4
    expected.backward()
    close = tolerance(family)
    assert value.item() == pytest.approx(expected.item(), rel=close)
    assert nll.item() == pytest.approx(
        sum(full_nll(models[1], row) for row in ROWS.rows) / 4, rel=close
    )
    head = head_of(models[0])
    for (name, result), (_, plain) in zip(
        *(model.named_parameters() for model in models), strict=True
    ):
        if plain.grad is not None and not name.startswith(head):
            assert (result.grad - plain.grad).norm() <= 10 * close * plain.grad.norm(), name


def test_steps_smaller_than_the_last_bit_are_not_lost(tmp_path):
    """bfloat16 weights of 0.5 and more lie 2^-8 apart or more; a step of 2e-4 alone changes none of
    them."""
    recipe = changed(weights="all", learning_rate=2e-4, epochs=20)
    model, exact = pruned(dtype=torch.bfloat16), pruned(dtype=torch.bfloat16).float()
    before = weights_of(model)
    train(model, tmp_path, recipe)
    train(exact, tmp_path, recipe)
    moved, goal = (
        torch.cat(
            [
                (w.float() - before[name].float())[before[name].abs() > 0.5]
                for name, w in item.named_parameters()
            ]
        )
        for item in (model, exact)
    )
    assert (moved != 0).float().mean() > 0.1
    assert torch.corrcoef(torch.stack([moved, goal]))[0, 1] > 0.5


# --- validation


@pytest.mark.parametrize("weights", ["lora", "all"])
def test_the_state_that_is_best_on_held_out_rows_is_kept(tmp_path, weights):
    """Rows that contradict the held-out ones, and a rate that is too high in the end: the best is
    in between."""
    recipe = changed(weights=weights, epochs=8, learning_rate=0.02, validate_every=2)
    model = pruned()
    result = train(
        model,
        tmp_path,
        recipe,
        CalibrationSet(ROWS.rows[:2]),
        validation=CalibrationSet(ROWS.rows[2:]),
    )
    assert [item["step"] for item in result["validations"]] == [0, 2, 4, 6, 8]
    nll = sum(full_nll(model, row) for row in ROWS.rows[2:]) / 2
    best = min(result["validations"], key=lambda item: item["nll"])
    assert (result["step"], best["nll"]) == (best["step"], pytest.approx(nll, abs=1e-6))
    start = sum(full_nll(pruned(), row) for row in ROWS.rows[2:]) / 2
    assert result["validations"][0]["nll"] == pytest.approx(start, abs=1e-6)
    assert nll <= start + 1e-9


@pytest.mark.parametrize("weights", ["lora", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_does_not_get_better_is_left_as_it_was(tmp_path, monkeypatch, weights, dtype):
    worse = count(1.0)
    monkeypatch.setattr(
        trainer._Trainer,
        "prediction_step",
        lambda *_, **__: (torch.tensor(next(worse)), *[FLAT] * 2),
    )
    model, watch = pruned(dtype=dtype), Watch()
    recipe = changed(weights=weights, validate_every=1)
    result = train(model, tmp_path, recipe, validation=ROWS, observer=watch)
    assert result["step"] == 0
    assert len(result["validations"]) == 4
    assert "never fell: the weights are left as they were" in watch.summary
    before = weights_of(pruned(dtype=dtype))
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(model).items())


# --- where memory ends


@pytest.mark.parametrize("weights", ["lora", "all"])
def test_a_full_device_gets_fewer_rows_at_once_then_checkpointing_and_the_same_weights(
    tmp_path, monkeypatch, weights
):
    """The device holds one row, and its layers only where they are computed anew; it is full at the
    second batch of a step, when one gradient is there already, and in the middle of a backward
    pass."""
    recipe = changed(weights=weights, epochs=2, **ALL_AT_ONCE)
    expected, result = pruned(), pruned()
    train(expected, tmp_path / "roomy", recipe)
    plain, asked, calls = TrainingLoss.__call__, [], count()

    def full(self, ids, lengths, total):
        asked.append((len(ids), decoder_layers(self.model)[0].training))
        loss, nll = plain(self, ids, lengths, total)
        if next(calls) and asked[-1] != (1, True):
            loss.backward(retain_graph=True)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate much")
        return loss, nll

    monkeypatch.setattr(TrainingLoss, "__call__", full)
    facts = train(result, tmp_path / "full", recipe)
    assert asked[:4] == [(3, False), (1, False), (2, False), (1, False)]
    assert set(asked[4:]) == {(1, True)}
    assert len(facts["losses"]) == 2
    for name, weight in weights_of(result).items():
        torch.testing.assert_close(weight, weights_of(expected)[name], rtol=1e-5, atol=1e-7)

    def always(self, ids, lengths, total):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate much")

    monkeypatch.setattr(TrainingLoss, "__call__", always)
    with pytest.raises(
        DeviceMemoryError, match=r"a row of [0-9]+ tokens does not fit .*; lower train.seq_len"
    ):
        train(pruned(), tmp_path / "none", recipe)


# --- what survives a kill


KINDS = [
    (torch.float32, {"validate_every": 2}, None),
    (torch.float32, {"validate_every": 2}, ROWS),
    (
        torch.bfloat16,
        {
            "weights": "all",
            "distill": 0.5,
            "schedule": "cosine",
            "warmup": 0.4,
            "validate_every": 2,
        },
        ROWS,
    ),
]


@pytest.mark.parametrize(("dtype", "changes", "validation"), KINDS)
def test_a_killed_run_ends_in_the_same_weights(tmp_path, monkeypatch, dtype, changes, validation):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trainer, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(trainer, "SAVE_COST_FACTOR", 0)
    recipe = changed(epochs=3, batch=1, accumulation=2, **changes)
    undisturbed, model = pruned(dtype=dtype), pruned(dtype=dtype)
    given = {"teacher": tiny_model(dtype=dtype), "validation": validation}
    expected = train(undisturbed, tmp_path / "undisturbed", recipe, **given)
    with pytest.raises(KeyboardInterrupt):
        train(pruned(dtype=dtype), tmp_path / "killed", recipe, observer=Watch(last=5), **given)
    (tmp_path / "killed/checkpoint-99").mkdir(parents=True)  # killed while it was written
    watch = Watch()
    torch.rand(5)  # the order of the rows is not the process's
    result = train(model, tmp_path / "killed", recipe, observer=watch, **given)
    assert result == expected
    assert watch.steps == 2
    assert "goes on after step 4" in watch.notes[0]
    assert {path.name for path in tmp_path.iterdir()} == {"killed", "undisturbed"}
    for name, weight in weights_of(model).items():
        assert torch.equal(weight, weights_of(undisturbed)[name]), name


STATE_FILES = (
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "training_args.bin",
    "seal.json",
    "best.safetensors",
)
DISTURBED = changed(epochs=3, batch=1, accumulation=2, validate_every=2)


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory):
    """The facts and weights of a training of six steps, and its last two states, as a kill at its
    end leaves them."""
    states, model = tmp_path_factory.mktemp("disturbed"), pruned()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "SAVE_SECONDS", 0.0)
        patch.setattr(trainer, "SAVE_COST_FACTOR", 0)
        facts = train(model, states, DISTURBED, validation=ROWS)
    return facts, weights_of(model), states


def flip(content):
    """A bit of the last byte that is not zero: an archive's padding counts, too."""
    place = len(content.rstrip(b"\0")) - 1
    return content[:place] + bytes([content[place] ^ 64]) + content[place + 1 :]


def empty(content):
    """As a cut of power may leave a file that nobody has synced."""
    return b""


@pytest.mark.parametrize(
    ("names", "damage"),
    [
        *(((name,), how) for name in STATE_FILES for how in (flip, empty)),
        (("*.pt", "*.json"), flip),
    ],
)
def test_a_damaged_state_is_set_aside_and_the_weights_are_the_same(
    tmp_path, disturbed, names, damage
):
    """One file of the newer one of two states; or several files of both, so that training begins
    anew."""
    facts, weights, killed = disturbed
    states, watch, model = shutil.copytree(killed, tmp_path / "states"), Watch(), pruned()
    _, newest = sorted(states.glob("checkpoint-*"))
    for name in names:
        for path in [newest / name] if len(names) == 1 else [*states.rglob(name)]:
            path.write_bytes(damage(path.read_bytes()))
    assert train(model, states, DISTURBED, validation=ROWS, observer=watch) == facts
    assert all(torch.equal(weight, weights[name]) for name, weight in weights_of(model).items())
    assert f"{newest.name}.bad" in watch.notes[0]
    # from the state after five steps, or from none
    assert watch.steps == (1 if len(names) == 1 else 6)


def write_states(folder, sealed):
    """Two states, as the Trainer writes them; `sealed` names the last one that was promised to be
    on disk."""
    for step in (1, 2):
        drop_old_states(folder)
        write_atomic(folder / BEST, lambda path, step=step: path.write_bytes(b"best %d" % step))
        (folder / f"checkpoint-{step}").mkdir()
        for name in ("optimizer.pt", "trainer_state.json"):
            (folder / f"checkpoint-{step}" / name).write_bytes(b"%d" % step * 100)
        seal_state(folder, step)
        sealed.write_text(str(step))


@pytest.mark.parametrize("mode", ["lost", "reordered"])
def test_a_sealed_state_outlives_a_cut_of_power_before_any_write(tmp_path, mode):
    folder, sealed, notes = tmp_path / "states", tmp_path / "sealed", []
    for cut in count(1):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        sealed.write_text("0")
        code, _ = forked(folder, lambda: write_states(folder, sealed), tmp_path / "log", cut, mode)
        result, least = last_state(folder, notes.append), int(sealed.read_text())
        step = 0 if result is None else int(result.name.partition("-")[2])
        assert step in (least, least + 1), f"write {cut}"
        if result is not None:
            content = {
                path.name: path.read_bytes()
                for path in result.iterdir()
                if path.name != "seal.json"
            }
            assert content == {
                "optimizer.pt": b"%d" % step * 100,
                "trainer_state.json": b"%d" % step * 100,
                BEST: b"best %d" % step,
            }
            assert (folder / BEST).read_bytes() == content[BEST]
        if code == 0:
            break
    assert cut > 20
    assert step == 2
    assert not notes


@contextmanager
def files_of_at_most(size):
    """Within, a write beyond this size fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_at_any_file_of_a_state_is_named_and_costs_no_more(tmp_path):
    recipe, given = changed(epochs=2, validate_every=2), {"validation": ROWS}
    expected = train(pruned(), tmp_path / "undisturbed", recipe, **given)
    sizes = {
        path.stat().st_size for path in (tmp_path / "undisturbed").rglob("*") if path.is_file()
    }
    for size in (*sorted(sizes)[:-1], max(sizes) - 1):
        with (
            files_of_at_most(size),
            pytest.raises(StorageError, match=r"cannot write .*states.* kept"),
        ):
            train(pruned(), tmp_path / "states", recipe, **given)
    assert train(pruned(), tmp_path / "states", recipe, **given) == expected


# --- data and stage


def test_samples_end_where_the_text_ends_or_at_seq_len():
    texts = ["ab", "abc", "abcdefgh"]

    def rows_of(texts, samples, seed):
        expected = changed(num_samples=samples, seq_len=4, seed=seed, validation=0)
        return training_rows(texts, tiny_tokenizer(), expected)[0].rows

    rows = rows_of(texts, 3, 0)
    ids = {letter: tiny_tokenizer()(letter)["input_ids"][0] for letter in "abcd"}
    a, b, c, d = ids.values()
    assert sorted(rows) == sorted([(a, b, 258), (a, b, c, 258), (a, b, c, d)])
    assert sorted(rows_of(texts * 9, 27, 1)) == sorted(rows * 9)
    with pytest.raises(
        InputError, match=r"train.num_samples \+ validation 4 is more than the 3 texts.*at most 3"
    ):
        rows_of(texts, 4, 0)


def test_joined_rows_are_full_and_validation_rows_are_others():
    texts = [
        f"{number} "
        + "abcd " * 7
        + "\n"
        + f"the paragraph of {number} has well more than fifty characters"
        for number in range(30)
    ]
    notes, expected = [], changed(num_rows=5, seq_len=32, validation=3)
    rows, held = training_rows(texts, tiny_tokenizer(), expected, texts[:4], notes.append)
    assert [len(row) for row in rows.rows + held.rows] == [32] * 8
    assert notes == ["4 of 30 training texts are evaluated too: they are not drawn"]
    text = tiny_tokenizer().decode([token for row in rows.rows + held.rows for token in row])
    assert not any(f"\n\n{number} " in text for number in range(4))
    samples, others = training_rows(
        texts, tiny_tokenizer(), changed(num_samples=20, validation=10, seq_len=99)
    )
    assert (len(samples.rows), len(others.rows)) == (20, 10)
    assert not set(samples.rows) & set(others.rows)
    with pytest.raises(
        InputError, match=r"train.num_rows \+ validation 903 is more than the \d+ rows of 32 tokens"
    ):
        training_rows(texts, tiny_tokenizer(), expected.model_copy(update={"num_rows": 900}))
    few, last = training_rows(
        texts, tiny_tokenizer(), expected.model_copy(update={"num_rows": 900}), at_most=True
    )
    assert len(few.rows) > 5
    assert len(last.rows) == 3
    assert not set(few.rows) & set(last.rows)
    held_out = expected.model_copy(update={"validation": len(few.rows) + 3})
    with pytest.raises(
        InputError, match=r"fill (\d+) rows of 32 tokens, of which \1 are held out; give more texts"
    ):
        training_rows(texts, tiny_tokenizer(), held_out, at_most=True)
