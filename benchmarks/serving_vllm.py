"""One model in vLLM, for `benchmarks/serving.py`; runs in vLLM's own environment, without this project's packages.

`python -I serving_vllm.py <checkpoint> <dtype> <prompt tokens> <new tokens> <descriptor>` writes a line of JSON to the
descriptor once the model is loaded, and one for each line that it reads: vLLM's processes log to stdout.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import IO


def main(checkpoint: str, dtype: str, prompt: int, new: int, out: IO[str]) -> None:
    from vllm import LLM, SamplingParams

    llm = LLM(
        checkpoint, dtype=dtype, seed=0, max_model_len=prompt + new + 8, max_num_seqs=1, enable_prefix_caching=False,
        disable_log_stats=True, enforce_eager=True,
    )  # fmt: skip
    ids = {"prompt_token_ids": [100 + 7 * i for i in range(prompt)]}

    def seconds(count: int) -> float:
        settings = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=count)
        start = time.perf_counter()
        llm.generate([ids], settings, use_tqdm=False)
        return time.perf_counter() - start

    cache = llm.llm_engine.vllm_config.cache_config
    print(json.dumps({"kv_cache_tokens": cache.num_gpu_blocks * cache.block_size}), file=out, flush=True)
    for _ in sys.stdin:
        prefill = seconds(1)
        print(json.dumps({"prefill": prefill, "decode": seconds(1 + new) - prefill}), file=out, flush=True)


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # no process of its own for the engine
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), os.fdopen(int(sys.argv[5]), "w"))
