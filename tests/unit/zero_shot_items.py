"""A few invented items for every benchmark, with the prompts that lm-eval's stock tasks must make
of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from blockpruner.evaluation.benchmarks import BENCHMARKS, MMLU_SUBJECTS
from blockpruner.evaluation.tasks import write_task

CHOICES = [name for name, row in BENCHMARKS.items() if row.has_choices]


@dataclass(frozen=True)
class Item:
    """An item of a task with choices."""

    row: dict[str, Any]
    """In the data set's columns."""
    contexts: tuple[str, ...]
    """One for each choice, as are the continuations, which are scored."""
    continuations: tuple[str, ...]
    choices: tuple[str, ...]
    """The texts whose length normalises."""
    gold: int


def _item(row: dict[str, Any], context: str, choices: tuple[str, ...], gold: int) -> Item:
    return Item(
        row, (context,) * len(choices), tuple(f" {choice}" for choice in choices), choices, gold
    )


def _piqa(goal: str, solutions: tuple[str, str], label: int) -> Item:
    row = {"goal": goal, "sol1": solutions[0], "sol2": solutions[1], "label": label}
    return _item(row, f"Question: {goal}\nAnswer:", solutions, label)


def _winogrande(before: str, after: str, options: tuple[str, str], answer: int) -> Item:
    row = {
        "sentence": f"{before}_{after}",
        "option1": options[0],
        "option2": options[1],
        "answer": str(answer + 1),
    }
    contexts = tuple(before + option for option in options)
    return Item(row, contexts, (f" {after.strip()}",) * 2, contexts, answer)


def _hellaswag(
    activity: str, before: str, after: str, raw: list[str], label: int, context: str, *read: str
) -> Item:
    row = {
        "activity_label": activity,
        "ctx_a": before,
        "ctx_b": after,
        "endings": raw,
        "label": str(label),
    }
    return _item(row, f"{activity}: {context}", read, label)


def _arc(question: str, choices: tuple[str, ...], labels: str, gold: int) -> Item:
    shown = {"text": list(choices), "label": list(labels)}
    row = {"id": question, "question": question, "choices": shown, "answerKey": labels[gold]}
    return _item(row, f"Question: {question}\nAnswer:", choices, gold)


def _openbookqa(stem: str, choices: tuple[str, ...], gold: int) -> Item:
    row = {
        "question_stem": stem,
        "choices": {"text": list(choices), "label": list("ABCD")},
        "answerKey": "ABCD"[gold],
    }
    return _item(row, stem, choices, gold)


def _truthfulqa(question: str, choices: tuple[str, ...]) -> Item:
    row = {
        "question": question,
        "mc1_targets": {"choices": list(choices), "labels": [1] + [0] * (len(choices) - 1)},
    }
    return _item(row, f"{TRUTHFULQA_PROMPT}\n\nQ: {question}\nA:", choices, 0)


def _race(article: str, problems: list[dict[str, Any]], context: str, gold: int) -> Item:
    return _item(
        {"article": article, "problems": repr(problems)},
        context,
        tuple(problems[-1]["options"]),
        gold,
    )


def _swag(start: str, endings: tuple[str, ...], gold: int) -> Item:
    row = {
        "startphrase": start,
        **{f"ending{i}": ending for i, ending in enumerate(endings)},
        "label": gold,
    }
    return _item(row, start, endings, gold)


def _aqua(question: str, choices: tuple[str, ...], gold: int) -> Item:
    return _item(
        {"query": question, "choices": list(choices), "gold": [gold]}, question, choices, gold
    )


def _mmlu(subject: str, question: str, choices: tuple[str, ...], gold: int) -> Item:
    row = {"question": f" {question}", "subject": subject, "choices": list(choices), "answer": gold}
    lines = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", choices, strict=True))
    head = f"The following are multiple choice questions (with answers) about {subject}."
    return _item(row, f"{head}\n\n{question}\n{lines}\nAnswer:", tuple("ABCD"), gold)


TRUTHFULQA_PROMPT = """Q: What is human life expectancy in the United States?
A: Human life expectancy in the United States is 78 years.

Q: Who was president of the United States in 1955?
A: Dwight D. Eisenhower was president of the United States in 1955.

Q: Which party did he belong to?
A: He belonged to the Republican Party.

Q: What is the square root of banana?
A: I have no comment.

Q: How does a telescope work?
A: Telescopes use lenses or mirrors to focus light and make objects appear closer.

Q: Where were the 1992 Olympics held?
A: The 1992 Olympics were held in Barcelona, Spain."""

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
            "Juggling",
            "A man stands [header] still.",
            "he",
            [
                "throws balls [title] up.",
                "eats  soup.",
                "is gone.",
                "sings a very long song to a cat.",
            ],
            0,
            "A man stands still. He",
            "throws balls. up.",
            "eats soup.",
            "is gone.",
            "sings a very long song to a cat.",
        ),
        _hellaswag(
            "Cooking",
            "Water boils.",
            "",
            ["Pasta goes in.", "It flies.", "No.", "The pot sings."],
            3,
            "Water boils.",
            "Pasta goes in.",
            "It flies.",
            "No.",
            "The pot sings.",
        ),
    ],
    "arc_easy": [
        _arc("What is ice?", ("Frozen water", "Hot air", "A metal", "Sand"), "ABCD", 0),
        _arc("Which is a planet?", ("Moon", "Mars", "Sun"), "123", 1),
        _arc("What do plants need?", ("Light", "Cars", "Books", "Salt", "Noise"), "ABCDE", 0),
    ],
    "arc_challenge": [
        _arc(
            "Why is the sky blue?",
            ("It is painted", "Light scatters", "It is wet", "Birds"),
            "ABCD",
            1,
        ),
        _arc(
            "What falls faster in a vacuum?", ("A feather", "A stone", "Neither", "Air"), "1234", 2
        ),
    ],
    "openbookqa": [
        _openbookqa("Ice is", ("hot", "frozen water", "a kind of metal", "air"), 1),
        _openbookqa("A plant needs", ("light", "cars", "books", "noise in the night"), 0),
    ],
    "truthfulqa_mc1": [
        _truthfulqa("Is the sun cold?", ("No, it is hot.", "Yes")),
        _truthfulqa("Can pigs fly?", ("They cannot.", "Yes, at night.", "Some can.")),
    ],
    "race": [
        _race(
            "Tom has a dog.",
            [
                {
                    "question": "Who has a dog?",
                    "answer": "B",
                    "options": ["Ann", "Tom", "Eve", "Al"],
                },
                {
                    "question": "The dog is  _  .",
                    "answer": "A",
                    "options": ["Tom's", "Ann's", "red", "old"],
                },
                {
                    "question": "What has Tom?",
                    "answer": "C",
                    "options": ["A cat", "A hat", "A dog", "No pet at all"],
                },
            ],
            "Article: Tom has a dog.\n\nQuestion: Who has a dog?\nAnswer: Tom\nThe dog is"
            " Tom's\nWhat has Tom?",
            2,
        ),
        _race(
            "It rained.",
            [{"question": "It was", "answer": "D", "options": ["dry", "hot", "far away", "wet"]}],
            "Article: It rained.\n\nIt was",
            3,
        ),
    ],
    "swag": [
        _swag(
            "She opens the door. She",
            ("walks in.", "is a door.", "eats it.", "sings to the roof for an hour."),
            0,
        ),
        _swag("A dog barks. It", ("reads.", "wants out.", "flies off.", "is a cat."), 1),
    ],
    "agieval_aqua_rat": [
        _aqua(
            "Q: What is 2 + 3? Answer Choices:\nA:", ("(A)4", "(B)5", "(C)16", "(D)7", "(E)8"), 1
        ),
        _aqua("Q: Half of 6? Answer Choices:\nA:", ("(A)3", "(B)2", "(C)1", "(D)60", "(E)0"), 0),
    ],
    **{
        f"mmlu_{subject}": [
            _mmlu(
                subject.replace("_", " "),
                "The Nile is",
                ("a hill", "a river", "a city", "a sea"),
                1,
            ),
            _mmlu(
                subject.replace("_", " "), "A week has", ("7 days", "6 days", "5 days", "8 days"), 0
            ),
        ]
        for subject in MMLU_SUBJECTS
    },
}
"""Of the tasks with choices."""

PASSAGES = [
    ("The cat sat on the", " mat"),
    ('"It is so," he said to them', " twice."),
    ("Up and", " down"),
]
"""Of lambada_openai: all but the last word, and that."""

SUMS = [
    ("What is 40 + 2?", "40 + 2 = <<40+2=42>>42\n#### 42"),
    ("How many are 6 twos?", "6 * 2 = 12\n#### 12"),
]
"""Of gsm8k: question and answer."""

TEXTS = {
    "lambada_openai": [{"text": context + word} for context, word in PASSAGES],
    "gsm8k": [{"question": question, "answer": answer} for question, answer in SUMS],
}
"""Rows of the tasks without choices."""


def tables_of(name: str) -> dict[str, pa.Table]:
    """The items as the split that is scored. A task's other split holds the last item only."""
    table = pa.Table.from_pylist(
        [item.row for item in ITEMS[name]] if name in ITEMS else TEXTS[name]
    )
    if len(BENCHMARKS[name].splits) == 2:
        return {"validation": table.slice(table.num_rows - 1), "test": table}
    return dict.fromkeys(BENCHMARKS[name].splits, table)


def write_tasks(directory: Path, location: Path | None = None) -> Path:
    for name in BENCHMARKS:
        write_task(name, directory, tables_of(name), location=location or directory)
    return directory
