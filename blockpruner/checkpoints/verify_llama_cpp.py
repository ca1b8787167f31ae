"""Verification of GGUF files by llama.cpp, in a fresh process that knows nothing of blockpruner.

Run as a script: `python verify_llama_cpp.py <directory> <reference.safetensors> <tolerance>`. It
prints one JSON object, and exits 0 if the files agree with the masked dense model, 1 if not. It
imports torch, for the reference, and xllamacpp, which is llama.cpp's server, here on the CPU.
"""

import json
import math
import sys
import tempfile
from http.client import HTTPConnection
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

ENGINE = "xllamacpp"
"""The Python module that runs the files."""

PRECISIONS = ("F16", "Q8_0")

RATIO = (2.0, 45.0)
"""Limits of the error of Q8_0, divided by the error of F16. The two differ by rounding; a wrong
file is wrong in both. Measured: 12 to 33 for SmolLM2-135M and random models, 3 for a chaotic one; 1
without the stub of an MLP, unpermuted, or with another rotation."""

EXACT = math.sqrt(2)
"""The factor of the upper limit if F16 holds the weights exactly: then only states are rounded, and
no weights. Measured: a ratio of 45.1 for SmolLM2-135M in bfloat16."""

TOP = 40
"""How many of the likeliest tokens are compared at each position."""


class Server:
    """llama.cpp's server with one file, its first slot, and its HTTP interface on this machine."""

    def __init__(self, path: Path, context: int, slots: str) -> None:
        # Imported late: the constants of this file are read where it is not installed.
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = context
        params.n_parallel = 1
        params.n_gpu_layers = 0
        params.cpuparams.n_threads = torch.get_num_threads()
        params.warmup = False
        params.slot_save_path = f"{slots}/"
        params.verbosity = -1
        self.server = xllamacpp.Server(params)
        self.plain = self.tokens("a")[-1]

    def post(self, path: str, **body: object) -> Any:
        address = self.server.listening_address.removeprefix("http://")
        connection = HTTPConnection(address)
        headers = {"Content-Type": "application/json"}
        connection.request("POST", path, json.dumps(body), headers)
        response = connection.getresponse()
        answer = json.loads(response.read())
        if "error" in answer:
            raise RuntimeError(f"llama.cpp on {path}: {answer['error']}")
        return answer

    def tokens(self, text: str) -> list[int]:
        answer = self.post("/tokenize", content=text, add_special=True)
        return list(answer["tokens"])

    def next(self, ids: list[int]) -> dict[int, float]:
        """Log probabilities of the likeliest next tokens, best first. The tokens of the last call
        are in the KV cache."""
        # The bias does not touch the probabilities. It makes the server choose a token that is
        # whole text: the server reports none with a token that ends the text or is part of a
        # character.
        answer = self.post(
            "/completion",
            prompt=ids,
            n_predict=1,
            n_probs=TOP,
            temperature=0,
            cache_prompt=True,
            logit_bias=[[self.plain, 1e9]],
        )
        completion = answer["completion_probabilities"][0]
        entries = completion["top_logprobs"]
        return {entry["id"]: entry["logprob"] for entry in entries}

    def cached(self) -> int:
        """The bytes that the slot holds."""
        answer = self.post("/slots/0?action=save", filename="slot")
        return int(answer["n_written"])


def ask(path: Path, reference: dict[str, Tensor]) -> dict[str, Any]:
    """Compare a file with the reference: log probabilities after the prompt and after each token of
    the greedy continuation, fed one by one through the KV cache; greedy tokens; attentions with a
    cache; a text's tokens."""
    rows = reference["tokens"].tolist()
    prompt = int(reference["prompt"])
    expected = reference["logits"].double().log_softmax(-1)
    text_bytes = bytes(reference["text"].tolist())
    errors: list[Tensor] = []
    cached_bytes: list[int] = []
    is_greedy = True
    with tempfile.TemporaryDirectory() as slots:
        length = len(rows[0])
        server = Server(path, length + 8, slots)
        text_tokens = server.tokens(text_bytes.decode())
        for row, row_expected in zip(rows, expected, strict=True):
            for position in range(prompt, len(row)):
                logprobs = server.next(row[:position])
                tokens = list(logprobs.keys())
                values = list(logprobs.values())
                measured = torch.tensor(values).double()
                error = measured - row_expected[position - 1, tokens]
                errors.append(error)
                if tokens[0] != row[position]:
                    is_greedy = False
                cached_bytes.append(server.cached())
    all_errors = torch.cat(errors)
    mean_square = all_errors.square().mean()
    bytes_per_token = cached_bytes[1] - cached_bytes[0]
    return {
        "max_logprob_difference": all_errors.abs().max().item(),
        "rms_logprob_difference": mean_square.sqrt().item(),
        "greedy_tokens_equal": is_greedy,
        "cache_layers": bytes_per_token // int(reference["cache_bytes"]),
        "text_tokens_equal": text_tokens == reference["text_tokens"].tolist(),
    }


def verify(checkpoint: str, reference_file: str, tolerance: float) -> dict[str, Any]:
    """Compare all files with the reference, and judge. Cache and text tokens must be right, and
    errors must come from rounding: below tolerance x the largest logit, or in their usual ratio.
    Errors of files that llama.cpp has quantized further are only reported. So are greedy tokens: in
    low precision a near-tie may fall the other way."""
    reference = load_file(reference_file)
    files = {}
    for path in sorted(Path(checkpoint).glob("model-*.gguf")):
        name = path.stem.removeprefix("model-")
        files[name] = ask(path, reference)
    f16, q8 = (files[name] for name in PRECISIONS)
    error_f16 = f16["rms_logprob_difference"]
    error_q8 = q8["rms_logprob_difference"]
    logits = reference["logits"]
    limit = tolerance * logits.abs().max().item()
    low, high = RATIO
    if reference["narrow"]:
        high *= EXACT
    is_accurate = max(error_f16, error_q8) <= limit
    has_usual_ratio = low * error_f16 <= error_q8 <= high * error_f16
    attentions = int(reference["attentions"])
    is_right = all(
        report["cache_layers"] == attentions and report["text_tokens_equal"]
        for report in files.values()
    )
    return {
        "engine": ENGINE,
        "version": version(ENGINE),
        "files": files,
        "tolerance": limit,
        "cache_layers_expected": attentions,
        "ok": is_right and (is_accurate or has_usual_ratio),
    }


if __name__ == "__main__":
    _, checkpoint, reference_file, tolerance = sys.argv
    report = verify(checkpoint, reference_file, float(tolerance))
    print(json.dumps(report))
    sys.exit(0 if report["ok"] else 1)
