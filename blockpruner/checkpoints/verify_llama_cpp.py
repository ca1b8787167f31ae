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
"""Limits of the error in 8 bits, divided by the error in 16 bits. The two differ by rounding; a
wrong file is wrong in both. Measured: 12 to 33 for SmolLM2-135M and random models, 3 for a chaotic
one; 1 without the stub of an MLP, unpermuted, or with another rotation."""

EXACT = math.sqrt(2)
"""The upper limit is so many times higher where 16 bits hold the weights exactly: then only states
are rounded, and no weights. Measured: 45.1 for SmolLM2-135M in bfloat16."""

TOP = 40
"""How many of the likeliest tokens are compared at each position."""


class Server:
    """llama.cpp's server with one file, its first slot, and its HTTP interface on this machine."""

    def __init__(self, path: Path, context: int, slots: str) -> None:
        import xllamacpp  # here: the constants of this file are used without it

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
        connection = HTTPConnection(self.server.listening_address.removeprefix("http://"))
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        answer = json.loads(connection.getresponse().read())
        if "error" in answer:
            raise RuntimeError(f"llama.cpp on {path}: {answer['error']}")
        return answer

    def tokens(self, text: str) -> list[int]:
        return list(self.post("/tokenize", content=text, add_special=True)["tokens"])

    def next(self, ids: list[int]) -> dict[int, float]:
        """Log probabilities of the likeliest next tokens, best first. The tokens of the last call
        are in the KV cache. The bias does not touch these numbers. It makes the server choose a
        token that is whole text: the server reports no probabilities with a token that ends the
        text or is part of a character."""
        answer = self.post(
            "/completion",
            prompt=ids,
            n_predict=1,
            n_probs=TOP,
            temperature=0,
            cache_prompt=True,
            logit_bias=[[self.plain, 1e9]],
        )
        return {
            entry["id"]: entry["logprob"]
            for entry in answer["completion_probabilities"][0]["top_logprobs"]
        }

    def cached(self) -> int:
        """Bytes that the slot holds."""
        return int(self.post("/slots/0?action=save", filename="slot")["n_written"])


def ask(path: Path, reference: dict[str, Tensor]) -> dict[str, Any]:
    """Compare a file with the reference: log probabilities after the prompt and after each token of
    the greedy continuation, fed one by one through the KV cache; greedy tokens; attentions with a
    cache; a text's tokens."""
    tokens, prompt = reference["tokens"].tolist(), int(reference["prompt"])
    expected = reference["logits"].double().log_softmax(-1)
    errors, greedy, held = [], [], []
    with tempfile.TemporaryDirectory() as slots:
        server = Server(path, len(tokens[0]) + 8, slots)
        text_tokens = server.tokens(bytes(reference["text"].tolist()).decode())
        for row, scores in zip(tokens, expected, strict=True):
            for position in range(prompt, len(row)):
                found = server.next(row[:position])
                errors.append(
                    torch.tensor(list(found.values())).double() - scores[position - 1, list(found)]
                )
                greedy.append(next(iter(found)) == row[position])
                held.append(server.cached())
    error = torch.cat(errors)
    return {
        "max_logprob_difference": error.abs().max().item(),
        "rms_logprob_difference": error.square().mean().sqrt().item(),
        "greedy_tokens_equal": all(greedy),
        "cache_layers": (held[1] - held[0]) // int(reference["cache_bytes"]),
        "text_tokens_equal": text_tokens == reference["text_tokens"].tolist(),
    }


def verify(checkpoint: str, reference_file: str, tolerance: float) -> dict[str, Any]:
    """Compare all files with the reference, and judge. Cache and text tokens must be right, and
    errors must come from rounding: below tolerance x the largest logit, or in their usual ratio.
    Errors of files that llama.cpp has quantized further are only reported. So are greedy tokens: in
    low precision a near-tie may fall the other way."""
    reference = load_file(reference_file)
    paths = sorted(Path(checkpoint).glob("model-*.gguf"))
    files = {path.stem.removeprefix("model-"): ask(path, reference) for path in paths}
    small, large = (files[name]["rms_logprob_difference"] for name in PRECISIONS)
    tolerance *= reference["logits"].abs().max().item()
    attentions, high = (
        int(reference["attentions"]),
        RATIO[1] * (EXACT if reference["narrow"] else 1),
    )
    return {
        "engine": ENGINE,
        "version": version(ENGINE),
        "files": files,
        "tolerance": tolerance,
        "cache_layers_expected": attentions,
        "ok": (max(small, large) <= tolerance or RATIO[0] * small <= large <= high * small)
        and all(
            report["cache_layers"] == attentions and report["text_tokens_equal"]
            for report in files.values()
        ),
    }


if __name__ == "__main__":
    report = verify(sys.argv[1], sys.argv[2], float(sys.argv[3]))
    print(json.dumps(report))
    sys.exit(0 if report["ok"] else 1)
