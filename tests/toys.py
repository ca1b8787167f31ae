"""A search, a metric, an export, a family and a method that changes weights, as a package of others
would add them."""

import json
import math

import torch

from blockpruner.checkpoints.registry import Export
from blockpruner.core.blocks import DENSE
from blockpruner.core.families import Family, count_parameters, gated_mlp, optional_bias
from blockpruner.core.options import Options
from blockpruner.methods.weights import Left, weights_kind
from blockpruner.model.models import decoder_layers
from blockpruner.scoring.metrics import Metric
from blockpruner.search.iteration import Iteration
from blockpruner.search.registry import Search


class DepthOptions(Options):
    step: int = 1
    """How many places further the next block is."""


def from_behind(problem, options):
    """Remove what is nearest to the head, whatever it costs, but score it."""
    order = sorted(problem.units, key=lambda unit: -max(block.layer for block in unit))[
        :: options.step
    ]
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


ROWS = (
    Search("behind", "from behind", from_behind, DepthOptions),
    Metric("bits", surprise, title="bits of surprise", formula="-log2 p(token)"),
    Export("shapes", "a file of shapes", ("nothing",), shapes),
    Family("gemma", "Gemma", optional_bias, gated_mlp, defaults={"tie_word_embeddings": True}),
    weights_kind(
        "quiet",
        "quiet MLPs",
        apply_=quiet_,
        plan=lambda options, job: lambda budget: {"first": 2},
        left=lambda details, config: Left(pruned=count_parameters(config).total),
        words=lambda plan, unit: "quiet MLPs at the top",
        taken_out=lambda plan: "nothing but sound",
    ),
)
