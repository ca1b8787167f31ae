"""Healed weights: what an export holds of them, against that of a dense model that had them
before."""

import json
from dataclasses import replace

import pytest
import torch
from huggingface_hub import metadata_load
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from blockpruner.checkpoints import nas, verification
from blockpruner.checkpoints.card import model_card
from blockpruner.checkpoints.registry import EXPORTS
from blockpruner.core.errors import InputError
from blockpruner.methods.apply import pruned_copy
from blockpruner.methods.healed import (
    Healed,
    changed_weights,
    find_healed,
    load_healed_,
    parameter_digests,
    save_healed,
    set_weights_,
)
from blockpruner.model.models import load_model, prune_
from tests.errors import refused
from tests.fakes import InProcess
from tests.plans import SOMEONE, fetch_tiny, healed_of, plan_of, pruning, with_weights
from tests.tiny import tiny_model

HOLES, WHOLE = ["mha.0", "mlp.1", "mha.2,mlp.2"], ["mlp.1", "mha.2"]
DOWN, OUT = "model.layers.{}.mlp.down_proj.weight", "model.layers.{}.self_attn.o_proj.weight"
ROWS = tuple(tuple((7 * r + 3 * k) % 250 + 1 for k in range(16)) for r in range(8))


@pytest.fixture(autouse=True)
def verified_here(monkeypatch):
    monkeypatch.setattr(verification, "subprocess", InProcess)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return fetch_tiny(tmp_path_factory.mktemp("dense"), tie_word_embeddings=True)


def other(model, *names):
    """New weights in the place of some of a checkpoint."""
    tensors = load_file(model / "model.safetensors")
    return {name: tensors[name].flip(0) * 1.5 for name in names}


def export(form, model, plan, out, **options):
    EXPORTS[form].write(pruning(model, plan, **options), out)
    return load_file(out / "model.safetensors"), json.loads((out / "verification.json").read_text())


@pytest.mark.parametrize("form", ["hf", "nas"])
@pytest.mark.parametrize(
    ("order", "places"),
    [
        (HOLES, {OUT.format(2): OUT.format(3), DOWN.format(0): DOWN.format(0)}),
        (WHOLE, {DOWN.format(1): DOWN.format(2)}),
    ],
)
def test_an_export_equals_that_of_a_dense_model_with_these_weights(
    tmp_path, dense, monkeypatch, form, order, places
):
    """By name in the pruned model, the name in the dense one; the embedding is also the head."""
    monkeypatch.setattr(nas.verify_mlx, "ENGINE", "no_such_engine")
    plan, places = (
        plan_of(dense, order),
        places | {"model.embed_tokens.weight": "model.embed_tokens.weight"},
    )
    weights = other(dense, *places.values())
    expected, _ = export(
        form, with_weights(dense, tmp_path / "dense", weights), plan, tmp_path / "expected"
    )
    healed = healed_of(
        dense, plan, tmp_path / "healed", {own: weights[name] for own, name in places.items()}
    )
    result, report = export(form, dense, plan, tmp_path / "out", healed=healed)
    assert report["ok"] or form == "nas"
    assert result.keys() == expected.keys()
    assert all(torch.equal(result[name], expected[name]) for name in expected)
    card = tmp_path / "out/README.md"
    assert "workflow and healed by hand" in card.read_text()
    assert metadata_load(card)["datasets"] == ["someone/texts"]


@pytest.mark.parametrize(
    ("kind", "details", "gone"),
    [
        ("laco", {"merges": [[1, 1]], "variant": "paper"}, 1),
        ("slicegpt", {"width": 24, "hidden": 32}, 0),
    ],
)
def test_models_with_other_weights_are_healed_too(tmp_path, dense, kind, details, gone):
    """The new weights are of the made model: the dense one has no such tensors."""
    plan = plan_of(
        dense,
        ["mha.2,mlp.2"],
        kind=kind,
        method=kind,
        details=details,
        blocks={"mha": gone, "mlp": gone},
    )
    made = pruned_copy(load_model(dense, "float32", "cpu"), plan, ROWS)
    before, name = (
        parameter_digests(made),
        next(name for name in dict(made.named_parameters()) if "down_proj" in name),
    )
    weight = torch.randn(
        dict(made.named_parameters())[name].shape, generator=torch.Generator().manual_seed(0)
    )
    set_weights_(made, {name: weight})
    changed = changed_weights(made, before, plan)
    assert set(changed) == ({name} if kind == "laco" else set(before))
    result, report = export(
        "hf",
        dense,
        plan,
        tmp_path / "out",
        healed=healed_of(dense, plan, tmp_path / "healed", changed),
        rows=ROWS,
    )
    assert report["ok"]
    assert torch.equal(result[name], weight)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    ids = torch.tensor(ROWS)
    assert torch.equal(loaded(ids).logits, made(ids).logits)


def test_only_what_changed_is_kept_and_a_tied_weight_once(tmp_path):
    model = prune_(
        tiny_model(dtype=torch.float32, tie_word_embeddings=True),
        plan_of(tiny_model().config.to_dict(), HOLES).mask,
    )
    before = parameter_digests(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
        model.get_parameter(DOWN.format(0)).add_(0)
        model.get_parameter(OUT.format(1)).add_(1)
    plan = plan_of(tiny_model().config.to_dict(), HOLES)
    assert set(changed_weights(model, before, plan)) == {"model.embed_tokens.weight", OUT.format(1)}


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (
            DOWN.format(3),
            (32, 48),
            r"down_proj.weight is \[32, 48\] here and absent in the pruned model",
        ),
        (OUT.format(2), (32, 16), r"o_proj.weight is \[32, 16\] here and \[32, 32\] in the pruned"),
        (DOWN.format(1), (32, 64), r"absent"),  # the layer has no MLP
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, dense, name, shape, message):
    plan = plan_of(dense, HOLES)
    healed = healed_of(dense, plan, tmp_path, {name: torch.zeros(shape)})
    with pytest.raises(
        InputError, match=f"{tmp_path}/weights.safetensors does not fit: model.layers.*{message}"
    ):
        pruning(dense, plan, healed=healed).prune_(load_model(dense, "float32", "cpu"))


def test_a_file_of_another_plan_or_model_is_refused(tmp_path, dense):
    plan = plan_of(dense, WHOLE)
    own = pruning(dense, plan).identity
    save_healed(tmp_path / "a", {DOWN.format(1): torch.zeros(32, 64)}, own, "", SOMEONE)
    assert find_healed([tmp_path / "none", tmp_path / "a"], own).of == own
    assert find_healed([tmp_path / "none"], own) is None
    sliced = replace(plan, kind="slicegpt", details={"width": 24})
    others = {
        pruning(
            dense, plan_of(dense, ["mlp.1", "mha.3"])
        ).identity,  # has tensors of the same shapes
        pruning(fetch_tiny(tmp_path), plan).identity,
        pruning(dense, plan, "bfloat16").identity,
        pruning(dense, sliced).identity,
        pruning(dense, sliced, rows=ROWS).identity,
    }
    assert len(others) == 5
    for of in others:
        with pytest.raises(
            InputError, match="a/weights.safetensors belongs to another model, plan or calibration"
        ):
            find_healed([tmp_path / "a"], of)


@pytest.mark.parametrize("fault", ["a bit flipped", "truncated", "not safetensors"])
def test_a_damaged_file_is_refused(tmp_path, dense, fault):
    plan = plan_of(dense, WHOLE)
    healed = healed_of(dense, plan, tmp_path, {DOWN.format(1): torch.ones(32, 64)})
    content = bytearray(healed.path.read_bytes())
    content[-9] ^= 1
    healed.path.write_bytes(
        {"a bit flipped": content, "truncated": content[:-40], "not safetensors": b"{}"}[fault]
    )
    with refused("damaged-file") as caught:
        load_healed_(tiny_model(), healed.path)
    assert "dvc" not in str(caught.value)
    assert caught.value.value == str(healed.path)


def test_the_one_result_of_a_card_is_of_the_last_healing(tmp_path):
    dense = fetch_tiny(tmp_path / "dense")
    reported = {"refit": {"before": 9.0, "after": 7.0}, "training": {"before": 7.0, "after": 6.0}}
    healed = Healed(tmp_path, "", "compensated, then trained", (), "", reported)
    (tmp_path / "README.md").write_text(
        model_card(plan_of(dense, ["mha.1"]), dense, "hf", healed=healed)
    )
    ((result,),) = (
        item["results"] for item in metadata_load(tmp_path / "README.md")["model-index"]
    )
    assert result["dataset"]["name"].endswith("training")
    assert result["metrics"][0]["value"] == 6.0
