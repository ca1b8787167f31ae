"""The GGUF export against llama.cpp (xllamacpp), which is the oracle, and against transformers'
logits."""

import copy
import json
import tempfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gguf import GGUFReader, TokenType
from gguf.quants import quantize
from safetensors.torch import load_file
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoConfig, LlamaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from blockpruner.checkpoints import gguf, verification, verify_llama_cpp
from blockpruner.checkpoints.gguf import TEXT, export_gguf
from blockpruner.checkpoints.packing import require_fit
from blockpruner.checkpoints.verification import reference_outputs
from blockpruner.checkpoints.vocabulary import CASED, CONTRACTED, vocabulary
from blockpruner.core.blocks import BlockKind, parse_mask
from blockpruner.core.errors import InputError
from blockpruner.core.families import FAMILIES
from blockpruner.inputs.checkpoints import _convert_gguf
from blockpruner.inputs.tokenizers import load_tokenizer
from blockpruner.model.models import load_model, masked, prune_
from tests.cells import seen
from tests.engines import with_llama_cpp
from tests.errors import refused
from tests.fakes import InProcess
from tests.plans import fetch, healed_of, narrow_plan, plan_of, pruning
from tests.tiny import tiny_model


@pytest.fixture(autouse=True)
def short_references(monkeypatch):
    """A third of what an export's verification asks; llama.cpp answers token by token."""
    monkeypatch.setattr(verification, "PROMPTS", 2)
    monkeypatch.setattr(verification, "NEW_TOKENS", 6)


MASKS = {
    "first": "mha.0,mlp.0",
    "MLPs before the first attention": "mha.0,mha.1",
    "last": "mha.5,mlp.5",
    "many": "mha.0,mha.1,mha.5,mlp.3,mlp.4",
}
SCALED = {"rope_theta": 10000.0, "factor": 8.0}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
MODELS = {
    "llama": {},
    "qwen2": {"use_sliding_window": False},
    "llama biases": {"attention_bias": True, "mlp_bias": True},
    "llama wide heads": {"head_dim": 16},
    "llama tied": {"tie_word_embeddings": True},
    "llama rope llama3": {"rope_parameters": {"rope_type": "llama3", **SCALED, **LLAMA3}},
    "llama rope linear": {"rope_parameters": {"rope_type": "linear", **SCALED}},
    "mistral": {"sliding_window": None},
}


@cache
def pieces():
    """Merges of bytes, learned from the very text that is compared, so that each rule of splitting
    shows."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT * 3, "low lower lowest 12 123 1234 's 'll"], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def byte_level(split, ignore_merges=False, **special):
    vocab, merges = pieces()
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{"eos_token": "</s>", "bos_token": "<s>"} | special
    )


def words(*steps):
    return pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )


def regex(pattern):
    isolated = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence(
        [isolated, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def sentencepiece(**options):
    """Pieces by rank, with every pair of pieces that makes one as a merge, as transformers reads a
    tokenizer.model."""
    tokenizer = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=120, show_progress=False)
    tokenizer.train_from_iterator(
        [("▁" + TEXT.replace(" ", "▁")).split("\n")[0]] * 2 + ["▁low▁lower", "▁▁▁▁"], trainer
    )
    result = json.loads(tokenizer.to_str())["model"]["vocab"]
    names = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *sorted(result, key=result.get),
    ]
    vocab = {name: index for index, name in enumerate(names)}
    merges = [
        (name[:cut], name[cut:])
        for name in names[259:]
        for cut in range(1, len(name))
        if name[:cut] in vocab and name[cut:] in vocab
    ]
    return LlamaTokenizer(vocab=vocab, merges=merges, **options)


@cache
def plain():
    return byte_level(words())


LLAMA_3 = CONTRACTED % r"\p{N}{1,3}"
TOKENIZERS = {
    "gpt-2": plain,
    "smollm": lambda: byte_level(words(pre_tokenizers.Digits(individual_digits=True))),
    "llama-bpe": lambda: byte_level(regex(LLAMA_3), ignore_merges=True),
    "tekken": lambda: byte_level(regex(CASED), ignore_merges=True),
    "qwen2": lambda: Qwen2Tokenizer(*pieces()),
    "default": sentencepiece,
}
"""What llama.cpp calls them ("default" is SentencePiece's), as transformers or their tokenizer.json
have them."""


def model_of(name, **changes):
    options = {"vocab_size": 304, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    # at the usual 0.5, rounding to 16 bits makes a chaos; at 0.2, a wrong file still errs 60 times
    # as much
    options |= {"initializer_range": 0.2}
    return tiny_model(name.split()[0], 6, torch.float32, **options | MODELS[name] | changes)


def asked(model, mask, path, tokenizer=None, words=None):
    """What llama.cpp says of a masked model's file, beside what the masked model says itself."""
    tokenizer, mask = tokenizer or plain(), parse_mask(mask)
    attentions = 6 - sum(block.kind is BlockKind.MHA for block in mask)
    with masked(model, mask):
        reference = reference_outputs(
            model, SimpleNamespace(layers=6, blocks={"mha": 6 - attentions})
        )
    reference |= gguf.facts(tokenizer, model.config.to_dict())
    pruned = prune_(copy.deepcopy(model), mask)
    words = words or vocabulary(tokenizer, model.config.to_dict())
    gguf.write(pruned, words, "F16", path)
    report = verify_llama_cpp.ask(path, reference)
    assert report["cache_layers"] == attentions
    best = reference["logits"].topk(2).values[:, int(reference["prompt"]) - 1 : -1]
    return report | {"margin": (best[..., 0] - best[..., 1]).min().item()}


@cache
def error_of_dense(name):
    with tempfile.TemporaryDirectory() as folder:
        report = asked(model_of(name), "", Path(folder) / "dense.gguf")
    return report["rms_logprob_difference"], report["max_logprob_difference"]


@with_llama_cpp
@pytest.mark.parametrize("mask", MASKS.values(), ids=list(MASKS))
@pytest.mark.parametrize("name", ["llama", pytest.param("qwen2", marks=pytest.mark.slow)])
def test_no_worse_than_the_dense_file(tmp_path, name, mask):
    report = asked(model_of(name), mask, tmp_path / "pruned.gguf")
    rms, largest = error_of_dense(name)
    assert report["rms_logprob_difference"] <= 1.5 * rms
    assert report["max_logprob_difference"] <= 2.5 * largest <= 0.06
    assert report["greedy_tokens_equal"] or report["margin"] <= 2 * largest
    assert report["text_tokens_equal"]


@with_llama_cpp
@pytest.mark.parametrize(
    "mask", [pytest.param("", marks=pytest.mark.slow), "mha.0,mlp.3"], ids=["whole", "holes"]
)
@pytest.mark.parametrize("name", MODELS)
def test_what_models_have(tmp_path, name, mask):
    report = asked(model_of(name), mask, tmp_path / "model.gguf")
    architecture = GGUFReader(tmp_path / "model.gguf").fields["general.architecture"].contents()
    assert architecture == ("deci" if mask else {"qwen2": "qwen2"}.get(name.split()[0], "llama"))
    assert report["max_logprob_difference"] <= 0.06
    if mask and name in FAMILIES and report["greedy_tokens_equal"]:
        seen("llama.cpp", name, report["max_logprob_difference"])


@with_llama_cpp
@pytest.mark.parametrize("pre", TOKENIZERS)
def test_tokens_are_those_of_transformers(tmp_path, pre):
    tokenizer = TOKENIZERS[pre]()
    model = model_of("llama", vocab_size=len(tokenizer) + 3)
    report = asked(model, "mha.0,mlp.3", tmp_path / "model.gguf", tokenizer)
    assert report["text_tokens_equal"]
    fields = GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == pre
    assert fields["tokenizer.ggml.tokens"].contents()[-1] == f"[PAD{len(tokenizer) + 2}]"
    types = fields["tokenizer.ggml.token_type"].contents()
    assert (types[tokenizer.eos_token_id], types[-1]) == (TokenType.CONTROL, TokenType.UNUSED)


def test_a_file_becomes_the_same_checkpoint_with_a_hub_and_without(tmp_path, monkeypatch):
    """De-quantized are the file's F16 weights; with any other bytes DVC would see another model."""
    model = model_of("llama")
    words = {**vocabulary(plain(), model.config.to_dict()), "license": "llama2"}
    gguf.write(model, words, "F16", tmp_path / "model.gguf")
    contents = []
    for offline in (True, False):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        checkpoint = tmp_path / f"offline {offline}"
        checkpoint.mkdir()
        licence = _convert_gguf((tmp_path / "model.gguf").read_bytes(), "float32", checkpoint)
        assert licence == {"license": "llama2"}
        contents.append({path.name: path.read_bytes() for path in checkpoint.iterdir()})
    assert contents[0] == contents[1]
    assert len({path.stat().st_mode for path in checkpoint.iterdir()}) == 1
    result, expected = load_model(checkpoint, "float32", "cpu").state_dict(), model.state_dict()
    assert result.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(result[name], weight if weight.ndim == 1 else weight.half().float()), (
            name
        )
    assert load_tokenizer(checkpoint).encode(TEXT) == plain().encode(TEXT)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    model_of("llama").save_pretrained(folder / "mine")
    plain().save_pretrained(folder / "mine")
    (folder / "mine/LICENSE").write_text("terms")
    return fetch(folder / "mine", folder / "model", dtype="float32")


def export(dense, out, order=("mha.0", "mlp.3", "mlp.2"), dtype="float32", **changes):
    export_gguf(pruning(dense, plan_of(dense, order, **changes), dtype), out)


@with_llama_cpp
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_is_complete_and_verified(tmp_path, dense, dtype, monkeypatch):
    if dtype != "float32":
        monkeypatch.setattr(verification, "subprocess", InProcess)
    export(dense, tmp_path / "out", dtype=dtype)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "LICENSE",
        "README.md",
        "blockpruner_plan.json",
        "model-F16.gguf",
        "model-Q8_0.gguf",
        "verification.json",
    }
    report = json.loads((tmp_path / "out/verification.json").read_text())
    assert report["ok"]
    assert report["cache_layers_expected"] == 5
    assert (
        report["files"]["F16"]["rms_logprob_difference"]
        < report["files"]["Q8_0"]["rms_logprob_difference"] / 5
    )
    assert "llama-cli -m model-Q8_0.gguf" in (tmp_path / "out/README.md").read_text()
    kinds = {
        tensor.name: tensor.tensor_type.name
        for tensor in GGUFReader(tmp_path / "out/model-Q8_0.gguf").tensors
    }
    assert (kinds["token_embd.weight"], kinds["output_norm.weight"]) == ("Q8_0", "F32")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@with_llama_cpp
@pytest.mark.usefixtures("in_process")
def test_layers_have_mlps_of_their_own_widths(tmp_path, dense):
    plan = narrow_plan(dense, {"mlp.0": range(32), "mlp.3": range(5, 42)})
    export_gguf(pruning(dense, plan), tmp_path / "out")
    assert json.loads((tmp_path / "out/verification.json").read_text())["ok"]
    fields = GGUFReader(tmp_path / "out/model-F16.gguf").fields
    widths = fields["deci.feed_forward_length"].contents()
    assert widths == [32, widths[1], widths[1], 37, widths[1], widths[1]]
    assert widths[1] > 37


@pytest.mark.usefixtures("in_process")
def test_healed_weights_are_in_the_files_to_the_byte(tmp_path, dense):
    """And nothing else differs from the files of the same model as pruned."""
    plan, before = plan_of(dense, ("mlp.3", "mha.4,mlp.4")), load_file(dense / "model.safetensors")
    names = ("model.layers.2.mlp.down_proj.weight", "model.layers.3.self_attn.o_proj.weight")
    weights = {name: before[name].flip(0) * 1.5 for name in names}
    export_gguf(pruning(dense, plan), tmp_path / "plain")
    export_gguf(
        pruning(dense, plan, healed=healed_of(dense, plan, tmp_path, weights)), tmp_path / "healed"
    )
    for precision in ("F16", "Q8_0"):
        plain, healed = (
            {
                tensor.name: tensor
                for tensor in GGUFReader(tmp_path / out / f"model-{precision}.gguf").tensors
            }
            for out in ("plain", "healed")
        )
        assert plain.keys() == healed.keys()
        changed = [
            healed[name]
            for name in plain
            if healed[name].data.tobytes() != plain[name].data.tobytes()
        ]
        assert {tensor.name for tensor in changed} == {
            "blk.2.ffn_down.weight",
            "blk.3.attn_output.weight",
        }
        assert {tensor.data.tobytes() for tensor in changed} == {
            quantize(weight.numpy(), tensor.tensor_type).tobytes()
            for weight, tensor in zip(
                weights.values(), sorted(changed, key=lambda t: t.name), strict=True
            )
        }


def test_merged_layers_are_a_plain_model(tmp_path, dense, monkeypatch):
    """LaCo, and what is written where llama.cpp is not installed."""
    monkeypatch.setattr(verify_llama_cpp, "ENGINE", "no_such_engine")
    details = {"merges": [[1, 2]], "variant": "paper"}
    export(dense, tmp_path / "out", kind="laco", details=details, blocks={"mha": 2, "mlp": 2})
    fields = GGUFReader(tmp_path / "out/model-F16.gguf").fields
    assert (fields["general.architecture"].contents(), fields["llama.block_count"].contents()) == (
        "llama",
        4,
    )
    named = [
        fields[f"general.{key}"].contents()
        for key in ("name", "base_model.0.name", "base_model.count")
    ]
    assert named == ["t", "mine", 1]
    assert (
        "not installed" in json.loads((tmp_path / "out/verification.json").read_text())["unchecked"]
    )


@with_llama_cpp
@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("fault", "files"),
    [
        ("blk.1.attn_q.weight", "Q8_0"),
        ("blk.1.attn_q.weight", "F16 Q8_0"),
        ("tokenizer", ""),
    ],
)
def test_a_wrong_file_fails_and_leaves_nothing(tmp_path, dense, monkeypatch, fault, files):
    """Also if only that in 8 bits is wrong, whose own rounding must not hide it."""
    parts, write, vocabulary_ = gguf.tensors, gguf.write, gguf.vocabulary
    written = []

    def spoilt(*arguments):
        wrong = fault if written[-1] in files.split() else None
        return (
            (name, weight * 1.2 if name == wrong else weight) for name, weight in parts(*arguments)
        )

    def remembered(model, words, precision, path):
        written.append(precision)
        write(model, words, precision, path)

    monkeypatch.setattr(gguf, "tensors", spoilt)
    monkeypatch.setattr(gguf, "write", remembered)
    if fault == "tokenizer":
        monkeypatch.setattr(
            gguf, "vocabulary", lambda *args: vocabulary_(*args) | {"add_bos_token": True}
        )
    with pytest.raises(InputError, match="does not reproduce the model in memory"):
        export(dense, tmp_path / "out")
    assert written == ["F16", "Q8_0"]
    assert list(tmp_path.iterdir()) == []


@with_llama_cpp
@pytest.mark.usefixtures("in_process")
def test_what_llama_cpp_quantizes_further_is_asked_too(tmp_path, dense, monkeypatch):
    """By a program that writes another file of ours, to which no quantization is equal."""
    tool = tmp_path / "bin/llama-quantize"
    tool.parent.mkdir()
    monkeypatch.setenv("PATH", str(tool.parent), prepend=":")

    def quantized(script, out):
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
        gguf.require_quantizations(["Q4_K_M"])
        export_gguf(pruning(dense, plan_of(dense, ["mha.0", "mlp.3"])), tmp_path / out, ["Q4_K_M"])

    quantized(
        '[ "$*" = "model-F16.gguf model-Q4_K_M.gguf Q4_K_M" ] && cp model-Q8_0.gguf "$2"', "out"
    )
    report = json.loads((tmp_path / "out/verification.json").read_text())
    assert report["ok"]
    assert report["files"]["Q4_K_M"] == report["files"]["Q8_0"]
    assert "model-Q4_K_M.gguf" in report["manifest"]
    export(dense, tmp_path / "other", order=["mlp.3"])
    with pytest.raises(InputError, match="does not reproduce the model in memory"):
        quantized(f'cp {tmp_path}/other/model-Q8_0.gguf "$2"', "wrong")  # with an attention more
    monkeypatch.setattr(verification, "LIMIT", 0.3)
    with refused("engine-hangs"):
        quantized("exec sleep 60", "hung")
    assert {path.name for path in tmp_path.iterdir()} == {"bin", "out", "other"}


@pytest.mark.parametrize(
    ("config", "plan"),
    [
        ({"model_type": "gemma2"}, {}),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 6}, {}),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, {}),
        ({}, {"blocks": {"mha": 6, "mlp": 0}}),
    ],
)
def test_what_a_file_cannot_hold(config, plan):
    config = AutoConfig.for_model(
        **{"model_type": "llama", "num_hidden_layers": 6} | config
    ).to_dict()
    with refused("export-limits"):
        require_fit("gguf", config, plan_of(config, ["mha.0"], **plan))


def unequal_halves():
    """A pair of pieces that makes a third, and that is no merge: SentencePiece has them all."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "a": 4, "b": 5, "ab": 6, "aa": 7, "aab": 8}
    return LlamaTokenizer(vocab=vocab, merges=[("a", "b"), ("a", "a"), ("aa", "b")])


def lower_cased():
    tokenizer = byte_level(words())
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def another_start():
    tokenizer = sentencepiece()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def surrounded_twice():
    tokenizer = plain_with("<s>", "</s>")
    pair = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    template = processors.TemplateProcessing("<s> <s> $A", special_tokens=pair)
    tokenizer.backend_tokenizer.post_processor = template
    return tokenizer


def plain_with(bos, eos):
    return byte_level(words(), bos_token=bos, eos_token=eos)


@pytest.mark.parametrize("merged", [True, False])
def test_a_tokenizer_of_llama_2_keeps_its_space_in_front(merged):
    """As its converter writes it since `legacy: false`, and as before."""
    tokenizer = sentencepiece()
    if merged:
        before = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(before)
        tokenizer.backend_tokenizer.pre_tokenizer = None
    assert vocabulary(tokenizer, {"vocab_size": len(tokenizer)})["add_space_prefix"]


@pytest.mark.parametrize(
    ("templates", "kept"), [({"default": "a", "tool": "b"}, "a"), ({"tool": "b"}, None)]
)
def test_of_several_chat_templates_a_file_has_the_default(templates, kept):
    tokenizer = plain_with("<s>", "</s>")
    tokenizer.chat_template = templates
    assert vocabulary(tokenizer, {"vocab_size": len(tokenizer)}).get("chat_template") == kept


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (
            lambda: byte_level(regex(LLAMA_3)),
            "splits text in a way unknown here",
        ),  # without ignore_merges
        (lower_cased, "after Lowercase"),
        (unequal_halves, "merges by halves of tokens"),
        (
            lambda: byte_level(words(pre_tokenizers.Whitespace())),
            "splits text in a way unknown here",
        ),
        (lambda: byte_level(None), "splits text in a way unknown here"),
        (another_start, "has normalizer .*Lowercase"),
        (surrounded_twice, "puts other tokens than its first and last around a text"),
        (
            lambda: PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}))),
            "a WordLevel model",
        ),
    ],
)
def test_tokenizers_without_an_equal_are_refused(tokenizer, message):
    with pytest.raises(
        InputError,
        match=rf"the tokenizer .*{message}.*supported: byte-level BPE.*Use export: \[hf\]",
    ):
        vocabulary(tokenizer(), {"vocab_size": 304})
