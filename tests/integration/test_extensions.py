"""A search, a metric, an export, a family and a method that changes weights, all defined in this file alone, go from
a run file to the report."""

import json
import math
from contextlib import ExitStack

import pytest
import torch
import yaml
from transformers import GemmaConfig, GemmaForCausalLM

from blockpruner.checkpoints import verification
from blockpruner.checkpoints.registry import EXPORTS, Export
from blockpruner.core.blocks import DENSE
from blockpruner.core.families import FAMILIES, Family, count_parameters, gated_mlp, optional_bias
from blockpruner.core.options import Options
from blockpruner.methods.registry import KINDS
from blockpruner.methods.weights import Left, weights_kind
from blockpruner.model.models import decoder_layers
from blockpruner.scoring.metrics import METRICS, Metric
from blockpruner.search.iteration import Iteration
from blockpruner.search.registry import SEARCHES, Search
from stages import (
    baseline,
    benchmark,
    calibrate,
    commit,
    compensate,
    fetch,
    materialize,
    report,
    score,
    settings,
    train,
)
from tests.fakes import InProcess
from tests.integration.project import run_of, write_inputs
from tests.tiny import VOCABULARY, tiny_tokenizer


class DepthOptions(Options):
    step: int = 1
    """How many places further the next block is."""


def from_behind(problem, options):
    """Remove what is nearest to the head, whatever it costs, but score it."""
    order = sorted(problem.units, key=lambda unit: -max(block.layer for block in unit))[:: options.step]
    for index in range(len(order)):
        base = [DENSE] if index == 0 else []
        scores = problem.ask([*base, DENSE.union(*order[: index + 1])])
        yield Iteration(index, tuple(scores), (*[None for _ in base], order[index]), len(base))


def surprise(logits, targets, dense):
    """Bits of the right token, [N]."""
    return -logits.double().log_softmax(-1).gather(-1, targets[:, None])[:, 0] / math.log(2)


def shapes(pruning, out):
    out.mkdir(parents=True)
    (out / "shapes.json").write_text(json.dumps({"parameters": pruning.plan.parameters["pruned"]}))


def quiet_(model, plan, rows):
    with torch.no_grad():
        for layer in decoder_layers(model)[plan.details["first"] :]:
            layer.mlp.down_proj.weight.zero_()
    return model


TOYS = (
    (SEARCHES, Search("behind", "from behind", from_behind, DepthOptions)),
    (METRICS, Metric("bits", surprise, title="bits of surprise", rise_title="rise in bits", units_text="bits per token",
                     formula="-log2 p(token)")),
    (EXPORTS, Export("shapes", "a file of shapes", ("nothing",), shapes)),
    (FAMILIES, Family("gemma", "Gemma", optional_bias, gated_mlp, defaults={"tie_word_embeddings": True})),
    (KINDS, weights_kind(
        "quiet", "quiet MLPs", apply_=quiet_, plan=lambda budget, options, job: {"first": 2},
        left=lambda details, config: Left(pruned=count_parameters(config).total),
        words=lambda plan, unit: "quiet MLPs at the top", taken_out=lambda plan: "nothing but sound",
    )),
)  # fmt: skip


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toys")
    torch.manual_seed(3)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.5}
    GemmaForCausalLM(GemmaConfig(**sizes, **heads, max_position_embeddings=128)).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    write_inputs(folder)
    (folder / "runs").mkdir()
    blocks = {"method": "behind", "metric": "bits", "options": {"step": 2}}
    for name, section, export in (("toy", blocks, ["hf", "shapes"]), ("soft", {"method": "quiet"}, ["hf"])):
        run = run_of(folder) | {"score": section, "export": export}
        (folder / "runs" / f"{name}.yaml").write_text(yaml.safe_dump(run))
    targets = {"toy-3": {"run": "toy", "budget": "3blocks"}, "soft-1": {"run": "soft", "budget": "0.1"}}
    params = {"runs": ["toy", "soft"], "targets": targets, "runtime": {"device": "cpu", "threads": 1}}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for registry, row in TOYS:
            stack.enter_context(registry.added(row))
        patch.setattr(verification, "subprocess", InProcess)
        for run in params["runs"]:
            for stage in (settings, fetch, calibrate, score, baseline):
                stage.main(run)
        for target in targets:
            for stage in (commit, compensate, train, materialize, benchmark):
                stage.main(target)
        report.main("")
        yield folder


def test_search_and_metric(project):
    plan = json.loads((project / "data/plans/toy-3/plan.json").read_text())
    assert plan["order"] == ["mha.3", "mha.2", "mha.1"] and plan["metric"] == "bits"
    counts = json.loads((project / "data/timings/toy-search.json").read_text())
    assert counts["trials_computed"] == 4 + 4  # bits, and the perplexity of the same masks


def test_family_and_export(project):
    config = json.loads((project / "data/checkpoints/toy-3/hf/config.json").read_text())
    assert config["model_type"] == "gemma_blockpruned" and config["layers_without_mha"] == [1, 2, 3]
    assert json.loads((project / "data/checkpoints/toy-3/hf/verification.json").read_text())
    found = json.loads((project / "data/checkpoints/toy-3/shapes/shapes.json").read_text())
    assert (
        found["parameters"] == json.loads((project / "data/plans/toy-3/plan.json").read_text())["parameters"]["pruned"]
    )


def test_weights(project):
    """Its checkpoint is plain, and has the zeros."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(project / "data/checkpoints/soft-1/hf")
    assert [bool(layer.mlp.down_proj.weight.any()) for layer in model.model.layers] == [True, True, False, False]


@pytest.mark.parametrize(
    "words",
    ["from behind", "bits of surprise: -log2 p(token)", "quiet MLPs at the top", "nothing but sound", "3 MHA + 0 MLP"],
)
def test_report_uses_the_rows_own_words(project, words):
    assert words in (project / "data/report/report.md").read_text(encoding="utf-8")
