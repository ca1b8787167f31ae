"""What the default costs on kinds of text that it never fitted, by the command itself: the table of
docs/results.md.

    BLOCKPRUNER_DATA=... python -m benchmarks.kinds FOLDER
        [--models smollm2,qwen,gemma] [--cells NAME,...]

Losses are kept in docs/results/kinds.jsonl (`RECORDS`), one line a cell and draw: what is there
is not computed again, and a kill loses one cell. The table is made from them. FOLDER holds what is
large and can go. A cell is a command with a name, as `CELLS` has it. Draws differ by the seeds of
all texts. Each checkpoint also answers five plain questions (`QUESTIONS`); `--answers` prints those
of the first draws.

Held-out: Python of five libraries and of this project, mathematics (MATH), dialogue (tool calls),
WikiText-2, stories and news (CoQA). Each kind has 16 rows of 512 tokens, each of documents of its
own. No source of them is in the default texts.
"""

import argparse
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

PACKAGES = {5: 5800, 20: 1500, 80: 900, 160: 820}
"""How many packages give text, and the characters of a piece: about 240 thousand in all."""
RECORDS = Path("docs/results/kinds.jsonl")
MODELS = {"smollm2": "smollm2-135m", "qwen": "qwen25-coder-0.5b", "gemma": "gemma3-270m"}
OWN = ("--texts", "own.jsonl")
"""One's own file of one kind: articles of an encyclopaedia."""


def rate(value: str) -> tuple[str, str]:
    """The option for a rate of training."""
    return "--set", f"train.learning_rate={value}"


CELLS: Mapping[str, Sequence[str]] = {
    "default 10 %": ("--budget", "0.10"),
    "default 20 %": ("--budget", "0.20"),
    "channels 10 %": ("--budget", "0.10", "--method", "narrow"),
    "shifted layers 10 %": ("--budget", "0.10", "--method", "shifted"),
    "own file 10 %": ("--budget", "0.10", *OWN),
    "own file only 10 %": ("--budget", "0.10", *OWN, "--only-texts"),
    "trained 10 % at 1e-4": ("--budget", "0.10", "--train", "all", *rate("1e-4")),
    "trained 10 % at 3e-4": ("--budget", "0.10", "--train", "all", *rate("3e-4")),
    "trained 20 % at 1e-4": ("--budget", "0.20", "--train", "all", *rate("1e-4")),
    "trained 20 % at 3e-4": ("--budget", "0.20", "--train", "all", *rate("3e-4")),
    **{
        f"Python of {packages} packages 10 %": (
            *("--budget", "0.10", "--method", "narrow", "--only-texts"),
            *("--texts", f"packages-{packages}.jsonl"),
        )
        for packages in PACKAGES
    },
}
"""The cells of packages are fitted to as much Python, of few packages or of many."""

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


def write_texts(path: Path, texts: Sequence[str]) -> None:
    """Write a file for `--texts`."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def source(name: str, **changes: int) -> list[str]:
    """The texts of a source by its name."""
    settings = with_sources({"source": name}, named_sources()) | changes
    found: Texts = TypeAdapter(Texts).validate_python(settings)
    return load_texts(found, cache_folder() / "cache", cache_folder() / "pins.json", str)


def never_fitted() -> dict[str, list[str]]:
    """The held-out texts by kind, in an order of their own."""
    libraries = []
    for package, sha256 in LIBRARIES.items():
        files = read_members(package_file(package, sha256, cache_folder() / "cache"), "*.py")
        texts = sorted(found.decode(errors="ignore") for found in files if len(found) > 3000)
        libraries += Random(0).sample(texts, 12)
    data = Path(os.environ["BLOCKPRUNER_DATA"])
    wikitext = "".join(
        pq.read_table(data / "wikitext2_raw_test.parquet").column("text").to_pylist()
    )
    archive = package_file(
        "llamafactory==0.9.5", named_sources()["instructions"]["sha256"], cache_folder() / "cache"
    )
    with tarfile.open(archive) as files:
        file = files.extractfile("llamafactory-0.9.5/data/glaive_toolcall_en_demo.json")
        assert file is not None
        calls = json.load(file)
    return {
        "Python of libraries": libraries,
        "this project": [path.read_text() for path in sorted(Path("blockpruner").rglob("*.py"))],
        "mathematics": source("mathematics"),
        "dialogue": [
            "\n\n".join(turn["value"] for turn in call["conversations"]) for call in calls
        ],
        "WikiText-2": [
            text
            for text in wikitext.split("\n = ")
            if not text.startswith("=") and len(text) > 2000
        ],
        "stories": source("stories-and-news"),
    }


def measured(folder: Path, rows: Mapping[str, Sequence[Sequence[int]]]) -> dict[str, Any]:
    """The NLL of each row by kind, and the answers, of a checkpoint; our own code in it is that of
    this clone."""
    model = load_model(folder, "bfloat16", "cpu", trust_remote_code=True)
    nll = {
        kind: [round(nll, 6) for nll in measure_perplexity(model, own, batch=4).row_nll]
        for kind, own in rows.items()
    }
    return {
        "nll": nll,
        "answers": [answer(model, AutoTokenizer.from_pretrained(folder), one) for one in QUESTIONS],
    }


def answer(model: PreTrainedModel, tokenizer: Any, question: str) -> str:
    """The first line of the greedy answer of at most 24 tokens, in the words of the
    chat template where there is one."""
    prompt = f"Question: {question}\nAnswer:"
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    given = tokenizer(prompt, return_tensors="pt")
    tokens = model.generate(
        **given, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id
    )
    return (
        str(tokenizer.decode(tokens[0, given.input_ids.shape[1] :], skip_special_tokens=True))
        .strip()
        .split("\n")[0]
    )


def pruned(
    model: Path, cell: Sequence[str], draw: int, rows: Mapping[str, Any], keep: Path
) -> dict[str, Any]:
    """Run the command, and measure what it wrote."""
    with TemporaryDirectory(dir=keep) as directory:
        out = Path(directory, "out")
        seeds = [f"--set={section}.seed={42 + draw}" for section in ("calibration", "compensate")]
        command = [
            sys.executable,
            "-m",
            "blockpruner",
            "prune",
            str(model),
            *cell,
            *seeds,
            *AS_STORED,
            "--out",
            str(out),
            "--json",
        ]
        command = [str(keep / word) if word.endswith(".jsonl") else word for word in command]
        told = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        plan = told["plan"]
        return {"method": plan["method"], "judged": plan.get("kinds", {}), **measured(out, rows)}


def summary(
    found: Sequence[Mapping[str, Any]], dense: Mapping[str, Sequence[float]]
) -> tuple[str, str]:
    """Mean and worst over kinds, with t intervals over draws."""
    means, worsts, names = list[float](), list[float](), list[str]()
    for one in found:
        ratios = {
            kind: math.exp(float(np.mean(np.array(nll) - np.array(dense[kind]))))
            for kind, nll in one["nll"].items()
        }
        loss = Loss(ratios)
        means.append(loss.mean)
        worsts.append(loss.worst)
        names.append(loss.worst_kind)
    return interval(means), f"{interval(worsts)} {max(names, key=names.count)}"


def interval(values: Sequence[float]) -> str:
    """The geometric mean, and a t interval of 95 % where there are two or more."""
    logs = np.log(values)
    center = float(np.exp(logs.mean()))
    if len(values) < 2:
        return f"{center:.2f}"
    half = float(stats.t.ppf(0.975, len(values) - 1) * logs.std(ddof=1) / math.sqrt(len(values)))
    return f"{center:.2f} [{center * math.exp(-half):.2f}, {center * math.exp(half):.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--cells", default=",".join(CELLS))
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--answers", action="store_true")
    given = parser.parse_args()
    if "BLOCKPRUNER_DATA" not in os.environ:
        sys.exit("BLOCKPRUNER_DATA is not set: the folder that holds wikitext2_raw_test.parquet")
    given.folder.mkdir(parents=True, exist_ok=True)
    known = [json.loads(line) for line in RECORDS.read_text().splitlines()]
    texts = never_fitted()
    articles = [text for text in source("encyclopaedia") if len(text) > 400]
    write_texts(given.folder / "own.jsonl", articles)
    for packages, length in PACKAGES.items():
        pieces = source(
            "python-of-packages", packages=packages, pieces=320 // packages, length=length
        )
        write_texts(given.folder / f"packages-{packages}.jsonl", pieces)

    def done(model: str, cell: str, draw: int) -> dict[str, Any] | None:
        return next(
            (
                one
                for one in known
                if [one["model"], one["cell"], one["draw"]] == [model, cell, draw]
            ),
            None,
        )

    def add(**fields: Any) -> None:
        known.append(fields)
        with RECORDS.open("a") as file:
            file.write(json.dumps(fields) + "\n")

    for name in given.models.split(","):
        wanted = TypeAdapter(Model).validate_python(
            with_sources({"source": MODELS[name]}, named_sources())
        )
        place = cached_checkpoint(
            wanted, cache_folder() / "cache", cache_folder() / "pins.json", print
        )
        tokenizer = load_tokenizer(place)
        rows = {
            kind: held_out(tokenizer, own_texts, ROWS).rows for kind, own_texts in texts.items()
        }
        if not done(name, "dense", 0):
            add(model=name, cell="dense", draw=0, **measured(place, rows))
        for draw in range(given.draws):
            for cell in given.cells.split(","):
                if not done(name, cell, draw):
                    found = pruned(place, CELLS[cell], draw, rows, given.folder)
                    add(model=name, cell=cell, draw=draw, **found)
    print(
        "| model | cell | draws | mean, × dense | worst kind, × dense | took"
        " |\n|---|---|---:|---:|---:|---|"
    )
    for name in given.models.split(","):
        dense = done(name, "dense", 0)
        for cell in given.cells.split(","):
            found = [one for draw in range(given.draws) if (one := done(name, cell, draw))]
            if dense and found:
                mean, worst = summary(found, dense["nll"])
                methods = ", ".join(dict.fromkeys(one["method"] for one in found))
                print(f"| {name} | {cell} | {len(found)} | {mean} | {worst} | {methods} |")
    for name in given.models.split(",") if given.answers else ():
        for cell in ("dense", *given.cells.split(",")):
            found = done(name, cell, 0)
            for question, said in zip(QUESTIONS, found["answers"] if found else (), strict=False):
                print(f"{name}, {cell}: {question} {said}")


if __name__ == "__main__":
    main()
