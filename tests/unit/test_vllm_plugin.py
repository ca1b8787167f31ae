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

FAMILIES_IN_VLLM = [name for name, family in FAMILIES.items() if family.in_vllm]
BASES = [f"{FAMILIES[name].prefix}ForCausalLM" for name in FAMILIES_IN_VLLM]


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
    names = [base.replace("For", "BlockPrunedFor") for base in BASES]
    assert added == {name: f"blockpruner.model.vllm_models:{name}" for name in names}


@pytest.mark.parametrize("family", FAMILIES_IN_VLLM)
def test_a_checkpoint_has_its_familys_config_without_remote_code(registry, tmp_path, family):
    dense = fetch_tiny(tmp_path, family)
    step = pruning(dense, plan_of(dense, ["mha.0", "mlp.1", "mha.2"]))
    save_pruned(step.prune_(step.load()), tmp_path / "pruned")
    config = AutoConfig.from_pretrained(tmp_path / "pruned")
    assert type(config) is CONFIG_MAPPING[family]
    assert config.model_type == family
    assert (config.layers_without_mha, config.layers_without_mlp) == ([0, 2], [1])
    assert not hasattr(config, "auto_map")
    assert not config.is_heterogeneous
    architecture = config.architectures[0]
    assert registry.models[architecture] == f"{vllm_plugin.MODELS}:{architecture}"
    dense_fields = json.loads((dense / "config.json").read_text())
    fields = config.to_dict()
    for name in dense_fields.keys() - {"architectures", "transformers_version"}:
        assert fields[name] == dense_fields[name], name


def test_vllm_starts_where_the_plugin_fails(registry, monkeypatch, caplog):
    """vLLM calls plugins outside of a try."""
    monkeypatch.setattr(Registry, "get_supported_archs", lambda self: 1 / 0)
    vllm_plugin.register()
    (line,) = caplog.messages
    assert line == "vLLM starts without blockpruner's models: ZeroDivisionError('division by zero')"


def test_no_type_of_others_is_registered(registry):
    for model_type in CONFIG_MAPPING._extra_content:
        assert model_type.endswith(("_blockpruned", "_slicegpt"))


def test_the_entry_point_imports_nothing_else_of_ours():
    (entry,) = metadata.entry_points(group="vllm.general_plugins", name="blockpruner")
    assert entry.load() is vllm_plugin.register
    code = f"import sys, {entry.module}; print(*sys.modules)"
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert {name for name in process.stdout.split() if name.startswith("blockpruner")} == {
        "blockpruner",
        "blockpruner.model",
        "blockpruner.model.known",
        "blockpruner.model.vllm_plugin",
    }


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

    def __init__(self, number, compilation, has_post_norms, mlp):
        super().__init__()
        self.self_attn = Attention(number, compilation)
        setattr(self, mlp, Mixture(number, compilation))
        self.mlp_name = mlp
        self.has_post_norms = has_post_norms
        self.input_layernorm = Norm()
        self.post_attention_layernorm = Norm()
        if has_post_norms:
            self.pre_feedforward_layernorm = Norm()
            self.post_feedforward_layernorm = Norm()

    def forward(self, positions, x, residual):
        if residual is None:
            residual = x
            x = self.input_layernorm(x)
        else:
            x, residual = self.input_layernorm(x, residual)
        x = self.self_attn(positions=positions, hidden_states=x)
        mlp = getattr(self, self.mlp_name)
        if not self.has_post_norms:
            x, residual = self.post_attention_layernorm(x, residual)
            return mlp(x), residual
        x = self.post_attention_layernorm(x)
        x, residual = self.pre_feedforward_layernorm(x, residual)
        return self.post_feedforward_layernorm(mlp(x)), residual


class Decoder(nn.Module):
    has_post_norms = False
    mlp = "mlp"

    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList()
        for number in range(4):
            compilation = vllm_config.compilation_config
            self.layers.append(Layer(number, compilation, self.has_post_norms, self.mlp))

    def forward(self, x):
        residual = None
        for layer in self.layers:
            x, residual = layer(None, x, residual)
        return x + residual


def config_without(mha=(), mlp=(), **fields):
    """A VllmConfig of a model with these holes."""
    config = SimpleNamespace(layers_without_mha=mha, layers_without_mlp=mlp, **fields)
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_config=config),
        compilation_config=SimpleNamespace(static_forward_context={}, static_all_moe_layers=[]),
    )


def register_base(registry, **attributes):
    """A Llama of these attributes in the registry, and the plugin's module of models."""
    base = type("LlamaForCausalLM", (Decoder,), attributes)
    registry.models["LlamaForCausalLM"] = SimpleNamespace(load_model_cls=lambda: base)
    return base, importlib.import_module(vllm_plugin.MODELS)


@pytest.mark.parametrize(
    ("has_post_norms", "mlp", "mha_norms", "mlp_norms"),
    [
        (False, "mlp", ["input_layernorm"], ["post_attention_layernorm"]),
        (
            True,
            "block_sparse_moe",
            ["input_layernorm", "post_attention_layernorm"],
            ["pre_feedforward_layernorm", "post_feedforward_layernorm"],
        ),
    ],
)
def test_removed_blocks_add_nothing_and_are_nowhere(
    registry, has_post_norms, mlp, mha_norms, mlp_norms
):
    base, models = register_base(registry, has_post_norms=has_post_norms, mlp=mlp)
    vllm_config = config_without([0, 3], [1, 3])
    pruned = models.LlamaBlockPrunedForCausalLM(vllm_config=vllm_config)
    assert models.LlamaBlockPrunedForCausalLM is type(pruned)
    assert issubclass(type(pruned), base)

    dense = base(vllm_config=config_without())
    removed_blocks = (
        "layers.0.self_attn",
        "layers.3.self_attn",
        f"layers.1.{mlp}",
        f"layers.3.{mlp}",
    )
    removed_norms = [f"layers.{n}.{norm}" for norm in mha_norms for n in (0, 3)]
    removed_norms += [f"layers.{n}.{norm}" for norm in mlp_norms for n in (1, 3)]
    expected = []
    for name, parameter in dense.named_parameters():
        module = name.rpartition(".")[0]
        if module in removed_blocks:
            parameter.data.zero_()
        elif module not in removed_norms:
            expected.append(name)
    assert [name for name, _ in pruned.named_parameters()] == expected
    pruned.load_state_dict({name: dense.get_parameter(name) for name in expected})
    x = torch.randn(5, 8)
    torch.testing.assert_close(pruned(x), dense(x))

    experts = [f"model.layers.{n}.mlp.experts" for n in (0, 2)]
    attentions = [f"model.layers.{n}.self_attn.attn" for n in (1, 2)]
    compilation = vllm_config.compilation_config
    assert set(compilation.static_forward_context) == {*experts, *attentions}
    assert compilation.static_all_moe_layers == experts


def test_widths_are_those_of_transformers_own_form():
    fields = {"model_type": "llama_blockpruned", "num_hidden_layers": 4, "intermediate_size": 8}
    layers = {
        "1": {"intermediate_size": 3},
        "2": {"skip": ["mlp"]},
        "3": {"skip": ["attention"], "intermediate_size": 5},
    }
    config = vllm_plugin.BlockPrunedConfig.from_dict({**fields, "per_layer_config": layers})
    assert config.mlp_widths == [8, 3, 8, 5]
    assert config.intermediate_size == 8


def test_each_mlp_is_made_while_the_config_has_its_width(registry, monkeypatch):
    vllm_config = config_without(intermediate_size=8, mlp_widths=[8, 3, 8, 5])
    config = vllm_config.model_config.hf_config
    widths = []

    class WideMixture(Mixture):
        def __init__(self, number, compilation):
            widths.append(config.intermediate_size)
            super().__init__(number, compilation)

    monkeypatch.setitem(globals(), "Mixture", WideMixture)
    _, models = register_base(registry)
    models.LlamaBlockPrunedForCausalLM(vllm_config=vllm_config)
    assert widths == [8, 3, 8, 5]
    assert config.intermediate_size == 8


def test_layers_of_other_names_are_refused_and_later_models_are_dense(registry):
    _, models = register_base(registry, mlp="feed_forward")
    with pytest.raises(ValueError, match=r"no hole could be made at \[\('mlp', 1\)\]"):
        models.LlamaBlockPrunedForCausalLM(vllm_config=config_without([0], [1, 9]))
    dense = Decoder(vllm_config=config_without())
    assert "layers.0.self_attn.weight" in dict(dense.named_parameters())
    with pytest.raises(AttributeError, match="has no attribute 'LlamaForCausalLM'"):
        models.__getattr__("LlamaForCausalLM")


def test_a_model_without_decoder_layers_is_refused(registry):
    _, models = register_base(registry)
    vllm_config = config_without([0])
    config = vllm_config.model_config.hf_config
    with (
        pytest.raises(ValueError, match="not as blockpruner knows them"),
        models.holes(config, vllm_config.compilation_config),
    ):
        nn.Sequential(nn.Linear(2, 2))
