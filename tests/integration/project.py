"""A copy of this project in a folder, with a tiny random model as its only run."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from blockpruner.config import dag
from blockpruner.inputs.sources import SHIPPED
from tests import forking
from tests.shipped import WORDS, write_shipped
from tests.tiny import save_tiny

ROOT = Path(__file__).parents[2]
HEALED = {"compensate": "refit", "train": True}


def sentence(number: int) -> str:
    return " ".join(WORDS[(number * 7 + k * k + number * k) % len(WORDS)] for k in range(6))


def write_inputs(folder: Path) -> None:
    """Texts and benchmark items for `run_of`."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": [sentence(i) for i in range(60)]}), folder / "texts.parquet")
    (folder / "heldout.txt").write_text("\n\n".join(sentence(i) for i in range(60)))
    items = {
        "goal": [sentence(i) for i in range(8)],
        "sol1": ["the cat", "a dog"] * 4,
        "sol2": ["red tree", "it was"] * 4,
        "label": [0, 1] * 4,
    }
    pq.write_table(pa.table(items), folder / "piqa_validation.parquet")


def run_of(folder: Path, **calibration: Any) -> dict[str, Any]:
    """A run file over the model and the inputs in a folder."""
    data = {"source": "path", "path": str(folder / "texts.parquet"), "format": "text"}
    return {
        "model": {"source": "path", "path": str(folder / "model"), "dtype": "float32"},
        "calibration": {
            "data": data,
            "num_samples": 10,
            "seq_len": 24,
            "packing": "joined",
            "split": "all",
            "seed": 42,
        }
        | calibration,
        "score": {"method": "greedy"},
        "evaluate": {
            "perplexity": {
                "data": data | {"path": str(folder / "heldout.txt")},
                "seq_len": 64,
                "max_rows": 2,
            },
            "zero_shot": {
                "data": {"source": "path", "path": str(folder)},
                "tasks": ["piqa"],
                "limit": 6,
            },
            "speed": {"prompt_tokens": 4, "new_tokens": 4, "repeats": 1, "batch": 1},
        },
        "compensate": {"num_rows": 24, "seq_len": 32, "validation": 0.25},
        "train": {
            "data": data,
            "num_samples": 12,
            "seq_len": 32,
            "rank": 4,
            "learning_rate": 0.01,
            "epochs": 2,
        },
    }


def make_project(folder: Path, targets: dict[str, str], **calibration: Any) -> Path:
    """Lay out the project with run `tiny` (llama, 4 layers) and the targets {name: budget}, healed
    where the name begins with "lora"; no git, DVC without SCM."""
    project, inputs = folder / "project", folder / "inputs"
    for name in ("blockpruner", "study", "stages", "flows"):
        half_written = shutil.ignore_patterns("*.pyc.*")  # by another worker
        shutil.copytree(ROOT / name, project / name, ignore=half_written)
    (project / "runs").mkdir()
    for name in ("dvc.yaml", ".dvcignore", "runs/sources.yaml"):
        shutil.copy(ROOT / name, project / name)
    with (project / "runs/sources.yaml").open("a") as file:
        file.write(yaml.safe_dump({SHIPPED: write_shipped(inputs / "shipped")}))
    write_inputs(inputs)
    save_tiny(inputs / "model", tie_word_embeddings=True)
    (project / "runs" / "tiny.yaml").write_text(yaml.safe_dump(run_of(inputs, **calibration)))
    (project / "studies").mkdir()
    set_targets(project, targets)
    (project / ".dvc").mkdir()
    (project / ".dvc" / "config").write_text("[core]\n    no_scm = True\n    analytics = false\n")
    return project


def set_targets(project: Path, targets: dict[str, str], **runtime: Any) -> None:
    value = {
        "runs": ["tiny"],
        "targets": {
            name: {"run": "tiny", "budget": budget} | (HEALED if name.startswith("lora") else {})
            for name, budget in targets.items()
        },
        "report": {"title": "Tiny", "plots": False},
        "studies": [],
        "experiments": {},
        "runtime": {"device": "cpu", "batch_tokens": "auto", "threads": 1} | runtime,
    }
    (project / "params.yaml").write_text(yaml.safe_dump(value))
    write_dag(project)


def write_dag(project: Path) -> None:
    with contextlib.chdir(project):
        dag.write()


def environment() -> dict[str, str]:
    folder = str(Path(sys.executable).parent)
    forking.ready()
    changes = {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "DVC_NO_ANALYTICS": "1"}
    changes["PYTHONPATH"] = f"{forking.STARTS}{os.pathsep}."
    return {k: v for k, v in os.environ.items() if k != "BLOCKPRUNER_OBSERVER"} | changes


def post(api: str, what: str, **body: Any) -> Any:
    """The answer of a Prefect server that asks for a password."""
    password = base64.b64encode(os.environ["PREFECT_API_AUTH_STRING"].encode()).decode()
    headers = {"Authorization": f"Basic {password}"}
    return httpx.post(f"{api}/{what}", json=body, headers=headers, timeout=60).json()


def module(project: Path, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a Python module in the project to its end."""
    command = [sys.executable, "-m", name, *arguments]
    return subprocess.run(
        command, cwd=project, env=environment(), capture_output=True, text=True, check=False
    )


def dvc(project: Path, *arguments: str) -> str:
    """Run a dvc command; returns its output, fails the test if it fails."""
    result = module(project, "dvc", *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def stage(project: Path, name: str, item: str = "tiny") -> subprocess.CompletedProcess[str]:
    return module(project, f"stages.{name}", item)


def counts(project: Path, method: str = "greedy") -> dict[str, Any]:
    """What the stage score computed and reused of a method of one search."""
    found: dict[str, Any] = json.loads(
        (project / f"data/provenance/tiny-{method}-search.json").read_text()
    )
    (result,) = found.values()
    return dict(result)


def tables(project: Path) -> dict[str, bytes]:
    """Content of every iteration table, by name."""
    return {
        path.name: path.read_bytes()
        for path in sorted((project / "data/scores").rglob("iteration_*.parquet"))
    }
