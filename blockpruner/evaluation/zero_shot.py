"""Zero-shot scores through lm-eval. No other module imports lm-eval.

Decides how lm-eval is run (its own `hf` model class over a model in memory, stock prompts, no
few-shot examples) and what is kept of an item. Tasks come from files that `tasks.write_task` wrote.
The numbers are those of

    lm_eval --model hf --tasks <task>
        --model_args pretrained=<checkpoint>,trust_remote_code=True,softmax_dtype=float32
        --include_path <task_dir> --limit <limit> --batch_size 8

(with add_bos_token=False among the model_args, where `evaluate.zero_shot.bos` is false)

to the item. Loglikelihoods agree up to rounding: another batch size or device may turn a near-tie.
"""

import io
import json
import math
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from blockpruner.core.errors import extra
from blockpruner.core.progress import errors_only
from blockpruner.evaluation.benchmarks import ACCURACIES, BENCHMARKS, Benchmark
from blockpruner.evaluation.store import ITEMS
from blockpruner.evaluation.tasks import require_stock
from blockpruner.inputs.calibration import require_embedded
from blockpruner.model import accelerator

with extra("eval"):
    from lm_eval.api.metrics import perplexity
    from lm_eval.evaluator import evaluate as harness_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import handle_non_serializable

BATCH_SIZE = 8
"""Requests at once; half as many where a device's memory does not hold them."""

BATCHES_PER_REPORT = 4
"""Batches between two reports of progress."""


@dataclass(frozen=True)
class TaskResult:
    task: str
    scores: dict[str, float | None]
    """lm-eval's metrics over all items, each with its standard error <metric>_stderr: null for a
    single item and for a metric that is no mean. Where there are choices, they are acc and
    acc_norm; null where the task lacks one."""
    items: pa.Table
    """In the schema ITEMS."""


def evaluate(
    model: PreTrainedModel,
    tokenizer: Any,
    task: str,
    task_dir: Path,
    limit: int | None = None,
    advance: Callable[[int, int], None] = lambda done, total: None,
    bos: bool = True,
) -> TaskResult:
    """Score a model on the first `limit` items of one task (None: all).

    Args:
        task_dir: holds <task>/<task>.yaml.
        advance: called with (requests done, requests in all). An item has a request for each
            choice.
        bos: whether texts get the special tokens that the tokenizer adds.
    """
    benchmark = BENCHMARKS[task]
    # lm-eval draws progress bars on standard error.
    with errors_only("lm_eval", "datasets"), redirect_stderr(io.StringIO()):
        loaded = _load(task, task_dir)
        harness = _Harness(
            advance,
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=BATCH_SIZE,
            softmax_dtype="float32",
            # None: the tokenizer decides.
            add_bos_token=None if bos else False,
        )
        raw = harness_evaluate(lm=harness, task_dict=loaded, limit=limit)
    assert raw is not None
    results = json.loads(json.dumps(raw, default=handle_non_serializable))
    definition = loaded["tasks"][task]
    items = []
    for sample in results["samples"][task]:
        # lm-eval repeats an item for each of its filters.
        if sample["filter"] == benchmark.filter:
            items.append(_item(benchmark, definition, sample))
    scores = _scores(benchmark, results["results"][task])
    return TaskResult(task, scores, pa.Table.from_pylist(items, schema=ITEMS))


def _item(benchmark: Benchmark, definition: Any, sample: dict[str, Any]) -> dict[str, Any]:
    """A row of the schema ITEMS."""
    item = {"task": benchmark.name, "item": sample["doc_id"], "prompt_hash": sample["prompt_hash"]}
    for metric in ACCURACIES:
        item[metric] = sample.get(metric)
    if benchmark.kind == "generate_until":
        return {**item, "loglikelihoods": [], "response": sample["resps"][0][0]}
    gold, choices = None, []
    if benchmark.has_choices:
        choices = definition.doc_to_choice(sample["doc"])
        gold = _gold(definition, sample["doc"], choices)
    loglikelihoods = [float(response[0]) for response in sample["filtered_resps"]]
    p_gold = benchmark.confidence(loglikelihoods, gold, choices)
    return {**item, "gold": gold, "loglikelihoods": loglikelihoods, "p_gold": p_gold}


def _scores(benchmark: Benchmark, results: dict[str, Any]) -> dict[str, float | None]:
    """The metrics of the benchmark's filter, from lm-eval's keys "<metric>,<filter>"."""
    scores = {}
    for key, value in results.items():
        metric, _, filter_name = key.partition(",")
        if filter_name == benchmark.filter:
            scores[metric] = None if value == "N/A" else value
    if not benchmark.has_choices:
        return scores
    metrics = ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")
    return {metric: scores.get(metric) for metric in metrics}


class _Harness(HFLM):  # type: ignore[misc]
    """lm-eval's own model class, reporting progress instead of drawing a bar."""

    def __init__(self, advance: Callable[[int, int], None], **options: Any) -> None:
        super().__init__(**options)
        self._advance = advance
        self._done = self._total = 0
        self._rows = self.batch_size

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        self._total = len(requests)
        return super().generate_until(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> Any:
        self._total = len(requests)
        texts = (context + continuation for _, context, continuation in requests)
        require_embedded(texts, self.tokenizer, self.model.config.to_dict())
        score_tokens = super()._loglikelihood_tokens

        def length(number: int) -> int:
            _, context, continuation = requests[number]
            return len(context) + len(continuation)

        # The longest requests come first: if they fit into memory, all do.
        longest_first = sorted(range(len(requests)), key=length, reverse=True)
        answers: list[Any] = []

        def score(span: slice) -> None:
            self.batch_size_per_gpu = self._rows
            batch = [requests[number] for number in longest_first[span]]
            answers.extend(score_tokens(batch, disable_tqdm=True))

        self._in_batches(len(requests), BATCHES_PER_REPORT, score)
        answer_by_number = dict(zip(longest_first, answers, strict=True))
        return [answer_by_number[number] for number in range(len(requests))]

    def _model_generate(
        self, context: Any, max_length: int, stop: list[str], *, attention_mask: Any, **options: Any
    ) -> Any:
        require_embedded(context.tolist(), self.tokenizer, self.model.config.to_dict())
        generate_rows = super()._model_generate
        rows: list[Any] = []

        def generate(span: slice) -> None:
            options["attention_mask"] = attention_mask[span]
            rows.extend(generate_rows(context[span], max_length, stop, **options))

        self._in_batches(len(context), 1, generate)
        return pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id)

    def _in_batches(self, count: int, batches: int, work: Callable[[slice], None]) -> None:
        """Do the work over `count` requests, some batches at a time. A batch that does not fit into
        memory is halved."""
        start = 0
        while start < count:
            size = min(self._rows * batches, count - start)
            span = slice(start, start + size)
            if accelerator.fits(partial(work, span), is_least=self._rows == 1):
                start += size
                self._done += size
                self._advance(self._done, self._total)
            else:
                self._rows = math.ceil(self._rows / 2)


def _load(task: str, task_dir: Path) -> Any:
    """lm-eval's task dictionary of one task."""
    require_stock(task, task_dir)
    loaded = TaskManager(include_path=str(task_dir / task), include_defaults=False).load([task])
    aggregation = loaded["tasks"][task].aggregation()
    # lm-eval bootstraps the standard error of this very function: minutes for LAMBADA, in forks of
    # this process. It does not know the function in a `partial`.
    for metric, function in aggregation.items():
        if function is perplexity:
            aggregation[metric] = partial(function)
    return loaded


def _gold(definition: Any, doc: dict[str, Any], choices: list[str]) -> int:
    """Index of the right choice, as lm-eval's multiple_choice reads it."""
    # Where the choices are contexts (WinoGrande), the text holds the answer.
    read = definition.doc_to_text if definition.multiple_input else definition.doc_to_target
    gold = read(doc)
    # A list holds one index (AQuA-RAT).
    if isinstance(gold, list):
        (gold,) = gold
    return choices.index(gold) if isinstance(gold, str) else int(gold)
