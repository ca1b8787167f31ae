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
"""What a layer's blocks are called in mlx-lm."""


class Hole(nn.Module):
    """A removed block: adds zero."""

    def __init__(self, block):
        super().__init__()
        self.is_local = getattr(block, "is_local", None)  # what EXAONE asks of all its attentions

    def __call__(self, x, *args, **kwargs):
        return mx.zeros_like(x)


class Passed:
    """What a layer without an attention shows of the past, while a model runs: another layer's."""

    def __init__(self, cache):
        self.offset, self.make_mask = cache.offset, cache.make_mask


class ModelArgs:
    """The fields of config.json, and the arguments of the family's model."""

    def __init__(self, config):
        family = config["model_type"].removesuffix("_blockpruned")
        self.module = importlib.import_module(
            f"mlx_lm.models.{MODEL_REMAPPING.get(family, family)}"
        )
        kept = config.get("source_layers") or list(range(config["num_hidden_layers"]))
        old = {
            "head_dim": config["hidden_size"] // config["num_attention_heads"],
            "rope_scaling": None,
        }
        fields = old | dict(config, model_type=family, num_hidden_layers=kept[-1] + 1)
        for name in ("layer_types", "no_rope_layers"):
            if (own := config.get(name)) is not None:
                told = dict(zip(kept, own, strict=True))
                fields[name] = [told.get(number, own[0]) for number in range(kept[-1] + 1)]
        if family == "exaone4" and "sliding_attention" not in config.get("layer_types", ()):
            fields["sliding_window_pattern"] = None
        elif (types := config.get("layer_types")) and not isinstance(
            config.get("sliding_window_pattern"), str
        ):
            full = [kind == "full_attention" for kind in types]
            steps = range(1, kept[-1] + 2)
            found = (n for n in steps if full == [number % n == n - 1 for number in kept])
            fields["sliding_window_pattern"] = next(found, kept[-1] + 2)
        self.source = dict(enumerate(kept))
        self.holes = {name: {kept[number] for number in config[name]} for name in BLOCKS}
        self.dropped = set(range(kept[-1] + 1)) - set(kept)
        self.family = self.module.ModelArgs.from_dict(fields)

    @classmethod
    def from_dict(cls, config):
        return cls(config)


def Model(args):
    """The family's model with holes."""

    class WithHoles(args.module.Model):
        def sanitize(self, weights):
            """The weights by the numbers of the dense model's layers; then blocks without weights
            are taken out."""
            renamed = {}
            for name, weight in weights.items():
                if found := LAYER.fullmatch(name):
                    name = f"{found[1]}{args.source[int(found[2])]}{found[3]}"
                renamed[name] = weight
            weights = super().sanitize(renamed) if hasattr(super(), "sanitize") else renamed
            for number, layer in enumerate(self.layers):
                here = f".layers.{number}."
                held = {
                    name.partition(here)[2].partition(".")[0] for name in weights if here in name
                }
                for name, blocks in BLOCKS.items():
                    for block in blocks:
                        if block in layer and (
                            number in args.holes[name] or number in args.dropped
                        ):
                            layer[block] = Hole(layer[block])
                for name in list(layer.children()):
                    if name not in held and "norm" in name:
                        layer[name] = nn.Identity()
                self._narrow(
                    layer, {n.partition(here)[2]: w.shape for n, w in weights.items() if here in n}
                )
            return weights

        def _narrow(self, layer, shapes):
            """Give MLPs the shapes that they have in the file."""
            for name, module in layer.named_modules():
                for key in ("weight", "bias"):
                    shape = shapes.get(f"{name}.{key}")
                    if name.startswith("mlp.") and shape is not None and key in module:
                        module[key] = mx.zeros(shape)

        def make_cache(self):
            """One cache for each attention that is left, in order."""
            own = super()
            caches = (
                own.make_cache() if hasattr(own, "make_cache") else [KVCache() for _ in self.layers]
            )
            self._kinds = [type(cache) for cache in caches]
            return [cache for number, cache in enumerate(caches) if self._attends(number)]

        def _attends(self, number):
            return number not in args.holes["layers_without_mha"] and number not in args.dropped

        def __call__(self, inputs, cache=None, *others, **more):
            if not cache:
                return super().__call__(inputs, None, *others, **more)
            if not hasattr(self, "_kinds"):  # the cache comes from a file
                self.make_cache()
            left, seen = iter(cache), {}
            whole = [
                next(left) if self._attends(number) else None for number in range(len(self.layers))
            ]
            for number, given in enumerate(whole):
                if given is not None:
                    seen.setdefault(self._kinds[number], Passed(given))
            some = next(iter(seen.values()))
            whole = [
                given or seen.get(kind, some)
                for given, kind in zip(whole, self._kinds, strict=True)
            ]
            return super().__call__(inputs, whole, *others, **more)

    return WithHoles(args.family)
