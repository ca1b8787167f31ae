"""SliceGPT against the same thing written as projections, and its checkpoint in a fresh process."""

import copy
import importlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from blockpruner.core.errors import InputError
from blockpruner.core.families import FAMILIES
from blockpruner.methods.slicegpt.slicing import slice_
from blockpruner.methods.slicegpt.widths import (
    SLICEABLE,
    sliced_parameters,
    sliced_ratio,
    width_for_ratio,
)
from tests.shapes import SHAPES
from tests.tiny import tiny_model

MODELS = {family: (family, {}) for family in SLICEABLE} | {
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "qwen3 with biases": ("qwen3", {"attention_bias": True}),
}
DAILY = ("llama with biases", "mistral", "qwen2", "qwen3")
models = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in DAILY else pytest.mark.slow) for name in MODELS]
)
GENERATOR = torch.Generator().manual_seed(3)
ROWS = [
    torch.randint(1, 257, (length,), generator=GENERATOR).tolist() for length in (30, 9, 17, 24, 2)
]
IDS = torch.randint(1, 257, (2, 14), generator=GENERATOR)
GENERATE = {"do_sample": False, "min_new_tokens": 8, "max_new_tokens": 8, "pad_token_id": 0}

LLAMA2_7B, LLAMA2_13B = (SHAPES[f"meta-llama/Llama-2-{size}-hf"] for size in ("7b", "13b"))


def tiny(name, layers=3, dtype=torch.float64):
    family, extra = MODELS[name]
    return tiny_model(family, layers, dtype, **extra)


@pytest.fixture
def exact_norms(monkeypatch):
    """transformers' norms compute in float32, whatever the dtype: that would hide any error below
    1e-6."""

    def forward(self, x):
        return (
            self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        )

    for family in SLICEABLE:
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        monkeypatch.setattr(
            getattr(module, f"{FAMILIES[family].prefix}RMSNorm"), "forward", forward
        )


class Projected:
    """Oracle: slicing is a projection of the dense model's residual stream before each block, and
    rotates nothing.

    x <- P x with P = Q_n Q_n^T, then x <- x + block(norm(x)): in the coordinates Q_n^T x that is
    the sliced network, and |P x|^2 = |Q_n^T x|^2, so that the norm divides by the dense hidden
    size. Q as the public code has it: damping, then eigenvectors sorted by eigenvalue; every row
    alone, unpadded.
    """

    def __init__(self, model, rows, width):
        self.model, self.width = model, width
        self.projections = []
        states = [self.embed(torch.tensor([row])) for row in rows]
        for block in self.blocks():
            self.projections.append(self.projection(states))
            states = [block(state @ self.projections[-1]) for state in states]

    def projection(self, states):
        tokens = np.concatenate([state[0].numpy() for state in states])
        gram = tokens.T @ tokens
        gram += 0.01 * np.diag(gram).mean() * np.eye(len(gram))
        values, vectors = np.linalg.eigh(gram)
        kept = vectors[:, np.argsort(-values)[: self.width]]
        return torch.from_numpy(kept @ kept.T)

    def embed(self, ids):
        return self.model.model.embed_tokens.weight[ids]

    def norm(self, norm, x):
        return (
            norm.weight
            * x
            / torch.sqrt((x**2).mean(-1, keepdim=True) + self.model.config.rms_norm_eps)
        )

    def mask(self, layer, length):
        ago = torch.arange(length)[:, None] - torch.arange(length)[None]
        config = self.model.config
        windowed = config.model_type == "mistral" or (config.model_type == "qwen2" and layer >= 2)
        return ((ago >= 0) & (ago < (config.sliding_window if windowed else length)))[None, None]

    def attention(self, layer, x):
        module = self.model.model.layers[layer]
        places = self.model.model.rotary_emb(x, torch.arange(x.shape[1])[None])
        normed = self.norm(module.input_layernorm, x)
        mask = self.mask(layer, x.shape[1])
        return x + module.self_attn(normed, position_embeddings=places, attention_mask=mask)[0]

    def mlp(self, layer, x):
        module = self.model.model.layers[layer]
        mlp, normed = module.mlp, self.norm(module.post_attention_layernorm, x)
        return x + mlp.down_proj(
            torch.nn.functional.silu(mlp.gate_proj(normed)) * mlp.up_proj(normed)
        )

    def blocks(self):
        for layer in range(self.model.config.num_hidden_layers):
            yield lambda x, layer=layer: self.attention(layer, x)
            yield lambda x, layer=layer: self.mlp(layer, x)

    def logits(self, ids):
        x = self.embed(ids)
        for projection, block in zip(self.projections, self.blocks(), strict=True):
            x = block(x @ projection)
        return self.norm(self.model.model.norm, x) @ self.model.lm_head.weight.T


@models
@pytest.mark.parametrize(
    ("width", "batch_tokens"), [(8, 10_000), (29, 1)], ids=["padded", "row by row"]
)
def test_sliced_equals_the_projected_dense_model(exact_norms, name, width, batch_tokens):
    model = tiny(name)
    oracle = Projected(copy.deepcopy(model), ROWS, width)
    sliced = slice_(model, ROWS, width, batch_tokens=batch_tokens)
    expected = oracle.logits(IDS)
    assert (sliced(IDS).logits - expected).abs().max() <= 1e-8
    assert expected.abs().max() > 1


@models
@pytest.mark.parametrize("width", [8, 24])
def test_parameters_are_counted_from_the_config(name, width):
    model = tiny(name)
    config, dense = model.config.to_dict(), model.num_parameters()
    assert sliced_parameters(config, width) == (dense, slice_(model, ROWS, width).num_parameters())


@pytest.mark.parametrize(
    ("config", "width", "ratio"), [(LLAMA2_7B, 2864, 21.45), (LLAMA2_13B, 3584, 21.52)]
)
def test_ratios_of_the_paper(config, width, ratio):
    """Table 1 of arXiv 2406.10594, sparsity 0.30, written out: what is sliced, what is not, and the
    shortcuts."""
    d, inner, layers, n = (
        config["hidden_size"],
        config["intermediate_size"],
        config["num_hidden_layers"],
        width,
    )
    dense = 2 * 32000 * d + layers * (4 * d * d + 3 * d * inner) + (2 * layers + 1) * d
    sliced = 32000 * (n + d) + layers * (4 * n * d + 3 * n * inner) + (d - n) * inner
    sliced += (2 * layers - 1) * n * n + n * d
    assert sliced_parameters(config, n) == (dense, sliced)
    assert round(100 * sliced_ratio(config, n), 2) == ratio
    assert width_for_ratio(config, ratio / 100) == n


def test_width_of_a_ratio():
    """The nearest of all; to slice a little makes a model larger, by the shortcuts."""
    widths = range(8, 4097, 8)
    for ratio in (0.01, 0.1, 0.2, 0.5, 0.9):
        distance = {n: abs(sliced_ratio(LLAMA2_7B, n) - ratio) for n in widths}
        assert width_for_ratio(LLAMA2_7B, ratio) == min(distance, key=distance.get)
    assert sliced_ratio(LLAMA2_7B, 4096) == pytest.approx(-64 * 4096 * 4096 / 6.7384e9, rel=1e-3)
    assert sliced_ratio(LLAMA2_7B, width_for_ratio(LLAMA2_7B, 0.0015)) > 0
    with pytest.raises(InputError, match=r"from 0\.0019 \(width 3576\) to 0\.9719"):
        width_for_ratio(LLAMA2_7B, 5e-4)
    for ratio in (0.99, -0.2):
        with pytest.raises(
            InputError, match=rf"ratio {ratio} .*from 0\.0019 \(width 3576\) to 0\.9719 \(width 8\)"
        ):
            width_for_ratio(LLAMA2_7B, ratio)


def test_kept_directions_hold_the_most_energy():
    """Of the embedded calibration tokens: as much as the largest singular values say, and more than
    random ones."""
    model, width = tiny("llama"), 12
    tokens = torch.tensor([token for row in ROWS for token in row])
    dense = model.get_input_embeddings()(tokens)
    sliced = slice_(model, ROWS, width).get_input_embeddings()(tokens)
    singular = np.linalg.svd(dense.numpy(), compute_uv=False)
    assert sliced.square().sum().item() == pytest.approx((singular[:width] ** 2).sum(), rel=1e-12)
    energies = sliced.square().sum(0)
    assert torch.equal(energies, energies.sort(descending=True).values)
    for _ in range(20):
        other, _ = torch.linalg.qr(torch.randn(32, width, dtype=torch.float64, generator=GENERATOR))
        assert (dense @ other).square().sum() < sliced.square().sum()


@models
def test_cached_decoding_equals_uncached(name):
    model = slice_(tiny(name), ROWS, 24)
    mask = torch.ones_like(IDS)
    tokens = model.generate(IDS, attention_mask=mask, use_cache=False, **GENERATE)
    assert torch.equal(model.generate(IDS, attention_mask=mask, **GENERATE), tokens)
    assert torch.equal(
        model.generate(IDS, attention_mask=mask, cache_implementation="static", **GENERATE), tokens
    )
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.int64), IDS], dim=1)
    remaining = (torch.arange(17) >= 3).long().expand(2, -1)
    assert torch.equal(model.generate(padded, attention_mask=remaining, **GENERATE)[:, 3:], tokens)

    complete, out = model(IDS, use_cache=False).logits, model(IDS[:, :5], use_cache=True)
    for position in range(5, 14):
        out = model(IDS[:, position : position + 1], cache=out.cache, use_cache=True)
        assert (
            out.logits[:, -1] - complete[:, position]
        ).abs().max() <= 1e-5  # Qwen3's head norms are in float32


LOAD = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
root, *names = sys.argv[1:]
ids = load_file(f"{root}/ids")["ids"]
for name in names:
    model, report = AutoModelForCausalLM.from_pretrained(
        f"{root}/{name}", trust_remote_code=True, dtype="auto", output_loading_info=True
    )
    assert not any(report.values()), report
    save_file({"logits": model(ids).logits.contiguous()}, f"{root}/{name}.out")
    print(type(model).__name__, model.config.sliced_width, model.num_parameters())
assert "blockpruner" not in sys.modules
"""


def test_saved_checkpoint_in_a_fresh_process(tmp_path):
    save_file({"ids": IDS}, tmp_path / "ids")
    expected, says = {}, []
    for name in MODELS:
        model = slice_(tiny(name, 2), ROWS, 24)
        type(model).register_for_auto_class("AutoModelForCausalLM")
        type(model.config).register_for_auto_class("AutoConfig")
        model.save_pretrained(tmp_path / name)
        expected[name] = model(IDS).logits
        says.append(
            f"{FAMILIES[MODELS[name][0]].prefix}SliceGPTForCausalLM 24 {model.num_parameters()}"
        )
    environment = os.environ | {
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-I", "-c", LOAD, str(tmp_path), *MODELS]
    result = subprocess.run(
        command, capture_output=True, text=True, env=environment, check=False, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == says
    for name, logits in expected.items():
        assert (load_file(tmp_path / f"{name}.out")["logits"] - logits).abs().max() <= 1e-10, name


def test_sliced_model_is_a_model_like_others():
    """It can be trained, its hidden states are recorded, and its dtype stays."""
    model = slice_(tiny("llama", dtype=torch.bfloat16), ROWS, 24)
    model.requires_grad_(True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    out = model(IDS, labels=IDS, output_hidden_states=True)
    assert [state.shape[-1] for state in out.hidden_states] == [24, 24, 24, 32]
    out.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_untied_for_good():
    model = slice_(tiny("llama tied"), ROWS, 24)
    logits = model(IDS).logits
    model.tie_weights()
    model.tie_weights(recompute_mapping=False)
    assert torch.equal(model(IDS).logits, logits)
    assert not model.config.tie_word_embeddings


def test_what_cannot_be_sliced():
    neox, split, overflowing = tiny_model("gpt_neox"), tiny("llama"), tiny("llama")
    for call in (
        lambda: slice_(neox, ROWS, 24),
        lambda: sliced_parameters(neox.config.to_dict(), 24),
    ):
        with pytest.raises(
            InputError, match="'gpt_neox' cannot be sliced.*llama, mistral, qwen2, qwen3"
        ):
            call()
    split.lm_head.to("meta")
    overflowing.get_input_embeddings().weight[5:].mul_(float("inf"))
    for model, width, message in (
        (tiny("llama"), 0, "width 0 is not valid.*give 1 to 32"),
        (tiny("llama"), 33, "width 33 is not valid.*give 1 to 32"),
        (split, 24, "a model on cpu, meta cannot be sliced"),
        (overflowing, 24, "not finite"),
    ):
        with pytest.raises(InputError, match=message):
            slice_(model, ROWS, width)
