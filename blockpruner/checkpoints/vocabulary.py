"""The vocabulary of a GGUF file, `tokenizer.*`, from a tokenizer of transformers.

Decides which tokenizers llama.cpp can imitate. llama.cpp names its ways to split text into words: a
tokenizer that splits otherwise is refused. The export also compares token ids with llama.cpp's.
"""

import itertools
import json
import re
from collections.abc import Mapping
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
"""llama.cpp's name for a byte-level BPE, by the steps that split text (`_split_steps`) and whether
whole words skip the merges."""


def vocabulary(tokenizer: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer's fields of a GGUF file, by the name of the `GGUFWriter.add_*` that takes each;
    raises InputError if llama.cpp has no equal of the tokenizer. Rows of the embedding without a
    token get one, up to the `vocab_size` of the model's config, which names the special tokens that
    the tokenizer does not name."""
    if not tokenizer.is_fast:
        raise _refusal(f"is a {type(tokenizer).__name__}, which has no tokenizer.json")
    fields = json.loads(tokenizer.backend_tokenizer.to_str())
    model = fields["model"]
    if model["type"] != "BPE":
        raise _refusal(f"is a {model['type']} model")
    is_byte_level = not model["byte_fallback"]
    result = _byte_level(fields) if is_byte_level else _sentencepiece(fields)
    token_by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    tokens = []
    types = []
    for index in range(config["vocab_size"]):
        token = token_by_id.get(index)
        # Models have more rows than tokens: a multiple of 64, for instance.
        tokens.append(f"[PAD{index}]" if token is None else token)
        types.append(_type(index, token, tokenizer, is_byte_level))
    result["token_list"] = tokens
    result["token_types"] = types
    if not is_byte_level:
        # llama.cpp merges the pair with the highest score.
        ranks = _merge_ranks(model)
        lowest = len(ranks)
        token_ranks = [ranks.get(token, lowest) for token in tokens]
        result["token_scores"] = [-float(rank) for rank in token_ranks]
    result |= _special(tokenizer, config)
    return result


def _byte_level(fields: Mapping[str, Any]) -> dict[str, Any]:
    model = fields["model"]
    steps = _split_steps(fields["pre_tokenizer"])
    ignores_merges = bool(model.get("ignore_merges", False))
    pre = SPLITS.get((steps, ignores_merges))
    normalizer = "NFC"
    if fields["normalizer"]:
        normalizer = fields["normalizer"]["type"]
    if pre is None or normalizer != "NFC":
        raise _refusal(
            f"splits text in a way unknown here: {' then '.join(steps)} after {normalizer}"
        )
    return {
        "tokenizer_model": "gpt2",
        "tokenizer_pre": pre,
        "token_merges": [" ".join(pair) for pair in model["merges"]],
    }


def _split_steps(step: Mapping[str, Any] | None) -> tuple[str, ...]:
    """A pre_tokenizer of tokenizer.json in short: regular expressions, "digits", GPT-2's "words",
    "bytes"."""
    match step:
        case None:
            return ()
        case {"type": "Sequence", "pretokenizers": steps}:
            splits = map(_split_steps, steps)
            return tuple(itertools.chain.from_iterable(splits))
        case {"type": "Digits", "individual_digits": True}:
            return ("digits",)
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}:
            step_name = "words" if use_regex else "bytes"
            return (step_name,)
        case {
            "type": "Split",
            "pattern": {"Regex": pattern},
            "behavior": "Isolated",
            "invert": False,
        }:
            return (pattern,)
    return (json.dumps(step),)


def _sentencepiece(fields: Mapping[str, Any]) -> dict[str, Any]:
    """BPE of characters with "▁" for a space, and bytes for what has no token: Llama 2, Mistral."""
    normalizer, pre_tokenizer = fields["normalizer"], fields["pre_tokenizer"]
    spaced = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepended = {"type": "Prepend", "prepend": "▁"}
    prefixed = {"type": "Sequence", "normalizers": [prepended, spaced]}
    match pre_tokenizer:
        case {"type": "Metaspace", "replacement": "▁", "split": False} if normalizer is None:
            has_prefix = pre_tokenizer["prepend_scheme"] != "never"
        case None if normalizer in (prefixed, spaced):
            has_prefix = normalizer == prefixed
        case _:
            raise _refusal(f"has normalizer {normalizer} and pre_tokenizer {pre_tokenizer}")
    return {
        "tokenizer_model": "llama",
        "tokenizer_pre": "default",
        "add_space_prefix": has_prefix,
    }


def _merge_ranks(model: Mapping[str, Any]) -> dict[str, int]:
    """The rank of each merged token. llama.cpp merges by it, whatever the token's halves are:
    refused unless every split of a token into two tokens is a merge."""
    merges = [tuple(pair) for pair in model["merges"]]
    ranks: dict[str, int] = {}
    ranks_in_order = []
    for pair in merges:
        rank = ranks.setdefault("".join(pair), len(ranks))
        ranks_in_order.append(rank)
    vocab = model["vocab"]
    splits = set()
    for token in ranks:
        for end in range(1, len(token)):
            prefix = token[:end]
            suffix = token[end:]
            if prefix in vocab and suffix in vocab:
                splits.add((prefix, suffix))
    is_sorted = ranks_in_order == sorted(ranks_in_order)
    if not is_sorted or not splits <= set(merges):
        raise _refusal("merges by halves of tokens, as SentencePiece's do not")
    return ranks


def _type(index: int, token: str | None, tokenizer: Any, is_byte_level: bool) -> int:
    if token is None:
        return int(TokenType.UNUSED)
    # In a byte-level vocabulary every text has tokens: the unknown one is like any other.
    if index == tokenizer.unk_token_id and not is_byte_level:
        return int(TokenType.UNKNOWN)
    added = tokenizer.added_tokens_decoder.get(index)
    if added is not None:
        return int(TokenType.CONTROL if added.special else TokenType.USER_DEFINED)
    if not is_byte_level and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
        return int(TokenType.BYTE)
    return int(TokenType.NORMAL)


def _special(tokenizer: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """Special tokens, whether they surround a text, and the chat template."""
    result: dict[str, Any] = {}
    for name in ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id"):
        index = getattr(tokenizer, name)
        if index is None:
            index = config.get(name)
        # A config may list several tokens that end a text.
        if isinstance(index, list):
            index = index[0]
        if index is not None:
            result[name] = index
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template is not None:
        result["chat_template"] = template
    bos = [result.get("bos_token_id")]
    eos = [result.get("eos_token_id")]
    plain_ids = tokenizer("a", add_special_tokens=False).input_ids
    ids = tokenizer("a").input_ids
    for has_bos, has_eos in itertools.product((False, True), repeat=2):
        surrounded = bos * has_bos + plain_ids + eos * has_eos
        if ids == surrounded:
            return result | {"add_bos_token": has_bos, "add_eos_token": has_eos}
    raise _refusal(
        f"puts other tokens than its first and last around a text: 'a' is {ids}, by itself"
        f" {plain_ids}"
    )


def _refusal(reason: str) -> InputError:
    return InputError(
        f"export gguf: the tokenizer {reason}, and llama.cpp would split text differently;"
        f" supported: byte-level BPE that splits as {', '.join(sorted(SPLITS.values()))} do, and"
        " BPE with byte_fallback as Llama 2's. Use export: [hf]"
    )
