"""Is a pruned model a good draft of its dense model? Assisted generation, in turns with the dense model alone.

    python -m benchmarks.draft CHECKPOINT [CHECKPOINT ...] [--tokens 3] [--threads 2]

A draft proposes a few tokens, and the dense model checks them in one pass (arXiv 2211.17192). Its output stays what it
is. Each checkpoint is an `hf` export of a target; the dense model is `data/models/smollm2`. Prompts are the first 64
tokens of held-out rows, and 64 tokens follow, greedily. Prints for each draft: the tokens that one pass of the dense
model yields, what the draft's pass costs in passes of the dense model, the speed-up that follows from both, and the
one that was measured, with the range over prompts. Needs `dvc repro`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.scoring import SMOLLM2, TEXT
from blockpruner.evaluation.perplexity import held_out
from blockpruner.evaluation.settings import Perplexity
from blockpruner.inputs.texts import read_texts
from blockpruner.inputs.tokenizers import load_tokenizer
from blockpruner.model.models import load_model, set_threads

PROMPTS, PROMPT, NEW = 8, 64, 64


def timed(model: PreTrainedModel, ids: torch.Tensor, **options: Any) -> tuple[float, torch.Tensor, int]:
    """Seconds, the new tokens, and how often the model ran."""
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    hook = model.register_forward_pre_hook(count)
    start = time.perf_counter()
    found = model.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, **options)
    seconds = time.perf_counter() - start
    hook.remove()
    return seconds, found[0, PROMPT:], calls


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--tokens", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    set_threads(given.threads)
    texts, wanted = read_texts(TEXT.parent / "perplexity.parquet"), Perplexity(seq_len=PROMPT, packing="documents")
    rows = held_out(load_tokenizer(SMOLLM2), texts, wanted).rows[:PROMPTS]
    dense = load_model(SMOLLM2, "float32")
    print("| draft | tokens a pass | cost of its pass | expected | measured |\n|---|---:|---:|---:|---:|")
    for path in given.checkpoints:
        draft = load_model(path, "float32", trust_remote_code=True)
        draft.generation_config.num_assistant_tokens = given.tokens
        draft.generation_config.num_assistant_tokens_schedule = "constant"
        draft.generation_config.assistant_confidence_threshold = 0.0
        yields, costs, ratios = [], [], []
        for row in rows:
            ids = torch.tensor([row], device=dense.device)
            alone, plain, _ = timed(dense, ids)
            small, _, _ = timed(draft, ids)
            both, assisted, calls = timed(dense, ids, assistant_model=draft)
            assert torch.equal(plain, assisted), "assisted generation gave other tokens"
            yields.append(NEW / calls)
            costs.append(small / alone)
            ratios.append(alone / both)
        each, cost = median(yields), median(costs)
        expected = each / (1 + given.tokens * cost)
        print(
            f"| {path} | {each:.2f} | {cost:.2f} | {expected:.2f}× | "
            f"{median(ratios):.2f}× [{min(ratios):.2f}, {max(ratios):.2f}] |"
        )


if __name__ == "__main__":
    main()
