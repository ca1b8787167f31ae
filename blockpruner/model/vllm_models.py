"""vLLM's models without what a checkpoint lacks: <prefix>BlockPrunedForCausalLM, made when it is
asked for.

Decides how a class of vLLM's builds a model with holes. In place of a removed block is a module
that returns zeros and has no weights; a removed attention is unknown to the KV cache; a removed
block is freed before the next one is made. A narrower MLP is made while the config has its width.
What the layers compute is vLLM's own. `vllm_plugin.register` names the classes to vLLM. Imports
nothing of blockpruner.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from vllm import ModelRegistry

ATTRIBUTES = {"self_attn": "mha", "attention": "mha", "mlp": "mlp", "block_sparse_moe": "mlp"}
"""The attributes of a decoder layer that hold its blocks, in vLLM's models and in those of
transformers."""

MIXTRAL = {
    ".mlp.experts.gate_up_proj": ".block_sparse_moe.experts.w13",
    ".mlp.experts.down_proj": ".block_sparse_moe.experts.w2",
    ".mlp.gate.": ".block_sparse_moe.gate.",
}
"""vLLM's names of the weights of Mixtral's MLPs, by transformers' names; in other families both
are the same."""


class NoBlock(nn.Module):
    """A removed block: adds zero."""

    def __init__(self, number: int | None) -> None:
        """Args:
        number: the layer's number, for an attention of transformers, which also returns its
            weights; otherwise None.
        """
        super().__init__()
        self.number = number
        # GLM and ERNIE set fields of these modules in all layers.
        self.rotary_emb = nn.Module()
        self.o_proj = nn.Module()

    def forward(self, *args: Tensor, **kwargs: Any) -> Any:
        hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[-1]
        zeros = torch.zeros_like(hidden_states)
        return zeros if self.number is None else (zeros, None)


class NoNorm(nn.Module):
    """The norm of a removed block. In vLLM a norm also adds what the block before it gave to the
    residual stream."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        return x if residual is None else (x, x + residual)


@contextmanager
def holes(config: Any, compilation: Any) -> Iterator[None]:
    """Let decoder layers that are built inside the `with` lack the blocks that the config names,
    and have MLPs of its widths.

    Raises ValueError if the layers have no such blocks, or linear attentions.
    """
    removed = {"mha": set(config.layers_without_mha), "mlp": set(config.layers_without_mlp)}
    dense_width = getattr(config, "intermediate_size", None)
    widths = getattr(config, "mlp_widths", None)
    numbers: dict[nn.Module, int] = {}
    layers_with_holes: dict[tuple[str, int], nn.Module] = {}

    def replace(layer: nn.Module, name: str, block: nn.Module) -> nn.Module | None:
        """A hook on every attribute that is set on a module: returns what is set instead."""
        if name == "linear_attn":
            raise ValueError(
                "vLLM runs no pruned hybrids yet: load this checkpoint in transformers"
            )
        kind = ATTRIBUTES.get(name)
        if kind == "mha":
            # An MLP has no layer number, but it is made after the attention.
            numbers[layer] = layer_number(block)
            if widths is not None:
                config.intermediate_size = widths[numbers[layer]]
        number = numbers.get(layer)
        if kind is None or number is None or number not in removed[kind]:
            return None
        layers_with_holes[kind, number] = layer
        forget(block, compilation)
        is_of_transformers = type(block).__module__.startswith("transformers.")
        return NoBlock(number if is_of_transformers and kind == "mha" else None)

    hook = register_module_module_registration_hook(replace)  # type: ignore[arg-type]  # its result is used
    try:
        yield
    finally:
        hook.remove()
        if widths is not None:
            config.intermediate_size = dense_width
    # A process of a pipeline builds only some of the layers.
    built = set(numbers.values())
    missing = []
    for kind, numbers_of_kind in removed.items():
        for number in sorted(numbers_of_kind & built):
            if (kind, number) not in layers_with_holes:
                missing.append((kind, number))
    if missing or not built:
        raise ValueError(
            f"vLLM's layers are not as blockpruner knows them: no hole could be made at {missing}"
        )
    for (kind, _), layer in layers_with_holes.items():
        for name in norms(layer, kind):
            setattr(layer, name, NoNorm())


def layer_number(attention: nn.Module) -> int:
    """The number of an attention's layer."""
    if hasattr(attention, "layer_idx"):  # an attention of transformers
        return int(attention.layer_idx)  # type: ignore[arg-type]  # no module
    # vLLM's are named after the layer, as in "model.layers.3.self_attn.attn".
    for module in attention.modules():
        name = str(getattr(module, "layer_name", ""))
        numbers = [piece for piece in name.split(".") if piece.isdigit()]
        if numbers:
            return int(numbers[0])
    raise ValueError(f"vLLM's {type(attention).__name__} has no layer name")


def forget(block: nn.Module, compilation: Any) -> None:
    """Take the modules of a removed block out of vLLM's context: nothing is cached or computed for
    them."""
    context = compilation.static_forward_context
    removed_modules = set(block.modules())
    for name, module in list(context.items()):
        if module in removed_modules:
            del context[name]
            if name in compilation.static_all_moe_layers:
                compilation.static_all_moe_layers.remove(name)


def norms(layer: nn.Module, kind: str) -> list[str]:
    """The norms of a layer that belong to its MHA or MLP."""
    mha_norms = ["input_layernorm"]
    mlp_norms = ["post_attention_layernorm"]
    if hasattr(layer, "post_feedforward_layernorm"):  # around each block: Gemma, OLMo 2
        mha_norms.append("post_attention_layernorm")
        mlp_norms = ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    elif not hasattr(layer, "post_attention_layernorm"):  # Cohere's blocks share one
        return []
    elif hasattr(layer, "post_mlp_layernorm"):  # GLM-4
        mha_norms.append("post_self_attn_layernorm")
        mlp_norms.append("post_mlp_layernorm")
    names = mha_norms if kind == "mha" else mlp_norms
    return [name for name in names if hasattr(layer, name)]


def pruned_class(base: type[Any], name: str) -> type[Any]:
    """A family's class, for models with holes."""

    class BlockPruned(base):  # type: ignore[misc]  # chosen at run time
        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            with holes(vllm_config.model_config.hf_config, vllm_config.compilation_config):
                super().__init__(vllm_config=vllm_config, prefix=prefix)

        def _create_attention_instances(self, prefix: str = "") -> None:
            """Give each removed attention an instance meanwhile: vLLM requires one in every layer
            of the models that it takes from transformers."""
            from vllm.model_executor.models.transformers.fusers import AttentionFuser

            removed = []
            for name, module in self.named_modules():
                if isinstance(module, NoBlock) and module.number is not None:
                    removed.append(module)
                    self.attention_fusers[module.number] = (name, AttentionFuser("none"))
            super()._create_attention_instances(prefix)
            for hole in removed:
                forget(hole, self.compilation_config)
                del hole.attn

        def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
            if base.__name__ == "MixtralForCausalLM":
                weights = ((mixtral_name(name), weight) for name, weight in weights)
            return super().load_weights(weights)  # type: ignore[no-any-return]

    BlockPruned.__name__ = BlockPruned.__qualname__ = name
    return BlockPruned


def mixtral_name(name: str) -> str:
    """vLLM's name of a weight of Mixtral."""
    for name_in_transformers, name_in_vllm in MIXTRAL.items():
        name = name.replace(name_in_transformers, name_in_vllm)
    return name


def __getattr__(name: str) -> type[Any]:
    """The class of this name: vLLM asks for the one that it needs."""
    if "BlockPruned" not in name:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    base = ModelRegistry.models[name.replace("BlockPruned", "")].load_model_cls()
    pruned = pruned_class(base, name)
    globals()[name] = pruned
    return pruned
