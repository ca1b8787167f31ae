"""What vLLM makes of a checkpoint directory; runs in vLLM's own environment, which has blockpruner
only as its plugin.

Run as a script: `python vllm_check.py check <checkpoint> <reference.json> <answer.json>`, or
`python vllm_check.py families <folder> <references> <answer.json>` for many: the reference of
<folder>/<name> is <references>/<name>.json. A reference has prompts, each with its greedy
continuation and the log-probability of every token but the first. The answer is a file since vLLM's
processes log to stdout.
"""

from __future__ import annotations

import gc
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

ROWS, PROMPT, NEW = 4, 256, 64
"""The shape of the speed measurement."""

OPTIONS = {"dtype": "float32", "max_model_len": 512, "enforce_eager": True}


def check(checkpoint: str, reference_file: str) -> dict[str, Any]:
    llm = load(checkpoint, **OPTIONS)
    return compare(llm, reference_file) | measure(llm, checkpoint)


def losses(checkpoint: str, reference_file: str) -> dict[str, Any]:
    """The mean NLL of some rows of tokens."""
    llm = load(checkpoint, **OPTIONS | {"dtype": "bfloat16", "max_model_len": 128})
    rows = json.loads(Path(reference_file).read_text())
    outputs = run(llm, rows, max_tokens=1, prompt_logprobs=0)
    said = [
        step[token].logprob
        for row, out in zip(rows, outputs, strict=True)
        for token, step in zip(row[1:], out.prompt_logprobs[1:], strict=True)
    ]
    return {"nll": -sum(said) / len(said)}


def nas(folder: str, references: str) -> dict[str, Any]:
    """Checkpoints that bring the code of their config."""
    return families(folder, references, trust_remote_code=True)


def families(folder: str, references: str, **more: Any) -> dict[str, Any]:
    """Of many small checkpoints, in this process: a start of vLLM's takes longer than they do."""
    from vllm.distributed import cleanup_dist_env_and_memory

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    found = {}
    for path in sorted(Path(folder).iterdir()):
        llm = load(
            str(path), **OPTIONS | {"max_model_len": 64, "max_num_batched_tokens": 128} | more
        )
        groups = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config.kv_cache_groups
        cached = sorted(int(name.split(".")[2]) for group in groups for name in group.layer_names)
        names = [
            name for name, _ in llm.apply_model(lambda model: list(model.named_parameters()))[0]
        ]
        found[path.name] = compare(llm, f"{references}/{path.name}.json") | {
            "cached": cached,
            "parameters": names,
        }
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()
    return found


def load(checkpoint: str, **options: Any) -> Any:
    from vllm import LLM

    return LLM(checkpoint, seed=0, enable_prefix_caching=False, disable_log_stats=True, **options)


def run(llm: Any, rows: list[list[int]], **options: Any) -> list[Any]:
    from vllm import SamplingParams

    settings = SamplingParams(temperature=0.0, ignore_eos=True, **options)
    return llm.generate([{"prompt_token_ids": row} for row in rows], settings, use_tqdm=False)


def compare(llm: Any, reference_file: str) -> dict[str, Any]:
    reference, differences = json.loads(Path(reference_file).read_text()), []
    asked = run(llm, [row["tokens"] for row in reference], max_tokens=1, prompt_logprobs=0)
    for row, output in zip(reference, asked, strict=True):
        steps = zip(row["tokens"][1:], output.prompt_logprobs[1:], row["logprobs"], strict=True)
        differences += [abs(step[token].logprob - wanted) for token, step, wanted in steps]
    new = len(reference[0]["tokens"]) - len(reference[0]["prompt"])
    greedy = run(llm, [row["prompt"] for row in reference], max_tokens=new)
    tokens = [
        row["prompt"] + list(output.outputs[0].token_ids)
        for row, output in zip(reference, greedy, strict=True)
    ]
    return {
        "max_logprob_difference": math.inf
        if any(map(math.isnan, differences))
        else max(differences),
        "greedy_tokens_equal": tokens == [row["tokens"] for row in reference],
    }


def measure(llm: Any, checkpoint: str) -> dict[str, Any]:
    rows = [[(7 * i + 13 * k) % 40000 + 100 for i in range(PROMPT)] for k in range(ROWS)]
    run(llm, rows, max_tokens=2)
    # the best of three each, since others may use the machine
    seconds = {
        1: math.inf,
        1 + NEW: math.inf,
    }
    for count in [*seconds] * 3:
        start = time.perf_counter()
        run(llm, rows, max_tokens=count)
        seconds[count] = min(seconds[count], time.perf_counter() - start)
    cache = llm.llm_engine.vllm_config.cache_config
    return {
        "kv_cache_tokens": cache.num_gpu_blocks * cache.block_size,
        "prefill_tokens_per_second": round(ROWS * PROMPT / seconds[1], 1),
        "decode_tokens_per_second": round(ROWS * NEW / (seconds[1 + NEW] - seconds[1]), 1),
        "megabytes": round(
            sum(path.stat().st_size for path in Path(checkpoint).glob("*.safetensors")) / 1e6, 1
        ),
    }


if __name__ == "__main__":
    what = {"check": check, "families": families, "nas": nas, "losses": losses}[sys.argv[1]]
    Path(sys.argv[4]).write_text(json.dumps(what(*sys.argv[2:4])))
