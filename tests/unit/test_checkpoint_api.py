"""The export and the three-line API."""

import json
import math
from contextlib import nullcontext
from email.message import Message
from itertools import combinations
from pathlib import Path
from statistics import mean
from types import ModuleType

import datasets
import pytest
import torch
from accelerate import cpu_offload
from huggingface_hub import metadata_load
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from transformers import AutoModelForCausalLM

import blockpruner
from blockpruner import splits
from blockpruner.checkpoints import card as card_module
from blockpruner.checkpoints import hf, verification, verify_llama_cpp
from blockpruner.checkpoints.hf import export_hf
from blockpruner.checkpoints.registry import require_exports
from blockpruner.cli import exporting
from blockpruner.cli import pruning as pruning_module
from blockpruner.core.blocks import DENSE, all_blocks
from blockpruner.core.errors import InputError
from blockpruner.core.families import count_parameters
from blockpruner.core.progress import SilentObserver
from blockpruner.evaluation.kinds import Loss, best_loss
from blockpruner.healing import choice
from blockpruner.healing.rows import compensation_rows
from blockpruner.healing.settings import Compensate
from blockpruner.inputs.calibration import draw, pack_rows
from blockpruner.inputs.settings import Calibration
from blockpruner.methods.registry import KINDS
from blockpruner.model.models import masked
from blockpruner.search.iteration import Iteration
from blockpruner.store.plans import load_plan, save_plan
from tests.engines import with_mlx
from tests.errors import refused
from tests.fakes import InProcess, PushHub
from tests.plans import fetch, fetch_tiny, plan_of, pruning
from tests.tiny import full_nll, save_tiny, tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]
TEXTS, MANY = (
    [f"{i} little words and {i * i} more of them" for i in range(count)] for count in (12, 60)
)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    (save_tiny(folder / "mine") / "NOTICE.txt").write_text("terms")
    return fetch(folder / "mine", folder / "model", dtype="float32")


def export(dense, plan, out, write=export_hf, dtype="float32"):
    """Write a checkpoint; returns its report."""
    write(pruning(dense, plan, dtype), out)
    return json.loads((out / "verification.json").read_text())


def test_export_is_complete_and_verified(tmp_path, dense):
    plan = plan_of(dense, ["mha.0", "mlp.3", "mlp.0"])
    report = export(dense, plan, tmp_path / "out")
    assert report["ok"]
    assert report["cache_layers"] == 3
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "verification.json",
        "modeling_blockpruned.py",
        "NOTICE.txt",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    card = (tmp_path / "out/README.md").read_text()
    assert "| 3 | mlp.0 |" in card
    assert "license_link: NOTICE.txt" in card
    assert f"{plan.parameters['pruned']:,} of {plan.parameters['dense']:,} parameters" in card
    assert "Python package `blockpruner` 0.1.0, which has no public address yet" in card
    assert "clone" not in card
    assert "\nvllm serve <this directory> " in card and "\n## Limits\n" in card
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert loaded.num_parameters() == plan.parameters["pruned"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_card_names_the_address_of_the_package_that_its_metadata_has(
    tmp_path, dense, monkeypatch
):
    about = Message()
    for key, value in {"Version": "7.8", "Project-URL": "Source, https://example.org/it"}.items():
        about[key] = value
    monkeypatch.setattr(card_module, "metadata", lambda name: about)
    text = card_module.model_card(plan_of(dense, ["mha.0"]), dense, "hf", "modeling_blockpruned.py")
    assert "`blockpruner` 7.8, from https://example.org/it" in text


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(("layer", "said"), [(3, False), (2, True), (0, True)])
def test_a_card_warns_of_engines_that_count_layers(tmp_path, layer, said):
    """Where local and global layers are in another order than before."""
    gemma = fetch_tiny(tmp_path, "gemma3_text")
    export(gemma, plan_of(gemma, [f"mha.{layer}", f"mlp.{layer}"]), tmp_path / "out")
    assert ("count layers instead" in (tmp_path / "out/README.md").read_text()) is said


@pytest.mark.usefixtures("in_process")
def test_whole_layers_are_a_plain_checkpoint(tmp_path, dense):
    plan = plan_of(dense, ["mlp.1", "mha.2"])
    assert export(dense, plan, tmp_path / "out")["class"] == "LlamaForCausalLM"
    assert not list((tmp_path / "out").glob("*.py"))
    card = (tmp_path / "out/README.md").read_text()
    assert "trust_remote_code" not in card
    assert "pip install" not in card
    assert "\nvllm serve <this directory> " in card
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.num_hidden_layers == 3
    assert loaded.num_parameters() == plan.parameters["pruned"]


@pytest.mark.parametrize(
    ("kind", "dtype", "names", "message"),
    [
        ("mask", "float64", ["hf", "gguf"], None),
        (
            "mask",
            "float64",
            ["nas"],
            "export: nas has no model.dtype: float64; set float32 or float16 or bfloat16",
        ),
        (
            "slicegpt",
            "float32",
            ["gguf"],
            "export: gguf cannot hold what SliceGPT .* valid with it: hf",
        ),
        ("mask", "float32", ["onnx"], "export 'onnx' is unknown; valid: hf, nas, mlx, gguf"),
    ],
)
def test_what_a_format_holds_is_known_before_anything_is_computed(kind, dtype, names, message):
    with pytest.raises(InputError, match=message) if message else nullcontext():
        require_exports(names, KINDS[kind], dtype)


@pytest.mark.parametrize("fault", ["renumbering", "weights"])
def test_a_wrong_checkpoint_fails_and_leaves_nothing(tmp_path, dense, monkeypatch, fault):
    save = hf.save_pruned

    def spoil(model, directory):
        if fault == "weights":
            with torch.no_grad():
                model.model.norm.weight.mul_(1.5)
        save(model, directory)
        if fault == "renumbering":
            path = directory / "modeling_blockpruned.py"
            path.write_text(
                path.read_text().replace("layer_idx = number", "layer_idx = number + 1")
            )

    monkeypatch.setattr(hf, "save_pruned", spoil)
    # as if it were installed like that
    monkeypatch.setattr(verification, "has_our_code", lambda directory: True)
    if fault == "renumbering":
        monkeypatch.setattr(verification, "subprocess", InProcess)
    with pytest.raises(InputError, match="does not reproduce the model in memory"):
        export(dense, plan_of(dense, ["mha.0"]), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_engine_that_hangs_is_stopped_and_nothing_is_left(tmp_path, monkeypatch):
    script = ModuleType("hangs")
    script.ENGINE, script.__file__ = "json", str(tmp_path / "hangs.py")
    Path(script.__file__).write_text("import time; time.sleep(60)")
    monkeypatch.setattr(verification, "LIMIT", 0.3)

    def write(directory, reference):
        (directory / "config.json").write_text("{}")
        return 0.1

    with refused("engine-hangs") as caught:
        verification.write_verified(tmp_path / "out", write, script)
    assert "json did not end within" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["hangs.py"]


def test_plan_round_trip(tmp_path):
    plan = plan_of(tiny_model().config.to_dict(), ["mha.1", "mlp.2"])
    save_plan(plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan
    assert (
        plan.ratios[-1]
        == plan.ratio
        == pytest.approx(1 - plan.parameters["pruned"] / plan.parameters["dense"])
    )


@pytest.mark.usefixtures("in_process")
def test_a_model_pruned_in_memory_is_the_masked_one_and_can_be_saved(tmp_path):
    """By the mask of its plan, whose ratio is the nearest to the one that was asked for."""
    model, reference, ratio = tiny_model(), tiny_model(), 0.3
    pruned = blockpruner.prune(
        model, tiny_tokenizer(), TEXTS, ratio, seq_len=32, method="blockpruner"
    )
    assert pruned.plan.method == "greedy"
    assert not pruned.compensation
    counts = count_parameters(reference.config.to_dict())
    assert (
        abs(counts.ratio(pruned.plan.mask) - ratio)
        <= max(counts.blocks.values()) / counts.total / 2
    )
    ids = torch.arange(1, 20)[None]
    with masked(reference, pruned.plan.mask):
        expected = reference(ids).logits
    assert torch.equal(pruned.model(ids).logits, expected)
    assert pruned.save(str(tmp_path / "out")) == {"hf": tmp_path / "out"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert (loaded(ids).logits - expected).abs().max() <= 1e-5


def test_prune_goes_on_from_the_trials_of_a_call_that_was_killed(tmp_path):
    """And never from those of another model."""

    class Killed(SilentObserver):
        def begin(self, phase, overall=None):
            if phase == "removal 2":
                raise KeyboardInterrupt

    def prune(model, **settings):
        counted = []
        forward = model.lm_head.register_forward_hook(lambda *_: counted.append(1))
        try:
            given = {"budget": "2blocks", "seq_len": 32, "method": "greedy"} | settings
            plan = blockpruner.prune(model, tiny_tokenizer(), TEXTS, **given).plan
        finally:
            forward.remove()
        return plan, len(counted)

    complete, passes = prune(tiny_model(), cache=tmp_path / "other")
    with pytest.raises(KeyboardInterrupt):
        prune(tiny_model(), cache=tmp_path, observer=Killed())
    resumed, rest = prune(tiny_model(), cache=tmp_path)
    assert resumed == complete
    assert 0 < rest < passes
    assert prune(tiny_model(), cache=tmp_path) == (complete, 0)
    other = tiny_model()
    other.model.norm.weight.mul_(1.5)
    assert prune(other, cache=tmp_path)[1] == passes


def test_a_compensated_model_has_the_perplexity_that_it_reports():
    """On a block where it happens to help a random model."""
    settings = {
        "seq_len": 16,
        "method": "given",
        "options": {"order": ["mlp.0"]},
        "compensate": "refit",
    }
    settings |= {"only_texts": True}
    pruned = blockpruner.prune(tiny_model(), tiny_tokenizer(), TEXTS, budget="1blocks", **settings)
    _, tuning = compensation_rows(TEXTS, tiny_tokenizer(), Compensate(), (), 128)
    perplexity = pruned.compensation["perplexity"]
    assert perplexity["after"] < perplexity["before"]
    nll = mean(full_nll(pruned.model, row) for row in tuning.rows)
    assert math.exp(nll) == pytest.approx(perplexity["after"])


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("train", ["lora", "all"])
def test_a_trained_model_is_nearer_to_the_dense_one(tmp_path, monkeypatch, train):
    """On rows that training did not see, and so it is saved."""
    tokenizer = tiny_tokenizer()
    settings = {
        "seq_len": 16,
        "method": "given",
        "options": {"order": ["mlp.0"]},
        "compensate": "refit",
    }
    settings |= {"train": train, "cache": tmp_path / "cache"}
    calibrate, result = splits.calibrate, []
    monkeypatch.setattr(
        splits,
        "calibrate",
        lambda *args, **extra: result.append(calibrate(*args, **extra)) or result[-1],
    )
    pruned = blockpruner.prune(
        tiny_model(dtype=torch.float32), tokenizer, MANY, "1blocks", **settings
    )
    reported = pruned.healed.perplexity
    assert set(reported) == {"refit", "training"}
    assert reported["training"]["after"] < reported["training"]["before"]
    validation = result[0].validation.rows
    for model, name in ((pruned.model, "after"), (tiny_model(dtype=torch.float32), "dense")):
        nll = mean(full_nll(model, row) for row in validation)
        assert math.exp(nll) == pytest.approx(reported["training"][name], rel=1e-4)
    assert pruned.plan.train
    assert not [path for path in (tmp_path / "cache/training").iterdir() if path.is_dir()]
    pruned.save(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    ids = torch.arange(1, 20)[None]
    assert torch.equal(loaded(ids).logits, pruned.model(ids).logits)
    card = (tmp_path / "out/README.md").read_text()
    assert "compensated without training (refit" in card
    assert "held out from training |" in card


def test_proposals_far_behind_after_a_quarter_of_the_rows_are_not_fitted_to_all(monkeypatch):
    asked, fit_to = [], choice.compensate

    def compensate(dense, plans, fit, tuning, observer, is_final):
        asked.append((set(plans), len(fit.rows)))
        return fit_to(dense, plans, fit, tuning, observer, is_final)

    monkeypatch.setattr(choice, "compensate", lambda *args, is_final: compensate(*args, is_final))
    monkeypatch.setattr(choice, "MIN_ROWS", 2)
    names = {"narrow", "layers"}
    for behind in (1.0, math.inf):
        monkeypatch.setattr(choice, "KEEP_WITHIN", behind)
        facts = blockpruner.prune(
            tiny_model(), tiny_tokenizer(), MANY, 0.3, seq_len=16
        ).compensation
        heat = {name: item["worst"] for name, item in facts["heat"].items()}
        remaining = names if behind == math.inf else {min(heat, key=heat.get)}
        assert heat.keys() == names
        assert facts["judged"].keys() == remaining
        (some, few), (rest, rows) = asked[-2:]
        assert (some, rest) == (names, remaining)
        assert few == -(-rows // 4) < rows


def test_of_the_searches_that_can_meet_a_budget_one_is_kept():
    def kept(budget, **args):
        return blockpruner.prune(tiny_model(), tiny_tokenizer(), MANY, budget, seq_len=16, **args)

    best = kept(0.3)
    judged, steps = (
        best.compensation["heat"] | best.compensation["judged"],
        {"layers": 2, "narrow": 0},
    )
    losses = {name: Loss({"": item["worst"]}) for name, item in best.compensation["judged"].items()}
    assert judged.keys() == steps.keys()
    assert len(best.plan.order) == steps[best_loss(losses)]
    for few in (kept(0.05), kept(0.25)):  # no layers come near those
        assert (few.compensation["heat"] | few.compensation["judged"]).keys() == {"narrow"}
    for alone in (kept(0.1, candidates="mha"), kept("2layers")):
        assert alone.plan.method == "floating"
        assert alone.compensation["judged"].keys() == {"floating"}


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"budget": 22.0}, ""),
        ({"budget": "1.2x"}, ""),
        ({"budget": None}, ""),
        ({"budget": [0.1]}, ""),
        ({"batch_tokens": 0}, "settings"),
        ({"method": "laco"}, "method-of-weights"),
        ({"metric": lambda logits, targets, dense: 0, "cache": "kept"}, "cache-of-function"),
        ({"texts": "one string"}, "texts-one-string"),
        ({"texts": TEXTS[:1], "only_texts": True}, "too-few-rows"),
        ({"max_loss": 0.1}, "too-much-lost"),
        ({"train": "some"}, "unknown-training"),
        ({"unit": "block"}, "unit-of-recipe"),
    ],
)
def test_prune_refuses_what_it_cannot(changes, rule):
    with refused(rule):
        blockpruner.prune(
            tiny_model(),
            tiny_tokenizer(),
            **{"texts": TEXTS, "budget": 0.2, "seq_len": 32} | changes,
        )


def test_a_model_stays_in_its_mode_and_an_export_of_it_is_verified(tmp_path, monkeypatch):
    monkeypatch.setattr(verification, "subprocess", InProcess)
    given = {"texts": TEXTS, "seq_len": 32, "method": "greedy", "observer": SilentObserver()}
    model, fresh = (
        tiny_model(dtype=torch.float32, attention_dropout=0.5),
        tiny_model(dtype=torch.float32),
    )
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    with pytest.raises(InputError, match="cannot be reached"):
        blockpruner.prune(model, tiny_tokenizer(), budget="999blocks", **given)
    assert [module.training for module in model.modules()] == modes
    pruned = blockpruner.prune(model, tiny_tokenizer(), budget="1blocks", **given)
    assert (
        pruned.plan.removed
        == blockpruner.prune(fresh, tiny_tokenizer(), budget="1blocks", **given).plan.removed
    )
    assert model.training
    assert not model.model.layers[0].training
    blockpruner.evaluate(model, tiny_tokenizer(), TEXTS, seq_len=32)
    assert model.training
    assert not model.model.layers[0].training
    pruned.save(tmp_path / "out")


def slower(model):
    model.model.rotary_emb.inv_freq.mul_(0.1)


def sharper(model):
    model.model.layers[0].self_attn.scaling = 0.9


@pytest.mark.parametrize("change", [slower, sharper])
def test_a_model_that_computes_otherwise_has_no_scores_of_another(tmp_path, change):
    """What differs is neither in its config nor in its weights."""

    def perplexity(**extra):
        model = tiny_model()
        if extra.pop("changed"):
            change(model)
        given = {
            "texts": TEXTS,
            "seq_len": 32,
            "method": "greedy",
            "observer": SilentObserver(),
        } | extra
        return blockpruner.prune(
            model, tiny_tokenizer(), budget="1blocks", **given
        ).plan.calibration["dense_perplexity"]

    plain = perplexity(changed=False, cache=tmp_path)
    assert perplexity(changed=True, cache=tmp_path) == perplexity(changed=True) != plain


def best_pair(problem, options):
    """The best of all pairs, by the search of a user: a plain function."""
    pairs = [first | second for first, second in combinations(problem.units, 2)]
    scores = tuple(problem.ask([DENSE, *pairs]))
    yield Iteration(
        0, scores, (None,) * len(scores), min(range(1, len(scores)), key=lambda i: scores[i].loss)
    )


def quantized(model):
    """As bitsandbytes marks it."""
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    return model


def adapted(model):
    return get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))


def with_adapter(model):
    return inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), model)


def offloaded(model):
    return cpu_offload(model)


def mixed(model):
    model.model.layers[1].mlp.to(torch.bfloat16)
    return model


@pytest.mark.parametrize(
    ("changed", "rule", "fix"),
    [
        (quantized, "quantized-model", "in bfloat16"),
        (adapted, "adapted-model", "merge_and_unload"),
        (with_adapter, "adapted-model", "merge_and_unload"),
        (offloaded, "offloaded-model", "device_map"),
        (mixed, "several-dtypes", "model.to(torch.bfloat16)"),
    ],
)
def test_a_model_that_is_not_plain_is_refused_with_the_fix(changed, rule, fix, monkeypatch):
    monkeypatch.setattr(splits, "calibrate", None)  # before anything is computed
    with refused(rule) as caught:
        blockpruner.prune(
            changed(tiny_model(dtype=torch.float32)), tiny_tokenizer(), TEXTS, "1blocks", seq_len=32
        )
    assert fix in str(caught.value)


def test_mps_is_refused_with_the_fix(monkeypatch):
    """MPS has no float64, in which losses are added."""
    model = tiny_model()
    monkeypatch.setattr(type(model), "device", torch.device("mps"))
    for call, extra in ((blockpruner.prune, ("1blocks",)), (blockpruner.evaluate, ())):
        with refused("mps-model") as caught:
            call(model, tiny_tokenizer(), TEXTS, *extra, seq_len=32)
        assert 'model.to("cpu")' in str(caught.value)


def test_a_model_spread_over_the_cpu_by_accelerate_is_pruned(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path / "tiny"), device_map="cpu")
    assert blockpruner.prune(
        model, tiny_tokenizer(), TEXTS, "1blocks", seq_len=32, method="greedy"
    ).plan.removed


def test_a_function_may_search_and_progress_shows_by_itself(capsys):
    reference = tiny_model()
    pruned = blockpruner.prune(
        tiny_model(),
        tiny_tokenizer(),
        TEXTS,
        "2blocks",
        seq_len=32,
        method=best_pair,
        only_texts=True,
    )
    assert "best so far" in capsys.readouterr().err
    rows = pack_rows(
        draw(TEXTS, None, "all", Calibration().seed), tiny_tokenizer(), 32, "joined"
    ).rows

    def loss(pair):
        with masked(reference, frozenset(pair)):
            return sum(full_nll(reference, row) for row in rows)

    assert pruned.plan.mask == frozenset(min(combinations(all_blocks(4), 2), key=loss))
    assert pruned.plan.method == "best_pair"


def test_texts_may_be_a_data_set():
    table = datasets.Dataset.from_dict({"text": TEXTS})
    given = {"seq_len": 32, "packing": "joined"}
    listed = blockpruner.evaluate(tiny_model(), tiny_tokenizer(), TEXTS, **given)
    assert blockpruner.evaluate(tiny_model(), tiny_tokenizer(), table, **given) == listed
    for texts, rule in (
        (datasets.DatasetDict(train=table), "texts-of-splits"),
        ("text", "texts-one-string"),
    ):
        with refused(rule):
            blockpruner.evaluate(tiny_model(), tiny_tokenizer(), texts)


def test_evaluate_is_the_perplexity_of_joined_rows():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    ids = tokenizer("\n\n".join(TEXTS)).input_ids
    rows = [ids[i : i + 32] for i in range(0, 96, 32)]
    dense = blockpruner.evaluate(model, tokenizer, TEXTS, seq_len=32, max_rows=3, packing="joined")
    assert dense.perplexity == pytest.approx(math.exp(mean(full_nll(model, row) for row in rows)))
    pruned = blockpruner.prune(model, tokenizer, TEXTS, "2blocks", seq_len=32, method="greedy")
    result = pruned.evaluate(TEXTS, seq_len=32, max_rows=3, packing="joined")
    assert result.row_nll == pytest.approx([full_nll(pruned.model, row) for row in rows])
    assert result != dense


@pytest.fixture
def compensated(tmp_path):
    """Pruned and compensated in memory, from a folder with a licence."""
    folder = save_tiny(tmp_path / "mine")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    model = AutoModelForCausalLM.from_pretrained(folder)
    settings = {
        "seq_len": 16,
        "method": "given",
        "options": {"order": ["mlp.0"]},
        "compensate": "refit",
    }
    settings |= {"only_texts": True}
    pruned = blockpruner.prune(model, tiny_tokenizer(), MANY, "1blocks", **settings)
    assert pruned.compensation["share"]
    return pruned


@with_mlx
@pytest.mark.usefixtures("in_process")
def test_formats_are_written_of_a_model_in_memory_and_verified(tmp_path, compensated, monkeypatch):
    before = {name: tensor.clone() for name, tensor in compensated.model.state_dict().items()}
    places = compensated.save_pretrained(tmp_path / "out", ["hf", "nas"])
    assert places == {"hf": tmp_path / "out", "nas": tmp_path / "out-nas"}
    for place in places.values():
        assert json.loads((place / "verification.json").read_text())["ok"]
    for name, tensor in compensated.model.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert tensor.dtype is torch.float32
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    ids = torch.arange(1, 20)[None]
    assert torch.equal(loaded(ids).logits, compensated.model(ids).logits)
    card, plan = (
        (tmp_path / "out/README.md").read_text(),
        load_plan(tmp_path / "out/blockpruner_plan.json"),
    )
    assert (
        "license: mit" in card
        and "compensated without training (refit" in card
        and "# out\n" in card
    )
    assert (plan.compensate, plan.removed) == ("refit", ("mlp.0",))
    held_out = compensated.compensation["perplexity"]
    columns = " | ".join(f"{held_out[name]:.3f}" for name in ("dense", "before", "after"))
    assert f"| rows held out from refit | {columns} |" in card
    ((result,),) = (
        item["results"] for item in metadata_load(tmp_path / "out/README.md")["model-index"]
    )
    assert result["metrics"] == [{"type": "perplexity", "value": held_out["after"]}]
    assert "mlx_lm.server --model <this directory>" in (tmp_path / "out-nas/README.md").read_text()
    monkeypatch.setattr(verify_llama_cpp, "ENGINE", "no_such_engine")
    (place,) = compensated.save_pretrained(tmp_path / "more", ["gguf"]).values()
    assert (place / "model-F16.gguf").exists(), "though the model's weights require gradients"


@pytest.mark.usefixtures("in_process")
def test_a_card_gives_no_number_of_weights_that_were_changed_since(tmp_path, compensated):
    """As by training of the user's own; other formats that are made of the checkpoint later say the
    same."""
    numbers = [
        compensated.plan.calibration["perplexity"],
        *compensated.compensation["perplexity"].values(),
    ]
    with torch.no_grad():
        compensated.model.model.norm.weight.mul_(1.5)
    compensated.save(tmp_path / "out")
    place = pruning_module.Command(tmp_path / "cache", "cpu", SilentObserver(), "nas")
    exporting.export(tmp_path / "out", place)
    plan = load_plan(tmp_path / "out/blockpruner_plan.json")
    assert plan.calibration["perplexity"] is None
    assert plan.kinds is None
    assert plan.removed == ("mlp.0",)
    for folder in ("out", "out-nas"):
        card = (tmp_path / folder / "README.md").read_text()
        assert "compensated without training (refit" in card
        assert "then changed, after which nothing was measured" in card
        assert not [number for number in numbers if f"{number:.3f}" in card]
        assert "model-index" not in card
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert torch.equal(again.model.norm.weight, compensated.model.model.norm.weight)


def files_in(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_folder_of_the_users_is_left_as_it_is(tmp_path, compensated):
    """Before anything is written at another place."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work/train.py").write_text("a day of work")
    (tmp_path / "work/config.json").write_text('{"auto_map": {"AutoConfig": "train.Config"}}')
    before = files_in(tmp_path)
    with refused("place-not-empty") as caught:
        compensated.save_pretrained(tmp_path / "work", ["nas", "hf"])
    assert "work is not empty" in str(caught.value)
    assert files_in(tmp_path) == before


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("name", ["out/notes", "out"])
def test_what_comes_while_an_export_runs_is_left_as_it_is(tmp_path, compensated, monkeypatch, name):
    def meanwhile(*_):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
        return ""

    monkeypatch.setattr(hf, "remark", meanwhile)
    before = files_in(tmp_path)
    with refused("place-not-empty"):
        compensated.save(tmp_path / "out")
    assert files_in(tmp_path) == before | {name: b"mine"}


@pytest.mark.usefixtures("in_process")
def test_what_is_pushed_is_private_verified_and_licensed(compensated, monkeypatch):
    hub = PushHub(monkeypatch)
    assert compensated.push_to_hub("me/small") == "https://hub.invalid/me/small/commit/1"
    (_, card), (_, repo, made), (_, _, files, _) = hub.calls
    assert repo == "me/small"
    assert made["private"] is True
    assert card["license"] == "mit"
    assert {"model.safetensors", "verification.json", "blockpruner_plan.json"} <= {
        file.path_in_repo for file in files
    }
