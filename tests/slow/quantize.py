"""Quantizes a pruned checkpoint; runs in the quantizers' own environment, which has no blockpruner.

Run as a script: `python quantize.py <checkpoint> <folder> <answer.json>`. The answer has the mean
NLL of some rows by the model as it is, and by each quantized one. Those of llm-compressor are saved
at <folder>/<scheme>.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TorchAoConfig

ROWS = torch.randint(1, 257, (16, 64), generator=torch.Generator().manual_seed(1))


def load(checkpoint, **options):
    return AutoModelForCausalLM.from_pretrained(
        checkpoint, trust_remote_code=True, dtype=torch.bfloat16, **options
    )


def nll(model):
    with torch.no_grad():
        return float(model(ROWS, labels=ROWS).loss)


def compressed(checkpoint, folder):
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    torch.Tensor.pin_memory = lambda self, *_: self  # AWQ pins memory, and there is no GPU
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    data = Dataset.from_dict(
        {"input_ids": ROWS.tolist(), "attention_mask": torch.ones_like(ROWS).tolist()}
    )
    all_but_head = {"targets": "Linear", "ignore": ["lm_head"]}
    recipes = {
        "FP8": [QuantizationModifier(scheme="FP8_DYNAMIC", **all_but_head)],
        "W8A8": [GPTQModifier(scheme="W8A8", **all_but_head)],
        "W4A16": [GPTQModifier(scheme="W4A16", **all_but_head)],
        "AWQ": [AWQModifier(), QuantizationModifier(scheme="W4A16_ASYM", **all_but_head)],
    }
    for name, recipe in recipes.items():
        model = load(checkpoint)
        given = {
            "recipe": recipe,
            "max_seq_length": 64,
            "num_calibration_samples": 16,
            "tokenizer": tokenizer,
        }
        oneshot(
            model=model,
            dataset=None if name == "FP8" else data,
            trust_remote_code_model=True,
            **given,
        )
        yield name, nll(model)
        model.save_pretrained(f"{folder}/{name}", save_compressed=True)
        tokenizer.save_pretrained(f"{folder}/{name}")


def loaded(checkpoint):
    from torchao.quantization import Int8WeightOnlyConfig

    four = {"bnb_4bit_compute_dtype": torch.bfloat16, "bnb_4bit_quant_type": "nf4"}
    configs = {
        "torchao int8": TorchAoConfig(Int8WeightOnlyConfig()),
        "bitsandbytes int8": BitsAndBytesConfig(load_in_8bit=True),
        "bitsandbytes nf4": BitsAndBytesConfig(load_in_4bit=True, **four),
    }
    for name, config in configs.items():
        yield name, nll(load(checkpoint, quantization_config=config, device_map="cpu"))


if __name__ == "__main__":
    source, out, answer = sys.argv[1:]
    found = {"none": nll(load(source)), **dict(loaded(source)), **dict(compressed(source, out))}
    Path(answer).write_text(json.dumps(found))
