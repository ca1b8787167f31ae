"""Baichuan checkpoints in their own layout, fetched and loaded, against the formulas of their code
written anew.

Norms are computed in float64 here and patched to be so in transformers, which rounds to float32 as
the original does. Rotary tables are float32 in both.
"""

import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from blockpruner.checkpoints.hf import code_file
from blockpruner.checkpoints.verification import reference_outputs, verify_checkpoint
from blockpruner.core.blocks import BlockId, BlockKind, parse_mask
from blockpruner.core.errors import InputError
from blockpruner.core.families import count_parameters
from blockpruner.inputs.tokenizers import load_tokenizer
from blockpruner.model.modeling_blockpruned import BaichuanConfig, BaichuanForCausalLM, alibi_slopes
from blockpruner.model.models import load_model, masked, prune_
from blockpruner.scoring.engine import Engine
from blockpruner.scoring.large.streaming import StreamingEngine
from blockpruner.store.files import read_json, write_json
from tests.oracles import make_rows, score_all, sweep
from tests.plans import fetch, save_pruned

LAYERS, HIDDEN, INNER, VOCABULARY = 4, 48, 40, 90
IDS = torch.randint(1, VOCABULARY, (11,), generator=torch.Generator().manual_seed(2))
MASKS = ["", "mha.0,mlp.2", "mha.1,mha.2,mlp.0,mlp.1", "mha.3,mlp.3", "mha.0,mha.1,mha.2,mha.3"]
GREEDY = {"do_sample": False, "min_new_tokens": 6, "max_new_tokens": 6, "pad_token_id": 0}

FORMS = {
    "2-7B": {"max_position_embeddings": 64, "model_max_length": 64, "z_loss_weight": 0},
    "2-13B": {"model_max_length": 64, "z_loss_weight": 0},
    "1-7B": {"architectures": ["BaiChuanForCausalLM"], "max_position_embeddings": 64},
    "1-13B": {"model_max_length": 64},
}
"""Where the config.json of each form differs from the others."""

CASES = [("2-7B", 4), ("2-13B", 6), ("1-7B", 4), ("1-13B", 4)]
cases = pytest.mark.parametrize(
    ("form", "heads"), CASES, ids=[f"{form} {heads} heads" for form, heads in CASES]
)

SLOPES = {
    4: [2**-2, 2**-4, 2**-6, 2**-8],
    6: [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3],
}


def original(form, heads=4, **changes):
    """config.json as on the hub, and tensors as in its files."""
    generator = torch.Generator().manual_seed(5)

    def random_(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * 0.5

    vocabulary = VOCABULARY if form[0] == "2" else 64_000
    config = {
        "architectures": ["BaichuanForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_baichuan.BaichuanConfig",
            "AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM",
        },
        "_from_model_config": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": INNER,
        "model_type": "baichuan",
        "num_attention_heads": heads,
        "num_hidden_layers": LAYERS,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.29.2",
        "use_cache": True,
        "vocab_size": vocabulary,
    }
    tensors = {
        "model.embed_tokens.weight": random_(vocabulary, HIDDEN),
        "model.norm.weight": 1 + random_(HIDDEN) / 2,
        "lm_head.weight": random_(vocabulary, HIDDEN),
    }
    for n in range(LAYERS):
        for name, shape in {
            "self_attn.W_pack": (3 * HIDDEN, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HIDDEN),
            "mlp.gate_proj": (INNER, HIDDEN),
            "mlp.up_proj": (INNER, HIDDEN),
            "mlp.down_proj": (HIDDEN, INNER),
        }.items():
            tensors[f"model.layers.{n}.{name}.weight"] = random_(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{n}.{name}.weight"] = 1 + random_(HIDDEN) / 2
    return {**config, **FORMS[form], **changes}, tensors


def write(folder, config, tensors, dtype=torch.float64):
    """Two shards; the second one begins in the midst of the layers."""
    folder.mkdir()
    names = sorted(tensors)
    middle = len(names) // 2
    shards = {
        "model-00001-of-00002.safetensors": names[:middle],
        "model-00002-of-00002.safetensors": names[middle:],
    }
    weight_map = {}
    for file, names_in_shard in shards.items():
        weights = {name: tensors[name].to(dtype) for name in names_in_shard}
        save_file(weights, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names_in_shard, file)
    write_json(folder / "config.json", config)
    index = {"metadata": {}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)
    (folder / "modeling_baichuan.py").write_text("raise RuntimeError('remote code was run')\n")
    return folder


def fetched(root, config, tensors, dtype=torch.float64, **settings):
    return fetch(write(root / "original", config, tensors, dtype), root / "model", **settings)


def rotated(x):
    """Rotary embedding of [heads, T, d]: numbers i and i + d/2 turn by t / 10000^(2i/d)."""
    half = x.shape[-1] // 2
    exponents = torch.arange(0, 2 * half, 2, dtype=torch.float32) / (2 * half)
    frequencies = 1 / 10000**exponents
    positions = torch.arange(x.shape[-2], dtype=torch.float32)
    angles = positions[:, None] * frequencies
    cos = angles.cos().double()
    sin = angles.sin().double()
    a = x[..., :half]
    b = x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def rms(x, weight):
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


def attention(config, packed):
    """The heads' outputs [T, HIDDEN] of queries, keys and values [T, 3 HIDDEN]."""
    heads = config["num_attention_heads"]
    length = len(packed)
    q, k, v = packed.view(length, 3, heads, -1).permute(1, 2, 0, 3)
    bias = torch.full((length, length), float("-inf"), dtype=torch.float64).triu(1)
    if "max_position_embeddings" in config:  # 7B
        q = rotated(q)
        k = rotated(k)
    else:
        # As the 13B's code has it: the slope times the key's position. The query's position adds
        # the same to all keys.
        slopes = torch.tensor(SLOPES[heads], dtype=torch.float64)
        bias = bias + slopes[:, None, None] * torch.arange(length)
    scores = q @ k.transpose(1, 2) / (HIDDEN / heads) ** 0.5 + bias
    return (scores.softmax(-1) @ v).transpose(0, 1).reshape(length, -1)


def formulas(config, tensors, ids, removed=frozenset()):
    """Logits [T, V] of token ids [T] without the blocks `removed`."""
    x = tensors["model.embed_tokens.weight"][ids]
    for layer in range(LAYERS):

        def weight(name, layer=layer):
            return tensors[f"model.layers.{layer}.{name}.weight"]

        if BlockId(BlockKind.MHA, layer) not in removed:
            h = rms(x, weight("input_layernorm"))
            heads = attention(config, h @ weight("self_attn.W_pack").T)
            x = x + heads @ weight("self_attn.o_proj").T
        if BlockId(BlockKind.MLP, layer) not in removed:
            h = rms(x, weight("post_attention_layernorm"))
            gate = h @ weight("mlp.gate_proj").T
            up = h @ weight("mlp.up_proj").T
            x = x + (gate * gate.sigmoid() * up) @ weight("mlp.down_proj").T
    head = tensors["lm_head.weight"]
    if config["vocab_size"] != 64_000:  # Baichuan 2 has a normalized head
        head = head / head.pow(2).sum(dim=1, keepdim=True).sqrt()
    return rms(x, tensors["model.norm.weight"]) @ head.T


def assert_equal_logits(logits, expected):
    assert (logits - expected).abs().max() <= 1e-10


@pytest.fixture
def exact_norms(monkeypatch):
    monkeypatch.setattr(LlamaRMSNorm, "forward", lambda self, x: rms(x, self.weight))


@cases
def test_a_fetched_model_computes_the_formulas(tmp_path, exact_norms, form, heads):
    config, tensors = original(form, heads)
    directory = fetched(tmp_path, config, tensors)
    for mask in map(parse_mask, MASKS):
        expected = formulas(config, tensors, IDS, mask)
        model = load_model(directory, "float64", "cpu")
        with masked(model, mask):
            assert_equal_logits(model(IDS[None]).logits[0], expected)
        assert_equal_logits(prune_(model, mask)(IDS[None]).logits[0], expected)


@pytest.mark.parametrize("mask", ["", "mha.0,mha.2,mlp.1"])
@pytest.mark.parametrize("heads", [4, 6])
def test_decoding_and_padding_with_alibi(tmp_path, exact_norms, mask, heads):
    config, tensors = original("2-13B", heads)
    removed = parse_mask(mask)
    model = prune_(load_model(fetched(tmp_path, config, tensors), "float64", "cpu"), removed)
    tokens = IDS
    for _ in range(6):
        logits = formulas(config, tensors, tokens, removed)
        tokens = torch.cat([tokens, logits[-1:].argmax(-1)])
    ones = torch.ones(1, len(IDS), dtype=torch.int64)
    for options in ({}, {"cache_implementation": "static"}):
        generated = model.generate(IDS[None], attention_mask=ones, **GREEDY, **options)
        assert torch.equal(generated[0], tokens)

    expected = formulas(config, tensors, IDS, removed)
    cache = None
    logits = []
    for ids in IDS.split([4, 1, 3, 3]):  # one token, and several at once after a past
        step = model(ids[None], cache=cache, use_cache=True)
        cache = step.cache
        logits.append(step.logits[0])
    assert_equal_logits(torch.cat(logits), expected)

    padding = torch.zeros(3, dtype=torch.int64)
    rows = torch.stack([torch.cat([padding, IDS]), torch.cat([IDS, IDS[:3]])])
    is_token = torch.ones_like(rows)
    is_token[0, :3] = 0
    padded, full = model(rows, attention_mask=is_token).logits
    assert_equal_logits(padded[3:], expected)
    assert_equal_logits(full, formulas(config, tensors, rows[1], removed))


def test_slopes():
    for heads, slopes in SLOPES.items():
        assert alibi_slopes(heads) == slopes
    slopes = [2 ** -(i / 4) for i in range(1, 33)]
    slopes += [2 ** -((2 * j + 1) / 8) for j in range(8)]
    assert alibi_slopes(40) == pytest.approx(slopes)


def test_bias_keeps_its_precision_in_bfloat16():
    """It is rounded once, also at far positions, between which bfloat16 has steps of 4 and more."""
    sizes = {"hidden_size": 24, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 9}
    model = BaichuanForCausalLM(BaichuanConfig(num_attention_heads=12, **sizes)).model
    mask = torch.ones(1, 1, 900, 900, dtype=torch.bool)
    bias = model.with_alibi(mask, 100, torch.bfloat16)
    slopes = torch.tensor(alibi_slopes(12), dtype=torch.float64)
    positions = torch.arange(900)
    exact = slopes[:, None, None] * (positions - 100 - positions[:, None])
    assert ((bias.double() - exact).abs() <= exact.abs() / 255.9).all()


def test_7b_becomes_a_plain_llama_checkpoint(tmp_path):
    """Weights stay in bfloat16, except the head, and in as many files."""
    config, tensors = original("2-7B")
    directory = fetched(tmp_path, config, tensors, dtype=torch.bfloat16, trust_remote_code=True)
    llama_config = read_json(directory / "config.json")
    assert not {"auto_map", "z_loss_weight", "model_max_length"} & llama_config.keys()
    assert AutoConfig.from_pretrained(directory).rope_parameters["rope_theta"] == 10000
    assert type(AutoModelForCausalLM.from_pretrained(directory)) is LlamaForCausalLM
    assert not list(directory.glob("*.py"))
    assert len({path.stat().st_mode for path in directory.glob("*.[js]*")}) == 1
    assert count_parameters(llama_config).total == sum(map(torch.numel, tensors.values()))

    paths = sorted(directory.glob("*.safetensors"))
    assert len(paths) == 2
    stored = load_file(paths[0]) | load_file(paths[1])
    index = read_json(directory / "model.safetensors.index.json")
    assert index["weight_map"].keys() == stored.keys()
    size = sum(tensor.nbytes for tensor in stored.values())
    assert index["metadata"]["total_size"] == size
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}.self_attn."
        packed = torch.cat([stored[f"{prefix}{name}_proj.weight"] for name in "qkv"])
        assert torch.equal(packed, tensors[f"{prefix}W_pack.weight"].bfloat16())
    head = stored.pop("lm_head.weight")
    assert head.dtype == torch.float32
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    normalized = F.normalize(tensors["lm_head.weight"].bfloat16().float())
    assert (head - normalized).abs().max() <= 1e-7
    assert torch.equal(load_model(directory, "bfloat16", "cpu").lm_head.weight, head.bfloat16())


@pytest.mark.parametrize("form", ["2-7B", "2-13B"])
def test_streaming_of_mixed_dtypes(tmp_path, form):
    config, tensors = original(form)
    directory = fetched(tmp_path, config, tensors, dtype=torch.bfloat16)
    rows = [[token % VOCABULARY for token in row] for row in make_rows([9, 4, 9])]
    streaming = StreamingEngine(directory, "bfloat16", device="cpu", batch_tokens=20)
    engine = Engine(load_model(directory, "bfloat16", "cpu"), 20)
    assert score_all(streaming, sweep(), rows) == score_all(engine, sweep(), rows)


@pytest.mark.usefixtures("in_process")
def test_full_layers_ship_the_modelling_file(tmp_path):
    """The rest is no block-pruned model, but transformers has no Baichuan either."""
    directory = fetched(tmp_path, *original("2-13B", 6))
    model = prune_(load_model(directory, "float64", "cpu"), parse_mask("mha.1,mlp.1"))
    plan = SimpleNamespace(layers=LAYERS, blocks={"mha": 1, "mlp": 1})
    save_file(reference_outputs(model, plan), tmp_path / "reference")
    save_pruned(model, tmp_path / "out")
    verify_checkpoint(tmp_path / "out", tmp_path / "reference", 1e-10)
    report = read_json(tmp_path / "out" / "verification.json")
    assert report["ok"]
    assert report["class"] == "BaichuanForCausalLM"
    assert code_file(model) == "modeling_blockpruned.py"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"z_loss_weight": None, "vocab_size": 64_016},
            r"vocab_size 64016, and no z_loss_weight.*125,696.*64,000",
        ),
        (
            {"z_loss_weight": None, "model_max_length": None, "vocab_size": 64_000},
            r"neither max_position_embeddings \(7B: rotary\) nor model_max_length",
        ),
    ],
)
def test_unknown_forms_are_refused_and_leave_nothing(tmp_path, changes, message):
    config, tensors = original("2-13B", **changes)
    config = {key: value for key, value in config.items() if value is not None}
    with pytest.raises(InputError, match=message):
        fetched(tmp_path, config, tensors)
    assert not (tmp_path / "model").exists()
    assert not list((tmp_path / "cache" / "models").iterdir())


# --- tokenizer

TEXTS = [
    "hello world",
    " hello",
    "  two",
    "",
    "x\ny\n\n  z",
    "12345",
    "你好 世界",
    "odd 😀 ☃",
    "    four",
    "a  b   c    d",
    "<reserved_0>hi<reserved_1> there",
    "tab\there",
    "naïve é",
    "trailing  ",
]


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    """A model trained with the settings of Baichuan 2's: no dummy prefix, no normalization, single
    digits, bytes."""
    spm = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("sentencepiece")
    lines = [
        "hello world, the quick brown fox 2024 jumps over 13 lazy dogs",
        "def f(x):    return x + 1",
        "你好，世界。北京是个不错的城市。",
        "tabs and   spaces     and more",
        "the theory",
    ]
    (folder / "texts").write_text("\n".join(lines * 40))
    spm.SentencePieceTrainer.train(
        input=str(folder / "texts"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=430,
        model_type="bpe",
        add_dummy_prefix=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=["<reserved_0>", "<reserved_1>"],
        minloglevel=2,
        hard_vocab_limit=False,
    )
    return folder / "tokenizer.model"


def with_tokenizer(folder, model):
    """The files of the tokenizer next to the weights, as on the hub."""

    def token(content):
        return {
            "__type": "AddedToken",
            "content": content,
            "lstrip": False,
            "normalized": True,
            "rstrip": False,
            "single_word": True,
        }

    settings = {
        "auto_map": {"AutoTokenizer": ["tokenization_baichuan.BaichuanTokenizer", None]},
        "add_bos_token": False,
        "add_eos_token": False,
        "use_fast": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "sp_model_kwargs": {},
        "tokenizer_class": "BaichuanTokenizer",
        "eos_token": token("</s>"),
        "pad_token": token("<unk>"),
        "unk_token": token("<unk>"),
    }
    special_tokens = {
        "bos_token": token("<s>"),
        "eos_token": token("</s>"),
        "unk_token": token("<unk>"),
        "pad_token": token("<unk>"),
    }
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "special_tokens_map.json", special_tokens)
    (folder / "tokenizer.model").write_bytes(model.read_bytes())
    return folder


@pytest.mark.parametrize("form", ["2-7B", "2-13B"])
def test_tokenizer_gives_the_ids_of_sentencepiece(tmp_path, sentencepiece_model, form):
    import sentencepiece

    folder = with_tokenizer(write(tmp_path / "original", *original(form)), sentencepiece_model)
    directory = fetch(folder, tmp_path / "model")
    assert (directory / "tokenizer.json").exists()
    (directory / "tokenizer.model").unlink()
    tokenizer = load_tokenizer(directory)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert type(AutoTokenizer.from_pretrained(directory)) is type(tokenizer)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    generator = random.Random(3)
    alphabet = "abcdefgh the  \n\t0123456789你好世界城é😀.,"
    random_texts = ["".join(generator.choices(alphabet, k=20)) for _ in range(300)]
    for text in TEXTS + random_texts:
        ids = reference.encode(text)
        assert tokenizer(text)["input_ids"] == ids, text
        assert tokenizer.decode(ids) == reference.decode(ids), text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert tokenizer("a</s>")["input_ids"][-1] == 2
