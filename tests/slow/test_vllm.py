"""Pruned SmolLM2 in vLLM: `make test-slow`, with an environment of vLLM's own."""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.scoring import TEXT
from blockpruner.checkpoints.nas import export_nas
from blockpruner.compensation.compensate import write_compensated
from blockpruner.compensation.rows import compensation_rows
from blockpruner.core.plan import Plan
from blockpruner.core.progress import SilentObserver
from blockpruner.core.settings import Compensate
from blockpruner.inputs.texts import read_texts
from blockpruner.inputs.tokenizers import load_tokenizer
from blockpruner.methods.apply import Pruning
from blockpruner.methods.healed import find_healed
from blockpruner.model.models import load_model
from tests.plans import SOMEONE, pruning

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


def pruned_models(dense: Path, plans: dict[str, Plan], folder: Path) -> dict[str, Pruning]:
    """The pruned ones of `plans`, and the smallest of them compensated."""
    result = {name: pruning(dense, plan) for name, plan in plans.items() if plan.removed}
    name, plain = max(result.items(), key=lambda item: item[1].plan.ratio)
    plan, wanted = replace(plain.plan, compensate="refit"), Compensate(method="refit", num_rows=64)
    rows = compensation_rows(read_texts(TEXT), load_tokenizer(dense), wanted, (), wanted.seq_len)
    write_compensated(folder, replace(plain, plan=plan), rows, wanted, SOMEONE, SilentObserver())
    healed = find_healed([folder], plain.identity)
    assert healed is not None, (folder / "compensate.json").read_text()
    return result | {f"{name} + refit": replace(plain, plan=plan, healed=healed)}


def test_vllm_says_what_the_model_in_memory_says(tmp_path, smollm2, plans):
    """At two ratios, and with other weights than the dense model's; what vLLM measures on the way is printed."""
    tokenizer, chosen = load_tokenizer(smollm2), pruned_models(smollm2, plans, tmp_path / "healed")
    references = {"dense": write_reference(load_model(smollm2, "float32", "cpu"), tokenizer, tmp_path / "dense.json")}
    reports = {"dense": ask("check", smollm2, references["dense"])}
    for name, made in chosen.items():
        references[name] = write_reference(made.prune_(made.load()), tokenizer, tmp_path / f"{name}.json")
        export_nas(made, tmp_path / f"nas {name}")
        reports[name] = ask("check", tmp_path / f"nas {name}", references[name])
    for name, report in reports.items():
        print(name, json.dumps(report))
        assert report["max_logprob_difference"] <= 1e-3
        assert report["greedy_tokens_equal"]
    tokens = {name: report["kv_cache_tokens"] for name, report in reports.items()}
    for name, made in chosen.items():
        assert tokens[name] / tokens["dense"] == pytest.approx(30 / (30 - made.plan.blocks["mha"]), rel=0.02)

    plain, name = sorted(chosen)[-2:]  # the check sees a difference: of a block, and of weights
    for path, other in ((tmp_path / f"nas {plain}", "dense"), (tmp_path / f"nas {name}", plain)):
        assert ask("check", path, references[other])["max_logprob_difference"] > 0.1
    answer = ask("serve", tmp_path / f"nas {name}", references[name])
    row = json.loads(references[name].read_text())[0]
    print(answer)
    assert answer["completion"] == tokenizer.decode(row["tokens"][len(row["prompt"]) :])
