"""vLLM's plugin without vLLM: what it tells transformers and vLLM, and how holes are made in a
decoder like vLLM's."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from importlib import metadata
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import rms_norm
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from blockpruner.core.families import FAMILIES
from blockpruner.model import vllm_plugin
from tests.plans import fetch_tiny, plan_of, pruning, save_pruned

BASES = {f"{family.prefix}ForCausalLM" for family in FAMILIES.values() if family.in_vllm}


class Registry:
    """Like vLLM's ModelRegistry."""

    def __init__(self):
        self.models = dict.fromkeys([*BASES, "GPT2LMHeadModel"], "vLLM's own")

    def get_supported_archs(self):
        return self.models.keys()

    def register_model(self, name, model):
        self.models[name] = model


@pytest.fixture
def registry(monkeypatch):
    """vLLM's, after it called the plugin twice. transformers forgets the configs after the test."""
    vllm = ModuleType("vllm")
    vllm.ModelRegistry = Registry()
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.delitem(sys.modules, vllm_plugin.MODELS, raising=False)
    monkeypatch.setattr(CONFIG_MAPPING, "_extra_content", dict(CONFIG_MAPPING._extra_content))
    vllm_plugin.register()
    vllm_plugin.register()
    yield vllm.ModelRegistry
    sys.modules.pop(vllm_plugin.MODELS, None)


def test_vllm_gets_a_class_for_each_of_its_families_and_no_other(registry):
    added = {name: model for name, model in registry.models.items() if model != "vLLM's own"}
    assert added == {
        (name := base.replace("For", "BlockPrunedFor")): f"blockpruner.model.vllm_models:{name}"
        for base in BASES
    }


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.in_vllm])
def test_a_checkpoint_has_its_familys_config_without_remote_code(registry, tmp_path, family):
    dense = fetch_tiny(tmp_path, family)
    made = pruning(dense, plan_of(dense, ["mha.0", "mlp.1", "mha.2"]))
    save_pruned(made.prune_(made.load()), tmp_path / "pruned")
    config = AutoConfig.from_pretrained(tmp_path / "pruned")
    assert type(config) is CONFIG_MAPPING[family] and config.model_type == family
    assert (config.layers_without_mha, config.layers_without_mlp) == ([0, 2], [1])
    assert not hasattr(config, "auto_map") and not config.is_heterogeneous
    assert (
        registry.models[config.architectures[0]]
        == f"{vllm_plugin.MODELS}:{config.architectures[0]}"
    )
    before, after = json.loads((dense / "config.json").read_text()), config.to_dict()
    assert {key: after[key] for key in before} == before | {
        key: after[key] for key in ("architectures", "transformers_version")
    }


def test_vllm_starts_where_the_plugin_fails(registry, monkeypatch, caplog):
    """vLLM calls plugins outside of a try."""
    monkeypatch.setattr(Registry, "get_supported_archs", lambda self: 1 / 0)
    vllm_plugin.register()
    (line,) = caplog.messages
    assert line == "vLLM starts without blockpruner's models: ZeroDivisionError('division by zero')"


def test_no_type_of_others_is_registered(registry):
    assert not {"nemotron-nas", "baichuan"} & CONFIG_MAPPING._extra_content.keys()
    assert all(
        name.endswith(("_blockpruned", "_slicegpt")) for name in CONFIG_MAPPING._extra_content
    )


def test_the_entry_point_imports_nothing_else_of_ours():
    (entry,) = metadata.entry_points(group="vllm.general_plugins", name="blockpruner")
    code = (
        f"import sys, {entry.module}; print(*sorted(n for n in sys.modules if"
        " n.startswith('blockpruner')))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert entry.load() is vllm_plugin.register
    assert found == [
        "blockpruner",
        *(f"blockpruner.model{name}" for name in ("", ".known", ".vllm_plugin")),
    ]


class Norm(nn.Module):
    """Like vLLM's RMSNorm, which also adds to the residual stream."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x, residual=None):
        if residual is None:
            return rms_norm(x, (8,), self.weight)
        return rms_norm(x + residual, (8,), self.weight), x + residual


class Cached(nn.Module):
    """Like vLLM's Attention and its mixtures, which are in the forward context by name."""

    def __init__(self, name, compilation):
        super().__init__()
        self.layer_name = name
        compilation.static_forward_context[name] = self


class Attention(nn.Linear):
    def __init__(self, number, compilation):
        super().__init__(8, 8)
        self.attn = Cached(f"model.layers.{number}.self_attn.attn", compilation)

    def forward(self, positions, hidden_states):
        return super().forward(hidden_states)


class Mixture(nn.Linear):
    def __init__(self, number, compilation):
        super().__init__(8, 8)
        self.experts = Cached(f"model.layers.{number}.mlp.experts", compilation)
        compilation.static_all_moe_layers.append(self.experts.layer_name)


class Layer(nn.Module):
    """Like those of Llama, or of Gemma, which also has norms after its blocks."""

    def __init__(self, number, compilation, around, mlp):
        super().__init__()
        self.self_attn = Attention(number, compilation)
        setattr(self, mlp, Mixture(number, compilation))
        self.mlp_name = mlp
        self.input_layernorm, self.post_attention_layernorm = Norm(), Norm()
        if around:
            self.pre_feedforward_layernorm, self.post_feedforward_layernorm = Norm(), Norm()

    def forward(self, positions, x, residual):
        x, residual = (
            (self.input_layernorm(x), x) if residual is None else self.input_layernorm(x, residual)
        )
        x = self.self_attn(positions=positions, hidden_states=x)
        before_mlp = self.post_attention_layernorm
        if hasattr(self, "pre_feedforward_layernorm"):
            x, before_mlp = self.post_attention_layernorm(x), self.pre_feedforward_layernorm
        x, residual = before_mlp(x, residual)
        x = getattr(self, self.mlp_name)(x)
        return (
            self.post_feedforward_layernorm(x) if hasattr(self, "post_feedforward_layernorm") else x
        ), residual


class Decoder(nn.Module):
    around, mlp = False, "mlp"

    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        torch.manual_seed(0)
        compilation = vllm_config.compilation_config
        self.layers = nn.ModuleList(
            [Layer(n, compilation, self.around, self.mlp) for n in range(4)]
        )

    def forward(self, x):
        residual = None
        for layer in self.layers:
            x, residual = layer(None, x, residual)
        return x + residual


def asked(mha, mlp):
    """A VllmConfig of a model with these holes."""
    config = SimpleNamespace(layers_without_mha=mha, layers_without_mlp=mlp)
    compilation = SimpleNamespace(static_forward_context={}, static_all_moe_layers=[])
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_config=config), compilation_config=compilation
    )


def of(vllm_config):
    return vllm_config.model_config.hf_config, vllm_config.compilation_config


@pytest.mark.parametrize(("around", "mlp"), [(False, "mlp"), (True, "block_sparse_moe")])
def test_removed_blocks_add_nothing_and_are_nowhere(registry, around, mlp):
    base = type("LlamaForCausalLM", (Decoder,), {"around": around, "mlp": mlp})
    registry.models["LlamaForCausalLM"] = SimpleNamespace(load_model_cls=lambda: base)
    models = importlib.import_module(vllm_plugin.MODELS)
    with_holes, dense = asked([0, 3], [1, 3]), asked([], [])
    pruned = models.LlamaBlockPrunedForCausalLM(vllm_config=with_holes)
    assert models.LlamaBlockPrunedForCausalLM is type(pruned) and issubclass(type(pruned), base)

    whole = base(vllm_config=dense)
    gone = [f"layers.{n}.self_attn." for n in (0, 3)] + [f"layers.{n}.{mlp}." for n in (1, 3)]
    gone += [f"layers.{n}.input_layernorm." for n in (0, 3)]
    after, before = "post_attention_layernorm", "pre_feedforward_layernorm"
    gone += [f"layers.{n}.{after}." for n in ((0, 3) if around else (1, 3))]
    gone += [
        f"layers.{n}.{name}." for n in (1, 3) for name in (before, "post_feedforward_layernorm")
    ]
    kept = [name for name, _ in whole.named_parameters() if not name.startswith(tuple(gone))]
    assert [name for name, _ in pruned.named_parameters()] == kept
    cached = with_holes.compilation_config.static_forward_context
    assert [name for name in cached if name.endswith("attn")] == [
        f"model.layers.{n}.self_attn.attn" for n in (1, 2)
    ]
    assert with_holes.compilation_config.static_all_moe_layers == [
        f"model.layers.{n}.mlp.experts" for n in (0, 2)
    ]
    assert not set(cached) - set(dense.compilation_config.static_forward_context)

    for name in [
        n for n, _ in whole.named_parameters() if n.startswith(tuple(gone)) and "norm" not in n
    ]:
        whole.get_parameter(name).data.zero_()
    pruned.load_state_dict({name: whole.get_parameter(name) for name in kept})
    x = torch.randn(5, 8)
    torch.testing.assert_close(pruned(x), whole(x))


def test_widths_are_those_of_transformers_own_form():
    fields = {"model_type": "llama_blockpruned", "num_hidden_layers": 4, "intermediate_size": 8}
    layers = {
        "1": {"intermediate_size": 3},
        "2": {"skip": ["mlp"]},
        "3": {"skip": ["attention"], "intermediate_size": 5},
    }
    config = vllm_plugin.BlockPrunedConfig.from_dict({**fields, "per_layer_config": layers})
    assert config.mlp_widths == [8, 3, 8, 5] and config.intermediate_size == 8


def test_each_mlp_is_made_while_the_config_has_its_width(registry, monkeypatch):
    seen, vllm_config, made = [], asked([], []), Mixture.__init__
    config = vllm_config.model_config.hf_config
    config.intermediate_size, config.mlp_widths = 8, [8, 3, 8, 5]
    monkeypatch.setattr(
        Mixture, "__init__", lambda *given: (seen.append(config.intermediate_size), made(*given))[1]
    )
    base = type("LlamaForCausalLM", (Decoder,), {})
    registry.models["LlamaForCausalLM"] = SimpleNamespace(load_model_cls=lambda: base)
    importlib.import_module(vllm_plugin.MODELS).LlamaBlockPrunedForCausalLM(vllm_config=vllm_config)
    assert seen == [8, 3, 8, 5] and config.intermediate_size == 8


def test_layers_of_other_names_are_refused_and_later_models_are_whole(registry):
    base = type("LlamaForCausalLM", (Decoder,), {"mlp": "feed_forward"})
    registry.models["LlamaForCausalLM"] = SimpleNamespace(load_model_cls=lambda: base)
    models = importlib.import_module(vllm_plugin.MODELS)
    with pytest.raises(ValueError, match=r"no hole could be made at \[\('mlp', 1\)\]"):
        models.LlamaBlockPrunedForCausalLM(vllm_config=asked([0], [1, 9]))
    with (
        pytest.raises(ValueError, match="not as blockpruner knows them"),
        models.holes(*of(asked([0], []))),
    ):
        nn.Sequential(nn.Linear(2, 2))
    assert "layers.0.self_attn.weight" in dict(
        Decoder(vllm_config=asked([], [])).named_parameters()
    )
    with pytest.raises(AttributeError, match="has no attribute 'LlamaForCausalLM'"):
        models.__getattr__("LlamaForCausalLM")
