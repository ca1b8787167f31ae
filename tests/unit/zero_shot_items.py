"""A few invented items for every benchmark, with the prompts that lm-eval's stock tasks must make of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from blockpruner.evaluation.benchmarks import write_task


@dataclass(frozen=True)
class Item:
    """row: in the data set's columns; contexts and continuations: one of each per choice, what is scored;
    choices: the texts whose length normalises."""

    row: dict[str, Any]
    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    choices: tuple[str, ...]
    gold: int


def _item(row: dict[str, Any], context: str, choices: tuple[str, ...], gold: int) -> Item:
    return Item(row, (context,) * len(choices), tuple(f" {choice}" for choice in choices), choices, gold)


def _piqa(goal: str, solutions: tuple[str, str], label: int) -> Item:
    row = {"goal": goal, "sol1": solutions[0], "sol2": solutions[1], "label": label}
    return _item(row, f"Question: {goal}\nAnswer:", solutions, label)


def _winogrande(before: str, after: str, options: tuple[str, str], answer: int) -> Item:
    row = {"sentence": f"{before}_{after}", "option1": options[0], "option2": options[1], "answer": str(answer + 1)}
    contexts = tuple(before + option for option in options)
    return Item(row, contexts, (f" {after.strip()}",) * 2, contexts, answer)


def _hellaswag(row: dict[str, Any], context: str, endings: tuple[str, ...]) -> Item:
    return _item(row, context, endings, int(row["label"]))


def _arc(question: str, choices: tuple[str, ...], labels: str, gold: int) -> Item:
    row = {
        "id": question,
        "question": question,
        "choices": {"text": list(choices), "label": list(labels)},
        "answerKey": labels[gold],
    }
    return _item(row, f"Question: {question}\nAnswer:", choices, gold)


ITEMS: dict[str, list[Item]] = {
    "piqa": [
        _piqa("Dry a wet book.", ("Press it between towels.", "Put it in the bath."), 0),
        _piqa("Open a jar", ("Hit it with a feather", "Run hot water over its lid, then twist"), 1),
        _piqa("Cool tea:", ("wait", "boil it"), 0),
        _piqa("Sharpen a pencil", ("with a spoon", "with a knife"), 1),
        _piqa("Find north", ("look at a compass", "look at a shoe"), 0),
    ],
    "winogrande": [
        _winogrande("The cup did not fit the box because the ", " was too big.", ("cup", "box"), 0),
        _winogrande("Ann thanked Eve since ", " had been helped.", ("Ann", "Eve"), 0),
        _winogrande("Rain fell on ", ", who was out.", ("the farmer", "Al"), 1),
        _winogrande("", " won the match against Bo.", ("Cy", "Bo"), 0),
    ],
    "hellaswag": [
        _hellaswag(
            {
                "activity_label": "Juggling",
                "ctx_a": "A man stands [header] still.",
                "ctx_b": "he",
                "endings": ["throws balls [title] up.", "eats  soup.", "is gone.", "sings a very long song to a cat."],
                "label": "0",
            },
            "Juggling: A man stands still. He",
            ("throws balls. up.", "eats soup.", "is gone.", "sings a very long song to a cat."),
        ),
        _hellaswag(
            {
                "activity_label": "Cooking",
                "ctx_a": "Water boils.",
                "ctx_b": "",
                "endings": ["Pasta goes in.", "It flies.", "No.", "The pot sings."],
                "label": "3",
            },
            "Cooking: Water boils.",
            ("Pasta goes in.", "It flies.", "No.", "The pot sings."),
        ),
    ],
    "arc_easy": [
        _arc("What is ice?", ("Frozen water", "Hot air", "A metal", "Sand"), "ABCD", 0),
        _arc("Which is a planet?", ("Moon", "Mars", "Sun"), "123", 1),
        _arc("What do plants need?", ("Light", "Cars", "Books", "Salt", "Noise"), "ABCDE", 0),
    ],
    "arc_challenge": [
        _arc("Why is the sky blue?", ("It is painted", "Light scatters", "It is wet", "Birds"), "ABCD", 1),
        _arc("What falls faster in a vacuum?", ("A feather", "A stone", "Neither", "Air"), "1234", 2),
    ],
}


def tables_of(name: str) -> dict[str, pa.Table]:
    """The items as the split that is scored; ARC's validation split holds the last item only."""
    table = pa.Table.from_pylist([item.row for item in ITEMS[name]])
    if name.startswith("arc_"):
        return {"validation": table.slice(table.num_rows - 1), "test": table}
    return {"validation": table}


def write_tasks(directory: Path, location: Path | None = None) -> Path:
    for name in ITEMS:
        write_task(name, directory, tables_of(name), location=location or directory)
    return directory
