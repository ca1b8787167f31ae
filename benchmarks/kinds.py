"""What the default costs on kinds of text that it never fitted, by the command itself: the table of
docs/results.md.

    BLOCKPRUNER_DATA=... python -m benchmarks.kinds FOLDER
        [--models smollm2,qwen,gemma] [--cells NAME,...]

Losses are kept in docs/results/kinds.jsonl (`RECORDS`), one line a cell and draw: what is there is
not computed again, and a kill loses one cell. docs/results/kinds.csv and regret.csv are made
from them, without FOLDER from what is there. FOLDER holds what is large and can go.

A cell is a command with a name (`CELLS`). Draws differ by the seeds of all texts. Each checkpoint
also answers five plain questions (`QUESTIONS`); `--answers` prints those of the first draws.

Held-out: Python of five libraries and of this project, mathematics (MATH), dialogue (tool calls),
WikiText-2, stories and news (CoQA). Each kind has 16 rows of 512 tokens, each of documents of its
own. No source of them is in the default texts.
"""

import argparse
import io
import json
import math
import os
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from pydantic import TypeAdapter
from scipy import stats
from transformers import AutoTokenizer, PreTrainedModel

from blockpruner.core.settings import Model, Texts
from blockpruner.evaluation.kinds import Loss
from blockpruner.evaluation.perplexity import held_out, measure_perplexity
from blockpruner.evaluation.settings import Perplexity
from blockpruner.inputs.checkpoints import cached_checkpoint
from blockpruner.inputs.packages import package_file, read_members
from blockpruner.inputs.sources import cache_folder, named_sources, with_sources
from blockpruner.inputs.texts import load_texts
from blockpruner.inputs.tokenizers import load_tokenizer
from blockpruner.model.models import load_model

Record = dict[str, Any]
"""A line of `RECORDS`: model, cell, draw, method, judged (perplexities of the run's own texts that
were set aside, by kind), nll (of each held-out row, by kind) and answers."""

RECORDS = Path("docs/results/kinds.jsonl")
TABLE = Path("docs/results/kinds.csv")
REGRET_TABLE = Path("docs/results/regret.csv")
MODELS = {"smollm2": "smollm2-135m", "qwen": "qwen25-coder-0.5b", "gemma": "gemma3-270m"}
TITLES = {"smollm2": "SmolLM2-135M", "qwen": "Qwen2.5-Coder-0.5B", "gemma": "Gemma 3 270M"}
OWN = ("--texts", "own.jsonl")
"""A file of one kind, articles of an encyclopaedia, as a user might give it."""

LIKE_OURS = tuple(
    f"--set=calibration.{value}" for value in ("data.source=wide", "split=all", "num_rows=64")
)
"""Texts of the default for a method of the paper, which has the paper's by itself."""

PACKAGES = {5: 5800, 20: 1500, 80: 900, 160: 820}
"""How many packages give text, and the characters of a piece: about 240 thousand in all."""


def trained(budget: str, learning_rate: str) -> tuple[str, ...]:
    """The options of a cell of training."""
    return ("--budget", budget, "--train", "all", "--set", f"train.learning_rate={learning_rate}")


def python_of(packages: int) -> tuple[str, ...]:
    """The options of a cell that is fitted to Python of so many packages only."""
    texts = ("--texts", f"packages-{packages}.jsonl", "--only-texts")
    return ("--budget", "0.10", "--method", "narrow", *texts)


CELLS: Mapping[str, Sequence[str]] = {
    "default 10 %": ("--budget", "0.10"),
    "default 20 %": ("--budget", "0.20"),
    "channels 10 %": ("--budget", "0.10", "--method", "narrow"),
    "shifted layers 10 %": ("--budget", "0.10", "--method", "shifted"),
    "Relative Magnitude (Frobenius) 10 %": (
        *("--budget", "0.10", "--method", "relative-magnitude-frobenius"),
        *("--compensate", "refit", *LIKE_OURS),
    ),
    "own file 10 %": ("--budget", "0.10", *OWN),
    "own file only 10 %": ("--budget", "0.10", *OWN, "--only-texts"),
    "trained 10 % at 1e-4": trained("0.10", "1e-4"),
    "trained 10 % at 3e-4": trained("0.10", "3e-4"),
    "trained 20 % at 1e-4": trained("0.20", "1e-4"),
    "trained 20 % at 3e-4": trained("0.20", "3e-4"),
    **{f"Python of {packages} packages 10 %": python_of(packages) for packages in PACKAGES},
}

RIVALS = ("shifted layers 10 %", "Relative Magnitude (Frobenius) 10 %")
"""The cells that the default could have taken in place of what it took."""

COMMIT = "14cd41b1"
"""The version of this project whose source is a held-out text: later versions are other texts."""

LIBRARIES = {  # five libraries of which no line is in the default texts
    "Django==5.1.4": "236e023f021f5ce7dee5779de7b286565fdea5f4ab86bae5338e3f7b69896cf0",
    "networkx==3.4.2": "df5d4365b724cf81b8c6a7312509d0c22386097011ad1abe274afd5e9d3bbc5f",
    "sympy==1.13.3": "54612cf55a62755ee71824ce692986f23c88ffa77207b30c1368eda4a7060f73",
    "SQLAlchemy==2.0.36": "fddbe92b4760c6f5d48162aef14824add991aeda8ddadb3c31d56eb15ca69f8e",
    "Twisted==24.11.0": "fe403076c71f04d5d2d789a755b687c5637ec3bcd3b2b8252d76f2ba65f54261",
}
QUESTIONS = (
    "What is the capital of France?",
    "How many days are in a week?",
    "What color is the sky on a clear day?",
    "Who wrote Romeo and Juliet?",
    "What is the opposite of hot?",
)
AS_STORED = ("--dtype", "bfloat16")
"""As the command computes a bfloat16 checkpoint on this processor; the packages hold these models
widened."""
ROWS = Perplexity(seq_len=512, max_rows=16, packing="documents")


def source(name: str, **changes: int) -> list[str]:
    """The texts of a source by its name."""
    settings = with_sources({"source": name}, named_sources()) | changes
    texts: Texts = TypeAdapter(Texts).validate_python(settings)
    return load_texts(texts, cache_folder() / "cache", cache_folder() / "pins.json", str)


def python_of_libraries() -> list[str]:
    """Twelve files of each of `LIBRARIES`."""
    texts = []
    for package, sha256 in LIBRARIES.items():
        archive = package_file(package, sha256, cache_folder() / "cache")
        files = [content.decode(errors="ignore") for content in read_members(archive, "*.py")]
        long_files = sorted(text for text in files if len(text) > 3000)
        texts += Random(0).sample(long_files, 12)
    return texts


def tool_calls() -> list[str]:
    """Conversations with an assistant that calls functions; no default text has any."""
    sha256 = named_sources()["instructions"]["sha256"]
    archive = package_file("llamafactory==0.9.5", sha256, cache_folder() / "cache")
    with tarfile.open(archive) as members:
        file = members.extractfile("llamafactory-0.9.5/data/glaive_toolcall_en_demo.json")
        assert file is not None
        calls = json.load(file)
    return ["\n\n".join(turn["value"] for turn in call["conversations"]) for call in calls]


def source_of_this_project() -> list[str]:
    """The Python files of blockpruner at `COMMIT`."""
    archive = subprocess.run(
        ("git", "archive", COMMIT, "blockpruner"), check=True, stdout=subprocess.PIPE
    ).stdout
    text_by_path = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as members:
        for member in members:
            if member.name.endswith(".py"):
                file = members.extractfile(member)
                assert file is not None
                text_by_path[Path(member.name)] = file.read().decode()
    return [text_by_path[path] for path in sorted(text_by_path)]


def articles_of_wikitext() -> list[str]:
    table = pq.read_table(Path(os.environ["BLOCKPRUNER_DATA"]) / "wikitext2_raw_test.parquet")
    articles = "".join(table.column("text").to_pylist()).split("\n = ")
    return [text for text in articles if not text.startswith("=") and len(text) > 2000]


def never_fitted() -> dict[str, list[str]]:
    """The held-out texts by kind, in a fixed order."""
    return {
        "Python of libraries": python_of_libraries(),
        "this project": source_of_this_project(),
        "mathematics": source("mathematics"),
        "dialogue": tool_calls(),
        "WikiText-2": articles_of_wikitext(),
        "stories": source("stories-and-news"),
    }


def write_texts(path: Path, texts: Sequence[str]) -> None:
    """Write a file for `--texts`."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def write_users_files(folder: Path) -> None:
    """The files that cells name."""
    articles = [text for text in source("encyclopaedia") if len(text) > 400]
    write_texts(folder / "own.jsonl", articles)
    for packages, length in PACKAGES.items():
        changes = {"packages": packages, "pieces": 320 // packages, "length": length}
        write_texts(folder / f"packages-{packages}.jsonl", source("python-of-packages", **changes))


def measured(checkpoint: Path, rows_by_kind: Mapping[str, Sequence[Sequence[int]]]) -> Record:
    """The NLL of each row by kind, and the answers."""
    # A pruned checkpoint brings our own modeling code, the same as this clone's.
    model = load_model(checkpoint, "bfloat16", "cpu", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    nll = {}
    for kind, rows in rows_by_kind.items():
        row_nll = measure_perplexity(model, rows, batch=4).row_nll
        nll[kind] = [round(value, 6) for value in row_nll]
    answers = [answer(model, tokenizer, question) for question in QUESTIONS]
    return {"nll": nll, "answers": answers}


def answer(model: PreTrainedModel, tokenizer: Any, question: str) -> str:
    """The first line of the greedy answer of at most 24 tokens, in the words of the chat template
    where there is one."""
    prompt = f"Question: {question}\nAnswer:"
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(prompt, return_tensors="pt")
    tokens = model.generate(
        **inputs, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id
    )
    new_tokens = tokens[0, inputs.input_ids.shape[1] :]
    return str(tokenizer.decode(new_tokens, skip_special_tokens=True)).strip().split("\n")[0]


def pruned(
    model: Path, cell: str, draw: int, rows_by_kind: Mapping[str, Any], folder: Path
) -> Record:
    """Run the command, and measure what it wrote."""
    options = [
        str(folder / option) if option.endswith(".jsonl") else option for option in CELLS[cell]
    ]
    # A draw draws all texts anew: those of the search and those of the fit.
    seeds = [f"--set={section}.seed={42 + draw}" for section in ("calibration", "compensate")]
    with TemporaryDirectory(dir=folder) as directory:
        checkpoint = Path(directory, "pruned")
        command = [sys.executable, "-m", "blockpruner", "prune", str(model), *options, *seeds]
        command += [*AS_STORED, "--out", str(checkpoint), "--json"]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
        plan = json.loads(output)["plan"]
        losses = measured(checkpoint, rows_by_kind)
    return {"method": plan["method"], "judged": plan.get("kinds", {}), **losses}


def loss_by_kind(record: Record, dense: Record) -> dict[str, float]:
    """Perplexity over the dense model's, of each held-out kind."""
    return {
        kind: math.exp(float(np.mean(np.array(nll) - np.array(dense["nll"][kind]))))
        for kind, nll in record["nll"].items()
    }


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The geometric mean, and the ends of the 95 % t interval over draws; NaN for one draw."""
    logs = np.log(values)
    center = float(logs.mean())
    if len(values) < 2:
        return math.exp(center), math.nan, math.nan
    quantile = float(stats.t.ppf(0.975, len(values) - 1))
    half = quantile * float(logs.std(ddof=1)) / math.sqrt(len(values))
    return math.exp(center), math.exp(center - half), math.exp(center + half)


def columns(name: str, values: Sequence[float]) -> dict[str, float]:
    """The columns of a number with its interval."""
    return dict(zip((name, f"{name}_low", f"{name}_high"), interval(values), strict=True))


def table(records: Sequence[Record]) -> pd.DataFrame:
    """A row for each model and cell that has a record: means, worst kinds and single kinds."""
    rows = []
    for model in MODELS:
        of_model = [record for record in records if record["model"] == model]
        dense = next((record for record in of_model if record["cell"] == "dense"), None)
        for cell in CELLS:
            draws = [record for record in of_model if record["cell"] == cell]
            if dense is None or not draws:
                continue
            losses = [Loss(loss_by_kind(record, dense)) for record in draws]
            worst_kinds = [loss.worst_kind for loss in losses]
            fitted_kinds = [Loss.of(record["judged"]).mean for record in draws if record["judged"]]
            rows.append(
                {"model": TITLES[model], "cell": cell, "draws": len(draws)}
                | columns("mean_x", [loss.mean for loss in losses])
                | columns("worst_x", [loss.worst for loss in losses])
                | {"worst_kind": max(worst_kinds, key=worst_kinds.count)}
                | {"took": ", ".join(sorted({record["method"] for record in draws}))}
                | {"set_aside_x": interval(fitted_kinds)[0] if fitted_kinds else math.nan}
                | {
                    f"{kind}_x": interval([loss.kinds[kind] for loss in losses])[0]
                    for kind in dense["nll"]
                }
            )
    return pd.DataFrame(rows)


def regret_table(records: Sequence[Record]) -> pd.DataFrame:
    """How many times as much the default costs as the best of itself and its `RIVALS`, by mean and
    by worst kind: a row for each model with all of them in the first draw."""
    rows = []
    for model in MODELS:
        of_model = {
            record["cell"]: record
            for record in records
            if record["model"] == model and record["draw"] == 0
        }
        cells = ("default 10 %", *RIVALS)
        if not {"dense", *cells} <= of_model.keys():
            continue
        losses = [Loss(loss_by_kind(of_model[cell], of_model["dense"])) for cell in cells]
        means = [loss.mean for loss in losses]
        worst = [loss.worst for loss in losses]
        rows.append(
            {
                "model": TITLES[model],
                "mean_regret_x": means[0] / min(means),
                "worst_regret_x": worst[0] / min(worst),
            }
        )
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--cells", default=",".join(CELLS))
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--answers", action="store_true")
    arguments = parser.parse_args()
    records = [json.loads(line) for line in RECORDS.read_text().splitlines()]
    if arguments.folder:
        if "BLOCKPRUNER_DATA" not in os.environ:
            sys.exit("BLOCKPRUNER_DATA is not set: the folder of wikitext2_raw_test.parquet")
        models, cells = arguments.models.split(","), arguments.cells.split(",")
        compute(arguments.folder, models, cells, arguments.draws, records)
    frame = table(records)
    TABLE.write_text(frame.round(3).to_csv(index=False))
    print(frame.round(2).to_string(index=False))
    regrets = regret_table(records)
    REGRET_TABLE.write_text(regrets.round(3).to_csv(index=False))
    print(regrets.round(3).to_string(index=False))
    if not arguments.answers:
        return
    for record in records:
        if record["draw"] == 0:
            for question, answer in zip(QUESTIONS, record["answers"], strict=True):
                print(f"{record['model']}, {record['cell']}: {question} {answer}")


def compute(
    folder: Path,
    models: Sequence[str],
    cells: Sequence[str],
    draws: int,
    records: list[Record],
) -> None:
    """Compute and keep what no record has."""
    folder.mkdir(parents=True, exist_ok=True)
    write_users_files(folder)
    texts_by_kind = never_fitted()
    keys = {(record["model"], record["cell"], record["draw"]) for record in records}

    def keep(model: str, cell: str, draw: int, losses: Record) -> None:
        records.append({"model": model, "cell": cell, "draw": draw, **losses})
        with RECORDS.open("a") as file:
            file.write(json.dumps(records[-1]) + "\n")

    for model in models:
        settings: Model = TypeAdapter(Model).validate_python(
            with_sources({"source": MODELS[model]}, named_sources())
        )
        checkpoint = cached_checkpoint(
            settings, cache_folder() / "cache", cache_folder() / "pins.json", print
        )
        tokenizer = load_tokenizer(checkpoint)
        rows_by_kind = {
            kind: held_out(tokenizer, texts, ROWS).rows for kind, texts in texts_by_kind.items()
        }
        if (model, "dense", 0) not in keys:
            keep(model, "dense", 0, measured(checkpoint, rows_by_kind))
        for draw in range(draws):
            for cell in cells:
                if (model, cell, draw) not in keys:
                    keep(model, cell, draw, pruned(checkpoint, cell, draw, rows_by_kind, folder))


if __name__ == "__main__":
    main()
