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
from blockpruner.evaluation.benchmarks import ACCURACIES, BENCHMARKS
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

REPORTED = 4
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
    batch_size: int = BATCH_SIZE,
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
    row = BENCHMARKS[task]
    is_generated = row.kind == "generate_until"
    # where they draw progress bars
    with (
        errors_only("lm_eval", "datasets"),
        redirect_stderr(io.StringIO()),
    ):
        loaded = _load(task, task_dir)
        definition = loaded["tasks"][task]
        special = None if bos else False  # None: as the tokenizer does by itself
        options = {"batch_size": batch_size, "softmax_dtype": "float32", "add_bos_token": special}
        lm = _Harness(advance, pretrained=model, tokenizer=tokenizer, **options)
        raw = harness_evaluate(lm=lm, task_dict=loaded, limit=limit)
    assert raw is not None
    results: dict[str, Any] = json.loads(json.dumps(raw, default=handle_non_serializable))
    samples = [sample for sample in results.pop("samples")[task] if sample["filter"] == row.filter]
    items = []
    for sample in samples:
        choices = definition.doc_to_choice(sample["doc"]) if row.has_choices else []
        gold = _gold(definition, sample["doc"], choices) if row.has_choices else None
        scored = [] if is_generated else [float(found[0]) for found in sample["filtered_resps"]]
        items.append(
            {
                "task": task,
                "item": sample["doc_id"],
                "gold": gold,
                "loglikelihoods": scored,
                "prompt_hash": sample["prompt_hash"],
                "response": sample["resps"][0][0] if is_generated else None,
                "p_gold": None if is_generated else row.confidence(scored, gold, choices),
                **{metric: sample.get(metric) for metric in ACCURACIES},
            }
        )
    found = {
        key.partition(",")[0]: None if value == "N/A" else value
        for key, value in results["results"][task].items()
        if key.endswith(f",{row.filter}")
    }
    if row.has_choices:
        found = {
            key: found.get(key) for key in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")
        }
    return TaskResult(task, found, pa.Table.from_pylist(items, schema=ITEMS))


class _Harness(HFLM):  # type: ignore[misc]
    """lm-eval's own model class, reporting progress instead of drawing a bar."""

    def __init__(self, advance: Callable[[int, int], None], **kwargs: Any) -> None:
        super().__init__(**kwargs)
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
        texts = (given + rest for _, given, rest in requests)
        require_embedded(texts, self.tokenizer, self.model.config.to_dict())
        whole, found = super()._loglikelihood_tokens, list[Any]()
        ordered = sorted(
            range(len(requests)), key=lambda n: -len(requests[n][1]) - len(requests[n][2])
        )

        def score(part: slice) -> None:
            self.batch_size_per_gpu = self._rows
            found.extend(whole([requests[n] for n in ordered[part]], disable_tqdm=True))

        self._over(len(requests), REPORTED, score)
        return [answer for _, answer in sorted(zip(ordered, found, strict=True))]

    def _model_generate(
        self, context: Any, max_length: int, stop: list[str], *, attention_mask: Any, **kwargs: Any
    ) -> Any:
        rows: list[Any] = []
        whole = super()._model_generate
        require_embedded(context.tolist(), self.tokenizer, self.model.config.to_dict())

        def generate(part: slice) -> None:
            rows.extend(
                whole(
                    context[part], max_length, stop, attention_mask=attention_mask[part], **kwargs
                )
            )

        self._over(len(context), 1, generate)
        return pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id)

    def _over(self, count: int, batches: int, work: Callable[[slice], None]) -> None:
        """Do the work over so many requests, some batches at a time."""
        done = 0
        while done < count:
            size = min(self._rows * batches, count - done)
            if accelerator.fits(partial(work, slice(done, done + size)), is_least=self._rows == 1):
                done, self._done = done + size, self._done + size
                self._advance(self._done, self._total)
            else:
                self._rows = -(-self._rows // 2)


def _load(task: str, task_dir: Path) -> Any:
    """lm-eval's task dictionary of one task."""
    require_stock(task, task_dir)
    loaded = TaskManager(include_path=str(task_dir / task), include_defaults=False).load([task])
    aggregation = loaded["tasks"][task].aggregation()
    # lm-eval bootstraps the standard error of this very function: minutes for LAMBADA, in forks of
    # this process
    aggregation.update(
        {metric: partial(how) for metric, how in aggregation.items() if how is perplexity}
    )
    return loaded


def _gold(definition: Any, doc: dict[str, Any], choices: list[str]) -> int:
    """Index of the right choice, as lm-eval's multiple_choice reads it. It comes from the target,
    or from the text where the choices are contexts (WinoGrande). A string is looked up among the
    choices. A list holds one index (AQuA-RAT)."""
    gold = (
        definition.doc_to_text(doc) if definition.multiple_input else definition.doc_to_target(doc)
    )
    if isinstance(gold, list):
        (gold,) = gold
    return choices.index(gold) if isinstance(gold, str) else int(gold)
