"""The vocabulary of a GGUF file, `tokenizer.*`, from a tokenizer of transformers.

Decides which tokenizers llama.cpp can imitate. llama.cpp has named ways of its own to split text
into words: a tokenizer has one of them, or is refused. The export also compares token ids with
llama.cpp's.
"""

import json
import re
from collections.abc import Mapping
from itertools import product
from typing import Any

from blockpruner.core.errors import InputError, extra

with extra("gguf"):
    from gguf import TokenType

WORDS = "|".join(
    (r"[^\r\n\p{L}\p{N}]?\p{L}+", "%s", r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
)
CONTRACTED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|" + WORDS
CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

SPLITS: dict[tuple[tuple[str, ...], bool], str] = {
    (("words",), False): "gpt-2",
    (("digits", "words"), False): "smollm",
    ((CONTRACTED % r"\p{N}{1,3}", "bytes"), True): "llama-bpe",
    ((CONTRACTED % r"\p{N}", "bytes"), False): "qwen2",
    ((CASED, "bytes"), True): "tekken",
}
"""llama.cpp's name for a byte-level BPE, by how it splits text (`_splits`) and whether whole words
skip the merges."""


def vocabulary(tokenizer: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer's part of a GGUF file, by the name of the `GGUFWriter.add_*` that takes it;
    raises InputError if llama.cpp has no equal of the tokenizer. Rows of the embedding without a
    token get one, up to the `vocab_size` of the model's config, which names the special tokens that
    the tokenizer does not name."""
    if not tokenizer.is_fast:
        raise _refusal(f"is a {type(tokenizer).__name__}, which has no tokenizer.json")
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    model = parts["model"]
    if model["type"] != "BPE":
        raise _refusal(f"is a {model['type']} model")
    rows, is_bytes = range(config["vocab_size"]), not model["byte_fallback"]
    result = _byte_level(parts) if is_bytes else _sentencepiece(parts)
    tokens = {index: token for token, index in tokenizer.get_vocab().items()}
    result |= {
        "token_list": [tokens.get(index, f"[PAD{index}]") for index in rows],
        "token_types": [_type(index, tokens.get(index), tokenizer, is_bytes) for index in rows],
    }
    if not is_bytes:
        ranks = _ranks(model)
        result["token_scores"] = [
            -float(ranks.get(token, len(ranks))) for token in result["token_list"]
        ]
    return result | _special(tokenizer, config)


def _byte_level(parts: Mapping[str, Any]) -> dict[str, Any]:
    splits = _splits(parts["pre_tokenizer"])
    known = SPLITS.get((splits, bool(parts["model"].get("ignore_merges", False))))
    normalizer = (parts["normalizer"] or {"type": "NFC"})["type"]
    if known is None or normalizer != "NFC":
        raise _refusal(
            f"splits text in a way unknown here: {' then '.join(splits)} after {normalizer}"
        )
    merges = [" ".join(pair) for pair in parts["model"]["merges"]]
    return {"tokenizer_model": "gpt2", "tokenizer_pre": known, "token_merges": merges}


def _splits(step: Mapping[str, Any] | None) -> tuple[str, ...]:
    """A pre_tokenizer of tokenizer.json in short: regular expressions, "digits", GPT-2's "words",
    "bytes"."""
    if step is None:
        return ()
    match step:
        case {"type": "Sequence", "pretokenizers": steps}:
            return tuple(split for part in steps for split in _splits(part))
        case {"type": "Digits", "individual_digits": True}:
            return ("digits",)
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}:
            return ("words",) if use_regex else ("bytes",)
        case {
            "type": "Split",
            "pattern": {"Regex": pattern},
            "behavior": "Isolated",
            "invert": False,
        }:
            return (pattern,)
    return (json.dumps(step),)


def _sentencepiece(parts: Mapping[str, Any]) -> dict[str, Any]:
    """BPE of characters with "▁" for a space, and bytes for what has no token: Llama 2, Mistral."""
    spaced = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prefixed = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, spaced]}
    match parts:
        case {
            "normalizer": None,
            "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "split": False} as step,
        }:
            prefix = step["prepend_scheme"] != "never"
        case {"pre_tokenizer": None, "normalizer": normalizer} if normalizer in (prefixed, spaced):
            prefix = normalizer == prefixed
        case _:
            raise _refusal(
                f"has normalizer {parts['normalizer']} and pre_tokenizer {parts['pre_tokenizer']}"
            )
    return {"tokenizer_model": "llama", "tokenizer_pre": "default", "add_space_prefix": prefix}


def _ranks(model: Mapping[str, Any]) -> dict[str, int]:
    """The place of each token in the order of merges. llama.cpp merges by it, whatever the token's
    halves are."""
    ranks: dict[str, int] = {}
    order = [ranks.setdefault("".join(pair), len(ranks)) for pair in model["merges"]]
    halves = {
        (token[:cut], token[cut:])
        for token in ranks
        for cut in range(1, len(token))
        if token[:cut] in model["vocab"] and token[cut:] in model["vocab"]
    }
    if order != sorted(order) or not halves <= {tuple(pair) for pair in model["merges"]}:
        raise _refusal("merges by halves of tokens, as SentencePiece's do not")
    return ranks


def _type(index: int, token: str | None, tokenizer: Any, is_bytes: bool) -> int:
    added = tokenizer.added_tokens_decoder.get(index)
    if token is None:
        return int(TokenType.UNUSED)
    if index == tokenizer.unk_token_id and not is_bytes:
        return int(TokenType.UNKNOWN)
    if added is not None:
        return int(TokenType.CONTROL if added.special else TokenType.USER_DEFINED)
    is_byte = not is_bytes and re.fullmatch(r"<0x[0-9A-F]{2}>", token)
    return int(TokenType.BYTE if is_byte else TokenType.NORMAL)


def _special(tokenizer: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """Special tokens, whether they surround a text, and the chat template."""
    result: dict[str, Any] = {}
    for name in ("bos", "eos", "unk", "pad"):
        index = getattr(tokenizer, f"{name}_token_id")
        index = config.get(f"{name}_token_id") if index is None else index
        if index is not None:
            result[f"{name}_token_id"] = index[0] if isinstance(index, list) else index
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template is not None:
        result["chat_template"] = template
    bos, eos = ([result.get(f"{name}_token_id")] for name in ("bos", "eos"))
    plain, ids = (tokenizer("a", add_special_tokens=special).input_ids for special in (False, True))
    for before, after in product((False, True), repeat=2):
        if ids == bos * before + plain + eos * after:
            return result | {"add_bos_token": before, "add_eos_token": after}
    raise _refusal(
        f"puts other tokens than its first and last around a text: 'a' is {ids}, by itself {plain}"
    )


def _refusal(reason: str) -> InputError:
    return InputError(
        f"export gguf: the tokenizer {reason}, and llama.cpp would split text differently;"
        f" supported: byte-level BPE that splits as {', '.join(sorted(SPLITS.values()))} do, and"
        " BPE with byte_fallback as Llama 2's. Use export: [hf]"
    )
