"""The memory that fits take, counted from a model's shape. No torch here."""

from blockpruner.core.families import FAMILIES, Config, attention_heads, count_parameters
from blockpruner.scoring.work import BYTES, batch_bytes, inner_size

HELD_OUT_TOKENS = 24 * 256
"""Tokens whose features choose the ridge penalty of a fit."""


def sums_bytes(width: int, hidden: int, has_gains: bool = False) -> int:
    """Bytes that a fit of a matrix [hidden, width] holds at most.

    These are sums in float32, a factor in float64 and solutions. With gains the factor is an
    eigendecomposition in float32 and its workspace.
    """
    square_bytes = 20 if has_gains else 12
    return square_bytes * width * width + 16 * width * hidden


def widths_bytes(width: int, hidden: int) -> int:
    """Bytes that the costs of narrower MLPs take at most: sums in float32, an inverse in float64
    and its workspace."""
    return 21 * width * width + 24 * width * hidden


def fit_bytes(config: Config, dtype: str, is_offloaded: bool = False) -> int:
    """The least memory of a device on which output projections are fitted.

    Args:
        is_offloaded: whether only one layer at a time is on the device (`offload`).
    """
    family = FAMILIES[str(config["model_type"])]
    hidden = int(config["hidden_size"])
    width = _fitted_width(config)
    sums = sums_bytes(width, hidden, has_gains=family.mlp.post is not None)
    heldout = 4 * HELD_OUT_TOKENS * (width + 2 * hidden)
    counts = count_parameters(config)
    parameters: float = counts.total
    if is_offloaded:
        waiting_share = 1 - 1 / int(config["num_hidden_layers"])
        parameters -= sum(counts.blocks.values()) * waiting_share
    return round(parameters * BYTES[dtype]) + batch_bytes(config, dtype) + sums + heldout


def _fitted_width(config: Config) -> int:
    """The number of features of the widest fit."""
    family = FAMILIES[str(config["model_type"])]
    heads, _, head_size = attention_heads({**family.defaults, **config})
    linear_heads = int(config.get("linear_num_value_heads", 0))
    linear_head_size = int(config.get("linear_value_head_dim", 0))
    mha = max(heads * head_size, linear_heads * linear_head_size)
    # A mixture of experts has no single matrix to fit.
    mlp = inner_size(config) if family.has_one_mlp else 0
    # Blocks that read the same state are fitted together.
    return mha + mlp if family.is_parallel(config) else max(mha, mlp)
