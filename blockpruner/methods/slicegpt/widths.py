"""SliceGPT's width, from a sparsity or a ratio, and the parameters that it leaves (arXiv
2401.15024).

Decides which families can be sliced and what counts, from a config alone: no torch here. How
weights are sliced is decided by `slicing`.
"""

from blockpruner.core.errors import UnreachableError
from blockpruner.core.families import FAMILIES, Config, Family, count_parameters

SLICEABLE = ("llama", "mistral", "qwen2", "qwen3")
"""Families with RMSNorm, sequential residual blocks and a gated MLP, each with a class pair in
`modeling_slicegpt`."""

MULTIPLE = 8
"""Widths are multiples of this, as in the paper's code, for the sake of matrix kernels."""


def sliceable_family(model_type: str) -> Family:
    """The family row of a model that can be sliced; raises UnreachableError that names those that
    can."""
    if model_type not in SLICEABLE:
        raise UnreachableError(
            f"model family {model_type!r} cannot be sliced: SliceGPT needs RMSNorm, sequential"
            f" residual blocks and a gated MLP; use a model of one of {', '.join(SLICEABLE)}, or"
            " another method"
        )
    return FAMILIES[model_type]


def sliced_parameters(config: Config, width: int) -> tuple[int, int]:
    """Parameters of the dense model and of the same sliced to `width` columns n, d being its hidden
    size.

    These parts of the sliced model count: embedding [V, n] and head [V, d], never tied; every block
    as one of hidden size n, since heads and inner size stay; the last MLP's output, which keeps d
    rows; the shortcut matrices, [n, n] after each block but [n, d] after the last. Norms have no
    scale left. All parameters of the dense model count, norms included. So Llama-2's 7B at width
    2864 has a ratio of 21.45 %, its 13B at 3584 one of 21.52 %, as arXiv 2406.10594 reports.
    Shortcuts and untied embeddings come on top: near full width the "sliced" model is the larger
    one.
    """
    row = sliceable_family(str(config["model_type"]))
    hidden, layers, vocabulary = (
        int(config[key]) for key in ("hidden_size", "num_hidden_layers", "vocab_size")
    )
    head = int(config.get("head_dim") or hidden // int(config["num_attention_heads"]))
    narrow = {**config, "hidden_size": width, "head_dim": head}
    blocks = sum(
        row.mha_parameters(narrow, layer) + row.mlp_parameters(narrow, layer)
        for layer in range(layers)
    )
    last_output = (int(config["intermediate_size"]) + bool(config.get("mlp_bias", False))) * (
        hidden - width
    )
    shortcuts = (2 * layers - 1) * width * width + width * hidden
    return (
        count_parameters(config).total,
        vocabulary * (width + hidden) + blocks + last_output + shortcuts,
    )


def sliced_ratio(config: Config, width: int) -> float:
    """Share of all parameters that slicing to `width` removes; negative where it adds some."""
    dense, sliced = sliced_parameters(config, width)
    return 1 - sliced / dense


def width_for_ratio(config: Config, ratio: float) -> int:
    """The width whose ratio is nearest to `ratio`, a share of all parameters; a tie goes to the
    larger ratio. Raises UnreachableError that names the smallest and the largest ratio where no
    width comes near."""
    widths = range(MULTIPLE, int(config["hidden_size"]) + 1, MULTIPLE)
    ratios = {width: sliced_ratio(config, width) for width in widths}  # falls with the width
    # a wide one adds more than it removes
    ratios = {width: share for width, share in ratios.items() if share > 0}
    if not ratios:
        raise UnreachableError(
            "SliceGPT makes this model larger at every width: its shortcuts outweigh what is sliced"
        )
    widest, narrowest = max(ratios), min(ratios)
    if not ratios[widest] / 2 <= ratio <= ratios[narrowest]:
        raise UnreachableError(
            f"ratio {ratio} is out of SliceGPT's reach here: this model has ratios from"
            f" {ratios[widest]:.4f} (width {widest}) to {ratios[narrowest]:.4f} (width {narrowest})"
        )
    return min(ratios, key=lambda width: (round(abs(ratios[width] - ratio), 12), width))
