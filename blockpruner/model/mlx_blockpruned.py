"""Block-pruned checkpoints in mlx-lm, which runs this file with `--trust-remote-code`; needs only
mlx-lm.

Decides how mlx-lm's own model of the base family runs without some blocks. It is built as deep as
the dense model, so that layers attend as there; a removed block adds zero and has no weights and no
cache.
"""

import importlib
import re

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache
from mlx_lm.utils import MODEL_REMAPPING

LAYER = re.compile(r"(.*?layers\.)(\d+)(\..*)")
BLOCKS = {
    "layers_without_mha": ("self_attn", "attention"),
    "layers_without_mlp": ("mlp", "block_sparse_moe"),
}
"""The names of a layer's blocks in mlx-lm."""


class Hole(nn.Module):
    """A removed block: adds zero."""

    def __init__(self, block):
        super().__init__()
        # EXAONE's decoder reads this of all its attentions.
        self.is_local = getattr(block, "is_local", None)

    def __call__(self, x, *args, **kwargs):
        return mx.zeros_like(x)


class Past:
    """What a layer without attention knows of the tokens before, from another layer's cache."""

    def __init__(self, cache):
        self.offset = cache.offset
        self.make_mask = cache.make_mask


class ModelArgs:
    """The fields of config.json, and the arguments of the family's model."""

    def __init__(self, config):
        family = config["model_type"].removesuffix("_blockpruned")
        module = MODEL_REMAPPING.get(family, family)
        self.module = importlib.import_module(f"mlx_lm.models.{module}")
        layer_count = config["num_hidden_layers"]
        self.source_layers = config.get("source_layers") or list(range(layer_count))
        self.depth = self.source_layers[-1] + 1
        # A layer that was dropped is one without both blocks.
        dropped = set(range(self.depth)) - set(self.source_layers)
        self.holes = {}
        for name in BLOCKS:
            removed = [self.source_layers[layer] for layer in config[name]]
            self.holes[name] = dropped.union(removed)
        fields = {
            # Some of mlx-lm's models require fields that newer configs leave out.
            "head_dim": config["hidden_size"] // config["num_attention_heads"],
            "rope_scaling": None,
            **config,
            "model_type": family,
            "num_hidden_layers": self.depth,
        }
        for name in ("layer_types", "no_rope_layers"):
            if config.get(name) is not None:
                fields[name] = self._of_dense_layers(config[name])
        fields |= self._window_pattern(family, config)
        self.family = self.module.ModelArgs.from_dict(fields)

    @classmethod
    def from_dict(cls, config):
        return cls(config)

    def _of_dense_layers(self, values):
        """A list with a value for each layer of the dense model. Dropped layers get any value."""
        by_layer = dict(zip(self.source_layers, values, strict=True))
        return [by_layer.get(layer, values[0]) for layer in range(self.depth)]

    def _window_pattern(self, family, config):
        """mlx-lm reads from `sliding_window_pattern`, not from `layer_types`, which layers have
        full attention: every n-th one."""
        layer_types = config.get("layer_types") or ()
        if family == "exaone4" and "sliding_attention" not in layer_types:
            return {"sliding_window_pattern": None}
        if not layer_types or isinstance(config.get("sliding_window_pattern"), str):
            return {}
        is_full = [layer_type == "full_attention" for layer_type in layer_types]
        for period in range(1, self.depth + 1):
            if is_full == [layer % period == period - 1 for layer in self.source_layers]:
                return {"sliding_window_pattern": period}
        return {"sliding_window_pattern": self.depth + 1}

    def attends(self, layer):
        return layer not in self.holes["layers_without_mha"]

    def dense_name(self, name):
        """The name of a weight in the dense model."""
        match = LAYER.fullmatch(name)
        if not match:
            return name
        prefix, layer, suffix = match.groups()
        return f"{prefix}{self.source_layers[int(layer)]}{suffix}"


def remove_blocks_(layer, number, args, weight_names):
    """Replace a layer's removed blocks by holes, and norms without weights by the identity."""
    for name, blocks in BLOCKS.items():
        if number in args.holes[name]:
            for block in blocks:
                if block in layer:
                    layer[block] = Hole(layer[block])
    modules_with_weights = {name.partition(".")[0] for name in weight_names}
    for name in list(layer.children()):
        if name not in modules_with_weights and "norm" in name:
            layer[name] = nn.Identity()


def narrow_mlp_(layer, shapes):
    """Give the MLP's weights the shapes that they have in the file."""
    for name, module in layer.named_modules():
        if not name.startswith("mlp."):
            continue
        for key in ("weight", "bias"):
            shape = shapes.get(f"{name}.{key}")
            if shape is not None and key in module:
                module[key] = mx.zeros(shape)


def Model(args):
    """The family's model with holes."""

    class WithHoles(args.module.Model):
        def sanitize(self, weights):
            """The weights by the numbers of the dense model's layers; then blocks without weights
            are taken out."""
            renamed = {}
            for name, weight in weights.items():
                renamed[args.dense_name(name)] = weight
            weights = renamed
            if hasattr(super(), "sanitize"):
                weights = super().sanitize(weights)
            for number, layer in enumerate(self.layers):
                shapes = {}
                for name, weight in weights.items():
                    _, in_layer, name_in_layer = name.partition(f".layers.{number}.")
                    if in_layer:
                        shapes[name_in_layer] = weight.shape
                remove_blocks_(layer, number, args, shapes)
                narrow_mlp_(layer, shapes)
            return weights

        def make_cache(self):
            """One cache for each attention that is left, in order."""
            if hasattr(super(), "make_cache"):
                caches = super().make_cache()
            else:
                caches = [KVCache() for _ in self.layers]
            self._cache_types = [type(cache) for cache in caches]
            return [cache for layer, cache in enumerate(caches) if args.attends(layer)]

        def __call__(self, inputs, cache=None, *arguments, **options):
            if not cache:
                return super().__call__(inputs, None, *arguments, **options)
            # A cache that comes from a file was not made by this object.
            if not hasattr(self, "_cache_types"):
                self.make_cache()
            remaining = iter(cache)
            caches = []
            past_by_type = {}
            for layer, cache_type in enumerate(self._cache_types):
                caches.append(next(remaining) if args.attends(layer) else None)
                if caches[layer] is not None:
                    past_by_type.setdefault(cache_type, Past(caches[layer]))
            # The family's decoder makes its masks by the caches of certain layers, such as layer 0.
            any_past = next(iter(past_by_type.values()))
            for layer, cache_type in enumerate(self._cache_types):
                if caches[layer] is None:
                    caches[layer] = past_by_type.get(cache_type, any_past)
            return super().__call__(inputs, caches, *arguments, **options)

    return WithHoles(args.family)
