"""BlockPruner from texts to a smaller model, in plain torch and transformers. Read this first.

    python -m blockpruner.reference MODEL TEXTS --blocks 6 --out FOLDER

MODEL is a folder or a hub name, TEXTS a plain text file with blank lines between texts.

A decoder layer has two residual blocks, `x = x + MHA(norm(x))` and `x = x + MLP(norm(x))`. The
algorithm (arXiv 2406.10594, Algorithm 1) removes them one at a time:

1. Draw calibration rows.
2. For each block that is left: measure the perplexity of the model without it.
3. Remove the block whose absence leaves the lowest perplexity. Repeat from 2.
4. Cut the removed blocks out of the model, so that their weights and their part of the KV cache are
   gone.
5. Refit (ours, not in the paper): fit the output projections that are left to the dense model, by
   least squares.

The product is fast: `scoring.walk` shares the common beginning of the candidates of step 2, and
`search.racing` leaves candidates out. `store.trials` keeps every score on disk, so a killed search
starts again and computes what is missing. `healing.refit` runs step 5 for many models at once, and
`healing.ridge` chooses its penalties. docs/extend.md shows how to add a metric. The tests compare
the exact search with this file to 1e-10 in float64.

This file is for models whose layers have `self_attn.o_proj` and `mlp.down_proj`, with a norm before
each and none behind: Llama, Mistral, Qwen2, Qwen3. A refit's rows must fit into a sliding window,
where attention has one.
"""

import argparse
import json
import math
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

Block = tuple[str, int]
"""A block by its kind and layer: ("mha", 3) is the attention of layer 3, ("mlp", 3) its
feed-forward part."""

MODULE_OF_KIND = {"mha": "self_attn", "mlp": "mlp"}
NORM_OF_KIND = {"mha": "input_layernorm", "mlp": "post_attention_layernorm"}
PROJECTION_OF_KIND = {"mha": "o_proj", "mlp": "down_proj"}

RIDGE_PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""The ridge penalties that a refit tries, as multiples of the mean squared feature."""
STEP_SIZES = (1.0, 0.75, 0.5, 0.0)
"""The shares of a refit's weight change that are tried in the end."""


# --- 1. Calibration rows


def draw_rows(
    texts: Sequence[str], tokenizer: Any, count: int, seq_len: int, seed: int = 42
) -> Tensor:
    """Draw texts in random order, join them, and cut them into `count` rows of `seq_len` tokens,
    [count, seq_len]."""
    shuffled = list(texts)
    random.Random(seed).shuffle(shuffled)
    token_ids = tokenizer("\n\n".join(shuffled))["input_ids"]
    available = len(token_ids) // seq_len
    if available < count:
        raise ValueError(f"the texts fill {available} rows of {seq_len} tokens, not {count}")
    return torch.tensor(token_ids[: count * seq_len]).reshape(count, seq_len)


# --- 2. Score every block


def all_blocks(model: PreTrainedModel) -> list[Block]:
    """All MHA blocks by layer, then all MLP blocks by layer: of equal scores the first one wins."""
    layer_count = len(model.model.layers)
    return [(kind, layer) for kind in ("mha", "mlp") for layer in range(layer_count)]


def module_of(model: PreTrainedModel, block: Block) -> nn.Module:
    """The attention or MLP module of a block."""
    kind, layer = block
    return cast(nn.Module, getattr(model.model.layers[layer], MODULE_OF_KIND[kind]))


def output_projection(model: PreTrainedModel, block: Block) -> nn.Linear:
    """The matrix through which a block adds to the residual stream."""
    return cast(nn.Linear, getattr(module_of(model, block), PROJECTION_OF_KIND[block[0]]))


@contextmanager
def masked(model: PreTrainedModel, removed: Iterable[Block]) -> Iterator[None]:
    """Let some blocks add zero to the residual stream inside the `with`: x + 0 skips a block."""

    def return_zeros(module: nn.Module, inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):  # attention also returns its weights
            return (torch.zeros_like(output[0]), *output[1:])
        return torch.zeros_like(output)

    hooks = [module_of(model, block).register_forward_hook(return_zeros) for block in removed]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def perplexity(model: PreTrainedModel, rows: Tensor) -> float:
    """exp of the mean over rows of the row's mean negative log-likelihood (NLL)."""
    row_means = []
    for row in rows:
        logits = model(input_ids=row[None], use_cache=False).logits[0, :-1]
        # Half precision is too coarse for a sum over the vocabulary.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        log_probabilities = torch.log_softmax(logits, dim=-1)
        token_nll = -log_probabilities.gather(-1, row[1:, None])
        row_means.append(float(token_nll.double().mean()))
    return math.exp(math.fsum(row_means) / len(row_means))


Scores = dict[Block, float]


def score_blocks(model: PreTrainedModel, rows: Tensor, removed: Sequence[Block]) -> Scores:
    """The perplexity without each block that is left, beside the blocks that are already removed
    (paper, Section 3.2).

    A step with n blocks left costs n passes over all rows.
    """
    perplexity_without = {}
    for candidate in all_blocks(model):
        if candidate not in removed:
            with masked(model, [*removed, candidate]):
                perplexity_without[candidate] = perplexity(model, rows)
    return perplexity_without


# --- 3. Remove the least important block, and repeat


def search(model: PreTrainedModel, rows: Tensor, count: int) -> list[Block]:
    """The first `count` blocks to remove, in order (paper, Algorithm 1)."""
    removed: list[Block] = []
    for step in range(1, count + 1):
        scores = score_blocks(model, rows, removed)
        # The block whose absence hurts least is the least important one.
        least_important = min(scores, key=scores.__getitem__)
        removed.append(least_important)
        name, score = block_name(least_important), scores[least_important]
        print(f"{step}: removed {name}, perplexity {score:.4f}", flush=True)
    return removed


def block_name(block: Block) -> str:
    """The name that the product has for a block: mha.3."""
    return f"{block[0]}.{block[1]}"


# --- 4. Cut the blocks out


class RemovedBlock(nn.Module):
    """Stands where a block was: adds nothing, has no weights and no part of the KV cache."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, hidden_states: Tensor, **_: Any) -> Any:
        zeros = torch.zeros_like(hidden_states)
        return (zeros, None) if self.kind == "mha" else zeros  # attention also returns its weights


def cut_(model: PreTrainedModel, removed: Iterable[Block]) -> None:
    """Take blocks and the norms before them out of the model, in place.

    The attentions that are left are numbered anew from 0. The KV cache has a place for each number,
    and a place that nobody fills would make cached decoding silently wrong.
    """
    for kind, index in removed:
        layer = model.model.layers[index]
        setattr(layer, MODULE_OF_KIND[kind], RemovedBlock(kind))
        setattr(layer, NORM_OF_KIND[kind], nn.Identity())
    cache_index = 0
    for layer in model.model.layers:
        if not isinstance(layer.self_attn, RemovedBlock):
            layer.self_attn.layer_idx = cache_index
            cache_index += 1


# --- 5. Refit


def block_input(model: PreTrainedModel, block: Block, hidden: Tensor) -> Tensor:
    """What the output projection of a block reads, [B, T, p], where the block reads the stream
    `hidden` [B, T, d]."""
    features: list[Tensor] = []
    projection = output_projection(model, block)
    hook = projection.register_forward_pre_hook(lambda module, inputs: features.append(inputs[0]))
    block_output(model, block, hidden)
    hook.remove()
    return features[0]


def block_output(model: PreTrainedModel, block: Block, hidden: Tensor) -> Tensor:
    """What a block adds to the residual stream `hidden` [B, T, d]."""
    kind, index = block
    normed = getattr(model.model.layers[index], NORM_OF_KIND[kind])(hidden)
    module: Any = module_of(model, block)
    if kind == "mlp":
        return cast(Tensor, module(normed))
    seq_len = hidden.shape[1]
    positions = torch.arange(seq_len, device=hidden.device)[None]
    causal_mask = torch.full((seq_len, seq_len), -math.inf).to(hidden).triu(1)
    attention_output, _ = module(
        hidden_states=normed,
        position_embeddings=model.model.rotary_emb(hidden, positions),
        attention_mask=causal_mask[None, None],
    )
    return cast(Tensor, attention_output)


def ridge_solution(features: Tensor, residuals: Tensor, penalty: float) -> Tensor:
    """The D [p, d] that minimises |X D - R|^2 + penalty * mean(diag(X^T X)) * |D|^2, for X [N, p]
    and R [N, d]."""
    gram = features.T @ features
    ridge = penalty * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)
    return cast(Tensor, torch.linalg.solve(gram + ridge, features.T @ residuals))


@torch.no_grad()
def refit_(
    model: PreTrainedModel, removed: Sequence[Block], fit_rows: Tensor, validation_rows: Tensor
) -> float:
    """Fit the output projections of a model without some blocks to the model with them, in place;
    the blocks stay in.

    The residual stream of the pruned model lacks what the removed blocks added. From the last block
    before the first removed one on, each block's output projection is fitted by least squares: the
    pruned stream behind the block, and behind the removed blocks that follow it, should be the
    dense one. Later fits read the stream that earlier fits have left, so they also repair what
    those could not.

    Returns the share of the change that is kept: the one with the lowest perplexity on
    `validation_rows`, 0 if no change helps there.
    """
    rows = torch.cat([fit_rows, validation_rows])
    is_fit_row = torch.arange(len(rows)) < len(fit_rows)
    layers = range(len(model.model.layers))
    in_order = [(kind, layer) for layer in layers for kind in ("mha", "mlp")]
    first_removed = min(map(in_order.index, removed))
    dense = pruned = model.model.embed_tokens(rows)
    old_weights: dict[Block, Tensor] = {}
    new_weights: dict[Block, Tensor] = {}
    for position, block in enumerate(in_order):
        following = in_order[position + 1 :]
        if block not in removed:
            span_after = list(takewhile(removed.__contains__, following))
            # The target is the dense stream behind the block and the removed span that follows.
            target = dense
            for passed in (block, *span_after):
                target = target + block_output(model, passed, target)
            # Before the first removed span nothing is missing, and nothing is fitted.
            if position + 1 + len(span_after) > first_removed:
                projection = output_projection(model, block)
                old_weights[block] = projection.weight.clone()
                new_weights[block] = fitted_weight(model, block, pruned, target, is_fit_row)
                dense = dense + block_output(model, block, dense)
                projection.weight.copy_(new_weights[block])
                pruned = pruned + block_output(model, block, pruned)
                projection.weight.copy_(old_weights[block])
            else:
                dense = pruned = dense + block_output(model, block, dense)
        else:
            dense = dense + block_output(model, block, dense)  # only the dense model has this block
    return keep_best_step_(model, removed, old_weights, new_weights, validation_rows)


def fitted_weight(
    model: PreTrainedModel, block: Block, pruned: Tensor, target: Tensor, is_fit_row: Tensor
) -> Tensor:
    """The output projection [d, p] that brings the pruned stream behind the block nearest to
    `target` [B, T, d]."""
    # Each token counts by its relative error. The first token of a row is a thousand times as long
    # in many models, and would decide alone.
    scale = 1 / target.norm(dim=-1, keepdim=True)
    features = block_input(model, block, pruned) * scale
    residuals = (target - pruned - block_output(model, block, pruned)) * scale
    fit_features = features[is_fit_row].flatten(0, 1)
    fit_residuals = residuals[is_fit_row].flatten(0, 1)
    validation_features = features[~is_fit_row].flatten(0, 1)
    validation_residuals = residuals[~is_fit_row].flatten(0, 1)
    best_change = torch.zeros_like(fit_features.T @ fit_residuals)
    least_error = float(validation_residuals.square().sum())
    for penalty in RIDGE_PENALTIES:
        change = ridge_solution(fit_features, fit_residuals, penalty)
        error = float((validation_residuals - validation_features @ change).square().sum())
        if error < least_error:
            best_change, least_error = change, error
    return output_projection(model, block).weight + best_change.T


def keep_best_step_(
    model: PreTrainedModel,
    removed: Sequence[Block],
    old_weights: dict[Block, Tensor],
    new_weights: dict[Block, Tensor],
    validation_rows: Tensor,
) -> float:
    """Scale the weight change by the step with the lowest perplexity on the validation rows;
    returns the step.

    Least squares can overshoot on rows that it has not seen, so the full step is not always the
    best one.
    """

    def set_step_(step: float) -> None:
        for block, new_weight in new_weights.items():
            weight = torch.lerp(old_weights[block], new_weight, step)
            output_projection(model, block).weight.copy_(weight)

    perplexity_by_step = {}
    for step in STEP_SIZES:
        set_step_(step)
        with masked(model, removed):
            perplexity_by_step[step] = perplexity(model, validation_rows)
    best_step = min(perplexity_by_step, key=perplexity_by_step.__getitem__)
    set_step_(best_step)
    return best_step


# --- Files


def save(model: PreTrainedModel, removed: Sequence[Block], folder: Path) -> None:
    """Write the config, the remaining weights, and the names of the removed blocks for `load`."""
    folder.mkdir(parents=True)
    model.config.save_pretrained(folder)
    weights = {name: weight.contiguous() for name, weight in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "removed.json").write_text(json.dumps([block_name(block) for block in removed]))


def load(folder: Path) -> PreTrainedModel:
    """Read a model that `save` wrote."""
    config = AutoConfig.from_pretrained(folder)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    names = json.loads((folder / "removed.json").read_text())
    cut_(model, [(name.split(".")[0], int(name.split(".")[1])) for name in names])
    weights = load_file(folder / "model.safetensors")
    model.to(next(iter(weights.values())).dtype)
    model.load_state_dict(weights, strict=not config.tie_word_embeddings)
    model.tie_weights()
    return model.eval()


def main(arguments: Sequence[str] | None = None) -> None:
    """Prune a model from the command line."""
    parser = argparse.ArgumentParser(description="Prune a model by blocks, the plain way.")
    parser.add_argument("model", help="a folder, or a name on the hub")
    parser.add_argument("texts", type=Path, help="a plain text file; blank lines separate texts")
    parser.add_argument("--blocks", type=int, default=6, help="how many blocks to remove")
    parser.add_argument("--rows", type=int, default=16, help="calibration rows")
    parser.add_argument("--seq-len", type=int, default=128, help="tokens in a row")
    parser.add_argument("--out", type=Path, help="the folder of the smaller model")
    options = parser.parse_args(arguments)
    texts = re.split(r"\n\s*\n", options.texts.read_text())
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model).eval()
    # Half of the rows choose blocks. Of the rest, a quarter chooses ridge penalties and the step,
    # so the perplexity that is printed of it is a little too good.
    rows = draw_rows(texts, tokenizer, 2 * options.rows, options.seq_len)
    search_rows, refit_rows = rows[: options.rows], rows[options.rows :]
    fit_rows = refit_rows[: 3 * options.rows // 4]
    validation_rows = refit_rows[3 * options.rows // 4 :]
    dense_perplexity = perplexity(model, validation_rows)
    removed = search(model, search_rows, options.blocks)
    step = refit_(model, removed, fit_rows, validation_rows)
    cut_(model, removed)
    pruned_perplexity = perplexity(model, validation_rows)
    print(f"refit by {step:.0%}")
    print(f"validation perplexity {dense_perplexity:.2f} -> {pruned_perplexity:.2f}")
    if options.out:
        save(model, removed, options.out)
        tokenizer.save_pretrained(options.out)
        print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
