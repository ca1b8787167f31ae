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
"""What vLLM calls the weights of Mixtral's MLPs; other families' have the names that transformers
gives them."""


class NoBlock(nn.Module):
    """A removed block: adds zero."""

    def __init__(self, number: int | None) -> None:
        """Args:
        number: of the layer, for an attention of transformers, which also returns its weights;
            otherwise None.
        """
        super().__init__()
        self.number = number
        # GLM and ERNIE set fields of those of all layers
        self.rotary_emb, self.o_proj = (
            nn.Module(),
            nn.Module(),
        )

    def forward(self, *args: Tensor, **kwargs: Any) -> Any:
        zeros = torch.zeros_like(kwargs["hidden_states"] if "hidden_states" in kwargs else args[-1])
        return zeros if self.number is None else (zeros, None)


class NoNorm(nn.Module):
    """The norm of a removed block. In vLLM a norm also adds what the block before it gave to the
    residual stream."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        return x if residual is None else (x, x + residual)


@contextmanager
def holes(config: Any, compilation: Any) -> Iterator[None]:
    """Decoder layers that are built meanwhile lack the blocks that the config names, and have MLPs
    of its widths; raises ValueError if there are no such blocks in the layers, or linear
    attentions."""
    wanted = {"mha": set(config.layers_without_mha), "mlp": set(config.layers_without_mlp)}
    width, widths = getattr(config, "intermediate_size", None), getattr(config, "mlp_widths", None)
    numbers: dict[
        nn.Module, int
    ] = {}  # of the layers: an MLP does not tell it, and is made after the attention
    made: dict[tuple[str, int], nn.Module] = {}

    def replace(layer: nn.Module, name: str, block: nn.Module) -> nn.Module | None:
        kind = ATTRIBUTES.get(name)
        if name == "linear_attn":
            raise ValueError(
                "vLLM runs no pruned hybrids yet: load this checkpoint in transformers"
            )
        if kind == "mha":
            numbers[layer] = layer_number(block)
            if widths is not None:
                config.intermediate_size = widths[numbers[layer]]
        if kind is None or numbers.get(layer) not in wanted[kind]:
            return None
        made[kind, numbers[layer]] = layer
        forget(block, compilation)
        is_theirs = type(block).__module__.startswith("transformers.")
        return NoBlock(getattr(block, "layer_idx", None) if is_theirs else None)

    hook = register_module_module_registration_hook(replace)  # type: ignore[arg-type]  # what it returns is taken
    try:
        yield
    finally:
        hook.remove()
        if widths is not None:
            config.intermediate_size = width
    built = set(numbers.values())  # in a pipeline, not all of the model's
    missed = {
        (kind, number) for kind, layers in wanted.items() for number in layers & built
    } - made.keys()
    if missed or not built:
        raise ValueError(
            "vLLM's layers are not as blockpruner knows them: no hole could be made at"
            f" {sorted(missed)}"
        )
    for (kind, _), layer in made.items():
        for name in norms(layer, kind):
            setattr(layer, name, NoNorm())


def layer_number(attention: nn.Module) -> int:
    """An attention of transformers has its layer's number, and one of vLLM's is named after it."""
    if hasattr(attention, "layer_idx"):
        return int(attention.layer_idx)  # type: ignore[arg-type]  # no module
    name = next(
        str(module.layer_name) for module in attention.modules() if hasattr(module, "layer_name")
    )
    return next(int(part) for part in name.split(".") if part.isdigit())


def forget(block: nn.Module, compilation: Any) -> None:
    """Nothing will be cached or computed for what is in a removed block."""
    layers, within = compilation.static_forward_context, set(block.modules())
    for name in [name for name, layer in layers.items() if layer in within]:
        del layers[name]
        if name in compilation.static_all_moe_layers:
            compilation.static_all_moe_layers.remove(name)


def norms(layer: nn.Module, kind: str) -> list[str]:
    """Those norms of a layer that belong to its MHA or MLP."""
    names = {"mha": ["input_layernorm"], "mlp": ["post_attention_layernorm"]}
    if not hasattr(layer, "post_attention_layernorm") and not hasattr(
        layer, "post_feedforward_layernorm"
    ):
        return []  # Cohere's blocks share one
    if hasattr(layer, "post_feedforward_layernorm"):
        names["mha"].append("post_attention_layernorm")
        names["mlp"] = ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    elif hasattr(layer, "post_mlp_layernorm"):  # GLM-4
        names["mha"].append("post_self_attn_layernorm")
        names["mlp"].append("post_mlp_layernorm")
    return [name for name in names[kind] if hasattr(layer, name)]


def pruned_class(base: type[Any], name: str) -> type[Any]:
    """A family's class, for models with holes."""

    class BlockPruned(base):  # type: ignore[misc]  # chosen at run time
        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            with holes(vllm_config.model_config.hf_config, vllm_config.compilation_config):
                super().__init__(vllm_config=vllm_config, prefix=prefix)

        def _create_attention_instances(self, prefix: str = "") -> None:
            """Give each layer an attention: vLLM wants one in the models that it takes from
            transformers."""
            from vllm.model_executor.models.transformers.fusers import AttentionFuser

            removed = {
                name: m
                for name, m in self.named_modules()
                if isinstance(m, NoBlock) and m.number is not None
            }
            self.attention_fusers |= {
                hole.number: (name, AttentionFuser("none")) for name, hole in removed.items()
            }
            super()._create_attention_instances(prefix)
            for hole in removed.values():
                forget(hole, self.compilation_config)
                del hole.attn

        def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
            names = MIXTRAL if base.__name__ == "MixtralForCausalLM" else {}
            return super().load_weights((renamed(name, names), weight) for name, weight in weights)  # type: ignore[no-any-return]

    BlockPruned.__name__ = BlockPruned.__qualname__ = name
    return BlockPruned


def renamed(name: str, names: dict[str, str]) -> str:
    for ours, theirs in names.items():
        name = name.replace(ours, theirs)
    return name


def __getattr__(name: str) -> type[Any]:
    """The class of this name: vLLM asks for the one that it needs."""
    if "BlockPruned" not in name:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = pruned_class(
        ModelRegistry.models[name.replace("BlockPruned", "")].load_model_cls(), name
    )
    return found
