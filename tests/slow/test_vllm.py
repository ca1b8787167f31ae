"""Pruned SmolLM2 in vLLM: `make test-slow`, with an environment of vLLM's own."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks.serving import plans
from blockpruner.checkpoints.nas import export_nas
from blockpruner.inputs.tokenizers import load_tokenizer
from blockpruner.model.models import load_model, masked
from tests.plans import pruning

PROMPTS = ["The capital of France is", "Once upon a time, a little fox", "def fibonacci(n):\n"]
NEW_TOKENS = 24

pytestmark = pytest.mark.slow


def ask(what: str, checkpoint: Path, reference: Path) -> dict:
    """An answer of `vllm_check.py` in a fresh process of vLLM's environment, which sees blockpruner only as installed
    there."""
    answer = reference.with_name(f"{what}-{checkpoint.name}.json")
    command = [Path(os.environ["BLOCKPRUNER_VLLM"]) / "python", "-I", Path(__file__).with_name("vllm_check.py")]
    command += [what, checkpoint, reference, answer]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    log = answer.with_suffix(".log")
    with open(log, "w") as out:
        result = subprocess.run(command, stdout=out, stderr=out, env=environment, cwd=reference.parent, check=False)
    assert result.returncode == 0, log.read_text()[-3000:]
    return json.loads(answer.read_text())


def write_reference(model, tokenizer, path: Path) -> Path:
    """Greedy continuations by transformers, without a cache, and the log-probability of each token after the first."""
    rows = []
    for text in PROMPTS:
        ids = tokenizer(text, return_tensors="pt").input_ids
        tokens = model.generate(
            ids, attention_mask=torch.ones_like(ids), use_cache=False, do_sample=False, min_new_tokens=NEW_TOKENS,
            max_new_tokens=NEW_TOKENS, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        logits = model(tokens, use_cache=False).logits[0, :-1].double()
        logprobs = logits.log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
        rows.append({"prompt": ids[0].tolist(), "tokens": tokens[0].tolist(), "logprobs": logprobs.tolist()})
    path.write_text(json.dumps(rows))
    return path


def test_vllm_says_what_the_masked_model_says(tmp_path, smollm2):
    """At two ratios; what vLLM measures on the way is printed."""
    model, tokenizer = load_model(smollm2, "float32", "cpu"), load_tokenizer(smollm2)
    dense = write_reference(model, tokenizer, tmp_path / "dense.json")
    chosen = {name: plan for name, plan in plans().items() if name != "dense"}
    references = {}
    for name, plan in chosen.items():
        with masked(model, plan.mask):
            references[name] = write_reference(model, tokenizer, tmp_path / f"{name}.json")
    del model
    reports = {"dense": ask("check", smollm2, dense)}
    for name, plan in chosen.items():
        export_nas(pruning(smollm2, plan), tmp_path / f"nas {name}")
        reports[name] = ask("check", tmp_path / f"nas {name}", references[name])
    for name, report in reports.items():
        print(name, json.dumps(report))
        assert report["max_logprob_difference"] <= 1e-3
        assert report["greedy_tokens_equal"]
    tokens = {name: report["kv_cache_tokens"] for name, report in reports.items()}
    for name, plan in chosen.items():
        assert tokens[name] / tokens["dense"] == pytest.approx(30 / (30 - plan.blocks["mha"]), rel=0.02)

    name = min(chosen)
    assert ask("check", tmp_path / f"nas {name}", dense)["max_logprob_difference"] > 0.1  # the check sees a difference
    answer = ask("serve", tmp_path / f"nas {name}", references[name])
    row = json.loads(references[name].read_text())[0]
    print(answer)
    assert answer["completion"] == tokenizer.decode(row["tokens"][len(row["prompt"]) :])
