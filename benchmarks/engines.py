"""Speed of pruned models in two engines, in turns: `python -m benchmarks.engines MODEL OUT
NAME=BLOCKS...`.

NAME=mha.3,mlp.7 is a model; the dense one is there always. transformers decodes one sequence after
a short prompt, and eight after 2,048 tokens each, where the KV cache counts; llama.cpp decodes one
sequence from an F16 file. OUT is a CSV file of ratios to the dense model with 95 % intervals.
"""

import argparse
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from transformers import PreTrainedModel

from blockpruner.checkpoints.gguf import write
from blockpruner.checkpoints.verify_llama_cpp import Server
from blockpruner.checkpoints.vocabulary import vocabulary
from blockpruner.core.blocks import BlockKind, parse_mask
from blockpruner.core.families import count_kv_cache, count_parameters
from blockpruner.core.progress import observer
from blockpruner.evaluation.settings import Speed
from blockpruner.evaluation.speed import measure_speed, turns
from blockpruner.inputs.tokenizers import load_tokenizer
from blockpruner.model.models import load_model, prune_
from blockpruner.reporting.frames import interval
from blockpruner.reporting.statistics import ratio_of_medians
from blockpruner.store.files import write_text

SHORT = Speed(prompt_tokens=128, new_tokens=64)
LONG = Speed(prompt_tokens=2048, new_tokens=24, batch=8)
REPEATS = {"transformers": 10, "transformers_kv": 4, "llama_cpp": 12}


def files(models: Mapping[str, PreTrainedModel], model: Path, folder: Path) -> dict[str, Path]:
    """A GGUF file of each model."""
    tokenizer = load_tokenizer(model)
    paths = {}
    for name, pruned in models.items():
        path = folder / f"{name.replace(' ', '-')}.gguf"
        write(pruned, vocabulary(tokenizer, pruned.config.to_dict()), "F16", path)
        paths[name] = path
    return paths


def llama_cpp(paths: Mapping[str, Path], tokens: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of decoding so many tokens, each repeat."""
    servers = {name: Server(path, 512, os.devnull) for name, path in paths.items()}
    seconds: dict[str, list[float]] = {name: [] for name in paths}
    prompt = list(range(1000, 1128))
    for repeat, name in turns(list(servers), repeats):
        answer = servers[name].post(
            "/completion",
            prompt=prompt,
            n_predict=tokens,
            ignore_eos=True,
            temperature=0,
            cache_prompt=False,
        )
        # The first repeat warms up.
        if repeat > 0:
            seconds[name].append(answer["timings"]["predicted_ms"] / 1000)
    return seconds


def transformers(
    models: Mapping[str, PreTrainedModel], settings: Speed, repeats: int
) -> dict[str, list[float]]:
    watcher = observer()
    speeds = measure_speed(
        models,
        settings.model_copy(update={"repeats": repeats}),
        lambda done, total: watcher.advance(done, total, "generations"),
    )
    return {name: speed.decode_seconds.samples for name, speed in speeds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engines", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("masks", nargs="+", metavar="NAME=BLOCKS")
    options = parser.parse_args()
    dense = load_model(options.model, "bfloat16", "cpu")
    masks = {}
    models = {"dense": dense}
    for text in options.masks:
        name, _, blocks = text.partition("=")
        masks[name] = parse_mask(blocks)
        models[name] = prune_(load_model(options.model, "bfloat16", "cpu"), masks[name])
    with tempfile.TemporaryDirectory() as folder:
        paths = files(models, options.model, Path(folder))
        decoded = llama_cpp(paths, SHORT.new_tokens, REPEATS["llama_cpp"])
    seconds = {
        "transformers": transformers(models, SHORT, REPEATS["transformers"]),
        "transformers_kv": transformers(models, LONG, REPEATS["transformers_kv"]),
        "llama_cpp": decoded,
    }
    config = dense.config.to_dict()
    parameters = count_parameters(config)
    cache = count_kv_cache(config)
    lines = []
    for name, mask in masks.items():
        line: dict[str, object] = {"model": name, "removed_pct": 100 * parameters.ratio(mask)}
        line |= {kind.value: sum(block.kind is kind for block in mask) for kind in BlockKind}
        line["kv_pct"] = 0 - 100 * cache.ratio(mask)
        for engine, times in seconds.items():
            line |= interval(f"{engine}_x", ratio_of_medians(times["dense"], times[name]))
        lines.append(line)
    write_text(options.out, pd.DataFrame(lines).round(4).to_csv(index=False))


if __name__ == "__main__":
    main()
