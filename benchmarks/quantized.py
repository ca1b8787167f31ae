"""What pruning is worth after quantization: `python -m benchmarks.quantized OUT TEXT DENSE
NAME=PRUNED...`.

DENSE and PRUNED are folders of checkpoints that llama.cpp can hold. Each becomes a GGUF file in 16
bits and one in each of its quantizations; `llama-quantize` and `llama-perplexity` of llama.cpp have
to be on PATH. OUT is a CSV file: bytes, perplexity of the plain text file TEXT in windows of 512
tokens, of which the later half is scored, and speed of decoding one sequence, all against the dense
model in 16 bits, with 95 % intervals (paired windows, repeats in turns).
"""

import argparse
import math
import re
import subprocess
import tempfile
from itertools import pairwise
from pathlib import Path

import pandas as pd
import torch
from transformers import AutoModelForCausalLM

from benchmarks.engines import REPEATS, SHORT, files, llama_cpp
from blockpruner.core.progress import observer
from blockpruner.reporting.frames import interval
from blockpruner.reporting.statistics import average, ratio_of_medians

QUANTIZATIONS = ("Q8_0", "Q5_K_M", "Q4_K_M")
WINDOWS = 32


def losses(path: Path, text: Path) -> list[float]:
    """Nats a token of each window. The program prints the perplexity of all windows up to each."""
    command = ["llama-perplexity", "-m", path, "-f", text, "-c", "512", "--chunks", str(WINDOWS)]
    threads = ["-t", str(torch.get_num_threads())]
    output = subprocess.run([*command, *threads], check=True, capture_output=True, text=True).stdout
    sums = [0.0]
    for count, perplexity in enumerate(re.findall(r"\[\d+\]([\d.]+),", output), 1):
        sums.append(count * math.log(float(perplexity)))
    return [longer - shorter for shorter, longer in pairwise(sums)]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quantized", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("dense", type=Path)
    parser.add_argument("pruned", nargs="+", metavar="NAME=FOLDER")
    options = parser.parse_args()
    folders = {"dense": options.dense}
    for text in options.pruned:
        name, _, path = text.partition("=")
        folders[name] = Path(path)
    with tempfile.TemporaryDirectory() as workspace:
        paths: dict[tuple[str, str], Path] = {}
        for name, folder in folders.items():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16")
            model.requires_grad_(False)
            plain = files({name: model}, folder, Path(workspace))[name]
            paths[name, "F16"] = plain
            for quantization in QUANTIZATIONS:
                quantized = plain.with_suffix(f".{quantization}")
                command = ["llama-quantize", plain, quantized, quantization]
                subprocess.run(command, check=True, capture_output=True)
                paths[name, quantization] = quantized
        watcher = observer()
        watcher.begin("perplexity")
        window_losses: dict[tuple[str, str], list[float]] = {}
        for key, path in paths.items():
            window_losses[key] = losses(path, options.text)
            watcher.advance(len(window_losses), len(paths), " ".join(key))
        watcher.end(f"{len(paths)} files")
        path_by_title = {" ".join(key): path for key, path in paths.items()}
        # All files are timed in turns: a drift of the machine falls on each of them.
        seconds = llama_cpp(path_by_title, SHORT.new_tokens, REPEATS["llama_cpp"])
        lines = []
        for key, path in paths.items():
            name, precision = key
            pairs = zip(window_losses["dense", "F16"], window_losses[key], strict=True)
            rise = average({"": [loss - dense_loss for dense_loss, loss in pairs]})
            speed = ratio_of_medians(seconds["dense F16"], seconds[f"{name} {precision}"])
            line = {"model": name, "precision": precision, "bytes": path.stat().st_size}
            # A difference of mean NLL is the logarithm of a ratio of perplexities.
            for column, nats in interval("perplexity_x", rise).items():
                line[column] = math.exp(nats)
            lines.append(line | interval("decode_x", speed))
    pd.DataFrame(lines).round(4).to_csv(options.out, index=False)


if __name__ == "__main__":
    main()
