"""Recovery against LoRA and AdamW written out here in plain torch, and against itself after a kill."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import metadata_load
from safetensors.torch import load_file, save
from torch import nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from blockpruner import recovery
from blockpruner.checkpoints import hf
from blockpruner.core.blocks import parse_mask
from blockpruner.core.errors import InputError, NonFiniteLossError
from blockpruner.core.progress import SilentObserver
from blockpruner.core.settings import Recover
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.inputs.texts import write_texts
from blockpruner.model.models import load_model, prune_
from blockpruner.params import load_run
from blockpruner.recovery import recover_, training_rows
from blockpruner.store.files import write_json
from blockpruner.store.manifest import manifest
from blockpruner.store.plans import save_plan
from stages import recover
from tests.integration.project import sentence
from tests.plans import plan_of
from tests.tiny import VARIANTS, full_nll, save_tiny, tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]
MASK = parse_mask("mha.0,mlp.1,mha.2,mlp.2")  # an MLP-only layer, an attention-only layer, a layer that is gone
ROWS = CalibrationSet(tuple(tuple((7 * r + 3 * k + r * k) % 250 + 1 for k in range(9 + 4 * r)) for r in range(4)))
DATA = {"source": "path", "path": "texts.parquet"}
SMALL = Recover(data=DATA, rank=3, learning_rate=2e-3, epochs=3)


def changed(**changes):
    return SMALL.model_copy(update=changes)


def pruned(family="llama", dtype=torch.float64, **config):
    return prune_(tiny_model(family, dtype=dtype, **config), MASK)


def train(model, adapters, recipe=SMALL, rows=ROWS, identity="m", observer=None, **options):
    observer = observer or SilentObserver()
    return recover_(model, rows, recipe, adapters=adapters, identity=identity, observer=observer, **options)


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
        self.last, self.steps, self.notes, self.cached = last, 0, [], None

    def note(self, message):
        self.notes.append(message)

    def advance(self, done, total, detail):
        self.steps += 1
        if self.steps == self.last:
            raise KeyboardInterrupt

    def end(self, summary, table=(), cached=False):
        self.cached = cached


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
    with pytest.raises(NonFiniteLossError, match=r"loss of step \d is (nan|inf); lower recover.learning_rate"):
        train(pruned(dtype=torch.float32), tmp_path, changed(learning_rate=1e30))


# --- what survives a kill -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kill", [1, 2, 5])
def test_a_killed_run_ends_in_the_same_weights(tmp_path, kill):
    recipe = changed(epochs=6, accumulation=4)
    undisturbed, model = pruned(dtype=torch.float32), pruned(dtype=torch.float32)
    losses = train(undisturbed, tmp_path / "undisturbed", recipe).losses
    with pytest.raises(KeyboardInterrupt):
        train(pruned(dtype=torch.float32), tmp_path / "killed", recipe, observer=Watch(last=kill), save_every=2)
    watch = Watch()
    torch.rand(5)  # the order of the rows is not the process's
    assert train(model, tmp_path / "killed", recipe, observer=watch).losses == losses
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
    others = [{"recipe": changed(alpha=11)}, {"rows": rows}, {"identity": "n"}, {}]
    for other in others:
        train(pruned(dtype=torch.float32), tmp_path, **other)
    train(pruned(), tmp_path)  # float64
    assert len(list(tmp_path.iterdir())) == len(others) + 1


FAULTS = ["truncated", "a bit flipped", "not safetensors", "another loss", "no losses", "no metadata", "other names"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_state_is_named_and_set_aside(tmp_path, fault):
    train(pruned(), tmp_path / "good")
    with pytest.raises(KeyboardInterrupt):
        train(pruned(), tmp_path / "bad", observer=Watch(last=2), save_every=1)
    (path,) = (tmp_path / "bad").iterdir()
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    tensors, losses = load_file(path), "[1.5, 1.25]"
    others = {name.replace("lora_A", "lora_a"): tensor for name, tensor in tensors.items()}
    changes = {
        "truncated": content[:-40],
        "a bit flipped": content,
        "not safetensors": b"{}",
        "another loss": save(tensors, {"losses": losses, "sha256": recovery._digest("[1.5, 1.24]", tensors)}),
        "no losses": save(tensors, {"sha256": recovery._digest("", tensors)}),
        "no metadata": save(tensors),
        "other names": save(others, {"losses": losses, "sha256": recovery._digest(losses, others)}),
    }
    path.write_bytes(changes[fault])
    watch = Watch()
    train(pruned(), tmp_path / "bad", observer=watch)
    assert watch.steps == 3
    assert f"{path} is damaged" in watch.notes[0]
    assert f"set aside as {path.name}.bad" in watch.notes[0]
    assert path.with_name(f"{path.name}.bad").read_bytes() == changes[fault]
    good, again = load_file(tmp_path / "good" / path.name), load_file(path)
    assert good.keys() == again.keys() and all(torch.equal(good[name], again[name]) for name in good)


# --- data and stage -------------------------------------------------------------------------------------------


def test_samples_end_where_the_text_ends_or_at_seq_len():
    texts = ["ab", "abc", "abcdefgh"]

    def rows_of(texts, samples, seed):
        return training_rows(texts, tiny_tokenizer(), changed(num_samples=samples, seq_len=4, seed=seed)).rows

    rows = rows_of(texts, 3, 0)
    ids = {letter: tiny_tokenizer()(letter)["input_ids"][0] for letter in "abcd"}
    a, b, c, d = ids.values()
    assert sorted(rows) == sorted([(a, b, 258), (a, b, c, 258), (a, b, c, d)])
    assert sorted(rows_of(texts * 9, 27, 1)) == sorted(rows * 9)
    with pytest.raises(InputError, match=r"recover.num_samples 4 is more than the 3 texts.*at most 3"):
        rows_of(texts, 4, 0)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder as after `materialize`, in which the stage runs; returns the plan."""
    monkeypatch.chdir(tmp_path)
    dense, run = save_tiny(Path("data/models/tiny")), load_run("smollm2", ROOT / "runs").model_dump(mode="json")
    write_json(dense / "blockpruner_source.json", {"source": {"source": "path", "path": "mine"}})
    run["recover"] = {
        "data": {"source": "hub", "repo": "someone/texts"},
        "num_samples": 8,
        "seq_len": 20,
        "rank": 2,
        "learning_rate": 0.01,
    }
    write_json(Path("runs/tiny.yaml"), run)
    targets = {"t": {"run": "tiny", "budget": "4blocks", "recover": True}}
    write_json(Path("params.yaml"), {"runs": ["tiny"], "targets": targets, "runtime": {"device": "cpu"}})
    write_texts(Path("data/sources/tiny/recover.parquet"), [sentence(i) for i in range(20)])
    plan = plan_of(dense, ["mha.0", "mlp.1", "mha.2,mlp.2"], run="tiny", recover=True)
    save_plan(plan, Path("data/plans/t/plan.json"))
    out = Path("data/checkpoints/t/hf")
    hf.save_checkpoint(prune_(load_model(dense, "float32", "cpu"), plan.mask), plan, dense, out, "")
    write_json(out / "verification.json", {"ok": True, "manifest": manifest(out)})
    return plan


def test_stage_trains_saves_and_verifies(project):
    recover.main("t")
    out = Path("data/recovered/t")
    facts, report = (json.loads((out / name).read_text()) for name in ("recover.json", "hf/verification.json"))
    assert facts["enabled"] and facts["samples"] == 8 and len(facts["losses"]) == 2
    assert report["ok"] and not report["blockpruner_imported"]
    assert report["cache_layers"] == 2
    assert "and then trained with LoRA (rank 2) on 8 samples of `someone/texts`" in (out / "hf/README.md").read_text()
    assert metadata_load(out / "hf/README.md")["datasets"] == ["someone/texts"]
    before = Path("data/checkpoints/t/hf")
    names = {path.name for path in before.iterdir()}
    assert {path.name for path in (out / "hf").iterdir()} == names
    for name in ("config.json", "modeling_blockpruned.py", "tokenizer.json"):
        assert (out / "hf" / name).read_bytes() == (before / name).read_bytes()
    models = [AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True) for path in (before, out / "hf")]
    old, new = (model.state_dict() for model in models)
    linear = {f"{name}.weight" for name, module in models[0].named_modules() if isinstance(module, nn.Linear)}
    assert {name for name in old if not torch.equal(old[name], new[name])} == linear - {"lm_head.weight"}


def test_stage_trains_only_what_was_verified(project):
    (Path("data/checkpoints/t/hf") / "tokenizer_config.json").write_text("{}")
    with pytest.raises(InputError, match="hf is not what was verified: tokenizer_config.json changed"):
        recover.main("t")


def test_stage_is_quick_when_off(project):
    save_plan(replace(project, recover=False), Path("data/plans/t/plan.json"))
    code = "import sys; from stages.recover import main; main('t'); assert 'torch' not in sys.modules, 'torch'"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(ROOT)})
    assert [path.name for path in Path("data/recovered/t").iterdir()] == ["recover.json"]
    assert json.loads(Path("data/recovered/t/recover.json").read_text()) == {"enabled": False}
