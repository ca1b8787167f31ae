"""Real weights through the Qwen2 rows: SmolLM2 with query, key and value biases of zero is a Qwen2 model.

Needs `dvc repro fetch@smollm2`. Not Qwen's own weights, but their path: family row, engine, search.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from blockpruner.core.blocks import DENSE, all_blocks
from blockpruner.inputs.calibration import pack_rows
from blockpruner.inputs.texts import read_texts
from blockpruner.inputs.tokenizers import load_tokenizer
from blockpruner.model.models import load_model
from blockpruner.scoring.engine import Engine
from blockpruner.scoring.work import Task

pytestmark = pytest.mark.slow

REMOVALS = 4


def qwen2_form(llama, directory):
    """The same weights as a Qwen2 checkpoint."""
    directory.mkdir()
    config = json.loads((llama / "config.json").read_text())
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    head = config.get("head_dim") or config["hidden_size"] // heads
    weights = load_file(llama / "model.safetensors")
    for layer in range(layers):
        for name, rows in (("q", heads), ("k", config["num_key_value_heads"]), ("v", config["num_key_value_heads"])):
            weights[f"model.layers.{layer}.self_attn.{name}_proj.bias"] = torch.zeros(rows * head)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    config |= {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    for name in ("head_dim", "attention_bias", "mlp_bias", "pretraining_tp"):
        config.pop(name, None)
    (directory / "config.json").write_text(json.dumps(config))
    for path in llama.glob("tokenizer*"):
        shutil.copy(path, directory / path.name)
    return directory


def greedy(checkpoint, rows):
    """The blocks removed one after another, and every loss on the way."""
    engine = Engine(load_model(checkpoint, "float32", "cpu"))
    removed, order, losses = DENSE, [], []
    for _ in range(REMOVALS):
        masks = [removed | {block} for block in all_blocks(engine.layers) if block not in removed]
        found = dict.fromkeys(masks, 0.0)
        for unit in engine.run([Task(span, tuple(masks)) for span in engine.row_batches(rows, range(len(rows)))], rows):
            found[unit.mask] += sum(unit.loss)
        losses.append(list(found.values()))
        best = min(found, key=found.__getitem__)
        order.append(*(best - removed))
        removed = best
    return order, torch.tensor(losses[0])


def test_the_qwen2_form_gives_the_same_sequence(tmp_path, smollm2):
    texts = read_texts(smollm2.parents[1] / "sources/smollm2/calibration.parquet")
    rows = pack_rows(texts[:1], load_tokenizer(smollm2), 128, "joined").rows[:2]
    (order, losses), (other, others) = greedy(smollm2, rows), greedy(qwen2_form(smollm2, tmp_path / "qwen2"), rows)
    assert order == other
    assert torch.equal(losses, others)
