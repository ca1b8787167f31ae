"""Verification of a checkpoint by transformers, in a fresh process that knows nothing of
blockpruner.

Run as a script: `python verify.py <checkpoint> <reference.safetensors> <tolerance>`. It prints one
JSON object, and exits 0 if the checkpoint agrees with the masked dense model, 1 if not. It imports
torch and transformers alone.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

ENGINE = "transformers"
"""The Python module that runs the checkpoint."""


@contextmanager
def in_float32(*models: nn.Module) -> Iterator[None]:
    """Within, these models compute in float32, unless they are of float64: bf16 and fp16 may be a
    hundred times as slow on a CPU. The weights keep their dtype. Each module has float32 copies of
    its own weights while it runs, so the whole model is never held in float32."""
    narrow_modules = []
    for model in models:
        for module in model.modules():
            weights = module.parameters(recurse=False)
            if any(weight.dtype != torch.float64 for weight in weights):
                narrow_modules.append(module)
    for module in narrow_modules:
        module.forward = partial(_forward_in_float32, module)
    try:
        yield
    finally:
        for module in narrow_modules:
            del module.forward


def _forward_in_float32(module: nn.Module, *inputs: Any, **options: Any) -> Any:
    # Linear attentions read the weights of their convolutions themselves.
    convolutions = [child for child in module.children() if isinstance(child, nn.Conv1d)]
    owners = [module, *convolutions]
    narrow_parameters = [dict(owner._parameters) for owner in owners]
    for owner, parameters in zip(owners, narrow_parameters, strict=True):
        for name, weight in parameters.items():
            if weight is not None:
                wide = weight.float()
                owner._parameters[name] = nn.Parameter(wide, requires_grad=False)
    try:
        return type(module).forward(module, *inputs, **options)
    finally:
        for owner, parameters in zip(owners, narrow_parameters, strict=True):
            owner._parameters.update(parameters)


@torch.inference_mode()
def stepped(
    model: PreTrainedModel, tokens: Tensor, prompt: int, length: int
) -> tuple[Tensor, Tensor, Any]:
    """A pass over the first `prompt` tokens at once, then over one token at a time. Tokens beyond
    `tokens` [B, T] are the likeliest ones. Returns logits [B, length, V], all tokens [B, length],
    and the KV cache."""
    out = model(tokens[:, :prompt], use_cache=True)
    logits = [out.logits]
    for position in range(prompt, length):
        if position == tokens.shape[1]:
            next_tokens = out.logits[:, -1:].argmax(-1)
            tokens = torch.cat([tokens, next_tokens], dim=1)
        token = tokens[:, position : position + 1]
        out = model(token, cache=out.cache, use_cache=True)
        logits.append(out.logits)
    return torch.cat(logits, dim=1), tokens, out.cache


def verify(checkpoint: str, reference_file: str, tolerance: float) -> dict[str, object]:
    """Compare with the reference: logits of prompt and greedy continuation in one pass, the same
    fed token by token through the KV cache, greedy tokens, and the attentions that hold a cache.

    No logit through the cache may differ by more than the tolerance from the reference's own
    through the cache. At half the positions, none may differ from those of one pass: elsewhere
    rounding may choose another expert of a mixture. Tokens are reported but not required: on
    another device, a near-tie may fall the other way.
    """
    reference = load_file(reference_file)
    tokens = reference["tokens"]
    expected = reference["logits"]
    expected_cached = reference["cached"]
    # The default kernel of mixtures has no float64.
    experts = "eager" if expected.dtype is torch.float64 else None
    # The caller has checked that the code of a checkpoint is its own.
    has_code = any(Path(checkpoint).glob("*.py"))
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint,
        trust_remote_code=has_code,
        dtype="auto",
        local_files_only=True,
        experts_implementation=experts,
    ).eval()
    prompt = int(reference["prompt"])
    length = tokens.shape[1]
    with torch.inference_mode(), in_float32(model):
        logits = model(tokens, use_cache=False).logits
        cached, _, cache = stepped(model, tokens, prompt, length)
        greedy = _generate(model, tokens[:, :prompt], length - prompt)
    difference = _distance(logits, expected)
    difference_cached = _distance(cached, expected_cached)
    difference_to_whole = _distance(cached, expected)
    differences = {
        "max_logit_difference": difference.max().item(),
        "max_logit_difference_cached": difference_cached.max().item(),
        "median_logit_difference_of_cached_to_whole": difference_to_whole.median().item(),
    }
    largest_logit = expected.double().abs().max().item()
    limit = tolerance * max(1.0, largest_logit)
    slots, filled_slots = _cache_slots(cache)
    attentions = int(reference["attentions"])
    is_imported = "blockpruner" in sys.modules
    return {
        "engine": ENGINE,
        **differences,
        "tolerance": limit,
        "greedy_tokens_equal": torch.equal(greedy, tokens),
        "cache_layers": slots,
        "cache_layers_expected": attentions,
        "class": type(model).__name__,
        "blockpruner_imported": is_imported,
        "ok": (
            all(difference <= limit for difference in differences.values())
            and filled_slots == slots == attentions
            and not is_imported
        ),
    }


def _distance(logits: Tensor, expected: Tensor) -> Tensor:
    """The largest difference of a logit at each position, [B, T]."""
    return (logits.double() - expected.double()).abs().amax(-1)


def _generate(model: Any, prompts: Tensor, count: int) -> Tensor:
    return cast(
        Tensor,
        model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            # With `min_new_tokens`, a token that ends the text would never be chosen.
            eos_token_id=None,
        ),
    )


def _cache_slots(cache: Any) -> tuple[int, int]:
    """How many layers a KV cache has, and how many of them hold something."""
    slots = len(cache.layers)
    filled = 0
    states = 0
    for layer in cache.layers:
        if getattr(layer, "is_initialized", False):
            filled += 1
        # Linear attentions have a state.
        previous = getattr(layer, "has_previous_state", {})
        if any(previous.values()):
            states += 1
    # A model whose attentions are all linear has a slot that stays empty (`cache_config`).
    if states and not filled:
        slots -= 1
    return slots, filled + states


if __name__ == "__main__":
    logging.disable_progress_bar()
    _, checkpoint, reference_file, tolerance = sys.argv
    report = verify(checkpoint, reference_file, float(tolerance))
    print(json.dumps(report))
    sys.exit(0 if report["ok"] else 1)
