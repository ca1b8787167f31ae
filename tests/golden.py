"""Golden numbers: every kind of result on tiny models, as the stages write it.

tests/golden/<CONSTANT>.json holds the numbers that a constant of blockpruner/versions.py covers,
with the versions that they were made with; tests/test_golden.py compares. `python -m tests.golden
--write` renews the files. It refuses a number that moved while the versions that cover it did not,
unless the entry is taken out of its file by hand first.

Weights are multiples of 2^-10, so that checkpoints have the same numbers on every machine.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import random
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from safetensors.torch import load_file, save_file

from blockpruner import versions
from blockpruner.config import dag
from blockpruner.core.blocks import DENSE, Mask, format_mask
from blockpruner.core.budgets import resources_of
from blockpruner.inputs import texts
from blockpruner.store.files import read_json, write_sealed_json
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
from tests.builders import FakeScorer, searched, short_rows, small_config
from tests.fakes import made_up_times, unverified
from tests.integration.project import sentence
from tests.shipped import replace_shipped
from tests.tiny import VARIANTS_DAILY, tiny_model, tiny_tokenizer, tolerance

FOLDER = Path(__file__).with_suffix("")
TEXTS = {"source": "path", "path": "inputs/texts.parquet", "format": "text"}
MIX = {"source": "mix", "of": [TEXTS, TEXTS | {"kind": "twice", "share": 2}]}
CALIBRATION = {
    "data": TEXTS,
    "num_samples": 10,
    "seq_len": 24,
    "packing": "joined",
    "split": "all",
    "seed": 42,
}
TIMED = {"prompt_tokens": 4, "new_tokens": 2, "repeats": 1, "batch": 1}
KINDS = ("piqa", "mmlu_marketing", "lambada_openai", "gsm8k")
"""Benchmarks of every kind: choices, letters, a word, an answer that is generated."""

ITEMS: dict[str, list[dict[str, Any]]] = {
    "piqa_validation": [
        {
            "goal": "Dry a wet book.",
            "sol1": "Press it between towels.",
            "sol2": "Put it in the bath.",
            "label": 0,
        },
        {
            "goal": "Open a jar",
            "sol1": "Hit it with a feather",
            "sol2": "Run hot water over its lid",
            "label": 1,
        },
        {"goal": "Cool tea:", "sol1": "wait", "sol2": "boil it", "label": 0},
        {"goal": "Find north", "sol1": "look at a shoe", "sol2": "look at a compass", "label": 1},
    ],
    "mmlu_marketing_test": [
        {
            "question": "A brand is",
            "subject": "",
            "choices": ["a name", "a price", "a shop", "a tax"],
            "answer": 0,
        },
        {
            "question": "Price is",
            "subject": "",
            "choices": ["an A", "a P", "a C", "a K"],
            "answer": 1,
        },
    ],
    "lambada_openai_test": [{"text": "The cat sat on the mat"}, {"text": "Up and down"}],
    "gsm8k_test": [
        {"question": "What is 40 + 2?", "answer": "40 + 2 = <<40+2=42>>42\n#### 42"},
        {"question": "How many are 6 twos?", "answer": "6 * 2 = 12\n#### 12"},
    ],
}
"""By the name of their file."""

EVALUATE = {
    "perplexity": {
        "data": {"source": "path", "path": "inputs/heldout.txt"},
        "seq_len": 64,
        "max_rows": 2,
    },
    "zero_shot": {"data": {"source": "path", "path": "inputs"}, "tasks": [*KINDS], "limit": 2},
    "speed": TIMED,
}
CHAIN = (
    "FETCH_VERSION",
    "CALIBRATION_VERSION",
    "SCORE_VERSION",
    "SEARCH_VERSION",
    "PLAN_VERSION",
    "WEIGHTS_VERSION",
    "EXPORT_VERSION",
    "EVAL_VERSION",
    "REPORT_VERSION",
)
"""The constants, in the order in which results are made of each other."""


@dataclass(frozen=True)
class Entry:
    """A few numbers of one kind of result."""

    measure: Callable[[World], Any]
    tolerance: float = 1e-8
    """How far a number may be from the golden one, relative to it."""


class World:
    """A folder laid out as the project, in which stages run in this process."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "inputs").mkdir()
        (root / "runs").mkdir()
        pq.write_table(
            pa.table({"text": [sentence(i) for i in range(60)]}), root / "inputs/texts.parquet"
        )
        (root / "inputs/heldout.txt").write_text("\n\n".join(sentence(i) for i in range(60)))
        for file, items in ITEMS.items():
            pq.write_table(pa.Table.from_pylist(items), root / f"inputs/{file}.parquet")
        replace_shipped(root / "inputs/shipped")
        # not of the running Python
        texts.pieces_of_library = lambda: [sentence(i) for i in range(60, 120)]

    def model(self, variant: str, **config: Any) -> Path:
        """A checkpoint of a tiny model, in float64."""
        folder = self.root / "inputs" / "-".join([variant.replace(" ", "-"), *config])
        if not folder.exists():
            model = tiny_model(variant, max_position_embeddings=512, **config)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.copy_((parameter * 1024).round() / 1024)
            model.save_pretrained(folder)
            tiny_tokenizer().save_pretrained(folder)
        return folder

    def start(
        self,
        name: str,
        variant: str = "llama",
        budgets: Sequence[str] = ("2blocks",),
        dtype: str = "float64",
        **own: Any,
    ) -> None:
        """Write a run file and params.yaml, then fetch and calibrate. Targets: <name>-t0,
        <name>-t1, ..., by budget."""
        sections = {
            "model": {
                "source": "path",
                "path": str(self.model(variant).relative_to(self.root)),
                "dtype": dtype,
            },
            "calibration": CALIBRATION,
            "score": {},
            "evaluate": EVALUATE,
            "train": None,
        } | own
        sections["score"] = {"method": "greedy"} | sections["score"]
        (self.root / "runs" / f"{name}.yaml").write_text(yaml.safe_dump(sections))
        targets = {
            f"{name}-t{i}": {"run": name, "budget": budget, "train": bool(sections["train"])}
            for i, budget in enumerate(budgets)
        }
        params = {
            "runs": [name],
            "targets": targets,
            "runtime": {"device": "cpu", "threads": 1},
            "report": {"title": "Golden", "plots": False},
        }
        (self.root / "params.yaml").write_text(yaml.safe_dump(params))
        dag.write()
        settings.main(name)
        fetch.main(name)
        calibrate.main(name)

    def scored(self, name: str, section: Mapping[str, Any]) -> Path:
        """Score a run that was started by another section; the folder of its search."""
        path = self.root / "runs" / f"{name}.yaml"
        section = {"method": "greedy"} | dict(section)
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"score": section}))
        dag.write()
        settings.main(name)
        with made_up_times():
            score.main(f"{name}-{section['method']}")
        folder = Path("data/scores") / name / section["method"] / section["method"]
        return folder / read_json(folder / "current.json")["search"]

    def built(
        self, name: str, budgets: Sequence[str] = ("2blocks",), until: Any = materialize, **own: Any
    ) -> None:
        """Start, score, and make every target up to a stage."""
        self.start(name, budgets=budgets, **own)
        score.main(f"{name}-{own.get('score', {}).get('method', 'greedy')}")
        for target in (f"{name}-t{i}" for i in range(len(budgets))):
            for stage in (commit, compensate, train, materialize, benchmark):
                with unverified():
                    stage.main(target)
                if stage is until:
                    break

    @cached_property
    def evaluated(self) -> str:
        """The run whose two targets are built and evaluated."""
        self.built("evaluated", ("2blocks", "4blocks"), benchmark)
        baseline.main("evaluated")
        return "evaluated"


# Numbers of what stages write


def traces(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Iteration tables under a folder, by their path."""
    paths = sorted(folder.rglob("iteration_*.parquet"))
    return {str(path.relative_to(folder)): pq.read_table(path).to_pylist() for path in paths}


def cells(path: Path) -> list[list[float | str]]:
    """A CSV file, numbers as numbers."""

    def number(cell: str) -> float | str:
        try:
            return float(cell)
        except ValueError:
            return cell

    return [[number(cell) for cell in line] for line in csv.reader(path.read_text().splitlines())]


def mark(values: torch.Tensor) -> float:
    """A number that changes with every value and with their order: sum_i v_i cos(i)."""
    flat = values.flatten().double()
    return (flat * torch.arange(1, len(flat) + 1, dtype=torch.float64).cos()).sum().item()


def weights_of(folder: Path) -> dict[str, Any]:
    """Dtype, shape and mark of every tensor."""
    found = {
        k: w for path in sorted(folder.glob("*.safetensors")) for k, w in load_file(path).items()
    }
    return {
        k: [str(w.dtype).removeprefix("torch."), *w.shape, mark(w)]
        for k, w in sorted(found.items())
    }


def norms_of(file: Path) -> dict[str, float]:
    return {name: weight.double().norm().item() for name, weight in sorted(load_file(file).items())}


# One function for each kind of result


def fetched(world: World) -> Any:
    """Every format of texts, and the items of a benchmark."""
    documents = '<doc id="1">\nA house .\n\nIt is red .\n</doc>\n<doc id="2">\nA tree .\n</doc>\n'
    records = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Hi", "input": "", "output": "Yo"},
    ]
    inputs = world.root / "inputs"
    (inputs / "alpaca.json").write_text(json.dumps(records))
    (inputs / "lines.jsonl").write_text(
        "\n".join(json.dumps({"text": sentence(i)}) for i in range(5))
    )
    (inputs / "wiki.utf8").write_text(documents)
    (inputs / "plain.txt").write_text("One text.\n\nStill the same one.")
    forms = {
        "alpaca.json": "alpaca",
        "lines.jsonl": "text",
        "wiki.utf8": "wikipedia",
        "plain.txt": "text",
    }
    found = {}
    for file, form in forms.items():
        data = {"source": "path", "path": f"inputs/{file}", "format": form}
        perplexity = EVALUATE["perplexity"] | {"data": data, "seq_len": 8}
        world.start("fetched", evaluate=EVALUATE | {"perplexity": perplexity})
        found[file] = (
            pq.read_table("data/sources/fetched/perplexity.parquet").column("text").to_pylist()
        )
    tasks = Path("data/sources/fetched/tasks")
    items = {
        str(path.relative_to(tasks)): pq.read_table(path).to_pylist()
        for path in sorted(tasks.rglob("*.parquet"))
    }
    return found | {"items": items}


def converted(world: World) -> Any:
    """Weights of a Baichuan checkpoint in its own layout."""
    own = world.root / "inputs/own-layout"
    shutil.copytree(world.model("llama", num_key_value_heads=4), own)
    weights = load_file(own / "model.safetensors")
    for layer in range(4):
        names = [f"model.layers.{layer}.self_attn.{name}_proj.weight" for name in "qkv"]
        weights[f"model.layers.{layer}.self_attn.W_pack.weight"] = torch.cat(
            [weights.pop(name) for name in names]
        )
    save_file(weights, own / "model.safetensors", metadata={"format": "pt"})
    config = read_json(own / "config.json") | {"model_type": "baichuan", "z_loss_weight": 0}
    (own / "config.json").write_text(json.dumps(config))
    world.start(
        "baichuan", model={"source": "path", "path": "inputs/own-layout", "dtype": "float64"}
    )
    return weights_of(Path("data/models/baichuan"))


def rows(world: World, **changes: Any) -> Any:
    world.start("rows", calibration=CALIBRATION | changes)
    return pq.read_table("data/calibration/rows/search.parquet").column("input_ids").to_pylist()


LOSSES = {
    "perplexity": "greedy",
    "kl": "greedy",
    "js": "greedy",
    "block_influence": "one_shot",
    "relative_magnitude": "one_shot",
}
"""Metrics, and the search that computes them."""


def losses(world: World, variant: str) -> Any:
    """Losses of the masks of two greedy steps, of those of the first step by divergences,
    influences of all units."""
    name, found = f"losses-{variant.replace(' ', '-')}", {}
    world.start(name, variant)
    for metric, method in LOSSES.items():
        for unit in ("block", "layer") if method == "one_shot" else ("block",):
            folder = world.scored(name, {"method": method, "metric": metric, "unit": unit})
            steps = list(traces(folder).values())[: 2 if metric == "perplexity" else 1]
            found[f"{metric} of {unit}s"] = {
                ",".join(row["removed"]): row["loss"] for step in steps for row in step
            }
    return found


def search(world: World, section: Mapping[str, Any]) -> Any:
    """What each iteration chose, and how much it computed: masks, rows, and the sum of their
    losses."""
    world.start("search", budgets=["0.2"])
    found = {}
    for path, trace in traces(world.scored("search", section)).items():
        chosen = {",".join(row["removed"]): row["loss"] for row in trace if row["chosen"]}
        total = math.fsum(row["loss"] or 0.0 for row in trace)
        found[path] = {
            "chosen": chosen,
            "masks": len(trace),
            "rows": sum(row["rows_used"] for row in trace),
            "sum": total,
        }
    return found


def made_up_losses(loss: str, base: Mask, mask: Mask, row: int) -> float:
    """Of 40 blocks: a cost of each, an interaction of two, and noise, all drawn by name."""
    blocks = sorted(map(str, mask))
    costs = [drawn(block, 0.1, 0.4) for block in blocks]
    costs += [drawn(f"{one} {other}", -0.04, 0.08) for one, other in combinations(blocks, 2)]
    costs += [drawn(f"{block} {row}", -0.1, 0.1) for block in blocks]
    return 2.0 + math.fsum(costs)


@cache
def drawn(name: str, low: float, high: float) -> float:
    return random.Random(name).uniform(low, high)


def made_up_search(world: World, acceleration: str) -> Any:
    """Which of 40 made-up blocks a greedy search removes, and how many it scores on how many rows.
    A tiny model has fewer blocks than a lazy step always scores."""
    rows, config = short_rows(16), small_config(20)
    given = {"method": "greedy", "acceleration": acceleration}
    trace = searched(
        FakeScorer(made_up_losses), rows, ["14blocks"], resources_of(config), **given
    ).of("14blocks")
    return [
        {
            "chosen": format_mask(step.added[step.chosen] or DENSE),
            "audited": format_mask(step.lazy_choice or DENSE),
            "masks": len(step.scores),
            "rows": sum(score.rows_used for score in step.scores),
        }
        for step in trace
    ]


def slicegpt(world: World) -> Any:
    """Norms of the sliced weights, whose directions have either sign."""
    world.built("slicegpt", ["0.3"], score={"method": "slicegpt"})
    return norms_of(Path("data/checkpoints/slicegpt-t0/hf/model.safetensors"))


def plans(world: World, section: Mapping[str, Any], budgets: Sequence[str]) -> Any:
    """The plan of each budget, all of it but fingerprints and the number of the file's format."""
    world.start("plans", budgets=budgets)
    world.scored("plans", section)
    found = {}
    for i, budget in enumerate(budgets):
        commit.main(f"plans-t{i}")
        plan = read_json(next(Path(f"data/plans/plans-t{i}").glob("*.json")))
        del plan["format"]
        found[budget] = {
            key: value
            for key, value in plan.items()
            if not re.search("[0-9a-f]{16}", json.dumps(value))
        }
    return found


OURS = (
    "architectures",
    "auto_map",
    "dtype",
    "layer_types",
    "layers_without_mha",
    "layers_without_mlp",
    "mlp_only_layers",
    "model_type",
    "num_hidden_layers",
    "tie_word_embeddings",
)
"""Of a config, what an export decides."""


def checkpoint(world: World, form: str, section: Mapping[str, Any], variant: str = "llama") -> Any:
    """What an export holds: names of files, config, and every tensor."""
    world.built(
        "export",
        ["4blocks"],
        variant=variant,
        dtype="float32",
        score=section,
        export=["hf", *({form} - {"hf"})],
    )
    folder = Path("data/checkpoints/export-t0") / form
    found: dict[str, Any] = {"files": sorted(path.name for path in folder.iterdir())}
    if form == "gguf":  # the importance matrix is of sums that another processor rounds otherwise
        return found | {
            path.name: gguf_content(path) for path in sorted(folder.glob("model-*.gguf"))
        }
    config = read_json(folder / "config.json")
    if form != "nas":  # which is all ours; others have what transformers of the day writes
        config = {key: config[key] for key in OURS if key in config}
    return found | {"config": config, "weights": weights_of(folder)}


def gguf_content(path: Path) -> Any:
    from gguf import GGUFReader

    reader = GGUFReader(path)
    fields = {
        name: mark(
            torch.cat([torch.tensor(part.tolist()).flatten().double() for part in field.parts])
        )
        for name, field in reader.fields.items()
    }
    tensors = {
        t.name: [int(t.tensor_type), *t.shape.tolist(), mark(torch.tensor(t.data.view("uint8")))]
        for t in reader.tensors
    }
    return {"fields": fields, "tensors": tensors}


def compensated(world: World) -> Any:
    """Perplexities before and after, and norms of the weights that come out of it."""
    # whose absence a refit makes good for
    given = {
        "method": "given",
        "options": {"order": ["mlp.2"]},
    }
    settings = {"method": "refit", "num_rows": 24, "seq_len": 32, "validation": 0.25}
    world.built("compensated", ["1blocks"], compensate, score=given, compensate=settings)
    folder = Path("data/compensated/compensated-t0")
    facts = read_json(folder / "compensate.json")
    del facts["search"]
    return {"report": facts, "norms": norms_of(folder / "weights.safetensors")}


def trained(world: World) -> Any:
    """Losses of training, and norms of the weights that come out of it."""
    recipe = {
        "data": TEXTS,
        "num_samples": 8,
        "seq_len": 32,
        "rank": 4,
        "learning_rate": 0.01,
        "epochs": 2,
    }
    world.built("trained", until=train, train=recipe)
    found = read_json(Path("data/trained/trained-t0/train.json"))
    norms = norms_of(Path("data/trained/trained-t0/weights.safetensors"))
    return {"losses": found["losses"], "tokens": found["tokens"], "norms": norms}


def evaluated(world: World, what: str) -> Any:
    """Held-out perplexity, scores of tasks and of every item, and sample texts."""
    folder = Path("data/evidence") / f"{world.evaluated}-{what}"
    found, items = (
        read_json(folder / "results.json"),
        pq.read_table(folder / "items.parquet").to_pylist(),
    )
    lines: dict[str, list[Any]] = {}
    for item in items:
        line = [
            item["loglikelihoods"],
            *(item.get(key) for key in ("acc", "acc_norm", "exact_match", "response")),
        ]
        lines.setdefault(item["task"], []).append(line)
    del found["perplexity"]["row_nll"]
    keys = (
        "parameters",
        "weight_bytes",
        "perplexity",
        "tasks",
        "average",
        "chance",
        "samples",
        "formats",
    )
    return {key: found[key] for key in keys if key in found} | {"items": lines}


def reported(world: World) -> Any:
    """The CSV files of a report and the numbers in its tables, of made-up times."""
    name = world.evaluated
    targets = {f"{name}-t{i}": {"run": name, "budget": f"{n}blocks"} for i, n in enumerate((2, 4))}
    params = yaml.safe_load(Path("params.yaml").read_text()) | {"runs": [name], "targets": targets}
    Path("params.yaml").write_text(yaml.safe_dump(params))
    dag.write()
    settings.main(name)
    for path in Path("data/evidence").glob(f"{name}-*/speed.json"):
        found = read_json(path)
        write_sealed_json(path, found | {"speed": _fixed(found.get("speed"))})
    report.main("")
    lines = Path("data/report/report.md").read_text().splitlines()
    shown = [cell.strip() for line in lines if line[:1] == "|" for cell in line.split("|")]
    return {
        **{path.name: cells(path) for path in sorted(Path("data/report").glob("*.csv"))},
        "cells": [
            cell for cell in shown if re.search(r"\d", cell) and not re.search("[a-z]", cell)
        ],
    }


def _fixed(value: Any, seconds: float = 1.25) -> Any:
    """Measured times as if the dense model took 1 second for all, and a pruned one 0.8."""
    if isinstance(value, list):
        return [_fixed(part, seconds) for part in value]
    if not isinstance(value, dict):
        return seconds if isinstance(value, float) else value
    found = {
        key: _fixed(part, {"dense": 1.0, "pruned": 0.8}.get(key, seconds))
        for key, part in value.items()
    }
    for key in (key for key in value if key.endswith("_tokens_per_second")):
        found[key] = (
            round(value[key] * value[key.replace("tokens_per_second", "seconds")]["median"])
            / seconds
        )
    return found


BLOCKS = {"method": "greedy"}
SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": BLOCKS,
    "greedy, layers": {"unit": "layer"},
    "greedy, MHA only": {"candidates": "mha"},
    "greedy, kl": {"metric": "kl"},
    "greedy, block_influence": {"metric": "block_influence"},
    **{
        f"greedy per {price}": {"options": {"per": price}}
        for price in ("parameters", "kv", "latency")
    },
    **{f"greedy, {name}": {"acceleration": name} for name in ("lazy", "race", "lazy+race")},
    "one_shot": {"method": "one_shot"},
    "one_shot, layers": {"method": "one_shot", "unit": "layer", "metric": "block_influence"},
    "random": {"method": "random"},
    "given": {"method": "given", "options": {"order": ["mha.2", "mlp.1", "mha.0,mlp.0"]}},
    "floating": {"method": "floating", "options": {"tries": 4}},
    "floating, lazy+race": {
        "method": "floating",
        "options": {"tries": 4},
        "acceleration": "lazy+race",
    },
}
PLANS: dict[str, tuple[Mapping[str, Any], tuple[str, ...]]] = {
    "greedy": (BLOCKS, ("0.2", "0.35", "3blocks", "0.25kv", "1.2x")),
    "layers": ({"unit": "layer"}, ("0.2", "2layers", "0.5kv")),
    "laco": ({"method": "laco", "options": {"count": 2}}, ("0.2", "1layers", "0.25kv")),
    "laco of the paper": (
        {"method": "laco", "options": {"count": 2, "variant": "paper"}},
        ("1layers", "2layers"),
    ),
    "slicegpt": ({"method": "slicegpt"}, ("0.2",)),
    "narrow": ({"method": "narrow"}, ("0.1",)),
}
EXPORTS: dict[str, tuple[Any, ...]] = {
    "hf": ("hf", BLOCKS),
    "hf, whole layers": ("hf", {"unit": "layer"}),
    "hf of laco": ("hf", {"method": "laco", "options": {"count": 2}}),
    **{form: (form, BLOCKS) for form in ("nas", "gguf")},
    **{f"hf of {variant}": ("hf", BLOCKS, variant) for variant in VARIANTS_DAILY[1:]},
}


def loose(variant: str) -> float:
    """The tolerance of losses on another processor: the weights of experts are a softmax in
    float32."""
    return 1e-6 if variant.startswith(("mixtral", "qwen3_moe")) else max(1e-8, tolerance(variant))


ENTRIES: dict[str, dict[str, Entry]] = {
    "FETCH_VERSION": {"texts and items": Entry(fetched), "converted checkpoints": Entry(converted)},
    "CALIBRATION_VERSION": {
        f"{packing}, split {split}": Entry(
            partial(rows, packing=packing, split=split, num_samples=6)
        )
        for packing in ("joined", "per_sample")
        for split in ("paper", "all")
    }
    | {"a mix": Entry(partial(rows, data=MIX, num_samples=6))},
    "SCORE_VERSION": {
        variant: Entry(partial(losses, variant=variant), loose(variant))
        for variant in VARIANTS_DAILY  # the contract tests compare every family with brute force
    },
    "SEARCH_VERSION": {
        name: Entry(partial(search, section={"method": "greedy"} | section))
        for name, section in SEARCHES.items()
    }
    | {
        f"greedy, {name}, 40 units": Entry(partial(made_up_search, acceleration=name))
        for name in ("lazy", "lazy+race")
    },
    "PLAN_VERSION": {
        **{
            name: Entry(partial(plans, section=section, budgets=budgets))
            for name, (section, budgets) in PLANS.items()
        },
    },
    "WEIGHTS_VERSION": {
        "slicegpt": Entry(slicegpt),
        "refit": Entry(compensated, 1e-6),
        "trained": Entry(trained, 1e-6),
    },
    "EXPORT_VERSION": {
        name: Entry(lambda world, how=how: checkpoint(world, *how)) for name, how in EXPORTS.items()
    },
    # lm-eval adds log-likelihoods in float32
    "EVAL_VERSION": {
        what: Entry(partial(evaluated, what=what), 1e-5) for what in ("dense", "t0", "t1")
    },
    "REPORT_VERSION": {"report": Entry(reported, 1e-5)},
}
"""By the constant to raise when the numbers move."""

# The files


def current() -> dict[str, int]:
    """The versions of today."""
    return {name: getattr(versions, name) for name in CHAIN}


def covering(constant: str) -> dict[str, int]:
    """The versions of a constant's numbers and of all that they are made from."""
    now = current()
    return {name: now[name] for name in CHAIN[: CHAIN.index(constant) + 1]}


def kept(constant: str) -> dict[str, Any]:
    """What the file of a constant holds."""
    path = FOLDER / f"{constant}.json"
    return read_json(path) if path.exists() else {"versions": {}, "numbers": {}}


def measure(world: World, constant: str, name: str) -> Any:
    """The numbers of an entry as JSON has them, in the world's folder."""
    with contextlib.chdir(world.root):
        text = json.dumps(ENTRIES[constant][name].measure(world))
    return json.loads(text, parse_float=lambda number: float(f"{float(number):.10g}"))


def moved(golden: Any, now: Any, tolerance: float, where: tuple[str, ...] = ()) -> Iterator[str]:
    """What differs, each difference in a line."""
    if isinstance(golden, dict) and isinstance(now, dict):
        for key in golden.keys() | now.keys():
            yield from moved(
                golden.get(key, "nothing"), now.get(key, "nothing"), tolerance, (*where, key)
            )
    elif isinstance(golden, list) and isinstance(now, list) and len(golden) == len(now):
        for index, (old, new) in enumerate(zip(golden, now, strict=True)):
            yield from moved(old, new, tolerance, (*where, str(index)))
    elif isinstance(golden, float) and isinstance(now, (int, float)):
        if not math.isclose(golden, now, rel_tol=tolerance, abs_tol=tolerance / 100):
            yield f"{' / '.join(where)} (golden {golden!r}, now {now!r})"
    elif golden != now:
        yield f"{' / '.join(where)} (golden {golden!r}, now {now!r})"


RENEW = "renew it with `python -m tests.golden --write`"


def problem(constant: str, name: str, now: Any, file: Mapping[str, Any]) -> str:
    """Why the numbers of an entry do not fit those of the file; "" if they do."""
    where = f"{name}: tests/golden/{constant}.json"
    if raised := [v for v, value in covering(constant).items() if value != file["versions"].get(v)]:
        return f"{where} is older than {', '.join(raised)}: {RENEW}"
    if name not in file["numbers"]:
        return f"{where} has no such entry: {RENEW}"
    lines = list(moved(file["numbers"][name], now, ENTRIES[constant][name].tolerance))
    if not lines:
        return ""
    more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
    return (
        f"{name} moved: {'; '.join(lines[:3])}{more}, and {constant} is still"
        f" {current()[constant]}: raise {constant} in blockpruner/versions.py and run `python -m"
        " tests.golden --write`, or undo the change"
    )


def renew(
    constant: str, now: Mapping[str, Any], file: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """A file's new content, and the numbers that moved without a version: those stay as they
    are."""
    is_raised = covering(constant) != file["versions"]
    same = (
        {}
        if is_raised
        else {name: file["numbers"][name] for name in now if name in file["numbers"]}
    )
    refused = [text for name in same if (text := problem(constant, name, now[name], file))]
    return {"versions": covering(constant), "numbers": {**now, **same}}, refused


def written(value: Any, indent: str = "") -> str:
    """JSON, with what fits into a line in one line."""
    line = json.dumps(value, sort_keys=True, ensure_ascii=False)
    if len(indent + line) <= 118 or not isinstance(value, (dict, list)):
        return line
    if isinstance(value, dict):
        parts = [f"{json.dumps(key)}: {written(value[key], indent + ' ')}" for key in sorted(value)]
    else:
        parts = [written(each, indent + " ") for each in value]
    begin, end = "{}" if isinstance(value, dict) else "[]"
    return f"{begin}\n{indent} " + f",\n{indent} ".join(parts) + f"\n{indent}{end}"


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    problems = []
    with TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        world = World(Path(folder))
        for constant, entries in ENTRIES.items():
            now = {name: measure(world, constant, name) for name in entries}
            content, refused = renew(constant, now, kept(constant))
            (FOLDER / f"{constant}.json").write_text(written(content) + "\n")
            problems += refused
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python -m tests.golden --write")
    main()
